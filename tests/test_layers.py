"""Our layers against PyTorch's own, in double precision, up to the second derivative."""

import copy

import pytest
import torch
from torch import nn

from immunity_lib.layers import BatchNorm2d, MaxPool2d, ReLU


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
    activations = network[0](images)
    out = network[1](activations)
    first = torch.autograd.grad(out.pow(3).sum(), wanted, retain_graph=True)
    again = [activations] if of_activations else wanted
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
        torch.testing.assert_close(ours(images), stock(images))
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    torch.testing.assert_close(ours.eval()(batches[0]), stock.eval()(batches[0]))


def test_batch_norm_without_running_statistics():
    images = torch.randn(6, 4, 5, 5)
    ours = BatchNorm2d(4, track_running_stats=False)
    stock = nn.BatchNorm2d(4, track_running_stats=False)
    torch.testing.assert_close(ours(images), stock(images))


def test_frozen_parameters_get_no_gradient():
    """As when only the input's gradient is wanted, in an attack."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), ReLU()).requires_grad_(False)
    images = torch.rand(2, 3, 6, 6, requires_grad=True)
    network(images).square().sum().backward()
    assert images.grad.any()
    assert all(parameter.grad is None for parameter in network.parameters())
