"""What a preset and a notebook's parameters may say, checked strictly before any computing.

A preset is a YAML file of these fields; papermill hands it to a notebook as it is (`-f`), and a
notebook opened by hand loads the one that its `preset` parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "presets"

DatasetName = Literal["parts10", "cifar10", "cifar100", "images"]
BaselineName = Literal["pdarts", "advrush", "robnet-free", "robnet-large-v1", "robnet-large-v2"]
ExpertName = Literal["resnet18", "densenet121", "googlenet", "googlenet-kuangliu", BaselineName]
AttackName = Literal["fgsm", "bim", "mim", "pgd", "cw", "apgd"]
GateName = Literal["trained", "uniform", "switch", "switch-per-image"]
Regime = Literal["standard", "adversarial", "trades", "alp"]
Count = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Budget = Annotated[Fraction, Field(gt=0, le=1)]


class Settings(BaseModel):
    """One preset. Units: epochs, images, pixels; eps and step sizes in the image's range [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    preset: str = Field(
        description="its name; results lie under it in runs/ and figures/",
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    model: str = Field("", description="one model of the preset by name; empty: all of them")
    data_folder: str = Field(
        "", description="where CIFAR (empty: data/, it is downloaded) or the own images lie"
    )
    output_folder: str = Field("", description="where runs/ and figures/ go; empty: the project")
    interactive: bool = Field(True, description="show widgets; batch runs set this to false")
    pretrained: bool = Field(
        True, description="use weights that come with the project; `make reproduce` trains all anew"
    )

    # data
    dataset: DatasetName
    train_images: Count | None = Field(None, description="training images; null: all")
    validation_images: Count = Field(500, description="held out of training, for its log")
    test_images: Count | None = Field(None, description="for clean accuracy and scores; null: all")
    attacked_images: Count = Field(1000, description="of the test images, for attacks")

    # models
    compared_experts: list[ExpertName] = Field(description="the networks of Table 1", min_length=1)
    expert: ExpertName = Field("googlenet", description="the network of Tables 2, 3 and Figure 2")
    experts: Annotated[int, Field(ge=2)] = Field(
        5, description="N of the mixture; the gates of more than six are drawn, not counted"
    )
    width: Annotated[float, Field(gt=0, le=4)] = Field(1.0, description="factor on all channels")
    heatmap_layer: Literal["larger-than-8x8", "at-least-8x8"] = "larger-than-8x8"
    gate_network: Literal["convolutional", "constant"] = "convolutional"
    further_datasets: list[DatasetName] = Field([], description="of Table 2, beside `dataset`")
    baselines: list[BaselineName] = Field([], description="networks to compare with in Table 2")
    baseline_layers: Annotated[int, Field(ge=3)] | None = Field(
        None, description="cells of each baseline; null: as published"
    )
    baseline_recipes: Literal["own", "preset"] = Field(
        "own", description="train baselines as their authors do, or as everything else here"
    )
    regimes: list[Regime] = Field(["standard", "adversarial"], min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)

    # training
    epochs: Count = 200
    batch_size: Annotated[int, Field(ge=2)] = 32
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 5e-4
    schedule: Literal["constant", "cosine", "multistep", "one-cycle", "warmup-cosine"] = "cosine"
    gradient_clip: Weight = Field(0.0, description="largest gradient norm; 0: not clipped")
    augment: bool = Field(True, description="random crop, horizontal flip and rotation")
    adversary: Literal["pgd", "ffgsm"] = Field("pgd", description="inner attack, trained gate")
    adversary_steps: Count = 10
    trades_weight: Weight = Field(6.0, description="of the divergence that TRADES adds")
    pairing_weight: Weight = Field(0.5, description="of adversarial logit pairing (alp)")
    reported_epoch: Literal["last", "selected"] = Field(
        "last", description="which weights are measured; selected: best on the validation images"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16: mixed precision in training, for GPUs"
    )
    processes: Count = Field(
        1,
        description="that train one model together, each on a GPU of its own where there are GPUs",
    )
    compiled: bool = Field(
        False, description="torch.compile for training without heat-map losses: a slow start"
    )

    # the losses, eqs (2) and (12)
    alpha: Weight = Field(1.0, description="weight of every expert's own cross entropy, eq (2)")
    beta: Weight = Field(1.0, description="weight of the mutual information loss, eq (12)")
    gamma: Weight = Field(1.0, description="weight of the position stability loss, eq (12)")
    coordinates: Literal["pixels", "unit"] = Field("unit", description="of eq (10) in training")
    explained: Literal["logit", "log-probability", "mixture"] = Field(
        "logit", description="what y_label in eq (3) is, in training"
    )
    floor: Weight = Field(0.1, description="share of the mean map added in training; 0: literal")
    warmup_epochs: Weight = Field(1.0, description="over which beta and gamma rise from 0")

    # attacks
    attacks: list[AttackName] = ["fgsm", "bim", "mim", "pgd"]
    eps: Budget = Fraction(8, 255)
    step_size: Budget = Fraction(2, 255)
    steps: Count = 20
    attack_gates: list[GateName] = Field(["switch", "uniform"], min_length=1)

    # adaptive attacks
    judged_images: Count | None = Field(
        None, description="of the test images, for adaptive attacks; null: those of all attacks"
    )
    gate_samples: list[Count] = Field(
        [1, 2, 5, 10, 20], description="of the gate for each gradient of EOTPGD, an attack for each"
    )
    judge_steps: Count = Field(
        100, description="of AutoAttack; Square has 50 queries and random noise 100 draws for each"
    )

    # the sweep of the loss weights
    weight_factors: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="on beta and on gamma, one at a time; 0 and 1 are in the ablation"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        lists = (
            "seeds", "compared_experts", "baselines", "regimes", "attacks", "attack_gates",
            "gate_samples", "weight_factors",
        )  # fmt: skip
        for field in lists:
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"{field} repeat: {values}; give each once")
        if len(set(self.datasets)) < len(self.datasets):
            raise ValueError(f"data sets repeat: {self.datasets}; give each once")
        if "images" in self.datasets and not self.data_folder:
            raise ValueError(
                "data set images, but data_folder is empty; name the folder that holds a folder of "
                "images for each class"
            )
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.processes} processes cannot share "
                "equally; make it a multiple of processes"
            )
        for field in ("attacked_images", "judged_images"):
            count = getattr(self, field)
            if None not in (self.test_images, count) and count > self.test_images:
                raise ValueError(
                    f"{field} is {count}, but test_images only {self.test_images}; lower the one "
                    "or raise the other"
                )
        return self

    @property
    def datasets(self) -> list[str]:
        """The data sets of Table 2; the first is that of everything else."""
        return [self.dataset, *self.further_datasets]

    @property
    def judged_count(self) -> int:
        """How many test images meet the adaptive attacks."""
        return self.judged_images or self.attacked_images

    @property
    def runs(self) -> Path:
        """Checkpoints, logs, records and executed notebooks of this preset."""
        return Path(self.output_folder or ROOT) / "runs" / self.preset

    @property
    def weights_file(self) -> str:
        """Name of the file in a model's folder with the weights of the reported epoch."""
        return {"last": "model.safetensors", "selected": "selected.safetensors"}[
            self.reported_epoch
        ]

    @property
    def figures(self) -> Path:
        """Tables and figures of this preset."""
        return Path(self.output_folder or ROOT) / "figures" / self.preset


def preset_names() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(preset: str, **changes: Any) -> Settings:
    """Settings of a preset, by its name or by the path of a YAML file, with some fields changed.

    A relative folder in the file starts from where the file is. Raises ValueError that names what
    is wrong and what would be right.
    """
    path = PRESETS / f"{preset}.yaml"
    if not path.exists():
        path = Path(preset)
    if not path.is_file():
        raise ValueError(
            f"unknown preset {preset!r}; valid names: {', '.join(preset_names())}, "
            "or the path of a YAML file"
        )
    content = read_yaml(path)
    for field in ("data_folder", "output_folder"):
        if content.get(field):
            content[field] = str(path.resolve().parent / content[field])
    for field in ("data_folder", "output_folder", "processes"):
        if changes.get(field) in (None, ""):  # it says nothing
            changes.pop(field, None)
    return _checked({"preset": path.stem} | content | changes)


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file; raises ValueError that names a file that is none."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold fields like 'epochs: 10'; found {content!r}")
    return content


def notebook_settings(namespace: Mapping[str, Any]) -> Settings:
    """Settings from a notebook's `globals()`, called in the cell right below its parameters.

    The preset that `preset` names, and on top every parameter that the notebook sets. A name that
    is no field is an error, since papermill passes unknown parameters on without one.
    """
    parameters = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in ("In", "Out", "settings")
        and not callable(value)
        and not isinstance(value, ModuleType)
    }
    if "settings" in namespace:  # the cell is run again, when the notebook has other names too
        known = Settings.model_fields.keys() & parameters.keys()
        parameters = {name: parameters[name] for name in known}
    return load_preset(parameters.pop("preset", "demo"), **parameters)


def _checked(content: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise ValueError("\n".join(_explained(problem) for problem in error.errors())) from None


def _explained(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown parameter {name!r}; valid names: {', '.join(Settings.model_fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing: {Settings.model_fields[name].description or 'give a value'}"
    if problem["type"] == "string_pattern_mismatch":  # a name that becomes a folder's
        return (
            f"{name} = {problem['input']!r}: give it letters, digits, '.', '_' and '-' alone, "
            "the first a letter or digit"
        )
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name} = {problem['input']!r}: {message}" if name else message
