"""Differences between two models, image by image, that the paper's claims are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from immunity_lib.per_image import unpacked, worst_case
from immunity_lib.printing import DATA, NETWORKS
from immunity_lib.recipes import (
    METHODS,
    MIXTURES,
    ModelName,
    judged_models,
    table1_models,
    table2_models,
    table3_models,
)
from immunity_lib.settings import Settings
from immunity_lib.tables import stored_record

Method = Annotated[str, Field(pattern=f"^({'|'.join(METHODS)})$")]


class NotTestable(Exception):
    """Why a preset cannot say anything about a claim."""


class Measure(BaseModel):
    """A difference between two models on the same images, or the two sides of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Accuracy(Measure):
    """Accuracy of a model minus that of the strongest of the others, in points: clean, or the mean
    over the preset's attacks on the switched gate, expected over the switches."""

    kind: Literal["accuracy"]
    regime: Literal["standard", "adversarial"]
    under: Literal["clean", "attacks"]
    model: Method
    against: Literal["baselines"] | list[Method]
    data: str = ""  # another data set than the preset's first


class Score(Measure):
    """A heat-map score of a model relative to another's, in % of the latter; Table 1's networks."""

    kind: Literal["score"]
    score: Literal["independence_score", "causality_score", "mutual_information"]
    model: Method
    against: Method


class Network(Measure):
    """Clean accuracy with one network minus that with the best other one of Table 1, in points."""

    kind: Literal["network"]
    method: Literal["ensemble", "immunity"]
    network: str


class Switching(Measure):
    """Worst case over adaptive attacks: the switched gate minus the plain ensemble, in points."""

    kind: Literal["switching"]
    regime: Literal["standard", "adversarial"]
    model: Method


class WorstCase(Measure):
    """Worst case over adaptive attacks, expected over the switches: two models, in points."""

    kind: Literal["worst-case"]
    regime: Literal["standard", "adversarial"]
    model: Method
    against: Method


def paired_differences(settings: Settings, measure: Measure) -> tuple[np.ndarray, str]:
    """Differences (S, B) for S seeds and B images, in shares of 1, and whom they are held against.

    Raises NotTestable where the preset has no such models."""
    if isinstance(measure, Accuracy):
        return _accuracy_differences(settings, measure)
    if isinstance(measure, Score):
        every = [*table1_models(settings), *table3_models(settings)]
        own, other = (
            _scores(settings, _of(settings, every, method), measure.score)
            for method in (measure.model, measure.against)
        )
        return (own - other) / other.mean(), _title(settings, measure.against)
    if isinstance(measure, Network):
        return _network_differences(settings, measure)
    every = [name for name in judged_models(settings) if name.regime == measure.regime]
    own = _worst_cases(settings, _of(settings, every, measure.model))
    if isinstance(measure, Switching):
        return own["uniform"] - own["failure"], "its plain ensemble"
    other = _worst_cases(settings, _of(settings, every, measure.against))
    return other["failure"] - own["failure"], _title(settings, measure.against)


def _accuracy_differences(settings: Settings, measure: Accuracy) -> tuple[np.ndarray, str]:
    data = measure.data or settings.dataset
    if data not in settings.datasets:
        raise NotTestable(f"the preset has no {DATA[data]}")
    every = dict.fromkeys([*table2_models(settings), *table3_models(settings)])
    every = [name for name in every if (name.dataset, name.regime) == (data, measure.regime)]
    own = _of(settings, every, measure.model)
    if measure.against == "baselines":
        others = {
            NETWORKS[baseline]: [
                name for name in every if (name.method, name.expert) == ("standalone", baseline)
            ]
            for baseline in settings.baselines
        }
        if not others:
            raise NotTestable("the preset has no baselines")
    else:
        others = {
            _title(settings, method): _of(settings, every, method) for method in measure.against
        }
    read = _clean if measure.under == "clean" else _attacked
    return _above_the_best(settings, own, others, read)


def _network_differences(settings: Settings, measure: Network) -> tuple[np.ndarray, str]:
    names = [name for name in table1_models(settings) if name.method == measure.method]
    by_network = {
        network: [name for name in names if name.expert == network]
        for network in settings.compared_experts
    }
    own = by_network.pop(measure.network, [])
    if not own or not by_network:
        raise NotTestable(f"the preset does not compare {NETWORKS[measure.network]} with others")
    others = {NETWORKS[network]: group for network, group in by_network.items()}
    read = _experts_alone if measure.method == "ensemble" else _clean_of_scores
    return _above_the_best(settings, own, others, read)


def _above_the_best(
    settings: Settings,
    own: Sequence[ModelName],
    others: Mapping[str, Sequence[ModelName]],
    read: Callable[[Settings, Sequence[ModelName]], np.ndarray],
) -> tuple[np.ndarray, str]:
    values = {title: read(settings, group) for title, group in others.items()}
    best = max(values, key=lambda title: values[title].mean())
    return read(settings, own) - values[best], best


def _of(settings: Settings, names: Sequence[ModelName], method: str) -> list[ModelName]:
    """The preset's mixtures of a method, a model a seed."""
    found = [name for name in names if name.method == method and name.expert == settings.expert]
    found = list(dict.fromkeys(found))
    if not found:
        raise NotTestable(f"the preset has no {_title(settings, method)} for it")
    return found


def _title(settings: Settings, method: str) -> str:
    return MIXTURES.get(method, f"independent {NETWORKS[settings.expert]}s")


def _clean(settings: Settings, names: Sequence[ModelName]) -> np.ndarray:
    entries = [
        stored_record(settings, name, "attacks")["result"]["clean"]["test"] for name in names
    ]
    return np.stack([unpacked(one["per_image"]["gates"]) / one["gates"] for one in entries])


def _attacked(settings: Settings, names: Sequence[ModelName]) -> np.ndarray:
    """Mean over the attacks on the first of the preset's gates."""
    rows = []
    for name in names:
        entries = stored_record(settings, name, "attacks")["result"]["attacks"]
        rows.append([
            unpacked(entry["per_image"]["gates"]) / entry["gates"]
            for entry in entries
            if entry["attacked_gate"] == settings.attack_gates[0]
        ])  # fmt: skip
    return np.array(rows).mean(1)


def _scores(settings: Settings, names: Sequence[ModelName], score: str) -> np.ndarray:
    return np.stack([unpacked(_score_result(settings, name)["per_image"][score]) for name in names])


def _experts_alone(settings: Settings, names: Sequence[ModelName]) -> np.ndarray:
    results = [_score_result(settings, name) for name in names]
    return np.stack(
        [unpacked(one["per_image"]["experts"]) / len(one["expert_accuracy"]) for one in results]
    )


def _clean_of_scores(settings: Settings, names: Sequence[ModelName]) -> np.ndarray:
    results = [_score_result(settings, name) for name in names]
    return np.stack(
        [unpacked(one["per_image"]["gates"]) / one["accuracy"]["gates"] for one in results]
    )


def _score_result(settings: Settings, name: ModelName) -> dict:
    return stored_record(settings, name, "scores")["result"]["test"]


def _worst_cases(settings: Settings, names: Sequence[ModelName]) -> dict[str, np.ndarray]:
    found = [
        worst_case(stored_record(settings, name, "adaptive")["result"]["attacks"]) for name in names
    ]
    return {key: np.stack([one[key] for one in found]) for key in found[0]}
