"""The losses of the paper: eqs (2), (9), (11) and their sum, eq (12)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from immunity_lib.scores import squared_distances

if TYPE_CHECKING:
    from immunity_lib.moe import ExpertOutputs


@dataclass(frozen=True)
class ImmunityLoss:
    """Eq (12) and its three parts, each a scalar; `total` is what training descends."""

    total: Tensor
    cross_entropy: Tensor
    mutual_information: Tensor
    position_stability: Tensor


def classification_loss(outputs: ExpertOutputs, labels: Tensor, alpha: float) -> Tensor:
    """Eq (2), mean over the batch: the mixture's cross entropy and alpha times every expert's.

    Both are given log-probabilities, of which softmax makes the probabilities again.
    """
    # Eq. (2): CE(y_hat, y) + alpha sum_i CE(softmax f_i, y)
    loss = functional.nll_loss(outputs.mixture(), labels)
    if alpha:
        images, experts, _ = outputs.log_probs.shape
        every_expert = outputs.log_probs.flatten(0, 1)
        labels = labels.repeat_interleave(experts)
        loss = loss + alpha * functional.nll_loss(every_expert, labels, reduction="sum") / images
    return loss


def mutual_information_loss(maps: Tensor) -> Tensor:
    """Eq (9), mean over the batch; maps (B, N, a, b), each summing to 1.

    Equals N (log N - I(C, E)): 0 where the experts' maps are disjoint, N log N where they agree.
    """
    # Eq. (9): - sum_i sum_ab h_i log(h_i / sum_j h_j); xlogy makes 0 log 0 = 0
    together = maps.sum(1, keepdim=True)
    loss = torch.xlogy(maps, together) - torch.xlogy(maps, maps)
    return loss.sum((1, 2, 3)).mean()


def position_stability_loss(maps: Tensor, coordinates: str = "pixels") -> Tensor:
    """Eq (11), its sum over the batch as written; maps (B, N, a, b), each summing to 1.

    How far the squared distances between the experts' centres of mass stray from their batch
    means; 0 where they are the same on every image. In pixels^4, or without unit for coordinates
    in "unit" (0 to 1 across the map).
    """
    distances = squared_distances(maps, coordinates)
    # Eq. (11): sum_ij sum_q (d2_q,ij - mean_q d2_q,ij)^2
    return (distances - distances.mean(0)).square().sum()


def immunity_loss(
    outputs: ExpertOutputs,
    labels: Tensor,
    maps: Tensor | None,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    coordinates: str = "pixels",
) -> ImmunityLoss:
    """Eq (12) for a batch. A term of weight 0 is not computed; without maps both must be 0.

    alpha, beta, gamma: the weights of eqs (2) and (12), >= 0.
    """
    images, experts, _ = outputs.log_probs.shape
    zero = outputs.log_probs.new_zeros(())
    cross_entropy = classification_loss(outputs, labels, alpha)
    mutual_information = position_stability = zero
    if (beta or gamma) and maps is None:
        raise ValueError(f"beta = {beta} and gamma = {gamma} need the experts' heat maps")
    if beta:
        mutual_information = mutual_information_loss(maps)
    if gamma:
        position_stability = position_stability_loss(maps, coordinates)
    # Eq. (12): (1/B) { sum_q CE + (beta/N) sum_q MI + gamma/(N (N - 1)) PS }
    total = (
        cross_entropy
        + beta / experts * mutual_information
        + gamma / max(experts * (experts - 1), 1) * position_stability / images
    )
    return ImmunityLoss(total, cross_entropy, mutual_information, position_stability)
