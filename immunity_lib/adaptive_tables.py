"""What notebook 06 tells, from the records of adaptive attacks alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from immunity_lib.attacks.suite import BLACK_BOX, FAMILIES, WHITE_BOX
from immunity_lib.per_image import success_within, worst_case
from immunity_lib.recipes import MIXTURES, ModelName
from immunity_lib.settings import Settings
from immunity_lib.tables import Column, row_of_cells, stored_record, without_seeds

QUERIES = (1, 5, 20)


def worth_of_the_gate(settings: Settings, names: Sequence[ModelName]) -> pd.DataFrame:
    """The headline, a tidy table: a row for each judged mixture, image by image the worst case over
    all attacks.

    "same answer": share of images to which all gates give one answer, unattacked. Then accuracies:
    unattacked; under the paper's four attacks; and under all of them, expected over switches, for
    the plain ensemble, with the trained gate frozen, and under every switch at once. "switching"
    is what it adds to the plain ensemble. Last, how often an attacker succeeds who may try k times.
    """
    cells = []
    for group in without_seeds(names):
        rows = [_headline(result_of(settings, name)) for name in group]
        columns = {
            Column(title, "points" if title == "switching" else "%"): [row[title] for row in rows]
            for title in rows[0]
        }
        cells += row_of_cells(label_of(group[0]), columns, settings.judged_count)
    return pd.DataFrame(cells)


def _headline(result: dict) -> dict[str, float]:
    attacks, clean = result["attacks"], result["agreement"]
    worst = worst_case(attacks)
    paper = worst_case(attacks, ["paper"])
    left = {gate: 1 - worst[gate].mean() for gate in worst}
    return {
        "same answer": clean["unanimous"],
        "unattacked": clean["switched"],
        "paper's attacks": 1 - paper["failure"].mean(),
        "all attacks": left["failure"],
        "plain ensemble": left["uniform"],
        "switching": left["failure"] - left["uniform"],
        "frozen gate": left["trained"],
        "every switch": float((worst["failure"] == 0).mean()),
    } | {f"success in {k}": success_within(worst["failure"], k) for k in QUERIES}


def suite_table(settings: Settings, names: Sequence[ModelName]) -> pd.DataFrame:
    """Every attack on every judged mixture, a tidy table; "switching" is the expectation over
    switches minus the plain ensemble on the same images."""
    cells = []
    for group in without_seeds(names):
        by_attack: dict[str, list[dict]] = {}
        for name in group:
            for entry in result_of(settings, name)["attacks"]:
                by_attack.setdefault(entry["attack"], []).append(entry)
        for attack, entries in by_attack.items():
            label = label_of(group[0]) | {
                "kind": FAMILIES[entries[0]["family"]], "attack": attack, "sees": entries[0]["sees"]
            }  # fmt: skip
            columns = {
                Column("expected over switches"): [entry["switched"] for entry in entries],
                Column("plain ensemble"): [entry["uniform"] for entry in entries],
                Column("switching", "points"): [
                    entry["switched"] - entry["uniform"] for entry in entries
                ],
                Column("frozen gate"): [entry["trained"] for entry in entries],
                Column("every switch"): [entry["every"] for entry in entries],
            }
            cells += row_of_cells(label, columns, entries[0]["images"])
    return pd.DataFrame(cells)


def checks_table(settings: Settings, names: Sequence[ModelName]) -> pd.DataFrame:
    """One line a check: how many of the models pass, the evidence of those that do not (or of the
    first), why it matters and who says so."""
    findings: dict[str, list[tuple[str, dict]]] = {}
    for name in names:
        for finding in result_of(settings, name)["checks"]:
            findings.setdefault(finding["check"], []).append((str(name), finding))
    lines = []
    for check, found in findings.items():
        failed = [f"{name}: {one['evidence']}" for name, one in found if not one["passed"]]
        example = found[0][1]
        lines.append({
            "check": check,
            "passed": f"{len(found) - len(failed)} of {len(found)}",
            "evidence": "; ".join(failed) or f"for example {example['evidence']}",
            "why": example["why"],
            "source": example["source"],
        })  # fmt: skip
    return pd.DataFrame(lines)


def sampling_curves(settings: Settings, names: Sequence[ModelName]) -> pd.DataFrame:
    """Accuracy by the number of gates sampled for a gradient: regime, model, samples ("exact" for
    all of them), switched, and seconds; means over seeds."""
    lines = []
    for name in names:
        for entry in result_of(settings, name)["attacks"]:
            exact = entry["attack"] == "exact-expected"
            if entry["family"] == "sampled" or exact:
                samples = "exact" if exact else entry["attack"].removeprefix("eotpgd-")
                lines.append(
                    label_of(name)
                    | {"samples": samples} | {key: entry[key] for key in ("switched", "seconds")}
                )  # fmt: skip
    by = ["training", "model", "samples"]
    return pd.DataFrame(lines).groupby(by, sort=False, as_index=False).mean()


def budget_curves(settings: Settings, names: Sequence[ModelName]) -> pd.DataFrame:
    """Accuracy by eps: training, model, eps, switched; means over seeds."""
    lines = [
        label_of(name) | {"eps": eps, "switched": accuracy}
        for name in names
        for eps, accuracy in result_of(settings, name)["by_budget"]
    ]
    by = ["training", "model", "eps"]
    return pd.DataFrame(lines).groupby(by, sort=False, as_index=False).mean()


def result_of(settings: Settings, name: ModelName) -> dict:
    """What was measured of a judged model."""
    return stored_record(settings, name, "adaptive")["result"]


def label_of(name: ModelName) -> dict[str, str]:
    """What labels a judged mixture in a table."""
    return {"training": name.regime, "model": MIXTURES[name.method]}


def missed_without_gradients(result: dict) -> np.ndarray:
    """Indices of images that attacks without gradients fool more often than those with them: the
    ones to look at first."""
    white, black = (
        worst_case(result["attacks"], families)["failure"] for families in (WHITE_BOX, BLACK_BOX)
    )
    return np.flatnonzero(black > white + 1e-9)
