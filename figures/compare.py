"""Do two runs of a preset agree? `python figures/compare.py FIRST SECOND`, of folders like figures/demo.

Prints what of their settings differs, every cell of the same data that both tables have and that differs by more than
other images and other trainings explain, and every claim whose verdict is another; ends with status 1 where one run
says that a claim holds and the other that it does not. Equal code, seed and machine give equal bytes; another processor
rounds otherwise, which is another training. That two runs agree is evidence as far as their trainings are not the same:
how many of the records that both have are of the same weights is printed, too.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from study.catalogue import DATA
from study.claims import DEVIATIONS
from study.settings import flat
from study.tables import FIELDS

OPPOSITE = {"holds", "does not hold"}


def read_table(path: Path) -> pd.DataFrame:
    """A tidy table with its data set, which it names itself only where it has several."""
    table = pd.read_csv(path)
    if "data" not in table:
        asked = json.loads(path.with_suffix(".json").read_bytes())["settings"]
        table.insert(0, "data", DATA[flat(asked)["dataset"]])
    return table


def differing_settings(*folders: Path) -> list[str]:
    """The settings, with both values, in which two folders' claims differ."""
    both = [json.loads((folder / "claims.json").read_bytes())["settings"] for folder in folders]
    fields = {field: [flat(one).get(field) for one in both] for field in flat(both[0]) | flat(both[1])}
    return [f"{field} ({one}, {other})" for field, (one, other) in fields.items() if one != other]


def same_weights(first: Path, second: Path) -> tuple[int, int]:
    """How many of the records that two folders both have are of the same weights, and how many those records are."""
    pairs = [(one, second / "records" / one.name) for one in (first / "records").glob("*.json")]
    weights = [[json.loads(one.read_bytes())["weights"] for one in pair] for pair in pairs if pair[1].is_file()]
    return sum(one == other for one, other in weights), len(weights)


def shared_cells(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Cells in % that two tidy tables (see `tables.summarise`) have; "differs": by more than two standard errors, those
    of so many images and trainings, a training's deviation being the cell's own or, of a single one, DEVIATIONS'."""
    labels = [field for field in first if field in second and field not in FIELDS[2:]]
    both = first.merge(second, on=labels, suffixes=("", " again")).query("unit == '%'")
    errors = []
    for end in ("", " again"):
        share = (both["value" + end] / 100).clip(0, 1)
        of_images = 1e4 * share * (1 - share) / both["images" + end]
        of_trainings = both["standard_deviation" + end].fillna(DEVIATIONS[0]) ** 2 / both["count" + end]
        errors.append(of_images + of_trainings)
    both["allowed"] = 2 * np.sqrt(sum(errors))
    both["differs"] = (both["value"] - both["value again"]).abs() > both["allowed"]
    return both[[*labels, "value", "value again", "allowed", "differs"]]


def differing_verdicts(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """Claims whose verdicts differ, as `claims.verdicts` has them; "contradiction" where they exclude each other."""
    both = first.merge(second, on="claim", suffixes=("", " again"))
    both = both[both["verdict"] != both["verdict again"]]
    pairs = zip(both["verdict"], both["verdict again"], strict=True)
    both = both.assign(contradiction=[set(pair) == OPPOSITE for pair in pairs])
    return both[["claim", "effect", "verdict", "effect again", "verdict again", "contradiction"]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and compare."""
    parser = ArgumentParser(prog="python figures/compare.py", description="Whether two runs of a preset agree.")
    parser.add_argument("folders", nargs=2, type=Path, help="as figures/demo, of each run")
    folders = parser.parse_args(arguments).folders
    for folder in folders:
        if not (folder / "claims.csv").is_file():
            parser.error(f"{folder} has no claims.csv; name two folders of figures, as figures/demo")
    try:
        return compare(*folders)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"no whole folder of figures ({error}); copy it with its .json files and records")


def compare(*folders: Path) -> int:
    """Print what differs between two folders; returns the exit status."""
    if differ := differing_settings(*folders):
        print("settings differ:", "; ".join(differ))
    same, shared_records = same_weights(*folders)
    by_construction = ": the same trainings, which agree by construction" * bool(same)
    print(f"{same} of {shared_records} records in both are of the same weights{by_construction}")
    contradictions = 0
    for path in sorted(folders[0].glob("*.csv")):
        pair = [folder / path.name for folder in folders]
        if not pair[1].is_file():
            print(f"{path.stem}: in one of the folders alone")
            continue
        if path.stem == "claims":
            tables = list(map(pd.read_csv, pair))
            found, count, what = differing_verdicts(*tables), len(tables[0]), "verdicts that differ"
            contradictions += int(found["contradiction"].sum())
        else:
            shared = shared_cells(*map(read_table, pair))
            found, count = shared[shared.pop("differs")], len(shared)
            what = "cells in both that differ by more than chance explains"
        print(f"{path.stem}: {len(found)} of {count} {what}")
        if len(found):
            print(found.to_string(index=False, float_format="{:.1f}".format))
    print(f"{contradictions} contradictions")
    return int(contradictions > 0)


if __name__ == "__main__":
    sys.exit(main())
