"""Every expert is the published network: counts, cost, and values of independent code."""

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from immunity_lib.experts import HEATMAP_LAYERS, build_expert, multiply_accumulates
from tests.fingerprints import NO_NORMALISATION, assert_fingerprint


def build_shapes_only(name: str, num_classes: int = 10, **options):
    """The full-width network on the meta device: shapes without values, hence without cost."""
    return build_expert(name, num_classes, **options).to("meta")


@pytest.mark.parametrize(
    ("name", "ten_classes", "hundred_classes"),
    [
        ("resnet18", 11_173_962, 11_220_132),
        ("densenet121", 6_956_298, 7_048_548),
        ("googlenet", 6_310_314, 6_402_564),
        ("googlenet-kuangliu", 6_166_250, 6_258_500),
    ],
)
def test_parameter_counts(name, ten_classes, hundred_classes):
    for num_classes, expected in ((10, ten_classes), (100, hundred_classes)):
        expert = build_shapes_only(name, num_classes)
        assert sum(parameter.numel() for parameter in expert.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "giga", "tail_share"),
    [
        ("resnet18", 0.555, 0.48),
        ("densenet121", 0.888, 0.32),
        ("googlenet", 0.532, 0.43),
        ("googlenet-kuangliu", 1.522, 0.11),
    ],
)
def test_multiply_accumulates(name, giga, tail_share):
    cost = multiply_accumulates(build_shapes_only(name))
    assert cost.head + cost.tail == pytest.approx(giga * 1e9, rel=0.01)
    assert cost.tail_share == pytest.approx(tail_share, abs=0.01)


def test_cost_agrees_with_a_count_operator_by_operator():
    expert = build_expert("pdarts", 10, width=0.125, layers=4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        expert(torch.zeros(1, 3, 32, 32))
    assert 2 * sum(multiply_accumulates(expert)) == counter.get_total_flops()


def test_counting_cost_leaves_the_expert_alone():
    expert = build_expert("resnet18", 10, width=0.0625).train()
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    multiply_accumulates(expert)
    assert all(torch.equal(value, before[key]) for key, value in expert.state_dict().items())
    assert all(module.training for module in expert.modules())


@pytest.mark.parametrize(
    ("name", "larger", "at_least"),
    [
        ("resnet18", (128, 16, 16), (256, 8, 8)),
        ("densenet121", (512, 16, 16), (1024, 8, 8)),
        ("googlenet", (480, 16, 16), (832, 8, 8)),
        ("googlenet-kuangliu", (832, 16, 16), (1024, 8, 8)),
    ],
)
def test_grad_cam_layer_in_both_readings(name, larger, at_least):
    images = torch.zeros(2, 3, 32, 32, device="meta")
    for heatmap_layer, expected in zip(HEATMAP_LAYERS, (larger, at_least), strict=True):
        expert = build_shapes_only(name, heatmap_layer=heatmap_layer)
        activations, logits = expert.forward_with_features(images)
        assert activations.shape == (2, *expected)
        assert logits.shape == (2, 10)


def torchvision_resnet18() -> nn.Module:
    peer = torchvision.models.resnet18(num_classes=10)
    peer.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    peer.maxpool = nn.Identity()
    return peer


def torchvision_densenet121() -> nn.Module:
    peer = torchvision.models.densenet121(num_classes=10)
    peer.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    peer.features.norm0 = peer.features.relu0 = peer.features.pool0 = nn.Identity()
    return peer


@pytest.mark.parametrize(
    ("name", "build_peer"),
    [("resnet18", torchvision_resnet18), ("densenet121", torchvision_densenet121)],
)
def test_equals_torchvision_with_a_cifar_stem(name, build_peer):
    torch.manual_seed(0)
    expert, peer = build_expert(name, 10, **NO_NORMALISATION), build_peer()
    # Both register their layers in the order of execution, so weights pair up without names.
    weights = peer.state_dict().values()
    own_keys = [key for key in expert.state_dict() if not key.startswith("normalise")]
    expert.load_state_dict(dict(zip(own_keys, weights, strict=True)), strict=False)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(expert(images), peer(images), rtol=1e-4, atol=1e-4)


FINGERPRINTS = {
    "resnet18": (
        (3.11056, -2.05963, 0.89906, -0.17855, 0.39533),
        (0.14869, 0.24957, -1.90746, 2.89047, -1.98865),
        (3.03818, -0.60329, 0.49000, -0.06840),
        (0.256686, 1.668710),
    ),
    "googlenet-kuangliu": (
        (0.52866, 0.21276, 0.00649, -0.37523, 0.41609),
        (1.82898, -0.35177, 0.02973, -1.98200, 1.48821),
        (0.42522, 0.02664, 0.04285, -0.33906),
        (0.240427, 0.998693),
    ),
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_logits_of_the_original_code(name):
    """Logits that kuangliu/pytorch-cifar gives for the same weights: counts miss wrong wiring."""
    assert_fingerprint(name, *FINGERPRINTS[name])


def test_light_googlenet_shares_its_inception_blocks_with_the_heavy_one():
    """Its wiring beyond the stem is thereby covered by the values of the original code."""
    light, heavy = build_expert("googlenet", 10), build_expert("googlenet-kuangliu", 10)
    inceptions = [name for name, _ in heavy.stages.named_children() if "inception" in name]
    assert len(inceptions) == 9
    for name in inceptions:
        assert str(light.stages.get_submodule(name)) == str(heavy.stages.get_submodule(name))
