"""What a training is: its data, model, descent, losses and adversary, with the paper's values as defaults."""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args, get_origin, get_type_hints

DatasetName = Literal["parts10", "cifar10", "cifar100", "images"]
# Of architecture search; the paper compares Immunity with them, and they can be experts like the others
BaselineName = Literal["pdarts", "advrush", "robnet-free", "robnet-large-v1", "robnet-large-v2"]
ExpertName = Literal["resnet18", "densenet121", "googlenet", "googlenet-kuangliu", BaselineName]
SMALLEST_EPS = Fraction(1, 10**6)  # images are float32, of which not much smaller ones would change anything
DATASETS, BASELINES, EXPERT_NAMES = map(get_args, (DatasetName, BaselineName, ExpertName))


@dataclass(frozen=True)
class Recipe:
    """All that trained weights depend on, besides code and data. Units: epochs, images, pixels; eps and step_size in
    the image's range [0, 1]. Raises ValueError for a value out of range and a name that there is not."""

    # data
    dataset: DatasetName = "parts10"
    train_images: int | None = None  # None: all
    validation_images: int = 500  # held out of training, for its log

    # model
    expert: ExpertName = "googlenet"
    experts: int = 5  # N of the mixture
    width: float = 1.0  # factor on all channels
    layers: int | None = None  # cells of a network of cells; None: as published
    heatmap_layer: Literal["larger-than-8x8", "at-least-8x8"] = "larger-than-8x8"
    gate_network: Literal["convolutional", "constant"] = "convolutional"
    normalise: bool = True  # by the data's mean and deviation of each channel
    seed: int = 0

    # descent
    epochs: int = 200
    batch_size: int = 32
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decayed: Literal["everything", "convolutions and classifier"] = "everything"
    schedule: Literal["constant", "cosine", "multistep", "one-cycle", "warmup-cosine"] = "cosine"
    gradient_clip: float = 0.0  # largest gradient norm; 0: not clipped
    augment: bool = True  # random crop, horizontal flip and rotation
    rotation: float = 15.0  # degrees, at most
    cutout: int = 0  # side of a hidden square; 0: none
    auxiliary_weight: float = 0.0  # of a network of cells' second classifier
    drop_path: float = 0.0  # of cells, at the end of training
    precision: Literal["float32", "bfloat16", "auto"] = "float32"  # bfloat16: mixed precision; auto: where it is faster
    # torch.compile, after the warm-up: a slow start, and faster steps; auto: on a GPU
    compiled: bool | Literal["auto"] = False

    # losses, eqs (2) and (12)
    alpha: float = 1.0  # weight of every expert's own cross entropy, eq (2)
    beta: float = 1.0  # weight of the mutual information loss, eq (12)
    gamma: float = 100.0  # weight of the position stability loss, eq (12)
    coordinates: Literal["pixels", "unit"] = "unit"  # of eq (10)
    explained: Literal["logit", "log-probability", "mixture"] = "logit"  # y_label of eq (3)
    floor: float = 0.1  # share of the mean map that is added, see `normalise_maps`; 0: literal
    warmup_epochs: float = 1.0  # over which beta and gamma rise from 0

    # adversarial training, on the trained gate
    adversary: Literal["pgd", "ffgsm", None] = None  # None: clean images
    adversary_steps: int = 10
    eps: Fraction = Fraction(8, 255)
    step_size: Fraction = Fraction(2, 255)
    # of clean and adversarial images: TRADES (arXiv 1901.08573), logit pairing (1803.06373)
    pairing: Literal["none", "trades", "alp"] = "none"
    pairing_weight: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "train_images": 2, "validation_images": 1, "experts": 1, "layers": 3, "epochs": 1,
            "batch_size": 2, "adversary_steps": 1, "eps": SMALLEST_EPS, "step_size": SMALLEST_EPS,
        }  # fmt: skip
        most = {"width": 4, "eps": 1, "step_size": 1, "experts": 100, "rotation": 180, "cutout": 32}
        wrong = []
        for name, valid in CHOICES.items():
            if (value := getattr(self, name)) not in valid:
                wrong.append(f"{name} is {value!r}; it must be one of {', '.join(map(str, valid))}")
        for name in ("auxiliary_weight", "drop_path"):
            if getattr(self, name) and self.expert not in BASELINES:
                wrong.append(f"{name} is {getattr(self, name)}; it must be 0 for {self.expert}, which has no cells")
        if self.auxiliary_weight and (self.experts > 1 or self.beta or self.gamma):  # its loss is of one network alone
            wrong.append(f"auxiliary_weight is {self.auxiliary_weight}; it must be 0, or experts 1, beta 0 and gamma 0")
        for name, value in vars(self).items():
            if value is None or isinstance(value, bool | str):
                continue
            low, high = least.get(name, 0), most.get(name, 2**63 - 1 if isinstance(value, int) else math.inf)
            if not low <= value < math.inf:  # so phrased that NaN fails
                wrong.append(f"{name} is {value}; it must be at least {low}")
            elif name in ("width", "learning_rate") and not value > 0:
                wrong.append(f"{name} is {value}; it must be above 0")
            elif value > high:
                wrong.append(f"{name} is {value}; it must be at most {high}")
            elif name in ("momentum", "drop_path") and value >= 1:
                wrong.append(f"{name} is {value}; it must be below 1")
        if wrong:
            raise ValueError("\n".join(wrong))

    def as_json(self) -> dict[str, Any]:
        """The fields for a JSON file, fractions as text."""
        return json.loads(json.dumps(vars(self), default=str))

    def is_that_of(self, known: Any) -> bool:
        """Whether these are the fields that `as_json` once gave; fields that it did not have yet stand for their
        defaults."""
        return isinstance(known, dict) and self.as_json() == Recipe().as_json() | known


# The values that a field of names may have
CHOICES = {name: list(get_args(hint)) for name, hint in get_type_hints(Recipe).items() if get_origin(hint) is Literal}
CHOICES["compiled"] = ["auto", False, True]
