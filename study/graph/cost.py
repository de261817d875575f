"""What a model costs, counted by PyTorch on tensors without contents: nothing is computed, and no data are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from immunity_lib.data import Dataset
from immunity_lib.evaluate import BATCH
from immunity_lib.heatmaps import grad_cam, normalise_maps
from immunity_lib.moe import ImmunityMoE
from immunity_lib.recipe import Recipe
from immunity_lib.train import build_model, training_loss

CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward


def cost_of(recipe: Recipe, classes: int) -> dict[str, int]:
    """Of a recipe's experts, from shapes alone: "parameters", bytes of "memory", and the multiply-accumulates of one
    image's "forward" pass, "gradient" by the image, heat "maps" and training "step" without its attack."""
    plain = Recipe(  # what shapes depend on; one expert
        experts=1, gate_network="constant", alpha=0.0, beta=0.0, gamma=0.0, warmup_epochs=0.0, expert=recipe.expert,
        width=recipe.width, layers=recipe.layers, heatmap_layer=recipe.heatmap_layer,
        auxiliary_weight=float(recipe.auxiliary_weight > 0),
    )  # fmt: skip
    with_maps = float(recipe.beta + recipe.gamma > 0)
    step = replace(plain, beta=with_maps, pairing=recipe.pairing, explained=recipe.explained if with_maps else "logit")
    cost = _cost_of_step(step, plain, classes) | _cost_of_measuring(plain, classes)
    weights = 4 * cost["parameters"]
    training = 3 * weights + recipe.batch_size * cost["kept by a step"] // 2
    cost["memory"] = max(training, weights + BATCH * cost["kept by a gradient"] // 2)
    shown = ("parameters", "memory", "forward", "gradient", "maps", "step")
    return {what: recipe.experts * cost[what] for what in shown}


@cache
def _cost_of_step(recipe: Recipe, plain: Recipe, classes: int) -> dict[str, int]:
    model, pair, labels = _without_contents(plain, classes)
    with _Counter() as counter:
        with _kept_for_backward(model) as kept:
            other = None if recipe.pairing == "none" else pair
            loss = training_loss(model.train(), pair, labels, recipe, 1.0, other).total
        loss.backward()
    parameters = sum(one.numel() for one in model.experts.parameters())
    return {"parameters": parameters, "step": counter.macs, "kept by a step": sum(one.nbytes() for one in kept)}


@cache
def _cost_of_measuring(plain: Recipe, classes: int) -> dict[str, int]:
    model, pair, labels = _without_contents(plain, classes)
    images = pair.clone().requires_grad_()
    with _Counter() as counter:
        with _kept_for_backward(model) as kept:
            outputs = model.eval().expert_outputs(images)
            answers = outputs.mixture("uniform").sum()
        forward = counter.macs
        normalise_maps(grad_cam(outputs, labels))
        maps = counter.macs
        torch.autograd.grad(answers, images)
    cost = {"forward": forward, "gradient": forward + counter.macs - maps, "maps": maps}
    return cost | {"kept by a gradient": sum(one.nbytes() for one in kept)}


def without_images(classes: int) -> Dataset:
    """What a model must know of its data to be built."""
    return Dataset("", ("",) * classes, (0.5,) * 3, (0.25,) * 3, (), "none", {})


@cache
def _without_contents(recipe: Recipe, classes: int) -> tuple[ImmunityMoE, torch.Tensor, torch.Tensor]:
    """A model, two images, the fewest that batch norms take, and their labels."""
    with torch.device("meta"), _Counter():  # it measures itself, too
        return build_model(recipe, without_images(classes)), torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)


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
        return tree_map_only(torch.Tensor, _another, found)


def _another(tensor: torch.Tensor) -> torch.Tensor:
    """As `empty_like`, which PyTorch carries out in Python on tensors without contents."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


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
