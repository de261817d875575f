"""What a model costs, counted by PyTorch on tensors without contents: nothing is computed, and no data are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from immunity_lib.data import Dataset
from immunity_lib.evaluate import BATCH
from immunity_lib.heatmaps import grad_cam, normalise_maps
from immunity_lib.moe import ImmunityMoE
from immunity_lib.recipe import Recipe
from immunity_lib.train import build_model, training_loss

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


def cost_of(recipe: Recipe, classes: int) -> dict[str, int]:
    """Of a recipe's experts, from shapes alone: "parameters", bytes of "memory" and of the "least" that it can do with
    (on a GPU, measuring takes fewer images at a time where they do not fit), and the multiply-accumulates of one
    image's "forward" pass, "gradient" by the image, heat "maps" and training "step" without its attack. What a pass of
    two images keeps for its backward pass is told too."""
    with_maps = recipe.beta + recipe.gamma > 0
    one = Recipe(  # what shapes depend on; one expert
        experts=1, gate_network="constant", alpha=0.0, beta=float(with_maps), gamma=0.0, warmup_epochs=0.0,
        expert=recipe.expert, width=recipe.width, layers=recipe.layers, heatmap_layer=recipe.heatmap_layer,
        auxiliary_weight=float(recipe.auxiliary_weight > 0), pairing=recipe.pairing,
        explained=recipe.explained if with_maps else "logit",
    )  # fmt: skip
    cost = _cost_of_one(one, classes)
    weights = 4 * cost["parameters"]
    training = 3 * weights + recipe.batch_size * cost["kept by a step"] // 2
    measuring = weights + BATCH * cost["kept by a gradient"] // 2
    in_bytes = {"memory": max(training, measuring), "least": training}
    return {what: recipe.experts * number for what, number in (cost | in_bytes).items()}


@cache
def _cost_of_one(recipe: Recipe, classes: int) -> dict[str, int]:
    """On two images, the fewest that batch norms take."""
    with torch.device("meta"), _Counter():  # it measures itself, too
        model, images = build_model(recipe, without_images(classes)), torch.zeros(2, 3, 32, 32)
        labels = torch.zeros(2, dtype=torch.long)
    with _Counter() as step:
        with _kept_for_backward(model) as kept_by_step:
            other = None if recipe.pairing == "none" else images
            loss = training_loss(model.train(), images, labels, recipe, 1.0, other).total
        loss.backward()
    images.requires_grad_()
    with _Counter() as forward, _kept_for_backward(model) as kept_by_gradient:
        outputs = model.eval().expert_outputs(images)
        answers = outputs.mixture("uniform").sum()
    with _Counter() as maps:
        normalise_maps(grad_cam(outputs, labels))
    with _Counter() as gradient:
        torch.autograd.grad(answers, images)
    return {
        "parameters": sum(one.numel() for one in model.experts.parameters()),
        "forward": forward.macs,
        "gradient": forward.macs + gradient.macs,
        "maps": forward.macs + maps.macs,
        "step": step.macs,
        "kept by a step": sum(one.nbytes() for one in kept_by_step),
        "kept by a gradient": sum(one.nbytes() for one in kept_by_gradient),
    }


def without_images(classes: int) -> Dataset:
    """What a model must know of its data to be built."""
    return Dataset("", ("",) * classes, (0.5,) * 3, (0.25,) * 3, (), "none", {})


class _Counter(TorchDispatchMode):
    """Counts multiply-accumulates for each of two images, on tensors without contents. Each operation is carried out
    once for all arguments of the same shapes: what would come of it, PyTorch takes a millisecond to tell."""

    known: ClassVar[dict] = {}  # what comes of an operation, and its multiply-accumulates
    macs = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if any(one.alias_info for one in function._schema.returns):  # a view, or in place
            return function(*arguments, **options)
        key = (function, _shapes(arguments), _shapes(tuple(options.items())))
        if key not in self.known:
            with FlopCounterMode(display=False, custom_mapping={CONVOLUTION_BACKWARD: _backward_flops}) as counter:
                self.known[key] = function(*arguments, **options), counter.get_total_flops() // 4
        found, macs = self.known[key]
        self.macs += macs
        return _another(found)


def _another(found):
    """As `empty_like` of each tensor, which PyTorch carries out in Python on tensors without contents."""
    if isinstance(found, torch.Tensor):
        return torch.empty_strided(found.shape, found.stride(), dtype=found.dtype, device=found.device)
    return type(found)(map(_another, found)) if isinstance(found, tuple | list) else found


def _shapes(value):
    """Arguments, hashable: of each tensor in them its shape."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_shapes, value)) if isinstance(value, tuple | list) else value


def _backward_flops(gradient, inputs, weight, *others, **_) -> int:  # their shapes
    """PyTorch's own formula takes a depthwise convolution's backward pass for a full one's."""
    return sum(others[-1][:2]) * conv_flop_count(inputs, weight, gradient)


@contextmanager
def _kept_for_backward(model: ImmunityMoE) -> Iterator[set[torch.UntypedStorage]]:
    """What is computed within it holds on to for its backward pass, weights aside, each tensor once."""
    kept = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
    kept -= {parameter.untyped_storage() for parameter in model.parameters()}
