"""Models by name: which there are in a preset, which each table needs, and how each is trained.

A model is named by what it is, `<data>-<method>-<expert>-<regime>-seed<k>`; its variants are configurations."""

import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from immunity_lib.recipe import BASELINES, DATASETS, EXPERT_NAMES, Recipe
from study.settings import Settings, read_yaml, validate

REGIMES = {
    "standard": "on clean images",
    "adversarial": "on adversarial images alone (Madry et al. 2018, arXiv 1706.06083)",
    "trades": "on clean images, and to answer alike under attack (Zhang et al. 2019, 1901.08573)",
    "alp": "adversarial logit pairing (Kannan et al. 2018, arXiv 1803.06373)",
}
METHODS = {
    "standalone": "a single network, the mixture of one",
    "standalone-wide": "a single network as large as the mixture: wider by the root of N",
    "ensemble": "independently trained stand-alone networks under equal weights",
    "moe": "the mixture alone: beta = gamma = 0",
    "moe-mi": "with the mutual information loss: gamma = 0",
    "moe-ps": "with the position stability loss: beta = 0",
    "immunity": "with both losses",
    "immunity-literal": "with both losses on heat maps as the equations literally say",
}
SINGLE = ("standalone", "standalone-wide")  # of one expert
CHANGES = {  # of a preset's recipe, by method
    # One expert has nothing to be different from, and its own loss is the mixture's
    **dict.fromkeys(SINGLE, {"experts": 1, "alpha": 0.0, "beta": 0.0, "gamma": 0.0}),
    "moe": {"beta": 0.0, "gamma": 0.0}, "moe-mi": {"gamma": 0.0}, "moe-ps": {"beta": 0.0},
    "immunity-literal": {"floor": 0.0, "warmup_epochs": 0.0},
}  # fmt: skip

# As readers call them: the mixtures of the ablation, data sets, networks, attacks (the weakest first)
MIXTURES = {"moe": "MoE", "moe-mi": "MoE+MI", "moe-ps": "MoE+PS", "immunity": "Immunity"}
DATA = {"parts10": "Parts-10", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "images": "own images"}
NETWORKS = {
    "resnet18": "ResNet18", "densenet121": "DenseNet121", "googlenet": "GoogLeNet",
    "googlenet-kuangliu": "GoogLeNet-kuangliu", "pdarts": "P-DARTS", "advrush": "AdvRush",
    "robnet-free": "RobNet-free", "robnet-large-v1": "RobNet-large-v1", "robnet-large-v2": "RobNet-large-v2",
}  # fmt: skip
ATTACK_TITLES = {"fgsm": "FGSM", "bim": "BIM", "mim": "MIM", "cw": "C&W", "apgd": "APGD", "pgd": "PGD"}

PARTS = {"dataset": DATASETS, "method": METHODS, "expert": EXPERT_NAMES, "regime": REGIMES}  # of a name
_NAME = "-".join(f"(?P<{part}>{'|'.join(names)})" for part, names in PARTS.items())
_NAME += "-seed(?P<seed>0|[1-9][0-9]{0,17})"  # each in one spelling, and no larger than PyTorch takes it
_read_once = cache(read_yaml)


class ModelName(BaseModel, frozen=True):
    """The parts of a model's name; `str()` puts them together, `parse` takes them apart."""

    dataset: str
    method: str
    expert: str
    regime: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}-{self.method}-{self.expert}-{self.regime}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Self:
        if not (match := re.fullmatch(_NAME, name)):
            known = ", ".join(f"{part} from {', '.join(names)}" for part, names in PARTS.items())
            told = "one is <data>-<method>-<expert>-<regime>-seed<k> with"
            raise ValueError(f"{name!r} is no model's name; {told} {known}")
        return cls(**match.groupdict())

    @property
    def title(self) -> str:
        """A mixture as readers call it."""
        return f"{MIXTURES[self.method]}, {self.regime} training"


def method_title(method: str, network: str) -> str:
    """A method with a network, as readers call it."""
    titles = {"standalone": "stand-alone {}", "standalone-wide": "stand-alone {}, as large as the mixture"}
    titles |= {"ensemble": "independent {}s"} | MIXTURES
    return titles.get(method, method).format(NETWORKS[network]).removeprefix("stand-alone " * (network in BASELINES))


def recipe_of(settings: Settings, name: ModelName) -> Recipe:
    """How this model is trained: the preset's recipe, what the method changes, a baseline's own recipe."""
    if name.method == "ensemble":
        raise ValueError(f"{name} is not trained; its members are: {members(settings, name)}")
    changes: dict[str, Any] = {"dataset": name.dataset, "expert": name.expert, "seed": name.seed}
    if name.expert in BASELINES:
        changes |= {"layers": settings.baseline_layers, "width": settings.baseline_width or settings.recipe.width}
    if published := own_recipe(settings, name):
        changes |= published["fields"]
    changes |= CHANGES.get(name.method, {})
    if name.method == "standalone-wide":
        changes["width"] = changes.get("width", settings.recipe.width) * settings.recipe.experts**0.5
    weights = {"trades": settings.trades_weight, "alp": settings.pairing_weight}
    if name.regime in weights:
        changes |= {"pairing": name.regime, "pairing_weight": weights[name.regime]}
    # What a model does not use stays at its default, so that changing it trains nothing anew
    unused = ["floor", "warmup_epochs", "coordinates", "explained"] * (name.method in (*SINGLE, "moe"))
    if name.regime == "standard":
        changes["adversary"] = None
        unused += ["adversary_steps", "eps", "step_size"]
    changes |= {field.name: field.default for field in fields(Recipe) if field.name in unused}
    return validate(Recipe, asdict(settings.recipe) | changes)


def own_recipe(settings: Settings, name: ModelName) -> dict[str, Any] | None:
    """Its authors' recipe ("source", "gaps", "fields" of a `Recipe`): of a stand-alone baseline, if the preset asks."""
    if (name.method, settings.baseline_recipes) != ("standalone", "own") or name.expert not in BASELINES:
        return None
    content = _read_once(Path(__file__).with_name("recipes.yaml"))
    kind = "standard" if name.regime == "standard" else "adversarial"
    return content["recipes"][content["networks"][name.expert][kind]]


def members(settings: Settings, ensemble: ModelName) -> list[ModelName]:
    """The stand-alone networks that an ensemble is made of: N seeds of its own."""
    count = settings.recipe.experts
    seeds = range(ensemble.seed * count, (ensemble.seed + 1) * count)
    return [ensemble.model_copy(update={"method": "standalone", "seed": seed}) for seed in seeds]


def single(settings: Settings, names: list[ModelName]) -> list[ModelName]:
    """The trained models behind these names; an ensemble stands for its members."""
    return [one for name in names for one in (members(settings, name) if name.method == "ensemble" else [name])]


def table1_models(settings: Settings) -> list[ModelName]:
    """Independently trained networks and Immunity, for every compared network."""
    return _models(settings, "ensemble", "immunity", experts=settings.compared_experts)


def table2_models(settings: Settings) -> list[ModelName]:
    """Every baseline and method under every regime, on every data set."""
    found = []
    for dataset, regime in product(settings.datasets, settings.regimes):
        of = {"datasets": [dataset], "regimes": [regime]}
        found += _models(settings, "standalone", experts=settings.baselines, seeds=settings.baseline_seeds, **of)
        found += _models(settings, *settings.controls, "moe", "immunity", **of)
    return found


def table3_models(settings: Settings) -> list[ModelName]:
    """The ablation, under standard training."""
    return _models(settings, *MIXTURES)


def first_model(settings: Settings, method: str) -> ModelName:
    """Of a method, the model that stands for it: the preset's own expert and data, standard training, first seed."""
    return _models(settings, method)[0]


def measured_models(settings: Settings, kind: str) -> list[ModelName]:
    """Every model that has a frame of this kind, once: "attacks" those of Tables 2 and 3, "scores" of Tables 1 and 3,
    "adaptive" those of Table 2, on the first data set, that the preset's `adaptive` names."""
    if kind == "adaptive":
        here = [name for name in table2_models(settings) if name.dataset == settings.recipe.dataset]
        kinds = ["baselines" if name.expert in settings.baselines else name.method for name in here]
        return [name for name, kind in zip(here, kinds, strict=True) if kind in settings.adaptive]
    tables = [table1_models if kind == "scores" else table2_models, table3_models]
    return list(dict.fromkeys(name for table in tables for name in table(settings)))


def asked_models(settings: Settings, kind: str) -> list[ModelName]:
    """Those that have a frame of this kind, or the one of them that `model` names; raises ValueError for any other."""
    names = measured_models(settings, kind)
    chosen = [name for name in names if settings.model in ("", str(name))]
    if not chosen:
        listed = "\n".join(map(str, names))
        raise ValueError(f"{settings.model} is none of preset {settings.preset}'s models here; those are:\n{listed}")
    return chosen


def explored_models(settings: Settings) -> list[ModelName]:
    """The mixtures that the explorer offers: every variant of the ablation, and of every regime."""
    return _models(settings, *MIXTURES, regimes=list(dict.fromkeys(["standard", *settings.regimes])), seeds=1)


def surrogates(settings: Settings, attacked: ModelName) -> list[ModelName]:
    """The other mixtures that were trained like this one, to attack it through."""
    others = [attacked.model_copy(update={"method": method}) for method in MIXTURES if method != attacked.method]
    return [name for name in measured_models(settings, "attacks") if name in others]


def trained_models(settings: Settings) -> list[ModelName]:
    """Every model that the preset trains, once."""
    named = [*measured_models(settings, "attacks"), first_model(settings, "immunity-literal"), *table1_models(settings)]
    return list(dict.fromkeys(single(settings, named)))


def _models(
    settings: Settings, *methods: str, experts: Sequence[str] | None = None, regimes: Sequence[str] = ("standard",),
    datasets: Sequence[str] | None = None, seeds: int | None = None,
) -> list[ModelName]:  # fmt: skip
    """Every combination, with every seed or the first few; by default of the preset's own expert and data."""
    experts = [settings.recipe.expert] if experts is None else experts
    parts = product(datasets or [settings.recipe.dataset], regimes, experts, methods, settings.seeds[:seeds])
    return [ModelName(dataset=d, regime=r, expert=e, method=m, seed=s) for d, r, e, m, s in parts]
