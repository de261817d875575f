"""The contract that every expert keeps, whatever its architecture."""

import pytest
import torch
from torch import nn

from immunity_lib.experts import BASELINES, EXPERTS, HEATMAP_LAYERS, build_expert

NETWORKS = {name: {"layers": 4} if name in BASELINES else {} for name in EXPERTS}


@pytest.fixture(scope="module", params=NETWORKS)
def expert(request):
    torch.manual_seed(0)
    return build_expert(request.param, num_classes=10, width=0.125, **NETWORKS[request.param])


@pytest.fixture(scope="module")
def images():
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def use_batch_statistics_in_evaluation(expert, images):
    """Give batch norm the statistics of these images, as training would in time."""
    for module in expert.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        expert.train()(images)
    return expert.eval()


def test_head_and_tail_make_the_network(expert, images):
    expert = use_batch_statistics_in_evaluation(expert, images)
    activations, logits = expert.forward_with_features(images)
    state = expert.head(images)
    torch.testing.assert_close(activations, expert.activations_of(state))
    torch.testing.assert_close(logits, expert.tail(state))
    torch.testing.assert_close(logits, expert(images))


def test_tail_leaves_the_activations_unchanged(expert, images):
    state = expert.train().head(images)
    activations = expert.activations_of(state)
    before = activations.clone()
    expert.tail(state)
    assert torch.equal(activations, before)


def test_heat_map_gradient_can_be_differentiated(expert, images):
    """In double precision, against a finite difference along a random direction."""
    expert = use_batch_statistics_in_evaluation(expert, images).double()
    images = images[:2].double()
    parameter = next(expert.parameters())
    direction = torch.randn_like(parameter)

    def heat(create_graph):
        activations, logits = expert.forward_with_features(images)
        (gradient,) = torch.autograd.grad(
            logits[:, 3].sum(), activations, create_graph=create_graph
        )
        return (gradient.mean((2, 3), keepdim=True) * activations).sum(1).square().sum()

    (slope,) = torch.autograd.grad(heat(create_graph=True), parameter)
    step = 1e-9  # short enough to cross no kink of a ReLU, where the slope jumps
    with torch.no_grad():
        parameter.add_(step * direction)
    above = heat(create_graph=False)
    with torch.no_grad():
        parameter.sub_(2 * step * direction)
    below = heat(create_graph=False)
    with torch.no_grad():
        parameter.add_(step * direction)
    expert.float()
    difference = (above - below) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=1e-3, atol=1e-12)


def test_gradient_reaches_every_parameter(expert, images):
    # In training a bias before batch norm has no effect, so look in evaluation.
    expert = use_batch_statistics_in_evaluation(expert, images)
    expert.zero_grad()
    nn.functional.cross_entropy(expert(images), torch.arange(8)).backward()
    without = [name for name, parameter in expert.named_parameters() if not parameter.grad.any()]
    assert not without


def test_predictions_in_evaluation_do_not_depend_on_the_batch(expert, images):
    expert = use_batch_statistics_in_evaluation(expert, images)
    with torch.no_grad():
        one_by_one = torch.cat([expert(image[None]) for image in images])
        torch.testing.assert_close(expert(images), one_by_one, rtol=1e-4, atol=1e-5)


def test_channels_last_is_kept_and_changes_nothing(expert, images):
    expert = use_batch_statistics_in_evaluation(expert, images)
    with torch.no_grad():
        logits = expert(images)
        activations, channels_last_logits = expert.to(
            memory_format=torch.channels_last
        ).forward_with_features(images.contiguous(memory_format=torch.channels_last))
    assert activations.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last_logits, logits, rtol=1e-4, atol=1e-5)


def test_normalisation_is_the_first_layer(expert, images):
    """Moving the mean by a constant equals moving the images the other way."""
    expert = use_batch_statistics_in_evaluation(expert, images)
    with torch.no_grad():
        shifted_images = expert(images - 0.1)
        expert.normalise.mean += 0.1
        shifted_mean = expert(images)
        expert.normalise.mean -= 0.1
    torch.testing.assert_close(shifted_mean, shifted_images, rtol=1e-3, atol=1e-4)


def test_normalisation_is_saved_but_not_trained():
    expert = build_expert("resnet18", 10, 0.0625, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    other = build_expert("resnet18", 10, 0.0625)
    other.load_state_dict(expert.state_dict())
    channels = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)
    assert torch.equal(other.normalise(channels.expand(1, 3, 4, 4)), torch.zeros(1, 3, 4, 4))
    assert not [name for name, _ in expert.named_parameters() if "normalise" in name]


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_do_not_depend_on_the_heat_map_layer(name, images):
    expert = build_expert(name, 10, width=0.125, **NETWORKS[name])
    other = build_expert(name, 10, width=0.125, heatmap_layer="at-least-8x8", **NETWORKS[name])
    other.load_state_dict(expert.state_dict())
    activations, logits = other.eval().forward_with_features(images)
    torch.testing.assert_close(logits, expert.eval()(images))
    assert activations.shape[2:] == (8, 8)


@pytest.mark.parametrize("name", NETWORKS)
def test_width_scales_the_network(name):
    sizes = []
    for width in (0.125, 0.25, 0.5):
        expert = build_expert(name, 10, width, **NETWORKS[name])
        sizes.append(sum(parameter.numel() for parameter in expert.parameters()))
        assert min(p.shape[0] for p in expert.parameters() if p.ndim == 4) >= 4
    assert sizes == sorted(set(sizes))
    assert 3 < sizes[-1] / sizes[-2] < 4.5  # weights grow with the square of the width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg"}, "'vgg'.*resnet18.*googlenet-kuangliu"),
        ({"num_classes": 1}, "num_classes is 1.*at least 2"),
        ({"width": 0}, "width is 0.*above 0"),
        ({"width": -0.5}, "width is -0.5.*above 0"),
        ({"width": float("nan")}, "width is nan.*above 0"),
        ({"mean": (0.5,)}, r"mean is \(0.5,\).*three"),
        ({"std": (0.2, 0.2, 0.0)}, r"std is \(0.2, 0.2, 0.0\).*above 0"),
        ({"heatmap_layer": "last"}, "'last'.*" + ".*".join(HEATMAP_LAYERS)),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_expert(**{"name": "resnet18", "num_classes": 10, **arguments})
