"""Tables show what the records say, and nothing that the paper is not known to say."""

import csv
import re
from statistics import mean, stdev

import pandas as pd
import pytest
import yaml

from immunity_lib import tables
from immunity_lib.printing import binomial_half_width, evidence, printed
from immunity_lib.recipes import attacked_models, table1_models, table3_models
from immunity_lib.records import DamagedFile, read_record, write_record
from immunity_lib.reported import REPORTED, reported_numbers
from immunity_lib.results import record_path
from immunity_lib.settings import load_preset

KNOWN = {
    ("table1", "GoogLeNet", "accuracy"): 95.01,
    ("table1", "Immunity-GoogLeNet", "accuracy"): 93.46,
    ("table3", "MoE", "clean"): 94.74,
}
STATES = ("trained", "uniform", "switched", "best", "worst", "every")


def shares(start: float, images: int) -> dict:
    """A `GateAccuracy` whose six numbers differ, so that a mix-up shows."""
    return {"images": images} | {name: start + k / 1000 for k, name in enumerate(STATES)}


def synthetic_scores(number: int) -> dict:
    return {
        "accuracy": shares(0.5 + number / 100, 40),
        "expert_accuracy": [0.40 + number / 100, 0.44 + number / 100],
        "independence_score": 1e-4 * (number + 1),
        "causality_score": 1000.0 + number,
        "mutual_information": 0.1 + number / 100,
        "empty_maps": 0.01 * number,
    }


def synthetic_attacks(settings, number: int) -> dict:
    attacks = [
        {"attack": attack, "attacked_gate": gate, "seconds": 1.0}
        | shares(0.1 + number / 250 + 0.01 * row + 0.005 * column, 20)
        for column, gate in enumerate(settings.attack_gates)
        for row, attack in enumerate(settings.attacks)
    ]
    return {"clean": {"test": shares(0.6 + number / 250, 40)}, "attacks": attacks}


def write_records(settings) -> None:
    provenance = {"commit": "abc", "finished": "2024-01-01T00:00:00+00:00"}
    for number, name in enumerate(table1_models(settings) + table3_models(settings)):
        path = record_path(settings, name, "scores")
        result = {"test": synthetic_scores(number)}
        write_record(path, {"model": str(name), "result": result, "provenance": provenance})
    for number, name in enumerate(attacked_models(settings)):
        path = record_path(settings, name, "attacks")
        result = synthetic_attacks(settings, number)
        write_record(path, {"model": str(name), "result": result, "provenance": provenance})


@pytest.fixture(params=[[0], [0, 1, 2]], ids=["one seed", "three seeds"])
def settings(request, tmp_path):
    preset = tmp_path / "scratch.yaml"
    content = {
        "dataset": "parts10", "compared_experts": ["resnet18", "googlenet"], "experts": 2,
        "test_images": 40, "attacked_images": 20, "seeds": request.param,
    }  # fmt: skip
    preset.write_text(yaml.safe_dump(content))
    settings = load_preset(str(preset), output_folder=str(tmp_path / "out"))
    write_records(settings)
    return settings


def result(settings, name, kind):
    return read_record(record_path(settings, name, kind))["result"]


def cell(frame, **labels):
    for field, value in labels.items():
        frame = frame[frame[field] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_independent_networks_are_judged_alone_and_immunity_by_its_switched_mixture(settings):
    frame = tables.table1(settings)
    names = [name for name in table1_models(settings) if name.expert == "resnet18"]
    independent = [result(settings, n, "scores")["test"] for n in names if n.method == "ensemble"]
    immunity = [result(settings, n, "scores")["test"] for n in names if n.method == "immunity"]
    alone = [100 * accuracy for one in independent for accuracy in one["expert_accuracy"]]

    ours = cell(frame, model="ResNet18", column="accuracy")
    assert ours["value"] == pytest.approx(mean(alone))
    assert ours["standard_deviation"] == pytest.approx(stdev(alone))
    assert ours["count"] == 2 * len(settings.seeds)
    ours = cell(frame, model="Immunity-ResNet18", column="accuracy")
    assert ours["value"] == pytest.approx(100 * mean(r["accuracy"]["switched"] for r in immunity))
    ours = cell(frame, model="Immunity-ResNet18", column="ensemble")
    assert ours["value"] == pytest.approx(100 * mean(r["accuracy"]["uniform"] for r in immunity))


def test_table2_answers_the_paper_row_by_row_on_both_data_sets(settings):
    grid = settings.model_copy(
        update={
            "dataset": "cifar10", "further_datasets": ["cifar100"], "attacks": ["pgd", "cw"],
            "baselines": ["pdarts", "robnet-free"],
        }
    )  # fmt: skip
    write_records(grid)
    frame = tables.table2(grid)
    rows = frame[["data", "training", "model"]].drop_duplicates()
    models = ["P-DARTS", "RobNet-free", "stand-alone GoogLeNet", "MoE", "Immunity"]
    assert [tuple(row) for row in rows.to_numpy()] == [
        (data, regime, model)
        for data in ("CIFAR-10", "CIFAR-100")
        for regime in ("standard", "adversarial")
        for model in models
    ]
    assert list(frame["column"].unique()) == ["clean", "PGD", "C&W"]
    # The paper has rows for the baselines and for Immunity, and none for its parts
    answered = frame[frame["column"] == "PGD"].set_index(["data", "model"])["paper_data"]
    for data in ("CIFAR-10", "CIFAR-100"):
        known = [answered.loc[(data, model)].iloc[0] for model in models]
        assert known == [data, data, "", "", data]
    assert "CIFAR-10 and CIFAR-100" in evidence(grid, frame)
    gates = tables.gates_table(grid)
    assert set(gates["data"]) == {"CIFAR-10", "CIFAR-100"}
    assert set(gates["model"]) == {"MoE", "Immunity"}


def test_table2_is_the_expectation_over_switches_with_the_first_gate_attacked(settings):
    ours = cell(tables.table2(settings), training="adversarial", model="Immunity", column="PGD")
    expected = []
    for name in attacked_models(settings):
        if (name.method, name.regime) == ("immunity", "adversarial"):
            attacks = result(settings, name, "attacks")["attacks"]
            expected += [
                100 * entry["switched"]
                for entry in attacks
                if (entry["attack"], entry["attacked_gate"]) == ("pgd", "switch")
            ]
    assert len(expected) == len(settings.seeds) == ours["count"]
    assert ours["value"] == pytest.approx(mean(expected))
    assert ours["images"] == 20


def test_table3_has_attacks_and_scores_in_one_row(settings):
    frame = tables.table3(settings)
    assert list(frame["model"].unique()) == ["MoE", "MoE+MI", "MoE+PS", "Immunity"]
    attacks = ["clean", "FGSM", "BIM", "MIM", "PGD"]
    scores = ["IScore", "CScore", "I(C,E)", "empty maps"]
    for _, row in frame.groupby("model"):
        assert list(row["column"]) == attacks + scores
    names = [name for name in table3_models(settings) if name.method == "moe-mi"]
    expected = mean(result(settings, n, "scores")["test"]["independence_score"] for n in names)
    ours = cell(frame, model="MoE+MI", column="IScore")
    assert (ours["value"], ours["unit"]) == (pytest.approx(1e3 * expected), "1e-3")


def test_gates_table_shows_every_gate_of_every_mixture_under_pgd(settings):
    frame = tables.gates_table(settings)
    assert set(frame["model"]) == {"MoE", "Immunity"}
    assert set(frame["attacked gate"]) == {"switch", "uniform"}
    labels = {"training": "standard", "model": "MoE", "attacked gate": "uniform"}
    names = [name for name in table3_models(settings) if name.method == "moe"]
    for state, column in tables.GATE_STATES.items():
        expected = []
        for name in names:
            (entry,) = (
                entry
                for entry in result(settings, name, "attacks")["attacks"]
                if (entry["attack"], entry["attacked_gate"]) == ("pgd", "uniform")
            )
            expected.append(100 * entry[state])
        assert cell(frame, column=column, **labels)["value"] == pytest.approx(mean(expected))


@pytest.mark.parametrize("make", [tables.table1, tables.table2, tables.table3])
def test_paper_numbers_are_the_known_ones_and_nothing_else(settings, make):
    frame = make(settings)
    known = {value for (artefact, _, _), value in KNOWN.items() if artefact == make.__name__}
    assert set(frame["paper"].dropna()) == known
    text = printed(frame)
    paper = text[text["source"] == "paper"].drop(columns=["source", "model"])
    paper = paper.drop(columns="training", errors="ignore")
    allowed = {f"{value:g}" for value in known} | {"not in our source", ""}
    assert set(paper.to_numpy().ravel()) <= allowed
    assert "paper are CIFAR-10 at full scale" in evidence(settings, frame)


def test_reported_file_has_a_line_for_every_cell_and_only_the_known_numbers():
    cells = reported_numbers()
    assert {key: value for key, value in cells.items() if value is not None} == KNOWN
    lines = {artefact: [key for key in cells if key[0] == artefact] for artefact, _, _ in cells}
    counts = {artefact: len(keys) for artefact, keys in lines.items()}
    assert counts == {"table1": 6 * 3, "table2": 2 * 2 * 4 * 5, "table3": 4 * 5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table4,MoE,clean,,%", "'table4' is none of table1, table2, table3"),
        ("table3,MoE,clean,ninety,%", "value 'ninety'"),
        ("table3,MoE,clean,120,%", "value '120' must be a number from 0 to 100"),
        ("table3,MoE,clean,nan,%", "value 'nan'"),
        ("table3,MoE,clean,90,percent", "unit 'percent' is none of %, as printed"),
        ("table3,MoE,clean,90,%,more", "more than the 5 fields"),
        ("table3,MoE,FGSM,1,%\ntable3,MoE,FGSM,2,%", "table3, MoE, FGSM is there twice"),
    ],
)
def test_a_faulty_reported_line_is_named(tmp_path, line, message):
    path = tmp_path / "reported.csv"
    path.write_text(f"artefact,row,column,value,unit\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        reported_numbers(path)
    assert "line " in str(error.value)


def test_a_reader_can_fill_a_cell_in(settings, tmp_path, monkeypatch):
    path = tmp_path / "reported.csv"
    path.write_text(REPORTED.read_text().replace("table3,MoE,PGD,,%", "table3,MoE,PGD,12.5,%"))
    monkeypatch.setattr(tables, "reported_numbers", lambda: reported_numbers(path))
    text = printed(tables.table3(settings))
    row = text[(text["model"] == "MoE") & (text["source"] == "paper")].iloc[0]
    assert (row["clean (%)"], row["PGD (%)"]) == ("94.74", "12.5")


def test_text_of_one_and_of_several_seeds(settings):
    frame = tables.table2(settings)
    ours = printed(frame).iloc[0]["clean (%)"]
    numbers = [
        100 * result(settings, name, "attacks")["clean"]["test"]["switched"]
        for name in attacked_models(settings)
        if (name.method, name.regime) == ("standalone", "standard")
    ]
    if len(settings.seeds) == 1:
        assert ours == f"{numbers[0]:.1f}"
        assert "one seed" in evidence(settings, frame)
    else:
        assert ours == f"{mean(numbers):.1f} ± {stdev(numbers):.1f} (3)"
        assert "3 seeds; mean ± standard deviation" in evidence(settings, frame)


def test_evidence_tells_images_and_interval_of_each_column(settings):
    text = evidence(settings, tables.table2(settings))
    assert re.search(r"clean: 40 images \(95 % interval at most ± 1\d\.\d points\)", text)
    assert re.search(r"FGSM, BIM, MIM, PGD: 20 images \(95 % interval at most ± \d+\.\d", text)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_half_width_is_that_of_the_interval_that_inverts_the_score_test(share):
    """Oracle: the Wilson interval is every p with |share - p| <= z sqrt(p (1 - p) / images)."""
    images, steps = 50, 200_001
    inside = []
    for k in range(steps):
        p = k / (steps - 1)
        if abs(share - p) <= 1.959964 * (p * (1 - p) / images) ** 0.5 + 1e-12:
            inside.append(p)
    assert binomial_half_width(share, images) == pytest.approx(
        (max(inside) - min(inside)) / 2, abs=2e-5
    )


def test_written_files_hold_the_numbers_and_name_their_records(settings, capsys):
    frame = tables.table3(settings)
    records = [
        record_path(settings, name, kind)
        for name in table3_models(settings)
        for kind in ("attacks", "scores")
    ]
    paths = tables.write_table(settings, frame, "table3", "Table 3: 50 % & more.", records)
    assert [path.name for path in paths] == [f"table3.{e}" for e in ("csv", "md", "tex", "json")]
    assert "figures/scratch/table3.csv" in capsys.readouterr().out

    read = pd.read_csv(paths[0])
    pd.testing.assert_series_equal(read["value"], frame["value"], rtol=1e-12)
    with open(paths[0], newline="") as file:
        assert {line["paper"] for line in csv.DictReader(file)} == {"94.74", ""}
    markdown, latex = paths[1].read_text(), paths[2].read_text()
    for text in printed(frame).to_numpy().ravel():
        assert text in markdown and text in latex
    assert r"Table 3: 50 \% \& more." in latex

    sidecar = read_record(paths[3])
    assert sidecar["caption"].startswith("Table 3: 50 % & more. Preset scratch, Parts-10")
    assert "output_folder" not in sidecar["settings"]
    assert [source["file"] for source in sidecar["records"]] == [
        path.relative_to(settings.runs).as_posix() for path in records
    ]
    assert str(settings.runs) not in paths[3].read_text()
    assert "finished" not in paths[3].read_text()
    before = [path.read_bytes() for path in paths]
    tables.write_table(settings, frame, "table3", "Table 3: 50 % & more.", records)
    assert [path.read_bytes() for path in paths] == before


def test_a_missing_record_is_named_with_the_command_that_makes_it(settings):
    name = attacked_models(settings)[0]
    record_path(settings, name, "attacks").unlink()
    with pytest.raises(FileNotFoundError, match=f"papermill .* -p model {name}"):
        tables.table2(settings)
    name = table1_models(settings)[0]
    record_path(settings, name, "scores").unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} .*make reproduce PRESET=scratch"):
        tables.table1(settings)


def test_a_record_of_other_attacks_is_not_taken_for_these(settings):
    more = settings.model_copy(update={"attack_gates": ["trained"]})
    with pytest.raises(ValueError, match="lacks FGSM on the trained gate"):
        tables.table2(more)


def test_a_damaged_record_is_not_read(settings):
    path = record_path(settings, table3_models(settings)[0], "scores")
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(DamagedFile, match=path.name):
        tables.table3(settings)
