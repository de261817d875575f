"""Two runs of a preset agree where chance explains what differs, and contradict each other where it does not."""

import re
import shutil

import pandas as pd
import pytest
from compare import main

from study.settings import ROOT

TABLE = pd.DataFrame({
    "model": ["MoE", "Immunity"], "column": "PGD", "unit": "%", "value": [40.0, 42.0],
    "standard_deviation": float("nan"), "count": 1, "images": 1000,
})  # fmt: skip
CLAIMS = pd.DataFrame({
    "claim": ["a", "b"], "title": ["one claim", "another"], "effect": [3.0, 1.0], "verdict": ["holds", "undecided"],
})  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def written(name, table, claims):
        folder = tmp_path / name
        folder.mkdir()
        table.to_csv(folder / "table2.csv", index=False)
        claims.to_csv(folder / "claims.csv", index=False)
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


def test_a_folder_without_results_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), str(tmp_path)])
    assert ended.value.code == 2 and f"{tmp_path} has no claims.csv" in capsys.readouterr().err


def test_the_demo_agrees_with_itself(tmp_path):
    assert main([str(ROOT / "figures/demo"), str(shutil.copytree(ROOT / "figures/demo", tmp_path / "again"))]) == 0


def test_one_training_and_three_agree_as_the_findings_say(capsys):
    assert main([str(ROOT / "figures/demo"), str(ROOT / "figures/parts10")]) == 0
    differing, shared = zip(*re.findall(r"(\d+) of (\d+) cells in both", capsys.readouterr().out), strict=True)
    assert set(differing) == {"0"} and f"of {sum(map(int, shared))} cells" in (ROOT / "docs/findings.md").read_text()
