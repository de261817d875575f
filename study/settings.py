"""What a preset and a notebook's parameters may say, checked strictly before any computing.

A preset is flat YAML: the study's own fields (`Settings`) and those of training (`immunity_lib.recipe.Recipe`)."""

import ast
import os
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from immunity_lib.recipe import SMALLEST_EPS, BaselineName, DatasetName, ExpertName, Recipe

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "presets"

AttackName = Literal["fgsm", "bim", "mim", "pgd", "cw", "apgd"]
GateName = Literal["trained", "uniform", "switch", "switch-per-image"]
ControlName = Literal["standalone", "standalone-wide", "ensemble"]
AdaptiveName = Literal["baselines", ControlName, "moe", "immunity"]
Regime = Literal["standard", "adversarial", "trades", "alp"]


def _exactly(value: Any) -> Any:
    """A decimal as it was written: 0.031 means 31/1000, not the nearest binary fraction; and yes is no number."""
    if isinstance(value, str) and "e" in value.lower():
        with suppress(ValueError):  # a Fraction would write out all zeros of 1e999999999
            value = float(value)
    return str(value) if isinstance(value, float | bool) else value


_exact = BeforeValidator(_exactly)
Count = Annotated[int, _exact, Field(gt=0, lt=2**31)]
Magnitude = Annotated[Fraction, _exact, Field(ge=SMALLEST_EPS, le=1)]
Weight = Annotated[float, _exact, Field(ge=0)]
Checked = TypeVar("Checked")
_adapter = cache(TypeAdapter)  # it takes milliseconds to build, and each record's recipe is checked
Seed = Annotated[int, _exact, Field(ge=0, lt=2**32)]

# Of a recipe, what the study itself sets for each model
SET_BY_MODEL = {"seed", "layers", "auxiliary_weight", "drop_path", "pairing", "pairing_weight"}
TRAINING = {field.name for field in fields(Recipe)} - SET_BY_MODEL
# Of this machine and moment; the rest of the settings is what a result rests on
NOT_OF_THE_RESULT = {"model", "data_folder", "output_folder", "interactive", "pretrained"}


class Settings(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    preset: str = Field(description="its name, under which results lie", pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    model: str = Field("", description="one model of the preset by name; empty: all of them")
    data_folder: str = Field("", description="where CIFAR (empty: data/, it is downloaded) or the own images lie")
    output_folder: str = Field("", description="where runs/ and figures/ go; empty: the project")
    interactive: bool = Field(True, description="show widgets; batch runs set this to false")
    pretrained: bool = Field(True, description="use the project's own weights; `make reproduce` trains all anew")
    recipe: Recipe = Field(description="how models are trained, and on what; flat in the preset")

    # images of each test split
    test_images: Count | None = Field(None, description="for clean accuracy and scores; null: all")
    attacked_images: Count = Field(1000, description="of the test images, for attacks")

    # models
    compared_experts: list[ExpertName] = Field(description="the networks of Table 1", min_length=1)
    further_datasets: list[DatasetName] = Field([], description="of Table 2, beside `dataset`")
    baselines: list[BaselineName] = Field([], description="networks to compare with in Table 2")
    baseline_layers: Count | None = Field(None, description="cells of each baseline; null: as published", ge=3)
    baseline_width: Weight | None = Field(None, description="factor on the channels of each; null: `width`", gt=0, le=4)
    baseline_seeds: Count | None = Field(None, description="train them with so many of the seeds; null: all")
    baseline_recipes: Literal["own", "preset"] = Field("own", description="train baselines as published, or as all")
    controls: list[ControlName] = Field(["standalone"], description="single networks and ensembles of Table 2")
    adaptive: list[AdaptiveName] = Field(
        ["moe", "immunity"], description="which models of Table 2 meet the adaptive attacks", min_length=1
    )
    regimes: list[Regime] = Field(["standard", "adversarial"], min_length=1)
    seeds: list[Seed] = Field([0], min_length=1)
    trades_weight: Weight = Field(6.0, description="of the divergence that TRADES adds")
    pairing_weight: Weight = Field(0.5, description="of adversarial logit pairing (alp)")

    # attacks, at the recipe's eps and step_size
    attacks: list[AttackName] = Field(["fgsm", "bim", "mim", "pgd"], min_length=1)
    steps: Count = 20
    magnitudes: list[Magnitude] = Field([], description="further eps of PGD, on the first of the gates")
    attack_gates: list[GateName] = Field(["switch", "uniform"], min_length=1)
    adaptive_images: Count | None = Field(None, description="test images for adaptive attacks; null: `attacked_images`")
    # of the gate for each gradient of EOTPGD, an attack for each
    gate_samples: list[Count] = Field([1, 2, 5, 10, 20], min_length=1)
    auto_attack_images: Count | None = Field(None, description="of those, for AutoAttack; null: all")
    auto_attack_steps: Count = Field(
        100, description="its Square has 50 queries for each, Square alone 10, random noise 5 draws"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong = []
        for field, values in [("datasets", self.datasets), *self]:
            told = [*map(budget_text, values)] if field == "magnitudes" else values  # by which tables know them
            if isinstance(values, list) and len(set(told)) < len(values):
                wrong.append(f"{field} repeat: {values}; give each once")
        if (experts := self.recipe.experts) < 2:
            wrong.append(f"experts is {experts}; a mixture has at least 2")
        if self.recipe.adversary is None and self.regimes != ["standard"]:
            wrong.append(f"regimes are {self.regimes}, but adversary is null; choose pgd or ffgsm, or standard alone")
        if self.recipe.expert in self.baselines:
            wrong.append(f"baselines have {self.recipe.expert}, the expert itself; leave it to controls")
        if absent := {*self.adaptive} - {*self.controls, "moe", "immunity", *["baselines"] * bool(self.baselines)}:
            wrong.append(f"adaptive has {', '.join(sorted(absent))}, but no such model is in controls or baselines")
        if "images" in self.datasets and not self.data_folder:
            wrong.append("data set images, but data_folder is empty; name the folder with a folder for each class")
        for field in ("attacked_images", "adaptive_images"):
            count, available = getattr(self, field), self.test_images
            if None not in (available, count) and count > available:
                wrong.append(f"{field} is {count}, but test_images only {available}; lower it, or raise those")
        if (few := self.auto_attack_images or 0) > self.adaptive_count:
            wrong.append(f"auto_attack_images is {few}, but adaptive_images only {self.adaptive_count}; lower it")
        if wrong:
            raise ValueError("\n".join(wrong))
        return self

    @property
    def datasets(self) -> list[str]:
        """The data sets of Table 2; the first is that of everything else."""
        return [self.recipe.dataset, *self.further_datasets]

    @property
    def adaptive_count(self) -> int:
        return self.adaptive_images or self.attacked_images

    @property
    def runs(self) -> Path:
        """Checkpoints, logs, records and executed notebooks of this preset."""
        return Path(self.output_folder or ROOT) / "runs" / self.preset

    @property
    def figures(self) -> Path:
        return Path(self.output_folder or ROOT) / "figures" / self.preset


def budget_text(eps: float) -> str:
    """A budget in 255ths, as papers write it: 8/255, 7.905/255."""
    return f"{255 * float(eps):.4g}/255"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(preset: str, **changes: Any) -> Settings:
    """Settings of a preset, by its name or by the path of a YAML file, with some fields changed.
    A relative folder in the file starts from there. Raises ValueError that says what is wrong and would be right."""
    own = PRESETS / f"{preset}.yaml"
    path = own if os.path.isfile(own) else Path(os.path.expanduser(str(preset)))
    if not os.path.isfile(path):
        valid = ", ".join(preset_names())
        raise ValueError(f"unknown preset {preset!r}; valid names: {valid}, or the path of a YAML file")
    content = read_yaml(path)
    for field in ("data_folder", "output_folder"):
        if isinstance(folder := content.get(field), str) and folder and "://" not in folder:
            content[field] = str(path.resolve().parent / os.path.expanduser(folder))
        if changes.get(field) in (None, ""):  # it says nothing
            changes.pop(field, None)
    settings = read_settings({"preset": path.stem} | content | changes)
    if settings.preset in preset_names() and path.resolve().parent != PRESETS and not settings.output_folder:
        told = f"{path} says preset: {settings.preset}, as one of the project's does, whose results it would overwrite"
        raise ValueError(f"{told}; give it a name of its own, or an output_folder")
    return settings


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's own reader takes the last of several."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise ValueError(f"{', '.join(sorted(repeated))} given twice; give each once")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; raises ValueError that names a file that is none."""
    text = path.read_bytes()  # PyYAML knows UTF-16 from UTF-8
    try:
        content = _EachKeyOnce(text).get_single_data()
    except Exception as error:  # for a date that is none or a thousand brackets, it raises errors of all kinds
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold fields like 'epochs: 10'; found {reprlib.repr(content):.200}")
    return content


def read_settings(content: Mapping[str, Any]) -> Settings:
    """Settings from a preset's flat fields; raises ValueError with all that is wrong with them."""
    for field in ("data_folder", "output_folder"):
        folder = content.get(field, "")
        if isinstance(folder, str) and "://" in folder:
            ask = "name a folder of this machine, on which a remote storage may be mounted"
            raise ValueError(f"{field} = {folder!r} is an address; {ask}")
        if isinstance(folder, str) and folder:  # absolute, since kernels are started elsewhere than commands
            content = {**content, field: os.path.abspath(os.path.expanduser(folder))}
    recipe = {"adversary": "pgd"} | {  # what regimes under attack use
        name: _exactly(value) if name in ("eps", "step_size") or isinstance(value, bool) else value
        for name, value in content.items()
        if name in TRAINING
    }
    if "recipe" in content:
        raise ValueError("unknown parameter 'recipe'; its fields stand beside the others, as 'epochs: 10'")
    own = {name: value for name, value in content.items() if name not in TRAINING}
    return validate(Settings, {**own, "recipe": recipe})


def flat(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file beside a figure has them, with the recipe's fields beside the others, as a preset has them."""
    return {field: value for field, value in asked.items() if field != "recipe"} | asked.get("recipe", {})


def validate(kind: type[Checked], content: Mapping[str, Any]) -> Checked:
    """Settings or a recipe of these fields; raises ValueError with all that is wrong with them."""
    try:
        return _adapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(problem) for problem in error.errors())) from None


def _explain(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"] if part != "recipe")
    if problem["type"] == "extra_forbidden":
        valid = sorted((Settings.model_fields.keys() - {"recipe"}) | TRAINING)
        return f"unknown parameter {name!r}; valid names: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"{name} is missing: {Settings.model_fields[name].description}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "list_type":
        message += f"; in a preset, or by papermill's -y '{name}: [...]'"
    if problem["type"] == "string_pattern_mismatch":  # a name that becomes a folder's
        message = "give it letters, digits, '.', '_' and '-' alone, 100 at most, the first a letter or digit"
    if problem["type"] == "value_error" and not name:  # of several fields, which it names
        return message
    return f"{name or 'a name'} = {reprlib.repr(problem['input']):.200}: {message}"


PARAMETERS = "# Parameters"  # how a cell of parameters begins, the notebook's and papermill's


def notebook_settings(namespace: Mapping[str, Any]) -> Settings:
    """Settings from a notebook's `globals()`, called in the cell right below its parameters.
    The preset that `preset` names, and on top every parameter that was set: in the notebook's own cell of parameters,
    as it ran last, and in the one that papermill puts behind it; no other names of the kernel. A parameter that is no
    field is an error, since papermill passes unknown ones on without one."""
    names, own = set[str](), set[str]()
    for cell in namespace.get("In", []):
        if cell.startswith(PARAMETERS):
            try:
                found = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name)]
            except SyntaxError:  # of a cell that was mended since
                continue
            # The notebook's own cell names its preset first, and begins anew
            given = {node.id for node in found if isinstance(node.ctx, ast.Store)}
            names, own = (names | given, own) if cell.startswith(f"{PARAMETERS}\n") else (given, given)
    if not names:
        raise ValueError(f"no cell of parameters has run: its first line is {PARAMETERS!r}, and must stay so")
    if missing := names - namespace.keys():
        raise ValueError(f"the cell of parameters has not set {', '.join(sorted(missing))}: run it again to its end")
    parameters = {name: namespace[name] for name in sorted(names)}
    if parameters.get("model") and "model" not in own:
        raise ValueError(f"model is {parameters['model']!r}, but this notebook is of all models; leave it out")
    return load_preset(parameters.pop("preset", "demo"), **parameters)
