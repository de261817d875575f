"""Files that are whole or not there: a kill leaves the old one or the new one, never a part."""

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write tensors and JSON-able notes as one safetensors file, which executes nothing on load."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # In one entry, since safetensors writes several in random order: equal content, equal bytes
    write_atomically(path, save(tensors, {"immunity": json.dumps(notes, sort_keys=True)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; raises DamagedFile if it is not whole."""
    try:
        with safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})["immunity"])
            # Copied: it hands out the file's own pages, which change when the file is written to
            return {name: file.get_tensor(name).clone() for name in file.keys()}, notes
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DamagedFile(f"{path} is not a whole file of this library: {error}") from error
