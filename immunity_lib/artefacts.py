"""Tables and figures as files, with a sidecar that says which records they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from immunity_lib.records import read_record, write_atomically, write_record
from immunity_lib.settings import Settings

# Of this machine and moment; the rest of the settings is what a result rests on
NOT_OF_THE_RESULT = {
    "model", "data_folder", "output_folder", "interactive", "pretrained", "processes",
}  # fmt: skip


def write_artefact(
    settings: Settings,
    name: str,
    contents: Mapping[str, str | bytes],
    caption: str,
    records: Sequence[Path],
) -> list[Path]:
    """Write figures/<preset>/<name>.<ending> for each of the contents, and <name>.json.

    The latter holds the caption, the settings, the checksum of each file, and of every record its
    copy in the folder records/ beside it, its checksum and provenance. The same records give the
    same bytes. The paths are printed and returned. Raises DamagedFile for a record that is not
    intact.
    """
    written = {f"{name}.{ending}": _as_bytes(content) for ending, content in contents.items()}
    sidecar = {
        "kind": "artefact",
        "name": name,
        "caption": caption,
        "settings": settings.model_dump(mode="json", exclude=NOT_OF_THE_RESULT),
        "files": {file: hashlib.sha256(content).hexdigest() for file, content in written.items()},
        "records": [_source(settings, record) for record in records],
    }
    paths = [settings.figures / file for file in (*written, f"{name}.json")]
    for path, content in zip(paths, written.values(), strict=False):
        write_atomically(path, content)
    write_record(paths[-1], sidecar)
    project = settings.figures.parents[1]
    print("saved", ", ".join(path.relative_to(project).as_posix() for path in paths))
    return paths


def _as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _source(settings: Settings, path: Path) -> dict:
    """Copy a record beside the results that rest on it, and say what it is."""
    provenance = read_record(path)["provenance"]
    name = f"{path.parent.name}.training.json" if path.name == "record.json" else path.name
    write_atomically(settings.figures / "records" / name, path.read_bytes())
    return {
        "file": f"records/{name}",
        "checksum": json.loads(path.read_text())["checksum"],
        "provenance": {key: value for key, value in provenance.items() if key != "finished"},
    }
