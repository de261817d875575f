"""Files that are whole or not there: a kill leaves the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
import reprlib
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor


class DamagedFile(ValueError):
    """A file that is truncated, altered, or not ours. The message names it."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, what was written of it is in the way
        raise


def set_aside(path: Path, reason: str) -> Path:
    """Rename a file that cannot be used, say so, and return its new name; nothing is deleted."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    target = path.replace(path.with_name(f"{path.name}.aside-{stamp}"))
    print(f"set aside as {target}: {reason}", file=sys.stderr)
    return target


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises DamagedFile that names the file if it is none."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not a whole record ({error}); move it away") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} holds no record, but {reprlib.repr(content)[:40]!r}; move it away")
    return content


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write tensors and JSON-able notes as one safetensors file, which executes nothing on load."""
    from safetensors.torch import save  # with PyTorch, which who only reads a record does without

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # In one entry, since safetensors writes several in random order: equal content, equal bytes
    write_atomically(path, save(tensors, {"immunity": json.dumps(notes, sort_keys=True)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; raises DamagedFile if it is not whole or not there, and OSError where it cannot
    be read now, which says nothing of the file."""
    try:
        with safe_open(path, "pt") as file:
            notes = dict(json.loads((file.metadata() or {})["immunity"]))
            # Copied: it hands out the file's own pages, which change when the file is written to
            return {name: file.get_tensor(name).clone() for name in file.keys()}, notes
    except (SafetensorError, FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFile(f"{path} is not a whole file of this library: {error}") from error
