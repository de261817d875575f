"""Models by name: which there are in a preset, and everything that determines each.

A model is named by what it is, `<data>-<method>-<expert>-<regime>-seed<k>`; its variants are
configurations of one model, and its recipe is all that its weights depend on.
"""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import chain
from typing import Literal

from pydantic import BaseModel, ConfigDict

from immunity_lib.data import DATASETS
from immunity_lib.experts import EXPERTS
from immunity_lib.settings import Settings

REGIMES = ("standard", "adversarial")
METHODS = {
    "standalone": "a single network, the mixture of one",
    "ensemble": "independently trained stand-alone networks under equal weights",
    "moe": "the mixture alone: beta = gamma = 0",
    "moe-mi": "with the mutual information loss: gamma = 0",
    "moe-ps": "with the position stability loss: beta = 0",
    "immunity": "with both losses",
    "immunity-literal": "with both losses on heat maps as the equations literally say",
}
_NAME = re.compile(
    "(?P<dataset>{})-(?P<method>{})-(?P<expert>{})-(?P<regime>{})-seed(?P<seed>[0-9]+)".format(
        *("|".join(sorted(names, key=len, reverse=True)) for names in
          (DATASETS, METHODS, EXPERTS, REGIMES))
    )
)  # fmt: skip


class ModelName(BaseModel):
    """The parts of a model's name; `str()` puts them together."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    method: str
    expert: str
    regime: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}-{self.method}-{self.expert}-{self.regime}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> ModelName:
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{name!r} is no model's name; one is <data>-<method>-<expert>-<regime>-seed<k> "
                f"with data from {', '.join(DATASETS)}, method from {', '.join(METHODS)}, "
                f"expert from {', '.join(EXPERTS)}, regime from {', '.join(REGIMES)}"
            )
        return cls(**match.groupdict())


class Recipe(BaseModel):
    """All that a trained model depends on, besides the code; fields as in `Settings`."""

    model_config = ConfigDict(frozen=True)

    dataset: str
    train_images: int | None
    validation_images: int
    expert: str
    experts: int
    width: float
    heatmap_layer: str
    gate_network: str
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: str
    gradient_clip: float
    augment: bool
    alpha: float
    beta: float
    gamma: float
    coordinates: str
    explained: str
    floor: float
    warmup_epochs: float
    adversary: Literal["pgd", "ffgsm"] | None  # None: standard training
    adversary_steps: int
    eps: Fraction
    step_size: Fraction


def recipe(settings: Settings, name: ModelName) -> Recipe:
    """What the preset says of this model's training."""
    if name.method == "ensemble":
        raise ValueError(f"{name} is not trained; its members are: {members(settings, name)}")
    changes: dict = {"expert": name.expert, "seed": name.seed}
    if name.method == "standalone":
        # One expert has nothing to be different from, and its own loss is the mixture's
        changes |= {"experts": 1, "alpha": 0.0}
    if name.method in ("standalone", "moe", "moe-ps"):
        changes["beta"] = 0.0
    if name.method in ("standalone", "moe", "moe-mi"):
        changes["gamma"] = 0.0
    if name.method == "immunity-literal":
        changes |= {"floor": 0.0, "warmup_epochs": 0.0}
    if name.regime == "standard":
        changes["adversary"] = None
    # What a model does not use stays at its default, so that changing it trains nothing anew
    unused: tuple[str, ...] = ()
    if name.method in ("standalone", "moe"):
        unused += ("floor", "warmup_epochs", "coordinates", "explained")
    if name.regime == "standard":
        unused += ("adversary_steps", "eps", "step_size")
    changes |= {field: Settings.model_fields[field].default for field in unused}
    return Recipe.model_validate(settings.model_dump() | changes)


def members(settings: Settings, ensemble: ModelName) -> list[ModelName]:
    """The stand-alone networks that an ensemble is made of: N seeds of its own."""
    first = ensemble.seed * settings.experts
    return [
        ensemble.model_copy(update={"method": "standalone", "seed": first + k})
        for k in range(settings.experts)
    ]


def table1_models(settings: Settings) -> list[ModelName]:
    """Independently trained networks and Immunity, for every compared network."""
    return [
        _name(settings, method, expert=expert, seed=seed)
        for expert in settings.compared_experts
        for method in ("ensemble", "immunity")
        for seed in settings.seeds
    ]


def table2_models(settings: Settings) -> list[ModelName]:
    """Every method under both regimes."""
    return [
        _name(settings, method, regime=regime, seed=seed)
        for regime in settings.regimes
        for method in ("standalone", "moe", "immunity")
        for seed in settings.seeds
    ]


def table3_models(settings: Settings) -> list[ModelName]:
    """The ablation, under standard training."""
    return [
        _name(settings, method, seed=seed)
        for method in ("moe", "moe-mi", "moe-ps", "immunity")
        for seed in settings.seeds
    ]


def literal_model(settings: Settings) -> ModelName:
    """The model that shows what the literal heat-map losses do."""
    return _name(settings, "immunity-literal", seed=settings.seeds[0])


def attacked_models(settings: Settings) -> list[ModelName]:
    """Every model of Tables 2 and 3, once."""
    return list(dict.fromkeys(table2_models(settings) + table3_models(settings)))


def trained_models(settings: Settings) -> list[ModelName]:
    """Every model that the preset trains, once."""
    of_table1 = chain.from_iterable(
        members(settings, name) if name.method == "ensemble" else [name]
        for name in table1_models(settings)
    )
    named = [*attacked_models(settings), literal_model(settings), *of_table1]
    return list(dict.fromkeys(named))


def _name(settings: Settings, method: str, expert="", regime="standard", seed=0) -> ModelName:
    expert = expert or settings.expert
    return ModelName(
        dataset=settings.dataset, method=method, expert=expert, regime=regime, seed=seed
    )
