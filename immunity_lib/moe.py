"""The mixture of experts and its random switch gate, eq (1) and section 4.1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GATES = ("trained", "uniform", "switch", "switch-per-image")
GATE_NETWORKS = ("convolutional", "constant")

Gate = str | Sequence[int]  # one of GATES, or a permutation of range(N)


@dataclass(frozen=True)
class ExpertOutputs:
    """Everything that one pass through the experts and the gate gives."""

    logits: Tensor  # (B, N, C), every expert's own
    log_gate: Tensor  # (B, N), log g_i(x) as trained, before any switching
    activations: tuple[Tensor, ...]  # of the Grad-CAM layer, N times (B, K, u, v)

    @property
    def log_probs(self) -> Tensor:
        """(B, N, C), log softmax f_i(x)."""
        return self.logits.log_softmax(-1)

    @property
    def gate(self) -> Tensor:
        """(B, N), the trained gate weights; each row sums to 1."""
        return self.log_gate.exp()

    def mixture(self, gate: Gate = "trained") -> Tensor:
        """(B, C), log of the mixture of probabilities under the given gate."""
        # Eq. (1): y_hat = sum_i g_i softmax(f_i), kept as its logarithm: softmax(log y_hat) is
        # y_hat, so that cross entropies and attacks, which take logits, see the true gradient
        log_gate = _switched(self.log_gate, gate)
        return torch.logsumexp(self.log_probs + log_gate[..., None], dim=1)


def _switched(log_gate: Tensor, gate: Gate) -> Tensor:
    """Gate weights (B, N) as the experts get them: expert i gets weight gate[i]."""
    images, experts = log_gate.shape
    if gate == "trained":
        return log_gate
    if gate == "uniform":
        return torch.full_like(log_gate, -math.log(experts))
    if gate == "switch":  # section 4.1: the gate's parameters are permuted, once a forward pass
        return log_gate[:, torch.randperm(experts, device=log_gate.device)]
    if gate == "switch-per-image":
        return log_gate.gather(1, torch.rand_like(log_gate).argsort(1))
    if isinstance(gate, Sequence) and sorted(gate) == list(range(experts)):
        return log_gate[:, list(gate)]
    raise ValueError(
        f"gate must be one of {', '.join(GATES)} or a permutation of 0..{experts - 1}; got {gate!r}"
    )


class ConvolutionalGate(nn.Module):
    """Gate weights that depend on the image: convolution, pooling, a linear layer to N.

    Permuting the N rows of the linear layer permutes the N weights: that is how the random switch
    gate is carried out, on the weights.
    """

    def __init__(self, experts: int, channels: int = 16):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.linear = nn.Linear(channels, experts)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) normalised images to (B, N) log gate weights."""
        return self.linear(self.features(images).mean((2, 3))).log_softmax(-1)


class ConstantGate(nn.Module):
    """Gate weights that are learned but the same for every image; uniform to begin with."""

    def __init__(self, experts: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(experts))

    def forward(self, images: Tensor) -> Tensor:
        return self.weights.log_softmax(-1).expand(len(images), -1)


class ImmunityMoE(nn.Module):
    """N experts mixed by a gate, eq (1). Returns log-probabilities.

    experts: networks with `forward_with_features`, as `build_expert` makes them; a single one
    makes a stand-alone network of the same interface. gate: a module from normalised images to
    (B, N) log weights, by default a `ConvolutionalGate`.
    evaluation_gate: what a bare `model(images)` uses, so that attack libraries, which call just
    that, see the defence as deployed; "switch" for the paper's random switch gate.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gate: nn.Module | None = None,
        evaluation_gate: Gate = "switch",
    ):
        super().__init__()
        if not experts:
            raise ValueError("a mixture needs at least one expert; got none")
        self.experts = nn.ModuleList(experts)
        self.gate = ConvolutionalGate(len(experts)) if gate is None else gate
        self.evaluation_gate = evaluation_gate

    def expert_outputs(self, images: Tensor) -> ExpertOutputs:
        """One pass of the experts and the gate over images (B, 3, 32, 32) in [0, 1]."""
        passes = [expert.forward_with_features(images) for expert in self.experts]
        activations, logits = zip(*passes, strict=True)
        log_gate = self.gate(self.experts[0].normalise(images))
        # In the images' precision: mixed precision ends before probabilities begin
        logits = torch.stack(logits, dim=1).to(images.dtype)
        return ExpertOutputs(logits, log_gate.to(images.dtype), activations)

    def forward(self, images: Tensor, gate: Gate | None = None) -> Tensor:
        """Log of the mixture, (B, C). gate: "trained", "uniform", "switch" (a fresh uniform
        permutation each call), "switch-per-image", or a permutation; None: `evaluation_gate`."""
        return self.expert_outputs(images).mixture(self.evaluation_gate if gate is None else gate)

    @contextmanager
    def evaluated_with(self, gate: Gate) -> Iterator[None]:
        """Within it, a bare `model(images)` uses this gate."""
        before, self.evaluation_gate = self.evaluation_gate, gate
        try:
            yield
        finally:
            self.evaluation_gate = before
