"""A model at one point of an attack: everything that a row of the explorer shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from immunity_lib.evaluation import permutations
from immunity_lib.explorer.cam_methods import OURS
from immunity_lib.explorer.drawing import scale_top
from immunity_lib.explorer.exploration import TRUE_CLASS, Answers, Exploration, Subject
from immunity_lib.moe import Gate
from immunity_lib.recipes import MIXTURES, ModelName


@dataclass(frozen=True)
class Moment:
    """budget, step: indices into the `answers`. heat: (N, 32, 32), the maps of all experts. state:
    the row of `evaluation.permutations` that the gate is in. top: where the scale ends, see
    `drawing.scale_top`.
    """

    title: str
    answers: Answers
    heat: Tensor
    budget: int
    step: int
    state: int
    top: float

    @property
    def image(self) -> Tensor:
        """(3, 32, 32)"""
        return self.answers.frames[self.budget, self.step]

    @property
    def experts(self) -> Tensor:
        """(N, C), probabilities."""
        return self.answers.experts[self.budget, self.step]

    @property
    def ensemble(self) -> Tensor:
        """(C,), probabilities under equal weights."""
        return self.answers.ensemble[self.budget, self.step]

    @property
    def mixture(self) -> Tensor:
        """(C,), probabilities in this state of the gate."""
        return self.answers.mixtures[self.budget, self.step, self.state]

    @property
    def weights(self) -> Tensor:
        """(N,), of the experts, in this state of the gate."""
        gate = self.answers.gate[self.budget, self.step]
        return gate[permutations(len(gate))[self.state]]

    @property
    def right(self) -> Tensor:
        """(G,) bool, by state of the gate."""
        return self.answers.right[self.budget, self.step]

    @property
    def moved(self) -> float:
        """Largest change of a pixel so far, in units of [0, 1]."""
        return (self.image - self.answers.frames[self.budget, 0]).abs().max().item()


def moments(
    exploration: Exploration,
    names: Sequence[ModelName],
    subject: Subject,
    attacked_gate: Gate,
    *,
    budget: int,
    steps: Sequence[int],
    state: int = 0,
    method: str = OURS,
    explained: int | str = TRUE_CLASS,
) -> list[Moment]:
    """Of each model, each of the steps, all maps on the one scale of its whole way."""
    key = subject, attacked_gate
    answers = [exploration.answers(name, *key) for name in names]
    maps = [exploration.maps(name, *key, method, explained) for name in names]
    top = scale_top(maps)
    return [
        Moment(label_of(name), found, heat[budget, step], budget, step, state, top)
        for name, found, heat in zip(names, answers, maps, strict=True)
        for step in steps
    ]


def label_of(name: ModelName) -> str:
    """A mixture as readers call it."""
    return f"{MIXTURES[name.method]}, {name.regime} training"
