"""Heat maps by name: the paper's Grad-CAM, eq (3), and its kin from pytorch-grad-cam."""

from contextlib import redirect_stderr
from io import StringIO

import torch
from torch import Tensor

from immunity_lib.heatmaps import expert_heatmaps, normalise_maps
from immunity_lib.moe import ImmunityMoE

OURS = "Grad-CAM, eq (3)"
KIN = ("Grad-CAM++", "XGrad-CAM", "Layer-CAM", "HiRes-CAM", "Eigen-CAM", "EigenGrad-CAM", "Score-CAM", "Ablation-CAM")
CAM_METHODS = (OURS, *KIN)
BATCH = 64


def explanation_maps(model: ImmunityMoE, images: Tensor, labels: Tensor, method: str) -> Tensor:
    """Heat maps (B, N, 32, 32) of every expert for the labels, each summing to 1.
    images: (B, 3, 32, 32) in [0, 1]; labels: (B,). method: one of CAM_METHODS; ValueError for another. pytorch-grad-cam
    stretches each map to 0 .. 1, so its least heated pixel is 0. Eigen-CAM looks at activations, whatever the class."""
    if method == OURS:
        return expert_heatmaps(model, images, labels)
    if method not in CAM_METHODS:
        raise ValueError(f"unknown CAM method {method!r}; valid names: {', '.join(CAM_METHODS)}")
    import pytorch_grad_cam as library  # costs a second, which only those who ask for it should pay
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    kin = getattr(library, method.replace("-", "").replace("+", "Plus"))
    by_expert = []
    for expert in model.experts:
        # Score-CAM prints a progress bar for each image
        with redirect_stderr(StringIO()), kin(expert, [expert.stages[expert.head_stages - 1]]) as cam:
            cam.batch_size = BATCH  # of the masked images that Score-CAM and Ablation-CAM ask for
            batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
            maps = [cam(few, list(map(ClassifierOutputTarget, theirs.tolist()))) for few, theirs in batches]
        by_expert.append(torch.cat(list(map(torch.from_numpy, maps))))
    return normalise_maps(torch.stack(by_expert, dim=1).float()).to(images.device)
