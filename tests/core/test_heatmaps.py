"""Heat maps, eq (3): against loops, pytorch-grad-cam, and the slopes of what is made of them."""

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from immunity_lib import ImmunityMoE, build_expert, expert_heatmaps, losses
from immunity_lib.experts import BASELINES, EXPERT_NAMES
from immunity_lib.heatmaps import _interpolation, grad_cam, is_empty, normalise_maps
from immunity_lib.moe import ExpertOutputs, permutations, switched_probabilities


@pytest.mark.parametrize(
    ("explained", "score"),
    [
        ("logit", lambda one, label: one.logits[0, :, label].sum()),
        ("log-probability", lambda one, label: one.logits.log_softmax(-1)[0, :, label].sum()),
        ("mixture", lambda one, label: one.mixture("trained")[0, label]),
    ],
)
def test_maps_are_eq_3_image_by_image_and_expert_by_expert(model, images, labels, explained, score):
    model, images = model.double(), images.double()
    found = grad_cam(model.expert_outputs(images), labels, explained=explained)
    for q in range(3):
        one = model.expert_outputs(images[q : q + 1])
        gradients = torch.autograd.grad(score(one, labels[q]), one.activations)
        for i, (gradient, activations) in enumerate(zip(gradients, one.activations, strict=True)):
            channels, rows, columns = activations.shape[1:]
            a = [gradient[0, k].sum() / channels for k in range(channels)]
            heat = sum(a[k] * activations[0, k] for k in range(channels)).relu()
            assert min(rows, columns) > 8
            expected = functional.interpolate(heat[None, None], (32, 32), mode="bilinear")[0, 0]
            torch.testing.assert_close(found[q, i], expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="logit, log-probability, mixture; got 'probability'"):
        expert_heatmaps(model, images, labels, explained="probability")


def test_A9_each_image_needs_a_label(model, images, labels):
    with pytest.raises(ValueError, match=rf"labels of shape \(1,\) for {len(images)} images; give each image one"):
        grad_cam(model.expert_outputs(images.requires_grad_()), labels[:1])


def test_maps_agree_with_pytorch_grad_cam_up_to_scaling(model, images):
    """It scales every map to 0 .. 1, so ours is scaled so too, after resizing to 32x32."""
    living = 0
    for label in range(10):  # a map that the ReLU empties has nothing to compare
        maps = expert_heatmaps(model, images[:2], torch.tensor([label, label]))
        for i, expert in enumerate(model.experts):
            with GradCAM(expert, [expert.stages[expert.head_stages - 1]]) as oracle:
                expected = oracle(images[:2], [ClassifierOutputTarget(label)] * 2)
            for ours, theirs in zip(maps[:, i].numpy(), expected, strict=True):
                if np.ptp(ours) > 1e-5:
                    ours = (ours - ours.min()) / np.ptp(ours)
                    np.testing.assert_allclose(ours, theirs, atol=1e-4)
                    living += 1
    assert living >= 10  # of 60


@pytest.mark.parametrize(("signs", "floor"), [([+1, -1], 0.0), ([-1, -1], 0.0), ([-1, -1], 0.1)])
def test_empty_map_is_uniform_counted_and_harmless(signs, floor):
    """Of synthetic "experts": class 0 is the mean activation times the sign; if negative, the ReLU leaves nothing."""
    activations = tuple(torch.rand(4, 3, 8, 8).requires_grad_() for _ in signs)
    means = [torch.stack([one.mean((1, 2, 3)), one[:, 0].mean((1, 2))], dim=1) for one in activations]
    logits = torch.stack([sign * mean for sign, mean in zip(signs, means, strict=True)], dim=1)
    outputs = ExpertOutputs(logits, torch.full((4, len(signs)), -math.log(len(signs))), activations)
    maps = normalise_maps(grad_cam(outputs, torch.zeros(4, dtype=torch.int64), create_graph=True), floor)
    assert torch.equal(maps[:, 1], torch.full((4, 32, 32), 1 / 1024))
    empty = [sign < 0 for sign in signs]
    assert is_empty(maps).tolist() == [empty] * 4
    loss = losses.mutual_information_loss(maps) + losses.position_stability_loss(maps, "pixels")
    gradients = torch.autograd.grad(loss, outputs.activations)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any() or signs[0] < 0


def test_floor_spreads_a_share_of_the_expert_s_mean_mass(model, images, labels):
    heat = grad_cam(model.expert_outputs(images), labels).double()
    mass = heat.sum((2, 3), keepdim=True)
    spread = 0.25 * mass.mean(0) / 1024
    found = expert_heatmaps(model, images, labels, floor=0.25).double()
    torch.testing.assert_close(found, (heat + spread) / (mass + 1024 * spread), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_constant_share_of_the_floor_changes_no_value_and_rewards_no_shrinking(floor):
    """Of maps of different mass at different places. Of no floor, it is the literal reading."""
    heat = torch.rand(4, 3, 32, 32, dtype=torch.float64) ** 8
    heat[:, 0, :20], heat[:2, 1, :, :16] = 0, 0
    heat = (heat * torch.arange(1, 5).view(4, 1, 1, 1)).requires_grad_()
    gradients, gains = [], []
    for constant_share in (False, True):
        maps = normalise_maps(heat, floor, constant_share=constant_share)
        loss = losses.position_stability_loss(maps, "pixels")
        gradients += torch.autograd.grad(loss, heat)
        gains.append((gradients[-1] * heat).sum((2, 3)))  # slope of scaling a map as a whole
        torch.testing.assert_close(maps, normalise_maps(heat, floor))
    if floor:
        assert gains[0].abs().max() > 1e-3
        torch.testing.assert_close(gains[1], torch.zeros_like(gains[1]), rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("experts", [3, 7])
@pytest.mark.filterwarnings("ignore:7 experts have")
def test_what_is_kept_from_inference_mode_serves_gradients_later(experts):
    """The permutations and the interpolation, each made by whoever asks first."""
    kept, found = (permutations, _interpolation), []
    for mode in (False, True):
        for one in kept:
            one.cache_clear()
        with torch.inference_mode(mode):
            permutations(experts), _interpolation(9, torch.device("cpu"), torch.float32)
        torch.manual_seed(0)
        activations = tuple(torch.rand(4, 2, 9, 9).requires_grad_() for _ in range(experts))
        logits = torch.stack([one.mean((2, 3)).square() for one in activations], dim=1)
        outputs = ExpertOutputs(logits, torch.rand(4, experts).log_softmax(1), activations)
        maps = grad_cam(outputs, torch.tensor([0, 1, 1, 0]), create_graph=True)
        raised = maps.square().sum() + switched_probabilities(outputs)[..., 0].square().sum()
        found.append(torch.autograd.grad(raised, activations))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert all(one.any() for one in found[0])


@pytest.mark.parametrize("train", [False, True])
def test_A4_maps_for_looking_change_nothing_and_do_not_depend_on_the_batch(model, images, labels, train):
    model, images = model.double().train(train), images.double()
    model.experts[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    together = expert_heatmaps(model, images, labels)
    alone = torch.cat([expert_heatmaps(model, images[q, None], labels[q, None]) for q in range(8)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():  # neither that nor frozen weights keep the maps from their gradients
        frozen = expert_heatmaps(model.requires_grad_(False), images, labels)
    with torch.inference_mode():
        batch = images.clone(), labels.clone()
    torch.testing.assert_close(expert_heatmaps(model, *batch), together)  # nor do images that it made
    torch.testing.assert_close(frozen, together)
    torch.testing.assert_close(frozen.sum((2, 3)), torch.ones(8, 3).double())


@pytest.mark.parametrize(
    ("expert", "explained"),
    [("resnet18", "logit"), ("resnet18", "log-probability"), ("resnet18", "mixture")]
    + [(expert, "logit") for expert in EXPERT_NAMES[1:]],
)
def test_training_gradient_is_the_slope_of_the_loss(images, labels, expert, explained):
    """Along a random direction through all parameters, in float64, with smooth functions in place of ReLUs and
    max-pools: a step may cross their kinks, where a map jumps.

    With floor 0, since a floor is a constant to the gradient though not to the loss."""
    options = {"layers": 3} if expert in BASELINES else {}
    model = ImmunityMoE([build_expert(expert, 10, 0.0625, **options) for _ in range(2)])
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.Softplus())
        if isinstance(module, nn.MaxPool2d):
            model.set_submodule(name, nn.AvgPool2d(module.kernel_size, module.stride, module.padding))
    model, images, step = model.double().train(), images[:4].double(), 1e-8
    parameters = list(model.parameters())
    start = parameters_to_vector(parameters).detach()
    direction = torch.randn_like(start)

    def loss(move=0.0):
        vector_to_parameters(start + move * direction, parameters)
        maps = expert_heatmaps(model, images, labels[:4], create_graph=True, explained=explained)
        weights = {"alpha": 1, "beta": 3, "gamma": 0.1, "coordinates": "pixels"}
        return losses.immunity_loss(model.expert_outputs(images), labels[:4], maps, **weights).total

    gradients = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    slope = torch.cat([one.flatten() for one in gradients]) @ direction
    difference = (loss(step) - loss(-step)) / (2 * step)
    assert difference.item() == pytest.approx(slope.item(), rel=1e-4)
