"""Immunity: a mixture of convolutional experts under a random switch gate, with losses on the experts' own heat maps
(arXiv 2402.18787).

Shapes, everywhere: B images, N experts, C classes, K channels, (u, v) feature grid, (a, b) heat-map grid.
"""

from immunity_lib.experts import as_expert, build_expert
from immunity_lib.heatmaps import expert_heatmaps
from immunity_lib.moe import ImmunityMoE

__all__ = ["ImmunityMoE", "as_expert", "build_expert", "expert_heatmaps"]
