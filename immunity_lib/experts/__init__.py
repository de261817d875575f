"""The experts by name. Each is a CIFAR-sized CNN with its normalisation inside.

The networks of architecture search are compared with Immunity, and can be its experts too.
"""

from collections.abc import Callable, Sequence
from typing import Any

from immunity_lib.baselines.advrush import AdvRush
from immunity_lib.baselines.cells import CellNetwork
from immunity_lib.baselines.pdarts import PDarts
from immunity_lib.baselines.robnet import RobNetFree, RobNetLarge, RobNetLargeV2
from immunity_lib.experts.cost import MultiplyAccumulates, multiply_accumulates
from immunity_lib.experts.densenet import DenseNet121
from immunity_lib.experts.expert import HEATMAP_LAYERS, Expert
from immunity_lib.experts.googlenet import GoogLeNet, GoogLeNetKuangliu
from immunity_lib.experts.resnet import ResNet18

__all__ = [
    "BASELINES",
    "EXPERTS",
    "HEATMAP_LAYERS",
    "CellNetwork",
    "Expert",
    "MultiplyAccumulates",
    "build_expert",
    "multiply_accumulates",
]

BASELINES: dict[str, type[CellNetwork]] = {
    "pdarts": PDarts,
    "advrush": AdvRush,
    "robnet-free": RobNetFree,
    "robnet-large-v1": RobNetLarge,
    "robnet-large-v2": RobNetLargeV2,
}
EXPERTS: dict[str, Callable[..., Expert]] = {
    "resnet18": ResNet18,
    "densenet121": DenseNet121,
    "googlenet": GoogLeNet,
    "googlenet-kuangliu": GoogLeNetKuangliu,
    **BASELINES,
}


def build_expert(
    name: str,
    num_classes: int,
    width: float = 1.0,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.25, 0.25, 0.25),
    heatmap_layer: str = "larger-than-8x8",
    *,
    layers: int | None = None,
    auxiliary: bool = False,
) -> Expert:
    """Build one expert with PyTorch's default initialisation.

    Args:
        name: one of `EXPERTS`.
        num_classes: C, at least 2.
        width: factor on every channel count, above 0; 1 is the published network. No layer
            gets fewer than 4 channels.
        mean, std: three numbers each, of the colour channels of images in [0, 1]. The defaults
            suit any images; pass the statistics of the training set where they are known.
        heatmap_layer: which stage feeds Grad-CAM, one of `HEATMAP_LAYERS`: the last one whose
            feature grid is "larger-than-8x8" (the paper's words) or "at-least-8x8".
        layers: number of cells of one of `BASELINES`, at least 3; None: as published.
        auxiliary: whether one of `BASELINES` has its second classifier, for training.

    Returns:
        A module from images (B, 3, 32, 32) in [0, 1] to logits (B, C).

    Raises:
        ValueError: an argument is outside what is listed above.
    """
    if name not in EXPERTS:
        raise ValueError(f"unknown expert {name!r}; valid names: {', '.join(EXPERTS)}")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 2")
    if not width > 0:
        raise ValueError(f"width is {width}; it must be above 0, and 1 is the published network")
    if len(mean) != 3:
        raise ValueError(f"mean is {mean}; it must be three numbers")
    if len(std) != 3 or not min(std) > 0:
        raise ValueError(f"std is {std}; it must be three numbers above 0")
    if heatmap_layer not in HEATMAP_LAYERS:
        valid = ", ".join(HEATMAP_LAYERS)
        raise ValueError(f"unknown heatmap_layer {heatmap_layer!r}; valid values: {valid}")
    options: dict[str, Any] = {"layers": layers} if layers is not None else {}
    options |= {"auxiliary": True} if auxiliary else {}
    if options and name not in BASELINES:
        raise ValueError(
            f"{' and '.join(options)} given for {name}, but it is for {', '.join(BASELINES)}"
        )
    return EXPERTS[name](
        width, num_classes=num_classes, mean=mean, std=std, heatmap_layer=heatmap_layer, **options
    )
