"""Immunity: mixtures of experts that defend by switching their gate, and the study of it."""

from immunity_lib.experts import build_expert
from immunity_lib.heatmaps import expert_heatmaps
from immunity_lib.moe import ImmunityMoE

__all__ = ["ImmunityMoE", "build_expert", "expert_heatmaps"]
