"""Immunity: a mixture of convolutional experts under a random switch gate, with losses on the experts' own heat maps
(arXiv 2402.18787).

Shapes, everywhere: B images, N experts, C classes, K channels, (u, v) feature grid, (a, b) heat-map grid.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from immunity_lib.experts import as_expert, build_expert
    from immunity_lib.heatmaps import expert_heatmaps
    from immunity_lib.moe import ImmunityMoE

__all__ = ["ImmunityMoE", "as_expert", "build_expert", "expert_heatmaps"]


def __getattr__(name: str):
    """Loaded when asked for: PyTorch takes seconds, and what only reads a recipe needs none of it."""
    modules = {"ImmunityMoE": "moe", "expert_heatmaps": "heatmaps", "as_expert": "experts", "build_expert": "experts"}
    if name in modules:
        return getattr(import_module(f"immunity_lib.{modules[name]}"), name)
    raise AttributeError(f"module 'immunity_lib' has no attribute {name!r}")
