"""What every expert has in common: a normalisation, a list of stages and a linear classifier.

Shapes: B images, C classes, K channels, (u, v) feature grid.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunity_lib.layers import differentiated_twice

# The paper takes "the last convolutional layer with dimensions exceeding 8*8" for Grad-CAM.
# Both readings of "exceeding", as the smallest admissible side of the feature grid.
HEATMAP_LAYERS = {"larger-than-8x8": 9, "at-least-8x8": 8}
IMAGE_SIZE = 32
SMALLEST_CHANNEL_COUNT = 4


def scale_channels(channels: int, width: float) -> int:
    """Channel count of a layer in a network of the given width, at least 4."""
    return max(SMALLEST_CHANNEL_COUNT, round(channels * width))


class Normalise(nn.Module):
    """(images - mean) / std per colour channel. Both are buffers: saved, never trained."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Expert(nn.Module):
    """An image classifier that also shows the activations its Grad-CAM heat map is made of.

    The network is a sequence of named stages. The *head* is the normalisation and every stage up
    to the Grad-CAM layer, the *tail* is the rest: logits = tail(head(images)). What a stage hands
    to the next is its *state*: its activations (B, K, u, v), unless a network says otherwise.

    The Grad-CAM layer is the last stage whose feature grid, for a 32x32 image, is large enough
    for `heatmap_layer`. It is the output of a whole stage, because the last convolution of a
    branching network sees only one branch. The choice does not enter the state dict: weights
    trained with one reading load into the other.

    A network whose stages hand on more than one tensor overrides `activations_of`.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        channels: int,
        *,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        heatmap_layer: str,
    ) -> None:
        """`channels` is the channel count of the last stage; the rest as in `build_expert`."""
        super().__init__()
        self.num_classes = num_classes
        self.normalise = Normalise(mean, std)
        self.stages = nn.Sequential()
        for name, stage in stages.items():
            self.stages.add_module(name, stage)
        self.classifier = nn.Linear(channels, num_classes)
        smallest_side = HEATMAP_LAYERS[heatmap_layer]
        self.head_stages = sum(side >= smallest_side for side in self.stage_sides().values())

    def stage_sides(self) -> dict[str, int]:
        """Side of every stage's feature grid for a 32x32 image, by the stage's name."""
        # A dry run of one image in eval mode, which updates no batch norm
        stages = copy.deepcopy(self.stages).eval()
        state = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.classifier.weight.device)
        sides = {}
        with torch.no_grad():
            for name, stage in stages.named_children():
                state = stage(state)
                sides[name] = self.activations_of(state).shape[-1]
        return sides

    @staticmethod
    def activations_of(state: Any) -> Tensor:
        """The activations (B, K, u, v) in the state behind a stage."""
        return state

    def head(self, images: Tensor) -> Any:
        """Images (B, 3, 32, 32) in [0, 1] to the state with the activations for Grad-CAM."""
        return self.stages[: self.head_stages](self.normalise(images))

    def tail(self, state: Any) -> Tensor:
        """The state behind the head to logits (B, C)."""
        final = self.activations_of(self.stages[self.head_stages :](state))
        return self.classifier(final.mean((2, 3)))

    def forward_with_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 32, 32) in [0, 1] to activations (B, K, u, v) and logits (B, C)."""
        with differentiated_twice(False):  # gradients of the logits end at the activations
            state = self.head(images)
        return self.activations_of(state), self.tail(state)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) in [0, 1] to logits (B, C)."""
        return self.tail(self.head(images))
