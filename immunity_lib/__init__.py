"""Immunity: mixtures of experts that defend by switching their gate, and the study of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from immunity_lib.experts import build_expert
    from immunity_lib.heatmaps import expert_heatmaps
    from immunity_lib.moe import ImmunityMoE

__all__ = ["ImmunityMoE", "build_expert", "expert_heatmaps"]
_HOMES = {"ImmunityMoE": "moe", "build_expert": "experts", "expert_heatmaps": "heatmaps"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the commands that start jobs do without PyTorch, which takes
    seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
