"""The tables of the paper and of notebooks 03, 04 and 06: filters and pivots of the long frame.

The long frame (see `measure`) has a row for each model, attack and image. From it come cells: what labels their row,
header ("column (unit)"), value and images; and from these tidy tables, of means over `count` seeds or networks."""

import math
import re
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from immunity_lib.attacks import FAMILIES
from immunity_lib.moe import DRAWN
from study import catalogue
from study.catalogue import ATTACK_TITLES, DATA, MIXTURES, NETWORKS, ModelName
from study.settings import Settings, budget_text
from study.store import read_frame, read_record, write_artefact

FIELDS = ["column", "unit", "value", "standard_deviation", "count", "images", "paper"]
DECIMALS = {"%": 1, "points": 1, "1e-3": 2, "pixels": 1, "pixels^4": 0, "nats": 3, "M": 2}
REPORTED = Path(__file__).with_name("reported.csv")
DEFENCES = {
    "switched": "expected over switches (%)",  # of a uniform permutation of the trained weights
    "uniform": "plain ensemble (%)",
    "switching": "switching (points)",  # what it adds: the first minus the second
    "trained": "frozen gate (%)",
    "every": "every switch (%)",  # right under all permutations, image by image
    "best": "best switch (%)",  # of the permutations, held fixed for all images
    "worst": "worst switch (%)",
}
SCORES = {  # of the heat maps, and the factors to the units of their columns
    "independence_score": ("IScore (1e-3)", 1e3),
    "independence_of_peaks": ("IScore of maps over their maxima (pixels)", 1),
    "causality_score": ("CScore (pixels^4)", 1),
    "mutual_information": ("I(C,E) (nats)", 1),
    "empty_maps": ("empty maps (%)", 100),
}
Names = Sequence[ModelName]


def read_rows(settings: Settings, names: Names, kind: str) -> pd.DataFrame:
    """The long frame's rows of the split "test"."""
    return read_frame(settings, names, kind).query("split == 'test'")


def right_experts(frame: pd.DataFrame, experts: int) -> dict[str, np.ndarray]:
    """Shares of a model's experts that are right alone: of all, of the one under attack, and of the others. frame: rows
    as `read_rows` gives them; experts: of a mixture."""
    longest = frame["experts"].str.len().max()
    packed = b"".join(one.ljust(longest, b"\0") for one in frame["experts"])
    right = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(len(frame), -1), axis=1)
    count = np.where(frame["method"].isin(catalogue.SINGLE), 1, experts)
    attacked = frame["attack"].str.extract(r"pgd-expert-(\d+)")[0].astype(float)
    one = np.where(attacked.notna(), right[range(len(frame)), attacked.fillna(1).astype(int) - 1], np.nan)
    others = (right.sum(1) - one) / np.maximum(count - 1, 1)
    return {"experts": right.sum(1) / count, "attacked_expert": one, "other_experts": others}


def gate_cells(settings: Settings, names: Names, kind: str = "attacks") -> pd.DataFrame:
    """A cell for each model, attack (by its name, family and what it sees) and defence."""
    labels = ["name", "data", "training", "model", "seed", "family", "attack", "sees"]
    cells = []
    for key, rows in read_rows(settings, names, kind).groupby(labels, sort=False):
        experts = 1 if rows["method"].iloc[0] in catalogue.SINGLE else settings.recipe.experts
        packed = np.frombuffer(b"".join(rows["gates"]), np.uint8).reshape(len(rows), -1)
        by_gate = np.unpackbits(packed, axis=1, count=min(math.factorial(experts), DRAWN)).mean(0)
        found = rows[["switched", "uniform", "trained"]].astype(float).mean()
        found["switching"] = found["switched"] - found["uniform"]
        found["every"] = (rows["switched"] == 1).mean()
        found["best"], found["worst"] = by_gate.max(), by_gate.min()
        label = dict(zip(labels, key, strict=True)) | {"images": len(rows)}
        cells += [label | {"header": DEFENCES[one], "value": 100 * found[one]} for one in DEFENCES]
    return pd.DataFrame(cells)


def attack_cells(settings: Settings, names: Names) -> pd.DataFrame:
    """Accuracy expected over switches, clean and under every attack and magnitude on the first of the gates."""
    gate, cells = settings.attack_gates[0], gate_cells(settings, names)
    cells = cells[cells["sees"].isin(["", gate]) & (cells["header"] == DEFENCES["switched"])]
    return cells.assign(header=cells["attack"].map(attack_title) + " (%)")


def score_cells(settings: Settings, names: Names) -> pd.DataFrame:
    """The scores of the heat maps, mean over images, and of the IScore, which few images can carry, the median."""
    groups = read_rows(settings, names, "scores").groupby(["model", "seed"], sort=False)
    means = groups[list(SCORES)].mean() * [scale for _, scale in SCORES.values()]
    means.columns = [header for header, _ in SCORES.values()]
    means.insert(1, "IScore median (1e-3)", 1e3 * groups["independence_score"].median())
    return means.assign(images=groups.size()).reset_index().melt(["model", "seed", "images"], var_name="header")


def summarise(cells: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """The tidy table of cells: values of one row and header become their mean and deviation."""
    groups = cells.groupby([*labels, "header"], sort=False)
    table = groups["value"].agg(["mean", "std", "size"]).assign(images=groups["images"].first())
    table = table.set_axis(FIELDS[2:-1], axis=1).reset_index()
    table = table.join(table["header"].str.extract(r"(?P<column>.*) \((?P<unit>.*)\)"))[[*labels, *FIELDS[:-1]]]
    rows = table.groupby(list(labels), sort=False).ngroup()  # each row's cells together
    return table.iloc[rows.argsort(kind="stable")].reset_index(drop=True)


def table1(settings: Settings) -> pd.DataFrame:
    """Table 1: networks trained independently of each other, and the same as experts of Immunity.
    "accuracy" is what the paper compares: a single network (mean over all of them), and Immunity under its switched
    gate. "experts alone" and "ensemble" (equal weights) compare like with like."""
    cells = []
    for name in catalogue.table1_models(settings):
        mixture = gate_cells(settings, [name], "scores").set_index("header")["value"]
        scores = score_cells(settings, [name])
        alone = 100 * np.array(read_record(settings, name, "scores")["summary"]["test"]["expert_accuracy"])
        independent, network = name.method == "ensemble", NETWORKS[name.expert]
        columns = {
            "accuracy (%)": alone if independent else [mixture[DEFENCES["switched"]]],
            "experts alone (%)": alone,
            "ensemble (%)": [mixture[DEFENCES["uniform"]]],
        }
        own = [pd.DataFrame({"header": header, "value": values}) for header, values in columns.items()]
        title = network if independent else f"Immunity-{network}"
        cells.append(pd.concat([*own, scores]).assign(model=title, images=scores["images"][0]))
    return beside_paper(settings, summarise(pd.concat(cells), ["model"]), "table1")


def table2(settings: Settings) -> pd.DataFrame:
    """Table 2: accuracy under attack, expected over the switched gate that the attack sees too, and how large each
    model is: without that, no two of them can be compared."""
    labels = ["data"] * bool(settings.further_datasets) + ["training", "model"]
    cells, sizes = attack_cells(settings, catalogue.table2_models(settings)), []
    for cell in cells.drop_duplicates("name").to_dict("records"):
        trained = catalogue.single(settings, [ModelName.parse(cell["name"])])
        records = [read_record(settings, one, "training") for one in trained]
        for header, field in (("parameters (M)", "parameters"), ("multiply-adds (M)", "multiply_accumulates")):
            sizes.append(cell | {"header": header, "value": sum(one[field] for one in records) / 1e6, "images": np.nan})
    table = summarise(pd.concat([pd.DataFrame(sizes), cells], ignore_index=True), labels)
    return beside_paper(settings, table, "table2")


def table3(settings: Settings) -> pd.DataFrame:
    """Table 3: the ablation under attack, as Table 2, and what the two losses do to the maps."""
    names = catalogue.table3_models(settings)
    cells = pd.concat([attack_cells(settings, names), score_cells(settings, names)])
    return beside_paper(settings, summarise(cells, ["model"]), "table3")


def strongest_attack(settings: Settings) -> str:
    """Of the paper's attacks that the preset has, the last in the order of the tables."""
    return max(settings.attacks, key=list(ATTACK_TITLES).index)


def gates_table(settings: Settings) -> pd.DataFrame:
    """The mixtures of Table 2 under the `strongest_attack`, for every gate attacked."""
    names = [name for name in catalogue.table2_models(settings) if name.method in MIXTURES]
    cells = gate_cells(settings, names).rename(columns={"sees": "attacked gate"})
    cells = cells[(cells["attack"] == strongest_attack(settings)) & (cells["header"] != DEFENCES["switching"])]
    return summarise(cells, ["data"] * bool(settings.further_datasets) + ["training", "model", "attacked gate"])


def beside_paper(settings: Settings, table: pd.DataFrame, artefact: str) -> pd.DataFrame:
    """A table with the numbers that the paper reports, on CIFAR-10 for data that it does not have.
    They lie in reported.csv, as far as our source of the paper shows them; who has the printed tables can add lines.
    Raises ValueError for a file that has no numbers, or two for a cell."""
    cell = ["table", "data", "training", "model", "column"]
    data = table.get("data", pd.Series(DATA[settings.recipe.dataset], table.index))
    rows = table[["model", "column"]].assign(
        table=artefact,
        data=data.map(of_paper),
        training=table.get("training", "standard"),
        model=table["model"].str.replace("^RobNet-.*", "RobNets", regex=True),
    )
    try:
        known = pd.read_csv(REPORTED, dtype={"value": float})[[*cell, "value"]]
        return table.assign(paper=rows.merge(known, how="left", validate="many_to_one")["value"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{REPORTED} needs {', '.join(cell)}, value: {error}") from None


def of_paper(data: str) -> str:
    """The data, as readers call them, whose numbers in the paper stand beside ours."""
    return data if data == "CIFAR-100" else "CIFAR-10"


def worst_case(rows: pd.DataFrame, families: Collection[str] = tuple(FAMILIES)) -> pd.DataFrame:
    """The least of what is right under each gate over the attacks of some families: switched, uniform and trained, by
    training, model, name and image. rows: as `read_rows` gives them."""
    groups = rows[rows["family"].isin(families)].groupby(["training", "model", "name", "image"], sort=False)
    return groups[["switched", "uniform", "trained"]].min()


def worth_of_the_gate(settings: Settings, names: Names) -> pd.DataFrame:
    """The headline: a row for each mixture, image by image the worst case over all attacks.
    "same answer": share of images to which all gates give one answer, unattacked. Then accuracies: unattacked; under
    the paper's attacks; under all, by what defends. Last, how often an attacker who may try k times succeeds:
    1 - (1 - q)^k where a try fools with probability q."""
    rows, by = read_rows(settings, names, "adaptive"), ["training", "model", "name"]
    left = worst_case(rows)
    same = {str(one): read_record(settings, one, "adaptive")["summary"]["agreement"] for one in names}
    found = pd.DataFrame({
        "same answer (%)": [same[name]["unanimous"] for _, _, name, _ in left.index],
        "unattacked (%)": worst_case(rows, ["clean"])["switched"],
        "paper's attacks (%)": worst_case(rows, ["paper"])["switched"],
        "all attacks (%)": left["switched"],
        "plain ensemble (%)": left["uniform"],
        "switching (points)": left["switched"] - left["uniform"],
        "frozen gate (%)": left["trained"],
        "every switch (%)": left["switched"] == 1,
        **{f"success in {k} (%)": 1 - left["switched"] ** k for k in (1, 5, 20)},
    })  # fmt: skip
    groups = found.astype(float).groupby(by, sort=False)
    means = (100 * groups.mean()).assign(images=groups.size()).reset_index()
    return summarise(means.melt([*by, "images"], var_name="header"), by[:2])


def suite_table(settings: Settings, names: Names) -> pd.DataFrame:
    """Every adaptive attack on every mixture, by what defends on the same images."""
    cells = gate_cells(settings, names, "adaptive")
    held = cells["header"].isin([DEFENCES["best"], DEFENCES["worst"]])
    cells = cells[(cells["family"] != "clean") & ~held]
    return summarise(cells.assign(kind=cells["family"].map(FAMILIES)), ["training", "model", "kind", "attack", "sees"])


def checks_table(settings: Settings, names: Names) -> pd.DataFrame:
    """One line a check: how many models pass, evidence of those that fail (or of the first), its reason and source."""
    told, lines = [read_record(settings, name, "adaptive")["summary"]["checks"] for name in names], []
    for found in zip(*told, strict=True):  # one check of all models
        failed = [f"{name}: {one['evidence']}" for name, one in zip(names, found, strict=True) if not one["passed"]]
        evidence = "; ".join(failed) or f"for example {found[0]['evidence']}"
        lines.append(found[0] | {"passed": f"{len(names) - len(failed)} of {len(names)}", "evidence": evidence})
    return pd.DataFrame(lines)


def budget_curves(settings: Settings, names: Names) -> pd.DataFrame:
    """Accuracy in % by eps: training, model, eps, value; means over seeds."""
    by, lines = ["training", "model", "eps"], []
    for name in names:
        for eps, accuracy in read_record(settings, name, "adaptive")["summary"]["by_budget"]:
            lines.append([name.regime, catalogue.method_title(name.method, name.expert), eps, 100 * accuracy])
    return pd.DataFrame(lines, columns=[*by, "value"]).groupby(by, sort=False, as_index=False).mean()


def table_text(table: pd.DataFrame) -> pd.DataFrame:
    """A table as text, one line a row of ours and, where we know numbers of the paper, one of its own. Several
    numbers are printed as "mean ± standard deviation (count)"."""
    labels = [field for field in table if field not in FIELDS]
    rows: dict[tuple, dict[str, str]] = {}
    for cell in table.to_dict("records"):
        label, header = [cell[field] for field in labels], f"{cell['column']} ({cell['unit']})"
        decimals = DECIMALS[cell["unit"]]
        text = f"{round(cell['value'], decimals) + 0.0:.{decimals}f}"  # no "-0.0"
        if cell["count"] > 1:
            text += f" ± {cell['standard_deviation']:.{decimals}f} ({cell['count']})"
        rows.setdefault((*label, "ours"), {})[header] = text
        if not pd.isna(cell.get("paper")):  # it does not say the units of its scores
            as_printed = "" if cell["unit"] == "%" else " as printed"
            rows.setdefault((*label, "paper"), {})[header] = f"{cell['paper']:g}{as_printed}"
    lines = [dict(zip([*labels, "source"], row, strict=True)) | rows[row] for row in rows]
    text = pd.DataFrame(lines).fillna("")
    return text if (text["source"] == "paper").any() else text.drop(columns="source")


def wilson_interval(percent, images: float) -> tuple:
    """The ends of the 95 % Wilson interval of a share of so many images, or of several; all in %."""
    share, z2 = percent / 100, norm.ppf(0.975) ** 2 / images
    half = (z2 * share * (1 - share) + z2**2 / 4) ** 0.5
    return tuple(100 * (share + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))


def preset_text(settings: Settings, datasets: Collection[str], seeds: Collection[int]) -> str:
    """The preset, some of its data sets and how many seeds, in words."""
    told = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"Preset {settings.preset}, {' and '.join(DATA[name] for name in datasets)}, {told}"


def evidence(settings: Settings, table: pd.DataFrame) -> str:
    """What a table rests on, in words: data, seeds, images and the error that those leave (the 95 % Wilson interval;
    an upper bound for expectations over gates, as each image then varies less)."""
    several = "; mean ± standard deviation (number of networks)" * bool(table["count"].max() > 1)
    datasets = settings.datasets if "data" in table else settings.datasets[:1]
    sentences = [f"{preset_text(settings, datasets, settings.seeds)}{several}."]
    for images, group in table.groupby("images", sort=False):
        low, high = wilson_interval(group.loc[group["unit"] == "%", "value"], images)
        error = f"(95 % interval at most ± {((high - low) / 2).max():.1f} points)"
        sentences.append(f"{', '.join(group['column'].unique())}: {images:.0f} images {error}.")
    if "paper" in table:
        if table["paper"].notna().any():
            of = "CIFAR-10, or CIFAR-100 in rows of it," if "data" in table else of_paper(DATA[datasets[0]])
            sentences.append(f"The rows marked paper are {of} at full scale.")
        sentences.append("Numbers of the paper that our source does not show are left out.")
    return " ".join(sentences)


def attack_title(attack: str) -> str:
    """An attack of a frame, as readers call it."""
    eps = attack.removeprefix("pgd at ")
    return ATTACK_TITLES.get(attack, attack) if eps == attack else f"PGD at {budget_text(Fraction(eps))}"


def write_table(
    settings: Settings, table: pd.DataFrame, name: str, caption: str, records: Sequence[Path],
    text: pd.DataFrame | None = None,
) -> None:  # fmt: skip
    """Write figures/<preset>/<name>.csv (the numbers), .md, .tex and .json (see `write_artefact`).
    records: the files that the table was read from. text: what is printed of a table that is not tidy; what a tidy
    one rests on is added to its caption."""
    if text is None:
        text, caption = table_text(table), f"{caption} {evidence(settings, table)}"
    escaped = re.sub(r"([%&_#$])", r"\\\1", caption)
    contents = {
        "csv": table.to_csv(index=False),
        "md": f"{caption}\n\n{text.to_markdown(index=False, disable_numparse=True)}\n",
        "tex": text.to_latex(index=False, escape=True, caption=escaped, label=f"tab:{name}"),
    }
    write_artefact(settings, name, contents, caption, records)
