"""What a crash, a full disk or a stray hand did to the files of earlier runs, found before they are
used: each is set aside under another name, and the graph makes it anew."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from immunity_lib.records import DamagedFile, read_record, read_tensors, set_aside
from immunity_lib.settings import Settings

ABANDONED = 3600  # seconds behind which nobody is still writing a file


def set_aside_damaged(settings: Settings) -> None:
    """Rename every file of a preset that is truncated or altered, and remove what a killed process
    left half-written."""
    for folder in ("models", "records", "jobs"):
        _set_aside_unreadable(settings.runs / folder, "*.json", read_record)
    _set_aside_unreadable(settings.runs / "models", "*.safetensors", read_tensors)
    _set_aside_unreadable(settings.runs / "notebooks", "*.ipynb", _read_json)
    _set_aside_unreadable(settings.figures, "*.json", read_record)
    for sidecar in sorted(settings.figures.glob("*.json")):
        _check_artefact(sidecar)
    for folder in (settings.runs, settings.figures):
        for part in folder.rglob(".*.part"):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()


def _set_aside_unreadable(folder: Path, pattern: str, read) -> None:
    for path in sorted(folder.rglob(pattern)):
        try:
            read(path)
        except DamagedFile as error:
            set_aside(path, f"{error}; it is made anew")


def _read_json(path: Path) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFile(f"{path} is not a whole notebook: {error}") from error


def _check_artefact(sidecar: Path) -> None:
    """A table or figure must be the one that was drawn, from the records that lie beside it."""
    content = read_record(sidecar)
    for name, checksum in content.get("files", {}).items():  # committed ones may lack them
        path = sidecar.parent / name
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            set_aside(path, f"{path} was altered after it was drawn; it is made anew")
    for record in content["records"]:
        path = sidecar.parent / record["file"]
        if not path.exists() or json.loads(path.read_bytes())["checksum"] != record["checksum"]:
            set_aside(sidecar, f"{path}, which it was drawn from, is not there; it is made anew")
            return
