"""Two runs of a preset agree where chance explains what differs, and contradict each other where it does not."""

import re
from pathlib import Path

import pandas as pd
import pytest
from compare import main

from study.settings import ROOT
from study.store import write_json

TABLE = pd.DataFrame({
    "model": ["MoE", "Immunity"], "column": "PGD", "unit": "%", "value": [40.0, 42.0],
    "standard_deviation": float("nan"), "count": 1, "images": 1000,
})  # fmt: skip
CLAIMS = pd.DataFrame({
    "claim": ["a", "b"], "title": ["one claim", "another"], "effect": [3.0, 1.0], "verdict": ["holds", "undecided"],
})  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def written(name, table, claims, dataset="parts10", weights=(), **settings):
        (folder := tmp_path / name).joinpath("records").mkdir(parents=True)
        table.to_csv(folder / "table2.csv", index=False)
        write_json(folder / "table2.json", {"settings": {"recipe": {"dataset": dataset}}})
        for model, checksum in enumerate(weights):
            write_json(folder / "records" / f"model-{model}.attacks.json", {"weights": [checksum]})
        claims.to_csv(folder / "claims.csv", index=False)
        write_json(folder / "claims.json", {"settings": {"recipe": {"dataset": dataset}} | settings})
        return str(folder)

    return written


@pytest.mark.parametrize(("moved", "differing"), [(5.0, 0), (40.0, 1)])
def test_a_cell_differs_where_it_moves_further_than_another_training_would(write, capsys, moved, differing):
    """From training to training six points, from images 1.6: in the difference of two, 8.8."""
    other = TABLE.assign(value=[40.0 + moved, 42.0])
    assert main([write("first", TABLE, CLAIMS), write("second", other, CLAIMS)]) == 0
    assert f"table2: {differing} of 2 cells in both" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "status", "told"),
    [("does not hold", 1, "1 contradictions"), ("undecided", 0, "1 of 2 verdicts"), ("holds", 0, "0 of 2 verdicts")],
)
def test_holds_and_does_not_hold_contradict_each_other(write, capsys, verdict, status, told):
    other = CLAIMS.assign(verdict=[verdict, "undecided"])
    assert main([write("first", TABLE, CLAIMS), write("second", TABLE, other)]) == status
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(("data", "cells"), [(["Parts-10"], 2), (["CIFAR-10"], 0), (["Parts-10", "CIFAR-10"], 2)])
def test_cells_of_other_data_are_not_compared(write, capsys, data, cells):
    """The one table does not name its data set, and the other does."""
    other = pd.concat([TABLE.assign(data=one, value=40.0 + 50 * (one != "Parts-10")) for one in data])
    main([write("first", TABLE, CLAIMS), write("second", other, CLAIMS)])
    main([write("third", TABLE, CLAIMS), write("fourth", TABLE.assign(value=90.0), CLAIMS, dataset="cifar10")])
    assert re.findall(r"table2: (.*) cells in both", capsys.readouterr().out) == [f"0 of {cells}", "0 of 0"]


def test_runs_that_share_trainings_are_said_to(write, capsys):
    main([write("first", TABLE, CLAIMS, weights="abc"), write("second", TABLE, CLAIMS, weights="ab")])
    main([write("third", TABLE, CLAIMS, weights="ab"), write("fourth", TABLE, CLAIMS, weights="cd")])
    said = [line for line in capsys.readouterr().out.splitlines() if "weights" in line]
    assert said == [
        "2 of 2 records in both are of the same weights: the same trainings, which agree by construction",
        "0 of 2 records in both are of the same weights",
    ]


def test_a_folder_without_results_or_that_was_not_copied_whole_is_named(write, tmp_path, capsys):
    first, second = write("first", TABLE, CLAIMS), write("second", TABLE, CLAIMS)
    Path(second, "table2.json").unlink()
    lacking = {str(tmp_path): f"{tmp_path} has no claims.csv", first: "table2.json'); copy it with its .json"}
    for one, told in lacking.items():
        with pytest.raises(SystemExit) as ended:
            main([one, second])
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_one_training_beside_several_is_told_as_it_is(capsys):
    assert main([str(ROOT / "figures/demo"), str(ROOT / "figures/parts10")]) == 0  # no verdict contradicts another
    printed, said = capsys.readouterr().out, " ".join((ROOT / "docs/findings.md").read_text().split())
    same, shared = re.search(r"(\d+) of (\d+) records in both are of the same weights", printed).groups()
    assert same == shared > "0" and "all records in both are of the same weights" in said
    differing, cells = (
        sum(map(int, one)) for one in zip(*re.findall(r"(\d+) of (\d+) cells in both", printed), strict=True)
    )
    assert f"Of {cells} cells {differing} differ still" in said


def test_settings_that_differ_are_told_before_what_they_may_have_changed(write, capsys):
    main([write("first", TABLE, CLAIMS, steps=20, seeds=[0]), write("second", TABLE, CLAIMS, "cifar10", steps=20)])
    assert capsys.readouterr().out.startswith("settings differ: seeds ([0], None); dataset (parts10, cifar10)\n")
    main([write("third", TABLE, CLAIMS, steps=20), write("fourth", TABLE, CLAIMS, steps=20)])
    assert "settings" not in capsys.readouterr().out
