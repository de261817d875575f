"""Our layers against PyTorch's own, in double precision, up to the second derivative."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from immunity_lib.layers import (
    BatchNorm2d,
    Conv2d,
    MaxPool2d,
    ReLU,
    activations_only,
    differentiated_twice,
)


def pair_of_networks(ours, stock):
    """The same network of two layers, once with our layer and once with PyTorch's."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 4, 1)
    networks = [nn.Sequential(copy.deepcopy(first), layer).double() for layer in (ours, stock)]
    networks[1].load_state_dict(networks[0].state_dict())
    return networks


def derivatives(network, images, of_activations):
    """Output, first derivatives, and derivatives of a function of first derivatives.

    of_activations: only the gradient of the layer's input is differentiated again, as a heat map
    needs it; otherwise the gradients of the images and of every parameter.
    """
    images = images.clone().requires_grad_()
    wanted = [images, *network.parameters()]
    with differentiated_twice():
        activations = network[0](images)
        out = network[1](activations)
    first = torch.autograd.grad(out.pow(3).sum(), wanted, retain_graph=True)
    again = [activations] if of_activations else wanted
    with activations_only() if of_activations else nullcontext():
        gradients = torch.autograd.grad(out.pow(3).sum(), again, create_graph=True)
    curved = sum((gradient.sin() + gradient.square()).sum() for gradient in gradients)
    second = torch.autograd.grad(curved + out.sum(), wanted)
    return [out, *first, *second]


def assert_same(ours, stock, of_activations):
    images = torch.randn(5, 3, 7, 6, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        images = images.contiguous(memory_format=layout)
        found = derivatives(ours, images, of_activations)
        expected = derivatives(stock, images, of_activations)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, check_stride=False)


@pytest.mark.parametrize("of_activations", [True, False])
@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (ReLU(), nn.ReLU()),
        (MaxPool2d(3, stride=2, padding=1), nn.MaxPool2d(3, stride=2, padding=1)),
        (MaxPool2d(3, stride=1, padding=1), nn.MaxPool2d(3, stride=1, padding=1)),
        (MaxPool2d(2, stride=2, padding=0), nn.MaxPool2d(2, stride=2, padding=0)),
    ],
    ids=["ReLU", "strided pool", "pool", "small pool"],
)
def test_piecewise_linear_layers_and_their_derivatives(ours, stock, of_activations):
    assert_same(*pair_of_networks(ours, stock), of_activations)


@pytest.mark.parametrize("of_activations", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1, "bias": False},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
        {"kernel_size": 3, "stride": 2, "groups": 2, "bias": False},
    ],
    ids=["1x1", "3x3", "strided", "dilated by channel", "in groups"],
)
def test_convolution_and_its_derivatives(options, of_activations):
    convolutions = [layer(4, 8, **options) for layer in (Conv2d, nn.Conv2d)]
    assert_same(*pair_of_networks(*convolutions), of_activations)


@pytest.mark.parametrize("of_activations", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_and_its_derivatives(affine, training, of_activations):
    networks = pair_of_networks(BatchNorm2d(4, affine=affine), nn.BatchNorm2d(4, affine=affine))
    for network in networks:
        network.train(training)
        if affine:
            nn.init.uniform_(network[1].weight, -2, 2, torch.Generator().manual_seed(1))
    assert_same(*networks, of_activations)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7}, {"momentum": None}, {"eps": 0.1}])
def test_running_statistics_follow_the_batches(options):
    """The state after three batches, and what evaluation makes of it."""
    ours, stock = BatchNorm2d(4, **options).double(), nn.BatchNorm2d(4, **options).double()
    batches = torch.randn(3, 6, 4, 5, 5, dtype=torch.float64) * 3 + 1
    for images in batches:
        with differentiated_twice():
            torch.testing.assert_close(ours(images), stock(images))
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    torch.testing.assert_close(ours.eval()(batches[0]), stock.eval()(batches[0]))


def test_batch_norm_without_running_statistics():
    images = torch.randn(6, 4, 5, 5)
    ours = BatchNorm2d(4, track_running_stats=False)
    stock = nn.BatchNorm2d(4, track_running_stats=False)
    with differentiated_twice():
        torch.testing.assert_close(ours(images), stock(images))


def test_frozen_parameters_get_no_gradient():
    """As when only the input's gradient is wanted, in an attack."""
    network = nn.Sequential(Conv2d(3, 4, 3), BatchNorm2d(4), ReLU()).requires_grad_(False)
    images = torch.rand(2, 3, 6, 6, requires_grad=True)
    with differentiated_twice():
        network(images).square().sum().backward()
    assert images.grad.any()
    assert all(parameter.grad is None for parameter in network.parameters())


def operators(network, images):
    """Names of what made the output of the images."""
    names, node = [], network(images).grad_fn
    while node is not None:
        names.append(node.name())
        node = node.next_functions[0][0]
    return names


def test_layers_are_pytorch_s_own_unless_a_second_derivative_is_expected():
    ours = nn.Sequential(Conv2d(3, 4, 3), BatchNorm2d(4), ReLU(), MaxPool2d(2))
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    images = torch.rand(2, 3, 6, 6)
    assert operators(ours, images) == operators(stock, images)
    with differentiated_twice():
        assert not set(operators(ours, images)) & set(operators(stock, images))
        with differentiated_twice(False):
            assert operators(ours, images) == operators(stock, images)
    assert operators(ours, images) == operators(stock, images)


def test_a_gradient_for_activations_alone_costs_none_for_weights():
    layer = Conv2d(3, 4, 3)
    images = torch.rand(2, 3, 6, 6, requires_grad=True)
    with differentiated_twice():
        out = layer(images).square().sum()
    with activations_only():
        out.backward(retain_graph=True)
    assert images.grad.any() and layer.weight.grad is None and layer.bias.grad is None
    out.backward()
    assert layer.weight.grad.any() and layer.bias.grad.any()
