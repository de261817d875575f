"""The numbers that the paper reports, as far as they are known.

They lie in reported.csv, one line a cell of Tables 1 to 3. A cell without value is one whose number
our source of the paper does not show: a reader who has the printed tables can fill it in.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

REPORTED = Path(__file__).with_name("reported.csv")
FIELDS = ["artefact", "row", "column", "value", "unit"]
ARTEFACTS = ("table1", "table2", "table3")
UNITS = ("%", "as printed")


def reported_numbers(path: Path = REPORTED) -> dict[tuple[str, str, str], float | None]:
    """The paper's cells by (artefact, row, column); None where the number is not known.

    Raises ValueError, with the line, for anything that is not such a cell.
    """
    cells: dict[tuple[str, str, str], float | None] = {}
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file, restkey="further", restval="")
        if lines.fieldnames != FIELDS:
            raise ValueError(f"{path} must begin with {','.join(FIELDS)}; got {lines.fieldnames}")
        for line in lines:
            where = f"{path}, line {lines.line_num}"
            if "further" in line:
                raise ValueError(f"{where} has more than the {len(FIELDS)} fields {FIELDS}")
            if line["artefact"] not in ARTEFACTS:
                raise ValueError(
                    f"{where}: artefact {line['artefact']!r} is none of {', '.join(ARTEFACTS)}"
                )
            if line["unit"] not in UNITS:
                raise ValueError(f"{where}: unit {line['unit']!r} is none of {', '.join(UNITS)}")
            key = (line["artefact"], line["row"], line["column"])
            if key in cells:
                raise ValueError(f"{where}: {', '.join(key)} is there twice; keep one")
            cells[key] = _value(line, where)
    return cells


def _value(line: dict[str, str], where: str) -> float | None:
    if not line["value"]:
        return None
    try:
        value = float(line["value"])
    except ValueError:
        value = math.nan
    highest = 100 if line["unit"] == "%" else math.inf
    if not (0 <= value <= highest and math.isfinite(value)):
        raise ValueError(
            f"{where}: value {line['value']!r} must be a number from 0 to {highest} "
            f"in {line['unit']!r}, or empty"
        )
    return value
