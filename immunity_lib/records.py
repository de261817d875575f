"""Results as files: JSON records with their provenance, tensors, atomic writes, checksums.

A file written here carries the checksum of its content. What does not match it, or cannot be read,
is named and set aside under another name: never loaded silently, never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from immunity_lib.settings import ROOT

if TYPE_CHECKING:
    from torch import Tensor

PACKAGES = ("torch", "torchvision", "torchattacks", "numpy", "safetensors", "snakemake")


class DamagedFile(ValueError):
    """A file that is truncated, altered, or not ours. The message names it."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: a kill leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, what was written of it is in the way
        raise


def set_aside(path: Path, reason: str) -> Path:
    """Rename a file or folder that cannot be used, say so, and return its new name."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    target = path.with_name(f"{path.name}.aside-{stamp}")
    os.replace(path, target)
    print(f"set aside as {target}: {reason}", file=sys.stderr)
    return target


def write_record(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON record; its own checksum is added under "checksum"."""
    body = json.loads(json.dumps(content))
    record = {**body, "checksum": _checksum_of_json(body)}
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read a record that `write_record` made; raises DamagedFile if it is not one, intact."""
    try:
        record = json.loads(path.read_text())
        checksum = record.pop("checksum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedFile(f"{path} is not a whole record: {error!r}") from error
    if checksum != _checksum_of_json(record):
        raise DamagedFile(f"{path} was altered after it was written: its checksum does not match")
    return record


def _checksum_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> str:
    """Write tensors and JSON-able notes as one safetensors file; returns their checksum."""
    from safetensors.torch import save  # torch costs seconds to import, and records are read often

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(notes, sort_keys=True)
    checksum = _checksum_of_tensors(tensors, text)
    # In one entry, since safetensors writes several in random order: equal content, equal bytes
    written = json.dumps({"notes": text, "checksum": checksum})
    write_atomically(path, save(tensors, {"immunity": written}))
    return checksum


def read_tensors(
    path: Path, checksum: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; raises DamagedFile if it is not whole and unaltered.

    checksum: what `write_tensors` returned, from a caller that wants that very file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            written = json.loads((file.metadata() or {}).get("immunity", "{}"))
            notes, known = written.get("notes", ""), written.get("checksum")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path} is not a whole safetensors file: {error}") from error
    found = _checksum_of_tensors(tensors, notes)
    if known != found:
        raise DamagedFile(f"{path} is not what this library wrote: its checksum does not match")
    if checksum not in (None, found):
        raise DamagedFile(f"{path} is whole, but another file than its record speaks of")
    return tensors, json.loads(notes)


def _checksum_of_tensors(tensors: dict[str, Tensor], notes: str) -> str:
    import torch

    digest = hashlib.sha256(notes.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def provenance() -> dict[str, Any]:
    """What a result depends on besides its settings: code, packages and hardware."""
    import torch

    return {
        # An image has no history, but was told its commit when it was built
        "commit": _git("rev-parse", "HEAD") or os.environ.get("IMMUNITY_COMMIT") or None,
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "immunity_lib")),
        "library": library_checksum(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def library_checksum() -> str:
    """Checksum of the library's source, by which a record tells which code made it."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "immunity_lib").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # not a checkout: the library's checksum still says which code it was
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"
