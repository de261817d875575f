"""The paper's tables from records alone, with the numbers that the paper reports beside ours.

A table is a tidy frame, one line a cell, as `printing` describes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import pandas as pd

from immunity_lib.artefacts import write_artefact
from immunity_lib.experts import BASELINES
from immunity_lib.printing import ATTACK_TITLES, DATA, NETWORKS, evidence, printed
from immunity_lib.recipes import (
    MIXTURES,
    ModelName,
    table1_models,
    table2_models,
    table3_models,
)
from immunity_lib.records import read_record
from immunity_lib.reported import reported_numbers
from immunity_lib.results import record_path
from immunity_lib.settings import Settings

STRONGEST_FIRST = ("pgd", "apgd", "cw", "mim", "bim", "fgsm")
GATE_STATES = {
    "trained": "trained",
    "uniform": "uniform",
    "switched": "expected over switches",
    "best": "best switch",
    "worst": "worst switch",
    "every": "right under every switch",
}


class Column(NamedTuple):
    """A column of a table: numbers of the records are multiplied by `scale` to be in `unit`."""

    name: str
    unit: str = "%"
    scale: float = 100


SCORES = {
    "independence_score": Column("IScore", "1e-3", 1e3),
    "causality_score": Column("CScore", "pixels^4", 1),
    "mutual_information": Column("I(C,E)", "nats", 1),
    "empty_maps": Column("empty maps"),
}


def table1(settings: Settings) -> pd.DataFrame:
    """Table 1: networks trained independently of each other, and the same as experts of Immunity.

    "accuracy" is what the paper compares: a single network (mean over all of them), and Immunity
    under its switched gate. "experts alone" and "ensemble" (equal weights) compare like with like.
    """
    cells = []
    for names in without_seeds(table1_models(settings)):
        results = [stored_record(settings, name, "scores")["result"]["test"] for name in names]
        network = NETWORKS[names[0].expert]
        model = f"Immunity-{network}" if names[0].method == "immunity" else network
        alone = [accuracy for result in results for accuracy in result["expert_accuracy"]]
        switched = [result["accuracy"]["switched"] for result in results]
        columns = {
            Column("accuracy"): switched if names[0].method == "immunity" else alone,
            Column("experts alone"): alone,
            Column("ensemble"): [result["accuracy"]["uniform"] for result in results],
        } | _scores(results)
        images = results[0]["accuracy"]["images"]
        cells += row_of_cells({"model": model}, columns, images, ("table1", model))
    return pd.DataFrame(cells)


def table2(settings: Settings) -> pd.DataFrame:
    """Table 2: accuracy under attack, expected over the switched gate that the attack sees too."""
    measured = gate_accuracies(settings, table2_models(settings))
    cells = []
    for (data, regime, model), group in measured.groupby(["data", "regime", "model"], sort=False):
        label = {"data": data} if settings.further_datasets else {}
        label |= {"training": regime, "model": model}
        cells += _attack_row(settings, group, label, ("table2", _reported_row(data, regime, model)))
    return pd.DataFrame(cells)


def _reported_row(data: str, regime: str, model: str) -> str:
    """The paper's row that a row of ours answers; for data that it does not have, CIFAR-10's."""
    data = data if data == "CIFAR-100" else "CIFAR-10"
    return f"{data} {regime} {'RobNets' if model.startswith('RobNet') else model}"


def table3(settings: Settings) -> pd.DataFrame:
    """Table 3: the ablation under attack, as Table 2, and what the two losses do to the maps."""
    names = table3_models(settings)
    measured = gate_accuracies(settings, names).groupby("model", sort=False)
    cells = []
    for (model, group), seeds in zip(measured, without_seeds(names), strict=True):
        label, reported = {"model": model}, ("table3", model)
        cells += _attack_row(settings, group, label, reported)
        results = [stored_record(settings, name, "scores")["result"]["test"] for name in seeds]
        images = results[0]["accuracy"]["images"]
        cells += row_of_cells(label, _scores(results), images, reported)
    return pd.DataFrame(cells)


def gates_table(settings: Settings) -> pd.DataFrame:
    """The mixtures of Table 2 under the strongest iterative attack, for every gate attacked."""
    attack = next(name for name in STRONGEST_FIRST if name in settings.attacks)
    mixtures = [name for name in table2_models(settings) if name.method != "standalone"]
    measured = gate_accuracies(settings, mixtures)
    measured = measured[measured["attack"] == ATTACK_TITLES[attack]]
    cells = []
    by = ["data", "regime", "model", "attacked_gate"]
    for (data, *labels), group in measured.groupby(by, sort=False):
        label = {"data": data} if settings.further_datasets else {}
        label |= dict(zip(("training", "model", "attacked gate"), labels, strict=True))
        columns = {Column(text): list(group[state]) for state, text in GATE_STATES.items()}
        cells += row_of_cells(label, columns, int(group["images"].iloc[0]))
    return pd.DataFrame(cells)


def gate_accuracies(settings: Settings, names: Sequence[ModelName]) -> pd.DataFrame:
    """One line a model, attack and attacked gate: data, regime, model, seed, attack ("clean" or its
    title), attacked_gate ("" if clean), images, and the shares of a `GateAccuracy`."""
    lines = []
    for name in names:
        result = stored_record(settings, name, "attacks")["result"]
        clean = {"attack": "clean", "attacked_gate": "", **result["clean"]["test"]}
        for entry in [clean, *result["attacks"]]:
            network = NETWORKS[name.expert]
            alone = network if name.expert in BASELINES else f"stand-alone {network}"
            attack = entry["attack"] if entry is clean else ATTACK_TITLES[entry["attack"]]
            label = {
                "data": DATA[name.dataset],
                "regime": name.regime,
                "model": MIXTURES.get(name.method, alone),
                "seed": name.seed,
            }
            lines.append(label | entry | {"attack": attack})
    return pd.DataFrame(lines)


def write_table(
    settings: Settings, frame: pd.DataFrame, name: str, caption: str, records: Sequence[Path]
) -> list[Path]:
    """Write figures/<preset>/<name>.csv (the tidy numbers), .md, .tex and .json (see artefacts).

    What the numbers rest on is added to the caption. records: the files that the frame was read
    from. Returns the paths.
    """
    caption = f"{caption} {evidence(settings, frame)}"
    return write_text_table(settings, frame, printed(frame), name, caption, records)


def write_text_table(
    settings: Settings,
    frame: pd.DataFrame,
    text: pd.DataFrame,
    name: str,
    caption: str,
    records: Sequence[Path],
) -> list[Path]:
    """As `write_table`, for a frame of any form; text: what of it is printed."""
    escaped = caption
    for special in r"%&_#$":
        escaped = escaped.replace(special, f"\\{special}")
    contents = {
        "csv": frame.to_csv(index=False),
        "md": f"{caption}\n\n{text.to_markdown(index=False, disable_numparse=True)}\n",
        "tex": text.to_latex(index=False, escape=True, caption=escaped, label=f"tab:{name}"),
    }
    return write_artefact(settings, name, contents, caption, records)


def stored_record(settings: Settings, name: ModelName, kind: str) -> dict:
    """The record of a kind, "attacks", "scores" or "adaptive"; raises FileNotFoundError, with the
    command that makes it, where there is none."""
    path = record_path(settings, name, kind)
    if not path.exists():
        command = f"make reproduce PRESET={settings.preset}"
        notebooks = {"attacks": "03_attacks", "adaptive": "06_adaptive_attacks"}
        if kind in notebooks:
            command = (
                f"papermill notebooks/{notebooks[kind]}.ipynb out.ipynb "
                f"-p preset {settings.preset} -p model {name}"
            )
        raise FileNotFoundError(f"{name} has no record of its {kind} yet ({path}); run: {command}")
    return read_record(path)


def without_seeds(names: Sequence[ModelName]) -> Iterable[list[ModelName]]:
    """The names that differ by their seed alone, together."""
    groups: dict[ModelName, list[ModelName]] = {}
    for name in names:
        groups.setdefault(name.model_copy(update={"seed": 0}), []).append(name)
    return groups.values()


def _scores(results: Sequence[dict]) -> dict[Column, list[float]]:
    return {column: [result[key] for result in results] for key, column in SCORES.items()}


def _attack_row(
    settings: Settings, measured: pd.DataFrame, label: dict, reported: tuple[str, str]
) -> list[dict]:
    """Clean accuracy and accuracy under every attack on the first of the gates to attack."""
    cells = []
    for attack in ("clean", *(ATTACK_TITLES[attack] for attack in settings.attacks)):
        gate = "" if attack == "clean" else settings.attack_gates[0]
        these = measured[(measured["attack"] == attack) & (measured["attacked_gate"] == gate)]
        if len(these) < len(settings.seeds):
            raise ValueError(
                f"a record of {', '.join(label.values())} lacks {attack} on the {gate} gate: "
                f"it is of other settings; run: make reproduce PRESET={settings.preset}"
            )
        columns = {Column(attack): list(these["switched"])}
        cells += row_of_cells(label, columns, int(these["images"].iloc[0]), reported)
    return cells


def row_of_cells(
    label: dict[str, str],
    columns: dict[Column, list[float]],
    images: int,
    reported: tuple[str, str] = ("", ""),
) -> list[dict]:
    """A line of a tidy table, with a cell for every column; reported: artefact and row of
    reported.csv that the line answers."""
    paper = reported_numbers()
    artefact, row = reported
    paper_data = "CIFAR-100" if row.startswith("CIFAR-100") else "CIFAR-10"
    cells = []
    for column, numbers in columns.items():
        values = [number * column.scale for number in numbers]
        key = (artefact, row, column.name)
        cells.append(
            label
            | {
                "column": column.name,
                "unit": column.unit,
                "value": mean(values),
                "standard_deviation": stdev(values) if len(values) > 1 else None,
                "count": len(values),
                "images": images,
                "paper_data": paper_data if key in paper else "",
                "paper": paper.get(key),
            }
        )
    return cells
