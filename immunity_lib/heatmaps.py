"""Differentiable Grad-CAM heat maps of all experts at once, eq (3).

No hooks: the experts hand out the activations of their Grad-CAM layer together with the logits, so one forward pass
serves classification and maps, and with `create_graph` the maps can stand in a loss. Experts share nothing, hence one
backward pass of the summed scores serves all of them.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from immunity_lib.moe import ExpertOutputs, ImmunityMoE, check_batch, check_labels, in_eval_mode

GRID = 32  # heat maps have the resolution of the images
# As `grad_cam` describes them: (B, N, C) or, of the mixture, (B, 1, C)
EXPLAINED = {
    "logit": lambda outputs: outputs.logits,
    "log-probability": lambda outputs: outputs.log_probs,
    "mixture": lambda outputs: outputs.mixture()[:, None],
}


def expert_heatmaps(
    model: ImmunityMoE, images: Tensor, labels: Tensor, create_graph: bool = False,
    *, floor: float = 0.0, explained: str = "logit",
) -> Tensor:  # fmt: skip
    """Heat maps of every expert for the given labels.

    images: (B, 3, 32, 32) in [0, 1]; labels: (B,). Returns (B, N, 32, 32), non-negative, each map sums to 1 and an
    empty one (all zero behind the ReLU of eq (3)) is uniform. The defaults are the one reading that scores and
    pictures use; `floor` is described in `normalise_maps`, `explained` in `grad_cam`. For a look (without
    `create_graph`) the model is in eval mode, and as before afterwards; in a loss (with it) batch norms mix the
    images of the batch as training has them. ValueError for images outside of [0, 1] and labels that do not match.
    """
    check_batch(model, images, labels)
    if not create_graph:
        images, labels = images.detach().clone().requires_grad_(), labels.clone()  # a graph of frozen weights, too
    with nullcontext() if create_graph else in_eval_mode(model), torch.enable_grad():
        outputs = model.expert_outputs(images)
        maps = normalise_maps(grad_cam(outputs, labels, create_graph, explained=explained), floor)
    return maps if create_graph else maps.detach()


def normalise_maps(maps: Tensor, floor: float = 0.0, *, constant_share: bool = False) -> Tensor:
    """Non-negative heat maps (B, N, 32, 32), each made to sum to 1; an empty one is uniform.

    floor: share of the expert's mean map mass in this batch (a constant for the gradient) that is spread evenly over
    each of its maps before dividing. 0 is the literal reading. A positive floor bounds the gradient through the
    division, which otherwise grows as a map shrinks and kills it. constant_share: whether the floor's share of each
    map is a constant for the gradient too. Then a loss cannot fall by letting a map shrink into its floor. Values are
    the same.
    """
    mass = maps.sum((-2, -1), keepdim=True)
    spread = GRID**2 * 1e-10  # far below the mass of any living map; it makes an all-zero map uniform instead of NaN
    if floor:
        spread = spread + floor * mass.detach().mean(0)
    if not constant_share:
        return (maps + spread / GRID**2) / (mass + spread)
    whole = mass.detach() + spread
    return maps / mass.clamp(min=1e-30) * (mass.detach() / whole) + spread / whole / GRID**2


def grad_cam(outputs: ExpertOutputs, labels: Tensor, create_graph: bool = False, *, explained: str = "logit") -> Tensor:
    """Unnormalised heat maps H_i of eq (3), (B, N, 32, 32), resized bilinearly.

    explained: what "y_label" in eq (3) is: the expert's own "logit" of the label, its "log-probability", or that of
    the "mixture".
    """
    if explained not in EXPLAINED:
        raise ValueError(f"explained must be one of {', '.join(EXPLAINED)}; got {explained!r}")
    check_labels(outputs, labels)
    scores = EXPLAINED[explained](outputs)
    scores = scores.gather(2, labels[:, None, None].expand(-1, scores.shape[1], 1))
    gradients = torch.autograd.grad(scores.sum(), outputs.activations, create_graph=create_graph, retain_graph=True)
    maps = []
    for activations, gradient in zip(outputs.activations, gradients, strict=True):
        # Eq. (3): a_k = (1/M) sum_uv dy/dA(u, v), M the number of channels; H = ReLU(sum_k a_k A_k).
        # Mixed precision's activations are coarser than the scores
        activations, gradient = activations.to(scores.dtype), gradient.to(scores.dtype)
        weights = gradient.sum((-2, -1)) / activations.shape[1]
        heat = torch.einsum("bk,bkuv->buv", weights, activations).relu()
        # Resized by two products with a fixed matrix: deterministic on every device and cheap to differentiate twice
        rows, columns = (_interpolation(size, heat.device, heat.dtype) for size in heat.shape[-2:])
        maps.append(rows @ heat @ columns.mT)
    return torch.stack(maps, dim=1)


def is_empty(maps: Tensor) -> Tensor:
    """Which normalised maps (..., 32, 32), made with floor 0, are empty, bool (...)."""
    return maps.amax((-2, -1)) == maps.amin((-2, -1))


@lru_cache
def _interpolation(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(32, size), that resizes a side linearly."""
    with torch.inference_mode(False):  # kept for later callers, whose autograd takes no inference tensor
        identity = torch.eye(size, device=device, dtype=dtype)[None]
        return functional.interpolate(identity, size=GRID, mode="linear")[0].mT.contiguous()
