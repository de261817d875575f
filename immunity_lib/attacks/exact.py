"""PGD on every gate that the random switch can draw, from one pass of the experts.

The N! gates share the experts' outputs, so the loss under each of them, its expectation and its
gradient cost no more than under a single gate. Averaging the loss of sampled gates ("expectation
over transformation", Athalye et al. 2018, arXiv 1802.00420) costs a pass for every sample instead.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from immunity_lib.attacks.frozen import FrozenPGD
from immunity_lib.evaluation import permutations
from immunity_lib.moe import ExpertOutputs, ImmunityMoE

Aim = Literal["expected", "weakest"]


def cross_entropy_by_gate(outputs: ExpertOutputs, labels: Tensor) -> Tensor:
    """The mixture's cross entropy under every permutation of its gate, (B, N!)."""
    own = outputs.log_probs.gather(2, labels[:, None, None].expand(-1, outputs.logits.shape[1], 1))
    gates = outputs.log_gate[:, permutations(own.shape[1]).to(labels.device)]
    # Eq. (1) for all gates, of the label's probability alone: (B, N!, N) + (B, 1, N)
    return -(gates + own.mT).logsumexp(-1)


class ExactPGD(FrozenPGD):
    """PGD (l_inf) on the exact cross entropy over all permutations of the gate.

    aim: what is raised for each image: the "expected" cross entropy over a uniform permutation,
    or that under its "weakest" gate, where the cross entropy is the largest. The points are those
    of the last step.
    """

    def __init__(
        self,
        model: ImmunityMoE,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        aim: Aim = "expected",
    ) -> None:
        """eps, alpha: budget and step size, in units of the image's range [0, 1]. Raises
        ValueError for an unknown aim."""
        if aim not in ("expected", "weakest"):
            raise ValueError(f"unknown aim {aim!r}; choose expected or weakest")
        super().__init__(model, eps, alpha, steps, random_start, stop_early=False)
        self.aim = aim

    def objective(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self.model.expert_outputs(points)
        losses = cross_entropy_by_gate(outputs, labels)
        raised = losses.mean(1) if self.aim == "expected" else losses.amax(1)
        return raised, outputs.mixture("uniform")
