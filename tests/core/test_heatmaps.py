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

from immunity_lib import ImmunityMoE, build_expert, expert_heatmaps, losses
from immunity_lib.experts import BASELINES
from immunity_lib.heatmaps import (
    empty_share,
    grad_cam,
    heatmaps_from_outputs,
    is_empty,
    normalise_maps,
)
from immunity_lib.moe import ExpertOutputs


def outputs_with_weights(signs):
    """One synthetic "expert" per sign: class 0 is its mean activation times the sign."""
    generator = torch.Generator().manual_seed(0)
    activations = tuple(torch.rand(4, 3, 8, 8, generator=generator).requires_grad_() for _ in signs)
    logits = torch.stack(
        [
            sign * torch.stack([one.mean((1, 2, 3)), one[:, 0].mean((1, 2))], dim=1)
            for sign, one in zip(signs, activations, strict=True)
        ],
        dim=1,
    )
    gate = torch.full((4, len(signs)), -math.log(len(signs)))
    return ExpertOutputs(logits, gate, activations)


def test_maps_are_distributions(model, images, labels):
    maps = expert_heatmaps(model, images, labels)
    assert maps.shape == (8, 3, 32, 32) and maps.min() >= 0
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(8, 3))
    assert not maps.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_maps_are_eq_3_image_by_image_and_expert_by_expert(model, images, labels):
    model, images = model.double(), images.double()
    found = grad_cam(model.expert_outputs(images), labels)
    for i, expert in enumerate(model.experts):
        for q in range(3):
            activations, logits = expert.forward_with_features(images[q : q + 1])
            (gradient,) = torch.autograd.grad(logits[0, labels[q]], activations)
            channels, rows, columns = activations.shape[1:]
            a = [gradient[0, k].sum() / channels for k in range(channels)]
            heat = sum(a[k] * activations[0, k] for k in range(channels)).relu()
            assert min(rows, columns) > 8
            expected = functional.interpolate(heat[None, None], (32, 32), mode="bilinear")[0, 0]
            torch.testing.assert_close(found[q, i], expected, rtol=1e-9, atol=1e-12)


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
    outputs = outputs_with_weights(signs)  # negative weights: the ReLU leaves nothing
    maps = heatmaps_from_outputs(
        outputs, torch.zeros(4, dtype=torch.int64), create_graph=True, floor=floor
    )
    assert torch.equal(maps[:, 1], torch.full((4, 32, 32), 1 / 1024))
    empty = [sign < 0 for sign in signs]
    assert is_empty(maps).tolist() == [empty] * 4 and empty_share(maps).tolist() == empty
    loss = losses.mutual_information_loss(maps) + losses.position_stability_loss(maps, "pixels")
    gradients = torch.autograd.grad(loss, outputs.activations)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any() or signs[0] < 0


def test_floor_spreads_a_share_of_the_expert_s_mean_mass(model, images, labels):
    heat = grad_cam(model.expert_outputs(images), labels).double()
    mass = heat.sum((2, 3), keepdim=True)
    spread = 0.25 * mass.mean(0) / 1024
    expected = (heat + spread) / (mass + 1024 * spread)
    found = expert_heatmaps(model, images, labels, floor=0.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


@pytest.fixture
def heat():
    """(4, 3, 32, 32), unnormalised: blobs of different mass at different places."""
    heat = torch.rand(4, 3, 32, 32, dtype=torch.float64) ** 8
    heat[:, 0, :20], heat[:2, 1, :, :16] = 0, 0
    return (heat * torch.arange(1, 5).view(4, 1, 1, 1)).requires_grad_()


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_constant_share_of_the_floor_changes_no_value_and_rewards_no_shrinking(heat, floor):
    """Of no floor, it is the literal reading."""
    gradients, gains = [], []
    for constant_share in (False, True):
        maps = normalise_maps(heat, floor, constant_share=constant_share)
        loss = losses.position_stability_loss(maps, "pixels")
        gradients += torch.autograd.grad(loss, heat)
        gains.append((gradients[-1] * heat).sum((2, 3)))  # slope of scaling a map as a whole
        torch.testing.assert_close(maps, normalise_maps(heat, floor))
        assert gradients[-1].abs().max() > 0
    if floor:
        assert gains[0].abs().max() > 1e-3
        torch.testing.assert_close(gains[1], torch.zeros_like(gains[1]), rtol=0, atol=1e-9)
    else:
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-9)


def test_explained_score_can_be_the_log_probability_or_the_mixture_s(model, images, labels):
    outputs = model.expert_outputs(images)
    for explained, score in (
        ("log-probability", outputs.logits.log_softmax(-1)[torch.arange(8), :, labels]),
        ("mixture", outputs.mixture("trained")[torch.arange(8), labels]),
    ):
        gradients = torch.autograd.grad(score.sum(), outputs.activations, retain_graph=True)
        found = grad_cam(outputs, labels, explained=explained)
        for i, (gradient, one) in enumerate(zip(gradients, outputs.activations, strict=True)):
            heat = (gradient.sum((2, 3), keepdim=True) * one).sum(1).relu() / one.shape[1]
            expected = functional.interpolate(heat[:, None], (32, 32), mode="bilinear")[:, 0]
            torch.testing.assert_close(found[:, i], expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="logit, log-probability, mixture; got 'probability'"):
        expert_heatmaps(model, images, labels, explained="probability")


@pytest.mark.parametrize("train", [False, True])
def test_A4_maps_for_looking_change_nothing_and_do_not_depend_on_the_batch(
    model, images, labels, train
):
    model, images = model.double().train(train), images.double()
    model.experts[1].eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    together = expert_heatmaps(model, images, labels)
    alone = torch.cat([expert_heatmaps(model, images[q, None], labels[q, None]) for q in range(8)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():  # neither that nor frozen weights keep the maps from their gradients
        frozen = expert_heatmaps(model.requires_grad_(False), images, labels)
    torch.testing.assert_close(frozen, together)


@pytest.mark.parametrize("create_graph", [False, True])
def test_A9_labels_that_do_not_match_the_images_are_refused(model, images, labels, create_graph):
    for wrong in (labels[:1], labels[:7], labels[:, None], torch.cat([labels, labels])):
        with pytest.raises(ValueError, match=r"labels of shape \(.* for 8 images; give each"):
            expert_heatmaps(model, images, wrong, create_graph)
    for wrong in (-1, 10):
        with pytest.raises(ValueError, match=f"0 to 9, found .*{wrong}"):
            expert_heatmaps(model, images, torch.where(labels == labels[0], wrong, labels))


@pytest.mark.parametrize(
    ("expert", "explained"),
    [("resnet18", "logit"), ("resnet18", "log-probability"), ("resnet18", "mixture")]
    + [(expert, "logit") for expert in ("googlenet", "densenet121", "pdarts", "robnet-free")],
)
def test_training_gradient_is_the_slope_of_the_loss(images, labels, expert, explained):
    """Along a random direction through all parameters, in float64, with smooth functions in place
    of ReLUs and max-pools: a step may cross their kinks, where a map jumps.

    With floor 0, since a floor is a constant to the gradient though not to the loss.
    """
    options = {"layers": 3} if expert in BASELINES else {}
    model = ImmunityMoE([build_expert(expert, 10, 0.0625, **options) for _ in range(2)])
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            model.set_submodule(name, nn.Softplus())
        if isinstance(module, nn.MaxPool2d):
            pool = nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
            model.set_submodule(name, pool)
    model, images, step = model.double().train(), images[:4].double(), 1e-8
    parameters = list(model.parameters())

    def loss():
        maps = expert_heatmaps(model, images, labels[:4], create_graph=True, explained=explained)
        outputs = model.expert_outputs(images)
        return losses.immunity_loss(
            outputs, labels[:4], maps, alpha=1, beta=3, gamma=0.1, coordinates="pixels"
        ).total

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    pairs = zip(gradients, directions, strict=True)
    slope = sum((one * direction).sum() for one, direction in pairs if one is not None).item()
    values = []
    for move in (step, -2 * step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(move * direction)
        values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)
