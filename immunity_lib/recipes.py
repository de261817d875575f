"""Models by name: which there are in a preset, and everything that determines each.

A model is named by what it is, `<data>-<method>-<expert>-<regime>-seed<k>`; its variants are
configurations of one model, and its recipe is all that its weights depend on. With loss weights of
its own the method has them behind it: `immunity-beta4-gamma0`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from pydantic import BaseModel, ConfigDict

from immunity_lib.baselines.published import PublishedRecipe, published_recipe
from immunity_lib.data import DATASETS
from immunity_lib.data.batches import MAXIMAL_ANGLE
from immunity_lib.experts import BASELINES, EXPERTS
from immunity_lib.settings import Settings

REGIMES = {
    "standard": "on clean images",
    "adversarial": "on adversarial images alone (Madry et al. 2018, arXiv 1706.06083)",
    "trades": "on clean images, and to answer alike under attack (Zhang et al. 2019, 1901.08573)",
    "alp": "adversarial logit pairing (Kannan et al. 2018, arXiv 1803.06373)",
}
METHODS = {
    "standalone": "a single network, the mixture of one",
    "ensemble": "independently trained stand-alone networks under equal weights",
    "moe": "the mixture alone: beta = gamma = 0",
    "moe-mi": "with the mutual information loss: gamma = 0",
    "moe-ps": "with the position stability loss: beta = 0",
    "immunity": "with both losses",
    "immunity-literal": "with both losses on heat maps as the equations literally say",
}
# The mixtures of the ablation, as readers call them
MIXTURES = {"moe": "MoE", "moe-mi": "MoE+MI", "moe-ps": "MoE+PS", "immunity": "Immunity"}
_NAME = re.compile(
    "(?P<dataset>{})-(?P<method>{})(-beta(?P<beta>[0-9.]+)-gamma(?P<gamma>[0-9.]+))?"
    "-(?P<expert>{})-(?P<regime>{})-seed(?P<seed>[0-9]+)".format(
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
    beta: float | None = None  # of eq (12); None: the preset's
    gamma: float | None = None

    def __str__(self) -> str:
        weights = "" if self.beta is None else f"-beta{self.beta:g}-gamma{self.gamma:g}"
        return f"{self.dataset}-{self.method}{weights}-{self.expert}-{self.regime}-seed{self.seed}"

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

    # Records from before these fields stand for their defaults
    pairing: Literal["none", "trades", "alp"] = "none"  # of clean and adversarial images
    pairing_weight: float = 0.0
    layers: int | None = None
    normalise: bool = True
    rotation: float = MAXIMAL_ANGLE
    cutout: int = 0
    auxiliary_weight: float = 0.0
    drop_path: float = 0.0
    decayed: Literal["everything", "convolutions and classifier"] = "everything"
    precision: str = "float32"
    compiled: bool = False


def recipe(settings: Settings, name: ModelName) -> Recipe:
    """What determines this model's training: the preset, what the method changes, and for a
    baseline the recipe of its authors."""
    if name.method == "ensemble":
        raise ValueError(f"{name} is not trained; its members are: {members(settings, name)}")
    changes: dict = {"expert": name.expert, "seed": name.seed}
    if name.expert in BASELINES:
        changes["layers"] = settings.baseline_layers
    if published := own_recipe(settings, name):
        changes |= published.fields
    if name.method == "standalone":
        # One expert has nothing to be different from, and its own loss is the mixture's
        changes |= {"experts": 1, "alpha": 0.0}
    if name.method in ("standalone", "moe", "moe-ps"):
        changes["beta"] = 0.0
    if name.method in ("standalone", "moe", "moe-mi"):
        changes["gamma"] = 0.0
    if name.beta is not None:
        changes |= {"beta": name.beta, "gamma": name.gamma}
    if name.method == "immunity-literal":
        changes |= {"floor": 0.0, "warmup_epochs": 0.0}
    weights = {"trades": settings.trades_weight, "alp": settings.pairing_weight}
    if name.regime in weights:
        changes |= {"pairing": name.regime, "pairing_weight": weights[name.regime]}
    else:
        changes["pairing_weight"] = 0.0
    if name.regime == "standard":
        changes["adversary"] = None
    # What a model does not use stays at its default, so that changing it trains nothing anew
    unused: tuple[str, ...] = ()
    if name.method in ("standalone", "moe"):
        unused += ("floor", "warmup_epochs", "coordinates", "explained")
    else:
        unused += ("compiled",)  # it cannot differentiate twice
    if name.regime == "standard":
        unused += ("adversary_steps", "eps", "step_size")
    changes |= {field: Settings.model_fields[field].default for field in unused}
    return Recipe.model_validate(settings.model_dump() | changes)


def own_recipe(settings: Settings, name: ModelName) -> PublishedRecipe | None:
    """The recipe of its authors, for a stand-alone baseline where the preset asks for it."""
    wanted = name.method == "standalone" and settings.baseline_recipes == "own"
    return (
        published_recipe(name.expert, name.regime) if wanted and name.expert in BASELINES else None
    )


def members(settings: Settings, ensemble: ModelName) -> list[ModelName]:
    """The stand-alone networks that an ensemble is made of: N seeds of its own."""
    first = ensemble.seed * settings.experts
    return [
        ensemble.model_copy(update={"method": "standalone", "seed": first + k})
        for k in range(settings.experts)
    ]


def single(settings: Settings, names: list[ModelName]) -> list[ModelName]:
    """The trained models behind these names; an ensemble stands for its members."""
    return [
        one
        for name in names
        for one in (members(settings, name) if name.method == "ensemble" else [name])
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
    """Every method and baseline under every regime, on every data set."""
    compared = [("standalone", baseline) for baseline in settings.baselines]
    compared += [(method, settings.expert) for method in ("standalone", "moe", "immunity")]
    return [
        _name(settings, method, expert, regime, seed, dataset)
        for dataset in settings.datasets
        for regime in settings.regimes
        for method, expert in compared
        for seed in settings.seeds
    ]


def table3_models(settings: Settings) -> list[ModelName]:
    """The ablation, under standard training."""
    return [_name(settings, method, seed=seed) for method in MIXTURES for seed in settings.seeds]


def swept_models(settings: Settings) -> list[ModelName]:
    """Immunity with one of its losses alone, its weight times each of the preset's factors. With
    the factors 0 and 1, these are models of Table 3."""
    weights = [(settings.beta * factor, 0.0) for factor in settings.weight_factors]
    weights += [(0.0, settings.gamma * factor) for factor in settings.weight_factors]
    return [
        _name(settings, "immunity", seed=seed).model_copy(update={"beta": beta, "gamma": gamma})
        for beta, gamma in weights
        for seed in settings.seeds
    ]


def literal_model(settings: Settings) -> ModelName:
    """The model that shows what the literal heat-map losses do."""
    return _name(settings, "immunity-literal", seed=settings.seeds[0])


def attacked_models(settings: Settings) -> list[ModelName]:
    """Every model of Tables 2 and 3 and of the sweep of loss weights, once."""
    every = table2_models(settings) + table3_models(settings) + swept_models(settings)
    return list(dict.fromkeys(every))


def judged_models(settings: Settings) -> list[ModelName]:
    """The mixtures under adaptive attacks: with and without the losses, under every regime."""
    return [
        _name(settings, method, regime=regime, seed=seed)
        for regime in settings.regimes
        for method in ("moe", "immunity")
        for seed in settings.seeds
    ]


def explored_models(settings: Settings) -> list[ModelName]:
    """The mixtures that the explorer offers: every variant of the ablation under every regime."""
    return [
        _name(settings, method, regime=regime, seed=settings.seeds[0])
        for regime in settings.regimes
        for method in MIXTURES
    ]


def surrogates(settings: Settings, judged: ModelName) -> list[ModelName]:
    """The other mixtures that were trained like this one, to attack it through."""
    return [
        name
        for name in attacked_models(settings)
        if name.method != "standalone"
        and name != judged
        and name == judged.model_copy(update={"method": name.method})
    ]


def trained_models(settings: Settings) -> list[ModelName]:
    """Every model that the preset trains, once."""
    of_table1 = single(settings, table1_models(settings))
    named = [*attacked_models(settings), literal_model(settings), *of_table1]
    return list(dict.fromkeys(named))


def _name(
    settings: Settings, method: str, expert="", regime="standard", seed=0, dataset=""
) -> ModelName:
    return ModelName(
        dataset=dataset or settings.dataset, method=method, expert=expert or settings.expert,
        regime=regime, seed=seed,
    )  # fmt: skip
