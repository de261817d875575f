"""The mixture of experts and its random switch gate, eq (1) and section 4.1."""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

GATES = ("trained", "uniform", "switch", "switch-per-image")
# forward_with_features: images (B, 3, 32, 32) to activations (B, K, u, v) of the Grad-CAM layer and logits (B, C);
# num_classes: C; normalise: what the gate's images go through
EXPERT_NEEDS = ("forward_with_features", "num_classes", "normalise")

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
        # Eq. (1): y_hat = sum_i g_i softmax(f_i), kept as its logarithm: softmax(log y_hat) is y_hat, so that cross
        # entropies and attacks, which take logits, see the true gradient
        log_gate = _switch(self.log_gate, gate)
        return torch.logsumexp(self.log_probs + log_gate[..., None], dim=1)


def _switch(log_gate: Tensor, gate: Gate) -> Tensor:
    """Log gate weights (B, N) as the experts get them: expert i gets weight gate[i]."""
    experts = log_gate.shape[1]
    if gate == "trained":
        return log_gate
    if gate == "uniform":
        return torch.full_like(log_gate, -math.log(experts))
    if gate == "switch":  # section 4.1: the gate's parameters are permuted, once a forward pass
        return log_gate[:, torch.randperm(experts, device=log_gate.device)]
    if gate == "switch-per-image":
        return log_gate.gather(1, torch.rand_like(log_gate).argsort(1))
    if isinstance(gate, Sequence) and sorted(gate) == list(range(experts)):
        return log_gate[:, [int(one) for one in gate]]  # of truth values, it would take a mask
    valid = f"one of {', '.join(GATES)} or a permutation of 0..{experts - 1}"
    raise ValueError(f"gate must be {valid}; got {gate!r}")


class ConvolutionalGate(nn.Module):
    """Gate weights that depend on the image: convolution, pooling, a linear layer to N. Permuting its N rows permutes
    the N weights: so is the random switch gate carried out, on the weights."""

    def __init__(self, experts: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()
        )
        self.linear = nn.Linear(16, experts)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) normalised images to (B, N) log gate weights."""
        scores = self.linear(self.features(images).mean((2, 3)))
        return scores.to(images.dtype).log_softmax(-1)  # in bfloat16, weights would not sum to 1


class ConstantGate(nn.Module):
    """Gate weights that are learned but the same for every image; uniform to begin with."""

    def __init__(self, experts: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(experts))

    def forward(self, images: Tensor) -> Tensor:
        return self.weights.log_softmax(-1).expand(len(images), -1)


def placed_as(module: nn.Module, other: nn.Module) -> nn.Module:
    """The module, moved to the device and the precision of another one's weights, if that has any."""
    for weight in itertools.chain(other.parameters(), other.buffers()):
        if weight.is_floating_point():
            return module.to(weight.device, weight.dtype)
    return module


class ImmunityMoE(nn.Module):
    """N experts mixed by a gate, eq (1). Returns log-probabilities.

    experts: as `build_expert` makes them; a single one makes a stand-alone network of the same interface. gate: a
    module from normalised images to (B, N) log weights, by default a `ConvolutionalGate`. evaluation_gate: what a
    bare `model(images)` uses, so that attack libraries, which call just that, see the defence as deployed; "switch"
    for the paper's gate."""

    def __init__(self, experts: Sequence[nn.Module], gate: nn.Module | None = None, evaluation_gate: Gate = "switch"):
        super().__init__()
        if not experts:
            raise ValueError("a mixture needs at least one expert; got none")
        for expert in experts:
            if missing := [name for name in EXPERT_NEEDS if not hasattr(expert, name)]:
                lacks = f"a {type(expert).__name__} is no expert: it lacks {', '.join(missing)}"
                raise TypeError(f"{lacks}; build_expert makes one, as_expert makes one of any network")
        if len(set(classes := [expert.num_classes for expert in experts])) > 1:
            raise ValueError(f"experts of {', '.join(map(str, classes))} classes; build all with one num_classes")
        self.experts = nn.ModuleList(experts)
        self.gate = placed_as(ConvolutionalGate(len(experts)), experts[0]) if gate is None else gate
        self.evaluation_gate = evaluation_gate

    def expert_outputs(self, images: Tensor) -> ExpertOutputs:
        """One pass of the experts and the gate over images (B, 3, 32, 32) in [0, 1]."""
        passes = [expert.forward_with_features(images) for expert in self.experts]
        activations, logits = zip(*passes, strict=True)
        log_gate = self.gate(self.experts[0].normalise(images))
        if log_gate.shape[-1] != len(logits):  # a single weight would be given to all
            given = f"the gate gives {log_gate.shape[-1]} weights for {len(logits)} experts"
            raise ValueError(f"{given}; build it for {len(logits)}, as ConstantGate({len(logits)})")
        # In the images' precision: mixed precision ends before probabilities begin
        logits = torch.stack(logits, dim=1).to(images.dtype)
        return ExpertOutputs(logits, log_gate.to(images.dtype), activations)

    def forward(self, images: Tensor, gate: Gate | None = None) -> Tensor:
        """Log of the mixture, (B, C). gate: "trained", "uniform", "switch" (a fresh uniform permutation each call),
        "switch-per-image", or a permutation; None: `evaluation_gate`."""
        return self.expert_outputs(images).mixture(self.evaluation_gate if gate is None else gate)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it, all of a model is in eval mode; afterwards, each module is in its own again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


LARGEST_ENUMERATED = 6  # experts; seven would make 5,040 mixtures per image
DRAWN = math.factorial(LARGEST_ENUMERATED)


class GateAccuracy(NamedTuple):
    """Shares of images that are classified correctly, 0 .. 1, under each way to set the gate."""

    trained: float
    uniform: float  # equal weights: the plain ensemble
    switched: float  # expected over a uniform permutation of the trained weights
    best: float  # of the permutations, each held fixed for all images
    worst: float
    every: float  # under all permutations, image by image


@dataclass(frozen=True)
class GateVerdicts:
    """Which images are classified correctly, bool, under each way to set the gate, and by each expert alone."""

    trained: Tensor  # (B,)
    uniform: Tensor  # (B,)
    switched: Tensor  # (B, G), under each permutation
    experts: Tensor  # (B, N)

    @property
    def failure(self) -> Tensor:
        """(B,), probability in 0 .. 1 that a uniformly drawn permutation gets the image wrong."""
        return 1 - self.switched.double().mean(1)

    @property
    def any_right(self) -> Tensor:
        """(B,), whether any gate, or any expert alone, gets the image right."""
        return self.trained | self.uniform | self.switched.any(1) | self.experts.any(1)

    @property
    def accuracy(self) -> GateAccuracy:
        trained, uniform, every = (one.double().mean() for one in (self.trained, self.uniform, self.switched.all(1)))
        by_permutation = self.switched.double().mean(0)
        shares = trained, uniform, by_permutation.mean(), by_permutation.max(), by_permutation.min(), every
        return GateAccuracy(*torch.stack(shares).tolist())  # together, since a GPU is waited for each time

    @classmethod
    def join(cls, batches: Sequence[Self]) -> Self:
        """The verdicts on the images of all batches, in their order."""
        tensors = ([getattr(one, field.name) for one in batches] for field in fields(cls))
        return cls(*map(torch.cat, tensors))


@cache
def permutations(experts: int) -> Tensor:
    """All permutations of range(experts), (N!, N), the identity first; of more than six experts, 720 drawn at random,
    always the same ones, with a warning."""
    with torch.inference_mode(False):  # kept for later callers, whose autograd takes no inference tensor
        if experts <= LARGEST_ENUMERATED:
            return torch.tensor(list(itertools.permutations(range(experts))))
        many = f"{experts} experts have {math.factorial(experts):,} gates, too many to count"
        told = f"whatever is said of the switched gate is an estimate from {DRAWN} drawn at random"
        warnings.warn(f"{many}: {told}", stacklevel=2)
        generator = torch.Generator().manual_seed(0)
        return torch.rand(DRAWN, experts, generator=generator).argsort(1)


def switched_probabilities(outputs: ExpertOutputs) -> Tensor:
    """The mixture's class probabilities under every permutation of its gate, (B, N!, C)."""
    states = permutations(outputs.gate.shape[1]).to(outputs.gate.device)
    # Eq. (1) for all gates at once: (B, N!, N) weights times (B, N, C) probabilities
    return outputs.gate[:, states] @ outputs.log_probs.exp()


def check_labels(outputs: ExpertOutputs, labels: Tensor) -> None:
    """Raise ValueError unless labels are (B,): others would be broadcast, or be taken for the first images'."""
    if labels.shape != outputs.logits.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {len(outputs.logits)} images; give each image one")


def verdicts(outputs: ExpertOutputs, labels: Tensor) -> GateVerdicts:
    """Which images are classified correctly under each gate and by each expert, from one pass of the experts.
    Raises ValueError unless labels are (B,)."""
    check_labels(outputs, labels)
    mixtures = [outputs.mixture(one)[:, None] for one in ("trained", "uniform")]
    found = (scores.max(-1) for scores in (*mixtures, switched_probabilities(outputs), outputs.logits))
    # NaN is no answer, not class 0
    trained, uniform, *others = ((answers == labels[:, None]) & ~largest.isnan() for largest, answers in found)
    return GateVerdicts(trained.squeeze(1), uniform.squeeze(1), *others)


ROUNDING = 1e-6  # a float32 image plus a float32 perturbation may miss its bounds by this much


def check_images(images: Tensor) -> None:
    """Raise ValueError unless the images lie in [0, 1]."""
    low, high = torch.stack(images.aminmax()).tolist()  # together, since a GPU is waited for each time
    if not (-ROUNDING <= low and high <= 1 + ROUNDING):  # so phrased that NaN fails
        remedy = "divide 8-bit images by 255, and do not normalise them: the model does that first"
        raise ValueError(f"images must lie in [0, 1], found {low:g} to {high:g}: {remedy}")


def check_batch(model: ImmunityMoE, images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless the images are (B, 3, 32, 32), B >= 1, float32 or float64 in [0, 1], each with a label in
    0 .. C - 1, int64."""
    # In bfloat16, 8/255 may become 8.5/255
    if images.shape[1:] != (3, 32, 32) or not len(images) or images.dtype not in (torch.float32, torch.float64):
        found = f"images of shape {tuple(images.shape)} are {images.dtype}"
        raise ValueError(f"{found}; give (B, 3, 32, 32) of torch.float32, B >= 1; for mixed precision, torch.autocast")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        found = f"labels of shape {tuple(labels.shape)} for {len(images)} images are {labels.dtype}"
        raise ValueError(f"{found}; give each image one, torch.int64")
    check_images(images)
    classes = model.experts[0].num_classes
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= classes:
        found = f"labels must lie in 0 to {classes - 1}, found {low} to {high}"
        remedy = f"build it with num_classes={high + 1} or mend the labels"
        raise ValueError(f"{found}: the model has {classes} classes; {remedy}")
