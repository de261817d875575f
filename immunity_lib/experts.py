"""The experts: CIFAR-sized CNNs with their normalisation inside, which also hand out the activations that their
Grad-CAM heat map is made of; `as_expert` makes one of any other network."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from immunity_lib.moe import in_eval_mode, placed_as
from immunity_lib.recipe import BASELINES, EXPERT_NAMES

# The paper takes "the last convolutional layer with dimensions exceeding 8*8" for Grad-CAM.
# Both readings of "exceeding", as the smallest admissible side of the feature grid.
HEATMAP_LAYERS = {"larger-than-8x8": 9, "at-least-8x8": 8}

Stages = tuple[dict[str, nn.Module], int]  # of a network, by name, and the channels of the last one


def scale_channels(channels: int, width: float) -> int:
    """Channel count of a layer in a network of the given width, at least 4."""
    return max(4, round(channels * width))


class Normalise(nn.Module):
    """(images - mean) / std per colour channel. Both are buffers: saved, never trained."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not len(mean) == len(std) == 3 or not all(deviation > 0 for deviation in std):
            raise ValueError(f"mean is {mean} and std is {std}; each must be three numbers, those of std above 0")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Expert(nn.Module):
    """Images (B, 3, 32, 32) in [0, 1] to logits (B, C), by a sequence of named stages.

    The Grad-CAM layer is the last stage whose grid, for a 32x32 image, is large enough for `heatmap_layer`; a whole
    stage, since the last convolution of a branching network sees only one branch. It does not enter the state dict:
    weights fit both readings. What a stage hands to the next is its *state*: its activations (B, K, u, v), unless
    `activations_of` is overridden.
    """

    def __init__(self, stages, channels: int, *, num_classes, mean, std, heatmap_layer) -> None:
        """stages, channels: as in `Stages`; the rest as in `build_expert`."""
        super().__init__()
        self.num_classes = num_classes
        self.normalise = Normalise(mean, std)
        self.stages = nn.Sequential(OrderedDict(stages))
        self.classifier = nn.Linear(channels, num_classes)
        smallest_side = HEATMAP_LAYERS[heatmap_layer]
        self.head_stages = sum(side >= smallest_side for side in self.stage_sides().values())

    def stage_sides(self) -> dict[str, int]:
        """Side of every stage's feature grid for a 32x32 image, by the stage's name."""
        state = torch.zeros(1, 3, 32, 32, device=self.classifier.weight.device)
        sides = {}
        with in_eval_mode(self.stages), torch.no_grad():  # a dry run, that updates no batch norm
            for name, stage in self.stages.named_children():
                state = stage(state)
                sides[name] = self.activations_of(state).shape[-1]
        return sides

    @staticmethod
    def activations_of(state: Any) -> Tensor:
        """The activations (B, K, u, v) in the state behind a stage."""
        return state

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (B, K, u, v) of the Grad-CAM layer, and logits (B, C)."""
        state = self.stages[: self.head_stages](self.normalise(images))
        final = self.activations_of(self.stages[self.head_stages :](state))
        return self.activations_of(state), self.classifier(final.mean((2, 3)))

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images)[1]


def convolution(in_channels: int, out_channels: int, size: int, stride: int = 1, bias: bool = True):
    """Convolution, batch norm, ReLU: (B, in, u, v) to (B, out, u/stride, v/stride)."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=bias)
    return nn.Sequential(layer, nn.BatchNorm2d(out_channels), nn.ReLU())


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: (B, in, u, v) to (B, out, u/stride, v/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *convolution(in_channels, out_channels, 3, stride, bias=False),
            *convolution(out_channels, out_channels, 3, bias=False)[:2],  # its ReLU: after the sum
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            # A 1x1 convolution with a stride, in two steps: as one it writes past its buffers on processors without
            # AVX-512 (oneDNN) where the channels are no multiple of 8
            projection = convolution(in_channels, out_channels, 1, bias=False)[:2]
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), *projection)
        self.relu = nn.ReLU()

    def forward(self, activations: Tensor) -> Tensor:
        return self.relu(self.residual(activations) + self.shortcut(activations))


def resnet18(width: float) -> Stages:
    """ResNet18 (He et al. 2016, arXiv 1512.03385), for CIFAR: the stem is a single 3x3 convolution; on 32x32 images
    the grids of the four stages are 32, 16, 8 and 4."""
    channels = scale_channels(64, width)
    stages: dict[str, nn.Module] = {"stem": convolution(3, channels, 3, bias=False)}
    for number, (full_width, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), 1):
        in_channels, channels = channels, scale_channels(full_width, width)
        blocks = BasicBlock(in_channels, channels, stride), BasicBlock(channels, channels, 1)
        stages[f"stage{number}"] = nn.Sequential(*blocks)
    return stages, channels


def preactivated(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    """Batch norm, ReLU, convolution: (B, in, u, v) to (B, out, u, v)."""
    layer = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU(), layer)


class DenseLayer(nn.Module):
    """Adds `growth` channels: (B, K, u, v) to (B, K + growth, u, v), the old ones first."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        bottleneck = preactivated(in_channels, 4 * growth, 1)
        self.new_channels = nn.Sequential(*bottleneck, *preactivated(4 * growth, growth, 3))

    def forward(self, activations: Tensor) -> Tensor:
        return torch.cat((activations, self.new_channels(activations)), 1)


def densenet121(width: float) -> Stages:
    """DenseNet121 (Huang et al. 2017, arXiv 1608.06993): a bare convolution and four dense blocks, whose grids on
    32x32 images are 32, 16, 8 and 4. Width scales the growth rate of 32, which all channel counts follow from; with
    its minimum of 4, widths below 0.125 are as 0.125."""
    growth = scale_channels(32, width)
    channels = 2 * growth
    stages: dict[str, nn.Module] = {"stem": nn.Conv2d(3, channels, 3, padding=1, bias=False)}
    for number, layers in enumerate((6, 12, 24, 16), 1):
        if number > 1:
            halved = preactivated(channels, channels // 2, 1)
            stages[f"transition{number - 1}"] = halved.append(nn.AvgPool2d(2))
            channels //= 2
        dense = (DenseLayer(channels + layer * growth, growth) for layer in range(layers))
        stages[f"dense{number}"] = nn.Sequential(*dense)
        channels += layers * growth
    stages["norm"] = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
    return stages, channels


# GoogLeNet (Szegedy et al. 2015, arXiv 1409.4842), in two forms that differ in the stem. Both have the paper's nine
# inception blocks, with batch norm after every convolution, two 3x3 convolutions in place of the 5x5 one, and no
# auxiliary classifier.
# Output channels: 1x1 | 1x1 -> 3x3 | 1x1 -> "5x5" | pool -> 1x1.
INCEPTION_CHANNELS = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64), "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


class Inception(nn.Module):
    """Four parallel branches, concatenated: (B, in, u, v) to (B, out_channels, u, v)."""

    def __init__(self, channels: int, branch_channels: Sequence[int]) -> None:
        super().__init__()
        one, three_in, three, five_in, five, pooled = branch_channels
        self.out_channels = one + three + five + pooled
        self.branches = nn.ModuleList([
            convolution(channels, one, 1),
            nn.Sequential(convolution(channels, three_in, 1), convolution(three_in, three, 3)),
            nn.Sequential(
                convolution(channels, five_in, 1),
                convolution(five_in, five, 3), convolution(five, five, 3),
            ),
            nn.Sequential(nn.MaxPool2d(3, 1, padding=1), convolution(channels, pooled, 1)),
        ])  # fmt: skip

    def forward(self, activations: Tensor) -> Tensor:
        return torch.cat([branch(activations) for branch in self.branches], 1)


def inception_stages(channels: int, width: float) -> Stages:
    """The nine inception blocks with a max-pool before 4a and 5a, and their output channels."""
    stages: dict[str, nn.Module] = {}
    for name, full_width in INCEPTION_CHANNELS.items():
        if name in ("4a", "5a"):
            stages[f"pool{name[0]}"] = nn.MaxPool2d(3, stride=2, padding=1)
        block = Inception(channels, [scale_channels(count, width) for count in full_width])
        stages[f"inception{name}"], channels = block, block.out_channels
    return stages, channels


def googlenet(width: float) -> Stages:
    """The light form, of weiaicunzai/pytorch-cifar100: three convolutions and a max-pool; on 32x32 images the blocks
    3, 4 and 5 have grids of 16, 8 and 4. Left out are its dropout, which would make the heat maps of training and
    evaluation differ, and a slip in a batch norm's epsilon."""
    channels = (3, *(scale_channels(count, width) for count in (64, 64, 192)))
    stem = (convolution(*ends, 3, bias=False) for ends in pairwise(channels))
    stages = {"stem": nn.Sequential(*stem), "pool3": nn.MaxPool2d(3, stride=2, padding=1)}
    blocks, last = inception_stages(channels[-1], width)
    return stages | blocks, last


def googlenet_kuangliu(width: float) -> Stages:
    """The heavy form, of kuangliu/pytorch-cifar: a single convolution; on 32x32 images the blocks 3, 4 and 5 have
    grids of 32, 16 and 8, for three times the compute."""
    stem_channels = scale_channels(192, width)
    stages, channels = inception_stages(stem_channels, width)
    return {"stem": convolution(3, stem_channels, 3), **stages}, channels


STAGES = {
    "resnet18": resnet18, "densenet121": densenet121,
    "googlenet": googlenet, "googlenet-kuangliu": googlenet_kuangliu,
}  # fmt: skip


def build_expert(
    name: str, num_classes: int, width: float = 1.0,
    mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.25, 0.25, 0.25),
    heatmap_layer: str = "larger-than-8x8", *, layers: int | None = None, auxiliary: bool = False,
) -> Expert:  # fmt: skip
    """Build one of `EXPERT_NAMES`: images (B, 3, 32, 32) in [0, 1] to logits (B, C), C at least 2.

    width: factor on every channel count, above 0; 1 is the published network. mean, std: of the colour channels,
    three numbers each; the defaults suit any images, the statistics of the training set are better. heatmap_layer:
    one of `HEATMAP_LAYERS`, see `Expert`. layers, auxiliary: of one of `BASELINES`, its number of cells, at least 3
    (None: as published), and whether it has its second classifier, for training. ValueError for anything else.
    """
    if name not in EXPERT_NAMES:
        raise ValueError(f"unknown expert {name!r}; valid names: {', '.join(EXPERT_NAMES)}")
    if not width > 0:
        raise ValueError(f"width is {width}; it must be above 0, and 1 is the published network")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 2")
    if heatmap_layer not in HEATMAP_LAYERS:
        raise ValueError(f"unknown heatmap_layer {heatmap_layer!r}; valid values: {', '.join(HEATMAP_LAYERS)}")
    options = dict(num_classes=num_classes, mean=mean, std=std, heatmap_layer=heatmap_layer)
    if name in BASELINES:
        from immunity_lib.cells import build_cells  # here, since cells.py builds on this module

        return build_cells(name, width, layers, auxiliary=auxiliary, **options)
    if layers is not None or auxiliary:
        given = f"layers is {layers} and auxiliary is {auxiliary} for {name}"
        raise ValueError(f"{given}; leave them out, they are for {', '.join(BASELINES)}")
    return Expert(*STAGES[name](width), **options)


class NetworkExpert(nn.Module):
    """A network of any make as an expert; `as_expert` makes it and checks that it is one."""

    def __init__(self, network: nn.Module, layer: str, num_classes: int, normalise: Normalise):
        super().__init__()
        self.num_classes, self.normalise, self.network, self.layer = num_classes, normalise, network, layer
        network.set_submodule(layer, Tap(network.get_submodule(layer)))

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tap = self.network.get_submodule(self.layer)
        try:
            logits = self.network(self.normalise(images))
            return tap.output, logits
        finally:  # after an error too, so that no graph is kept
            tap.output = None

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_features(images)[1]


class Tap(nn.Module):
    """A layer that keeps its last output until somebody takes it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.output = layer, None

    def forward(self, *inputs: Any, **options: Any) -> Any:
        self.output = self.layer(*inputs, **options)
        return self.output


def as_expert(
    network: nn.Module, layer: str, num_classes: int, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
) -> NetworkExpert:
    """A copy of any network of normalised images (B, 3, 32, 32) to logits (B, C), as an expert.

    layer: name of the module, as in `network.named_modules()`, whose output (B, K, u, v) feeds Grad-CAM; "layer2" of
    torchvision's ResNet18, say. mean, std: those that the network was trained with, or zeros and ones where it takes
    images in [0, 1]. TypeError for what is no module; ValueError for a value out of range, and where two images
    passed through in either mode show that heat maps of that layer cannot be made and differentiated.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is a {type(network).__name__}; it must be a torch.nn.Module")
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 2")
    names = [name for name, _ in network.named_modules() if name]
    if layer not in names:
        outer = ", ".join(name for name in names if name.count(".") < 2)
        raise ValueError(f"unknown layer {layer!r}; the network has {outer}, and what they contain")
    normalise = placed_as(Normalise(mean, std), network)
    expert = NetworkExpert(copy.deepcopy(network), layer, num_classes, normalise)
    trial = copy.deepcopy(expert).cpu().float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for mode in ("eval", "train"):
            if obstacle := _obstacle(trial.train(mode == "train")):
                raise ValueError(f"layer {layer!r} in {mode} mode: {obstacle}")
    return expert


def _obstacle(expert: NetworkExpert) -> str | None:
    """Why no heat maps can be made of this expert and differentiated, from a pass of two images."""
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    edits = []  # how often the layer's output had been written into by the time it was done
    tap = expert.network.get_submodule(expert.layer)
    tap.register_forward_hook(lambda *seen: edits.append(getattr(seen[-1], "_version", 0)))
    try:
        activations, logits = expert.forward_with_features(images)
        found, wanted = getattr(logits, "shape", type(logits)), (2, expert.num_classes)
        if found != wanted:
            return f"the network gives {found}, not logits {wanted}; mend num_classes"
        found = getattr(activations, "shape", ())
        if len(found) != 4 or found[0] != 2 or found[2:].numel() <= 1:
            needed = "activations (2, K, u, v) on a grid of more than one pixel"
            return f"the layer gives {found}, not {needed}; choose an earlier layer"
        if activations._version != edits[-1]:
            return "the network overwrites the layer's output in place; build it with inplace=False"
        (slope,) = torch.autograd.grad(logits.sum(), activations, create_graph=True)
        if slope.requires_grad:
            slope.square().sum().backward()
    except Exception as error:  # the network's own, of any type
        failed = f"images {tuple(images.shape)} cannot be passed through, or the logits not"
        return f"{failed} be differentiated twice by the layer's output; choose another: {error}"
    return None
