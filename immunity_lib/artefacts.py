"""The sidecar of a table or figure, which says what records it was made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from immunity_lib.records import read_record, write_record
from immunity_lib.settings import Settings

# Of this machine and moment; the rest of the settings is what a result rests on
NOT_OF_THE_RESULT = {"model", "data_folder", "output_folder", "interactive"}


def write_sidecar(settings: Settings, name: str, caption: str, records: Sequence[Path]) -> Path:
    """Write figures/<preset>/<name>.json and return its path.

    It holds the caption, the settings, and of every record its file (relative to runs/<preset>),
    checksum and provenance, without times: the same records give the same sidecar.
    """
    path = settings.figures / f"{name}.json"
    write_record(
        path,
        {
            "kind": "artefact",
            "name": name,
            "caption": caption,
            "settings": settings.model_dump(mode="json", exclude=NOT_OF_THE_RESULT),
            "records": [_source(settings, record) for record in records],
        },
    )
    return path


def _source(settings: Settings, path: Path) -> dict:
    provenance = read_record(path)["provenance"]  # intact, or it says what is wrong
    return {
        "file": path.relative_to(settings.runs).as_posix(),
        "checksum": json.loads(path.read_text())["checksum"],
        "provenance": {key: value for key, value in provenance.items() if key != "finished"},
    }
