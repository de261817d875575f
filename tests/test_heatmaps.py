"""Heat maps, eq (3): against loops, pytorch-grad-cam and PyTorch's own second derivatives."""

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch.nn import functional

from immunity_lib import ImmunityMoE, build_expert, expert_heatmaps, losses
from immunity_lib.experts import BASELINES
from immunity_lib.heatmaps import empty_share, grad_cam, heatmaps_from_outputs, normalised
from immunity_lib.layers import differentiated_twice
from immunity_lib.moe import ExpertOutputs


def outputs_with_weights(signs, scale=1.0):
    """One synthetic "expert" per sign: class 0 is its mean activation times the sign."""
    generator = torch.Generator().manual_seed(0)
    activations = tuple(
        (scale * torch.rand(4, 3, 8, 8, generator=generator)).requires_grad_() for _ in signs
    )
    logits = torch.stack(
        [
            sign * torch.stack([one.mean((1, 2, 3)), one[:, 0].mean((1, 2))], dim=1)
            for sign, one in zip(signs, activations, strict=True)
        ],
        dim=1,
    )
    gate = torch.full((4, len(signs)), -math.log(len(signs)))
    return ExpertOutputs(logits, gate, activations)


ZEROS = torch.zeros(4, dtype=torch.int64)


def test_maps_are_distributions(model, images, labels):
    maps = expert_heatmaps(model, images, labels)
    assert maps.min() >= 0
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(8, 3))
    assert not maps.requires_grad


def test_maps_are_eq_3_image_by_image_and_expert_by_expert(model, images, labels):
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
            torch.testing.assert_close(found[q, i], expected, rtol=1e-4, atol=1e-7)


def test_maps_agree_with_pytorch_grad_cam_up_to_scaling(model, images, labels):
    """It scales every map to 0 .. 1, so ours is scaled so too, after resizing to 32x32."""
    maps = expert_heatmaps(model, images, labels)
    living = 0
    for i, expert in enumerate(model.experts):
        layer = expert.stages[expert.head_stages - 1]
        with GradCAM(expert, [layer]) as oracle:
            expected = oracle(images, [ClassifierOutputTarget(label.item()) for label in labels])
        for ours, theirs in zip(maps[:, i].numpy(), expected, strict=True):
            if np.ptp(ours) > 0:
                np.testing.assert_allclose((ours - ours.min()) / np.ptp(ours), theirs, atol=1e-4)
                living += 1
    assert living >= 12  # of 24; those that the ReLU empties have nothing to compare


def test_maps_depend_on_the_label(model, images, labels):
    other = expert_heatmaps(model, images, (labels + 1) % 10)
    assert (expert_heatmaps(model, images, labels) - other).abs().max() > 1e-3


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_scaling_an_expert_s_logits_scales_its_maps_alone(model, images, labels, floor):
    """By 5: the normalised maps stay, up to the small constant."""
    heat = grad_cam(model.expert_outputs(images), labels)
    maps = expert_heatmaps(model, images, labels, floor=floor)
    with torch.no_grad():
        model.experts[1].classifier.weight.mul_(5)
        model.experts[1].classifier.bias.mul_(5)
    factor = torch.tensor([1.0, 5.0, 1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(grad_cam(model.expert_outputs(images), labels), factor * heat)
    scaled = expert_heatmaps(model, images, labels, floor=floor)
    torch.testing.assert_close(scaled, maps, rtol=1e-3, atol=1e-7)


def test_empty_map_is_uniform_counted_and_harmless():
    outputs = outputs_with_weights([+1, -1])  # negative weights: the ReLU leaves nothing
    maps = heatmaps_from_outputs(outputs, ZEROS, create_graph=True)
    assert torch.equal(maps[:, 1], torch.full((4, 32, 32), 1 / 1024))
    assert empty_share(maps).tolist() == [0, 1]
    loss = losses.mutual_information_loss(maps) + losses.position_stability_loss(maps)
    gradients = torch.autograd.grad(loss, outputs.activations)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].any()


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_all_maps_empty_is_harmless_too(floor):
    outputs = outputs_with_weights([-1, -1])
    maps = heatmaps_from_outputs(outputs, ZEROS, create_graph=True, floor=floor)
    loss = losses.mutual_information_loss(maps) + losses.position_stability_loss(maps)
    gradients = torch.autograd.grad(loss, outputs.activations)
    assert torch.equal(maps, torch.full_like(maps, 1 / 1024))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_floor_spreads_a_share_of_the_expert_s_mean_mass(model, images, labels):
    heat = grad_cam(model.expert_outputs(images), labels).double()
    mass = heat.sum((2, 3), keepdim=True)
    spread = 0.25 * mass.mean(0) / 1024
    expected = (heat + spread) / (mass + 1024 * spread)
    found = expert_heatmaps(model, images, labels, floor=0.25)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-8)


def test_constant_share_of_the_floor_changes_no_value_and_rewards_no_shrinking(
    model, images, labels
):
    heat = grad_cam(model.expert_outputs(images), labels).detach().double().requires_grad_()
    gain = []
    for constant_share in (False, True):
        maps = normalised(heat, 0.1, constant_share=constant_share)
        loss = losses.position_stability_loss(maps)
        (gradient,) = torch.autograd.grad(loss, heat)
        gain.append((gradient * heat).sum((2, 3)))  # slope when a map is scaled as a whole
        torch.testing.assert_close(maps, normalised(heat, 0.1))
        assert gradient.abs().max() > 0
    rewarded, constant = gain
    assert rewarded.abs().max() > 1e-3
    torch.testing.assert_close(constant, torch.zeros_like(constant), rtol=0, atol=1e-9)


def test_constant_share_of_no_floor_is_the_literal_reading(model, images, labels):
    heat = grad_cam(model.expert_outputs(images), labels).detach().double().requires_grad_()
    gradients = [
        torch.autograd.grad(
            losses.position_stability_loss(normalised(heat, constant_share=constant_share)), heat
        )[0]
        for constant_share in (False, True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-9)


def test_explained_score_can_be_the_log_probability_or_the_mixture_s(model, images, labels):
    outputs = model.expert_outputs(images)
    for explained, score in (
        ("log-probability", outputs.logits.log_softmax(-1)[torch.arange(8), :, labels]),
        ("mixture", outputs.mixture("trained")[torch.arange(8), labels]),
    ):
        gradients = torch.autograd.grad(score.sum(), outputs.activations, retain_graph=True)
        heat = torch.stack(
            [
                (gradient.sum((2, 3), keepdim=True) * one).sum(1).relu() / one.shape[1]
                for gradient, one in zip(gradients, outputs.activations, strict=True)
            ],
            dim=1,
        )
        expected = functional.interpolate(heat, (32, 32), mode="bilinear")
        found = grad_cam(outputs, labels, explained=explained)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_unknown_explained_score_names_the_valid_ones(model, images, labels):
    with pytest.raises(ValueError, match="logit, log-probability, mixture; got 'probability'"):
        expert_heatmaps(model, images, labels, explained="probability")


def test_maps_leave_no_gradient_behind(model, images, labels):
    expert_heatmaps(model, images, labels)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_weights_change_no_map(model, images, labels):
    frozen = copy.deepcopy(model).requires_grad_(False)
    torch.testing.assert_close(
        expert_heatmaps(frozen, images, labels), expert_heatmaps(model, images, labels)
    )


def training_model(expert="resnet18"):
    """Two experts in train mode and double precision."""
    torch.manual_seed(0)
    options = {"layers": 3} if expert in BASELINES else {}
    model = ImmunityMoE([build_expert(expert, 10, 0.0625, **options) for _ in range(2)])
    return model.double().train()


def total_loss(model, images, labels, floor=0.0, explained="logit", cheap=True):
    """cheap: with the library's own second derivatives, else with PyTorch's."""
    with differentiated_twice(cheap):
        outputs = model.expert_outputs(images)
    maps = heatmaps_from_outputs(outputs, labels, True, floor=floor, explained=explained)
    return losses.immunity_loss(
        outputs, labels, maps, alpha=1, beta=3, gamma=0.1, coordinates="pixels"
    ).total


@pytest.mark.parametrize(
    ("expert", "explained"),
    [("resnet18", "logit"), ("resnet18", "log-probability"), ("resnet18", "mixture")]
    + [(expert, "logit") for expert in ("googlenet", "densenet121", "pdarts", "robnet-free")],
)
def test_training_gradient_is_that_of_pytorch_s_own_layers(images, labels, expert, explained):
    found, expected = ({}, {})
    for gradients, cheap in ((found, True), (expected, False)):
        model = training_model(expert)
        total_loss(model, images.double(), labels, 0.1, explained, cheap).backward()
        gradients |= {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_training_gradient_is_the_slope_of_the_loss(images, labels):
    """Along a random direction through all parameters, by a step too short to cross a ReLU's kink.

    With floor 0, since a floor is a constant to the gradient though not to the loss.
    """
    model, images, step = training_model(), images.double(), 1e-8
    parameters = list(model.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(total_loss(model, images, labels), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    values = []
    for move in (step, -2 * step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(move * direction)
        values.append(total_loss(model, images, labels).item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4)
