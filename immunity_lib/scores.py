"""How different and how steady the experts' heat maps are: section 5.2.1 and eqs (4)-(8), (10).

All take maps (B, N, a, b), each summing to 1, as `expert_heatmaps` makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

COORDINATES = ("pixels", "unit")


def centre_of_mass(maps: Tensor, coordinates: str = "pixels") -> Tensor:
    """Eq (10): mean (row, column) of each map, (B, N, 2); pixels count from 0, "unit" is 0 to 1."""
    if coordinates not in COORDINATES:
        raise ValueError(
            f"coordinates must be one of {', '.join(COORDINATES)}; got {coordinates!r}"
        )
    rows, columns = (
        torch.arange(size, dtype=maps.dtype, device=maps.device) for size in maps.shape[-2:]
    )
    if coordinates == "unit":
        rows, columns = rows / rows[-1], columns / columns[-1]
    # Eq. (10): sum_ab (a, b) h(a, b)
    return torch.stack((maps.sum(-1) @ rows, maps.sum(-2) @ columns), dim=-1)


def squared_distances(maps: Tensor, coordinates: str = "pixels") -> Tensor:
    """Squared distances between the centres of mass of all pairs of experts, (B, N, N)."""
    centres = centre_of_mass(maps, coordinates)
    return (centres[:, :, None] - centres[:, None, :]).square().sum(-1)


def independence_score(maps: Tensor) -> Tensor:
    """IScore: mean over images and ordered pairs of experts of sum_ab (h_i - h_j)^2.

    0 for equal maps; higher is more independent. 0 for a single expert.
    """
    experts = maps.shape[1]
    # IScore = 1/(N (N - 1)) sum_ij sum_ab (h_i - h_j)^2, expanded so that no pair is stored
    squares = maps.square().sum((1, 2, 3))
    square_of_sum = maps.sum(1).square().sum((1, 2))
    return (2 * (experts * squares - square_of_sum) / max(experts * (experts - 1), 1)).mean()


def causality_score(maps: Tensor) -> Tensor:
    """CScore: eq (11) over the number of images, in pixels^4; lower is more stable."""
    distances = squared_distances(maps)
    # CScore = (1/B) sum_ij sum_q (d2 - mean_q d2)^2
    return (distances - distances.mean(0)).square().sum() / maps.shape[0]


def mutual_information(maps: Tensor) -> Tensor:
    """I(C, E) of a pixel's coordinate and the expert, in nats, mean over images; 0 .. log N."""
    # Eqs. (4), (5): p(c | E = i) = h_i(c), experts equally likely, p(c) = (1/N) sum_j h_j(c)
    average = maps.mean(1, keepdim=True)
    divergence = torch.xlogy(maps, maps) - torch.xlogy(maps, average)
    return divergence.sum((2, 3)).mean()
