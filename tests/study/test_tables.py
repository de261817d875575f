"""Tables show what the frames say, and nothing that the paper is not known to say."""

from dataclasses import replace
from fractions import Fraction
from itertools import product
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest
from frames import ADAPTIVE, World

from study import catalogue, tables
from study.store import read_json, record_path

KNOWN = {
    "table1": {"GoogLeNet accuracy": 95.01, "Immunity-GoogLeNet accuracy": 93.46},
    "table2": {},
    "table3": {"MoE clean": 94.74},
}


@pytest.fixture(scope="module", params=[[0], [0, 1, 2]], ids=["one seed", "three seeds"])
def world(request, make_settings, tmp_path_factory):
    settings = make_settings(
        compared_experts=["resnet18", "googlenet"], expert="googlenet", experts=3, baselines=["robnet-free"],
        test_images=40, attacked_images=20, adaptive_images=12, attacks=["fgsm", "pgd"], seeds=request.param,
        magnitudes=["2/255"], output_folder=str(tmp_path_factory.mktemp("world")),
    )  # fmt: skip
    return World(settings)


@pytest.fixture
def settings(world):
    return world.settings


def cell(table, **labels):
    for field, value in labels.items():
        table = table[table[field] == value]
    assert len(table) == 1
    return table.iloc[0]


def models(names, method, regime="standard", expert="googlenet"):
    return [name for name in names if (name.method, name.regime, name.expert) == (method, regime, expert)]


def test_independent_networks_stand_for_themselves_and_immunity_for_its_mixture(world, settings):
    table, names = tables.table1(settings), catalogue.table1_models(settings)
    independent = models(names, "ensemble", expert="resnet18")
    immunity = models(names, "immunity", expert="resnet18")
    alone = [world.summaries[name, "scores"]["test"]["expert_accuracy"] for name in independent]
    alone = [100 * share for shares in alone for share in shares]
    ours = cell(table, model="ResNet18", column="accuracy")
    assert (ours["value"], ours["standard_deviation"]) == pytest.approx((mean(alone), stdev(alone)))
    assert (ours["count"], ours["images"]) == (3 * len(settings.seeds), 40)
    for column, defence in {"accuracy": "switched", "ensemble": "uniform"}.items():
        ours = cell(table, model="Immunity-ResNet18", column=column)
        expected = mean(world.accuracy(one, kind="scores", defence=defence) for one in immunity)
        assert ours["value"] == pytest.approx(expected)
    rows = ["ResNet18", "Immunity-ResNet18", "GoogLeNet", "Immunity-GoogLeNet"]
    assert list(table["model"]) == [row for row in rows for _ in range(9)]


def test_table2_is_the_expectation_over_switches_with_the_first_gate_attacked(world, settings):
    table = tables.table2(settings)
    rows = table[["training", "model"]].drop_duplicates().itertuples(index=False, name=None)
    shown = ("RobNet-free", "stand-alone GoogLeNet", "MoE", "Immunity")
    assert list(rows) == list(product(("standard", "adversarial"), shown))
    assert list(table["column"].unique()) == ["parameters", "multiply-adds", "clean", "FGSM", "PGD", "PGD at 2/255"]
    assert set(table.loc[table["unit"] == "M", "value"]) == {2, 3}
    names = models(catalogue.table2_models(settings), "immunity", "adversarial")
    ours = cell(table, training="adversarial", model="Immunity", column="PGD")
    assert ours["value"] == pytest.approx(mean(world.accuracy(name, "pgd", "switch") for name in names))
    assert (ours["count"], ours["images"]) == (len(settings.seeds), 20)


def test_table2_of_several_data_sets_is_held_against_the_paper_s_own_rows(make_settings, tmp_path, monkeypatch):
    settings = make_settings(
        dataset="cifar10", further_datasets=["cifar100"], baselines=["robnet-free"], attacks=["pgd", "cw"],
        output_folder=str(tmp_path),
    )  # fmt: skip
    World(settings)
    reported = tmp_path / "reported.csv"
    reported.write_text(
        "table,data,training,model,column,value\ntable2,CIFAR-10,standard,RobNets,PGD,1\n"
        "table2,CIFAR-100,standard,RobNets,PGD,2\ntable2,CIFAR-100,adversarial,Immunity,clean,3\n"
    )
    monkeypatch.setattr(tables, "REPORTED", reported)
    table = tables.table2(settings)
    assert list(table["column"].unique()) == ["parameters", "multiply-adds", "clean", "PGD", "C&W"]
    known = table[table["paper"].notna()][["data", "training", "model", "column", "paper"]]
    assert [" ".join(map(str, row)) for row in known.itertuples(index=False)] == [
        "CIFAR-10 standard RobNet-free PGD 1.0", "CIFAR-100 standard RobNet-free PGD 2.0",
        "CIFAR-100 adversarial Immunity clean 3.0",
    ]  # fmt: skip
    assert set(tables.gates_table(settings)["data"]) == {"CIFAR-10", "CIFAR-100"}


def test_table3_has_attacks_and_scores_in_one_row(world, settings):
    table = tables.table3(settings)
    assert list(table["model"].unique()) == ["MoE", "MoE+MI", "MoE+PS", "Immunity"]
    for _, row in table.groupby("model"):
        assert list(row["column"]) == [
            "clean", "FGSM", "PGD", "PGD at 2/255", "IScore", "IScore median", "IScore of maps over their maxima",
            "CScore", "I(C,E)", "empty maps",
        ]  # fmt: skip
    names = models(catalogue.table3_models(settings), "moe-mi")
    expected = 1e3 * mean(world.scores[name]["independence_score"].mean() for name in names)
    ours = cell(table, model="MoE+MI", column="IScore")
    assert (ours["value"], ours["unit"]) == (pytest.approx(expected), "1e-3")


@pytest.mark.parametrize("defence", sorted(set(tables.DEFENCES) - {"switching"}))
def test_gates_table_shows_every_gate_of_every_mixture_under_pgd(world, settings, defence):
    """Oracle: verdicts counted one by one. Six gates fill no byte: what pads it is no gate."""
    table, names = tables.gates_table(settings), models(catalogue.table3_models(settings), "moe")
    assert set(table["model"]) == {"MoE", "Immunity"} and set(table["attacked gate"]) == {"switch", "uniform"}
    expected = mean(world.accuracy(name, "pgd", "uniform", defence=defence) for name in names)
    labels = {"training": "standard", "model": "MoE", "attacked gate": "uniform"}
    column = tables.DEFENCES[defence].removesuffix(" (%)")
    assert cell(table, column=column, **labels)["value"] == pytest.approx(expected)


@pytest.mark.parametrize("artefact", KNOWN)
def test_numbers_of_the_paper_are_the_known_ones_and_nothing_else(settings, artefact):
    table = getattr(tables, artefact)(settings)
    known = table[table["paper"].notna()]
    assert dict(zip(known["model"] + " " + known["column"], known["paper"], strict=True)) == KNOWN[artefact]
    # A row of the paper of which nothing is known is left out
    text, told = tables.table_text(table), tables.evidence(settings, table)
    assert (text.get("source", pd.Series()) == "paper").sum() == len(known)
    assert ("The rows marked paper are CIFAR-10 at full scale." in told) == bool(len(known))


def test_the_caption_says_whose_numbers_of_the_paper_stand_there(settings):
    hundred = settings.model_copy(update={"recipe": replace(settings.recipe, dataset="cifar100")})
    table = tables.table3(settings).assign(paper=1.0)
    assert "The rows marked paper are CIFAR-100 at full scale." in tables.evidence(hundred, table)


def test_a_reader_can_add_numbers_of_the_paper_and_a_faulty_file_is_named(settings, tmp_path, monkeypatch):
    path, shipped, line = tmp_path / "reported.csv", tables.REPORTED.read_text(), "table3,CIFAR-10,standard,MoE,{}\n"
    monkeypatch.setattr(tables, "REPORTED", path)
    path.write_text(shipped + line.format("PGD,12.5") + line.format("CScore,80"))
    text = tables.table_text(tables.table3(settings))
    row = text[(text["model"] == "MoE") & (text["source"] == "paper")].iloc[0]
    assert (row["clean (%)"], row["PGD (%)"], row["FGSM (%)"]) == ("94.74", "12.5", "")
    assert row["CScore (pixels^4)"] == "80 as printed"
    faulty = {
        "ninety": shipped + line.format("PGD,ninety"),
        "MoE": shipped + 2 * line.format("PGD,1"),
        "": "table,data\n",
    }
    for told, content in faulty.items():
        path.write_text(content)
        with pytest.raises(ValueError, match=f"(?s)reported.csv needs table, data.*{told}"):
            tables.table3(settings)


def test_text_of_one_and_of_several_seeds(world, settings):
    table = tables.table2(settings)
    names = models(catalogue.table2_models(settings), "standalone", expert="robnet-free")
    numbers = [world.accuracy(name) for name in names]
    ours = tables.table_text(table).iloc[0]["clean (%)"]
    if len(numbers) == 1:
        expected, told = f"{numbers[0]:.1f}", "Parts-10, one seed."
    else:
        expected, told = f"{mean(numbers):.1f} ± {stdev(numbers):.1f} (3)", "3 seeds; mean ± standard deviation"
    assert ours == expected and told in tables.evidence(settings, table)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_evidence_tells_images_and_the_interval_that_inverts_the_score_test(settings, share):
    """Oracle: the Wilson interval is every p with |share - p| <= z sqrt(p (1 - p) / images)."""
    cells = pd.DataFrame({"header": ["A (%)", "B (nats)"], "value": [100 * share, 7], "images": 50})
    told = tables.evidence(settings, tables.summarise(cells.assign(model="-"), ["model"]))
    p = np.linspace(0, 1, 200_001)
    inside = p[abs(share - p) <= 1.959964 * (p * (1 - p) / 50) ** 0.5 + 1e-12]
    half = 50 * (inside.max() - inside.min())
    assert f"A, B: 50 images (95 % interval at most ± {half:.1f} points)." in told


@pytest.mark.parametrize(
    ("eps", "text"),
    [(Fraction(8, 255), "8/255"), (0.031, "7.905/255"), (0.5, "127.5/255"), (Fraction(1, 1000), "0.255/255")],
)
def test_A7_a_budget_is_printed_as_a_short_decimal_of_255ths(eps, text):
    assert tables.budget_text(eps) == text
    assert tables.attack_title(f"pgd at {eps}") == f"PGD at {text}" and tables.attack_title("clean") == "clean"


def test_written_files_hold_the_numbers_and_name_their_records(settings):
    table, kinds = tables.table3(settings), ("attacks", "scores")
    records = [record_path(settings, name, kind) for name in catalogue.table3_models(settings) for kind in kinds]
    tables.write_table(settings, table, "table3", "Table 3: 50 % & more.", records)
    paths = [settings.figures / f"table3.{e}" for e in ("csv", "md", "tex", "json")]
    pd.testing.assert_frame_equal(pd.read_csv(paths[0]), table, rtol=1e-12, check_dtype=False)
    markdown, latex = paths[1].read_text(), paths[2].read_text()
    assert all(text in markdown and text in latex for text in tables.table_text(table).to_numpy().ravel())
    assert r"Table 3: 50 \% \& more." in latex
    sidecar = read_json(paths[3])
    assert sidecar["caption"].startswith("Table 3: 50 % & more. Preset tiny, Parts-10")
    assert [one["file"] for one in sidecar["records"]] == [f"records/{p.name}" for p in records]


def test_the_headline_is_the_worst_case_of_each_image(world, settings):
    """Oracle: loops over images and attacks."""
    table = tables.worth_of_the_gate(settings, catalogue.measured_models(settings, "adaptive"))
    expected = {}
    for name in models(catalogue.measured_models(settings, "adaptive"), "immunity"):
        found = [world.verdicts[name, "adaptive", a, sees] for a, _, sees in ADAPTIVE]
        left = [min(sum(g[image]) / 6 for g, _, _ in found) for image in range(12)]
        paper = [min(sum(g[image]) / 6 for g, _, _ in found[:2]) for image in range(12)]
        uniform = [min(float(one[image]) for _, one, _ in found) for image in range(12)]
        trained = [min(float(one[image]) for _, _, one in found) for image in range(12)]
        numbers = {
            "same answer": 0.75, "paper's attacks": mean(paper), "all attacks": mean(left),
            "unattacked": world.accuracy(name, kind="adaptive") / 100, "plain ensemble": mean(uniform),
            "switching": mean(left) - mean(uniform), "frozen gate": mean(trained),
            "every switch": mean(float(one == 1) for one in left), "success in 1": mean(1 - one for one in left),
            "success in 5": mean(1 - (1 - (1 - one)) ** 5 for one in left),
        }  # fmt: skip
        for column, number in numbers.items():
            expected.setdefault(column, []).append(100 * number)
    for column, numbers in expected.items():
        ours = cell(table, training="standard", model="Immunity", column=column)
        assert (ours["value"], ours["images"]) == (pytest.approx(mean(numbers)), 12)
    assert cell(table, training="standard", model="MoE", column="switching")["unit"] == "points"


def test_the_suite_has_a_row_for_every_attack_and_a_column_for_every_defence(world, settings):
    names = catalogue.measured_models(settings, "adaptive")
    suite = tables.suite_table(settings, names)
    own = suite[(suite["training"] == "adversarial") & (suite["model"] == "MoE")]
    assert list(own["attack"].unique()) == [attack for attack, _, _ in ADAPTIVE]
    ours = own[own["attack"] == "noise"].set_index("column")["value"]
    assert list(ours.index) == ["expected over switches", "plain ensemble", "switching", "frozen gate", "every switch"]
    attacked = models(names, "moe", "adversarial")
    for column, defence in {"expected over switches": "switched", "plain ensemble": "uniform"}.items():
        shares = [world.accuracy(name, "noise", "all gates", "adaptive", defence) for name in attacked]
        assert ours[column] == pytest.approx(mean(shares))
    assert ours["switching"] == pytest.approx(ours["expected over switches"] - ours["plain ensemble"])


def test_checks_and_budgets_are_those_of_the_summaries(settings):
    names = catalogue.measured_models(settings, "adaptive")
    (line,) = tables.checks_table(settings, names).to_dict("records")
    assert line["passed"] == f"{len(names) // 2} of {len(names)}"
    assert line["evidence"].startswith(f"{models(names, 'immunity')[0]}: so much; ")
    budget = tables.budget_curves(settings, names).head(2)
    assert list(budget["eps"]) == [0, 0.5] and list(budget["value"]) == pytest.approx([90, 10 * mean(settings.seeds)])
