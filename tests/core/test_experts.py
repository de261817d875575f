"""Every expert is the published network and keeps the contract; other networks become experts."""

import copy
import hashlib
from collections import OrderedDict
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torchvision
from conftest import calibrate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cells import edge_by_edge
from immunity_lib import ImmunityMoE, cells
from immunity_lib.experts import BASELINES, EXPERT_NAMES, HEATMAP_LAYERS, Expert, as_expert, build_expert

NO_NORMALISATION = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def small(name: str, **options) -> Expert:
    return build_expert(name, 10, 0.125, layers=4 if name in BASELINES else None, **options)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small_torchvision_resnet() -> nn.Module:
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


@pytest.fixture(scope="module", params=[*EXPERT_NAMES, "torchvision"])
def _shared_expert(request, images):
    torch.manual_seed(0)
    foreign = request.param == "torchvision"
    return calibrate(as_expert(small_torchvision_resnet(), "layer2", 10) if foreign else small(request.param), images)


@pytest.fixture
def expert(_shared_expert):
    return copy.deepcopy(_shared_expert)


def test_activations_and_logits_come_from_one_pass_of_every_parameter(expert, images):
    activations, logits = expert.forward_with_features(images)
    assert torch.equal(logits, expert(images))
    if isinstance(expert, Expert):
        state = expert.stages[: expert.head_stages](expert.normalise(images))
        assert torch.equal(activations, expert.activations_of(state))  # no later stage edits them
    # In training a bias before batch norm has no effect, so look in evaluation
    nn.functional.cross_entropy(logits, torch.arange(8)).backward()
    assert all(parameter.grad.any() for parameter in expert.parameters())


def test_channels_last_is_kept_and_changes_nothing(expert, images):
    with torch.no_grad():
        logits = expert(images)
        activations, channels_last_logits = expert.to(memory_format=torch.channels_last).forward_with_features(
            images.contiguous(memory_format=torch.channels_last)
        )
    assert activations.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last_logits, logits, rtol=1e-4, atol=1e-5)


def test_normalisation_is_the_first_layer(expert, images):
    """Moving the mean by a constant equals moving the images the other way."""
    with torch.no_grad():
        shifted_images = expert(images - 0.1)
        expert.normalise.mean += 0.1
        torch.testing.assert_close(expert(images), shifted_images, rtol=1e-3, atol=1e-4)
    saved, trained = dict(expert.state_dict()), dict(expert.named_parameters())
    assert {"normalise.mean", "normalise.std"} <= saved.keys() - trained.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"name": "vgg"}, "'vgg'.*resnet18.*googlenet-kuangliu.*robnet-large-v2"),
     ({"num_classes": 1}, "num_classes is 1.*at least 2"), ({"width": float("nan")}, "width is nan.*above 0"),
     ({"mean": (0.5,)}, r"mean is \(0.5,\).*three"), ({"std": (0.2, float("nan"), 0.2)}, "std is .*nan.*above 0"),
     ({"heatmap_layer": "last"}, "'last'.*" + ".*".join(HEATMAP_LAYERS)),
     ({"layers": 5}, "layers is 5 .* for resnet18; leave them out.*pdarts"),
     ({"auxiliary": True}, "auxiliary is True for resnet18; .*pdarts"),
     ({"name": "pdarts", "layers": 2}, "layers is 2; .* at least 3"),
     ({"name": "robnet-free", "layers": 21}, "layers is 21; RobNet-free has designs for 20")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_expert(**{"name": "resnet18", "num_classes": 10, **arguments})


# Parameters for 10 and 100 classes, billions of multiply-accumulates, K of the Grad-CAM layer in
# both readings, and the SHA-256 of the names of the weights, of which some are saved already
PUBLISHED = {
    "resnet18": (11_173_962, 11_220_132, 0.555, 128, 256, "6dbf5e02"),
    "densenet121": (6_956_298, 7_048_548, 0.888, 512, 1024, "eba50abd"),
    "googlenet": (6_310_314, 6_402_564, 0.532, 480, 832, "72c554b1"),
    "googlenet-kuangliu": (6_166_250, 6_258_500, 1.522, 832, 1024, "d12be60b"),
    "pdarts": (3_433_798, 3_485_728, 0.532, 288, 576, "07721913"),
    "advrush": (4_158_046, 4_209_976, 0.645, 288, 576, "cf636f60"),
    "robnet-free": (5_439_790, 5_491_720, 0.780, 288, 576, "60023cd8"),
    "robnet-large-v1": (6_842_710, 6_894_640, 1.030, 288, 576, "408a862e"),
    "robnet-large-v2": (33_326_666, 33_418_916, 5.095, 512, 1024, "cf7ecda1"),
}


@pytest.mark.parametrize("name", EXPERT_NAMES)
def test_published_sizes(name):
    ten_classes, hundred_classes, giga, larger, at_least, names = PUBLISHED[name]
    image = torch.zeros(1, 3, 32, 32)
    grids = ((larger, 16, 16), (at_least, 8, 8))
    for heatmap_layer, classes, grid in zip(HEATMAP_LAYERS, (10, 100), grids, strict=True):
        expert = build_expert(name, classes, heatmap_layer=heatmap_layer).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            activations, logits = expert.forward_with_features(image)
        assert activations.shape == (1, *grid) and logits.shape == (1, classes)
        assert parameters(expert) == {10: ten_classes, 100: hundred_classes}[classes]
        keys = " ".join(expert.state_dict())  # weights do not depend on the heat maps' layer
        assert hashlib.sha256(keys.encode()).hexdigest().startswith(names)
    # Two operations make one of these
    assert counter.get_total_flops() / 2 == pytest.approx(giga * 1e9, rel=0.01)


def test_densenet_equals_that_of_torchvision_with_a_cifar_stem(images):
    peer = torchvision.models.densenet121(num_classes=10)
    peer.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    peer.features.norm0 = peer.features.relu0 = peer.features.pool0 = nn.Identity()
    expert = build_expert("densenet121", 10, **NO_NORMALISATION)
    # Both register their layers in the order of execution, so weights pair up without names.
    weights = peer.state_dict().values()
    own_keys = [key for key in expert.state_dict() if not key.startswith("normalise")]
    expert.load_state_dict(dict(zip(own_keys, weights, strict=True)), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(expert(images), peer(images), rtol=1e-4, atol=1e-4)


def pseudo_random(count: int, frequency: float) -> Tensor:
    """Portable numbers in [0, 1): the fraction of 43758.5453 sin(frequency k), k = 1 .. count."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return (43758.5453 * torch.sin(frequency * steps)) % 1


# Logits in train mode: all ten of image 0, four of image 1, mean and deviation of all 8
FINGERPRINTS = {
    "resnet18": (3.11056, -2.05963, 0.89906, -0.17855, 0.39533, 0.14869, 0.24957, -1.90746, 2.89047, -1.98865, 3.03818,
        -0.60329, 0.49000, -0.06840, 0.256686, 1.668710),
    "googlenet-kuangliu": (0.52866, 0.21276, 0.00649, -0.37523, 0.41609, 1.82898, -0.35177, 0.02973, -1.98200, 1.48821,
        0.42522, 0.02664, 0.04285, -0.33906, 0.240427, 0.998693),
    "pdarts": (0.73629, 0.13315, -0.38334, -0.16843, -0.25372, 0.23732, 0.17500, 0.71400, -0.10032, 1.24557, 0.24216,
        -0.14384, -0.07383, 0.11801, 0.183832, 0.450891),
    "robnet-free": (-0.86243, -0.28088, -0.41010, -0.66622, -0.31167, -1.24598, 1.29337, 0.24709, 0.34142, 2.76166,
        -0.95563, -0.00514, -0.46147, -0.66280, 0.100000, 1.846841),
}  # fmt: skip


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_logits_of_the_original_code(name):
    """Logits that the published code gives for the same weights: counts miss wrong wiring."""
    expert = build_expert(name, 10, **NO_NORMALISATION).double().train()
    with torch.no_grad():
        for parameter_name, parameter in expert.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter.numel() / parameter.shape[0]
                values = (2 * pseudo_random(parameter.numel(), 12.9898) - 1) * (6 / fan_in) ** 0.5
                parameter.copy_(values.view_as(parameter))
            else:
                parameter.fill_(0.1 if parameter_name.endswith("bias") else 1.0)
        logits = expert(pseudo_random(8 * 3 * 32 * 32, 78.233).view(8, 3, 32, 32))
    found = [*logits.flatten()[:14].tolist(), logits.mean().item(), logits.std().item()]
    assert found == pytest.approx(FINGERPRINTS[name], rel=0, abs=1e-4)


def test_light_googlenet_shares_its_inception_blocks_with_the_heavy_one():
    """Its wiring beyond the stem is thereby covered by the values of the original code."""
    light, heavy = build_expert("googlenet", 10), build_expert("googlenet-kuangliu", 10)
    inceptions = [name for name, _ in heavy.stages.named_children() if "inception" in name]
    assert len(inceptions) == 9
    assert all(str(light.stages.get_submodule(one)) == str(heavy.stages.get_submodule(one)) for one in inceptions)


def network_of(**changes: nn.Module) -> nn.Module:
    """Convolution, nonlinearity, pooling and a linear layer; some of them exchanged."""
    layers = {"stem": nn.Conv2d(3, 4, 3, padding=1), "bend": nn.Tanh()}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "linear": nn.Linear(4, 10)}
    return nn.Sequential(OrderedDict(layers | changes))


def test_as_expert_shows_what_a_hook_sees_in_the_network_that_it_copies(images):
    network = small_torchvision_resnet().eval()
    stream, seen = torch.get_rng_state(), []
    expert = as_expert(network, "layer2", 10)
    assert torch.equal(torch.get_rng_state(), stream)
    network.layer2.register_forward_hook(lambda *passed: seen.append(passed[-1]))
    expected = network(expert.normalise(images))
    activations, logits = expert.forward_with_features(images)
    assert torch.equal(logits, expected) and torch.equal(activations, seen[0])
    pairs = ((logits, activations), (expected, seen[0]))
    assert torch.equal(*(torch.autograd.grad(scores[:, 1].sum(), layer)[0] for scores, layer in pairs))
    expert.network.fc = nn.Linear(1, 1)  # a pass that fails behind the layer leaves nothing of its graph
    with pytest.raises(RuntimeError, match="shapes"):
        expert(images)
    assert expert.network.layer2.output is None
    expert.requires_grad_(False).apply(lambda module: [one.zero_() for one in module.parameters()])
    assert torch.equal(network(expert.normalise(images)), expected)


def test_what_is_added_to_a_network_is_where_its_weights_are_and_in_their_precision(images):
    """The normalisation, and the gate of a mixture."""
    network = network_of()
    single = ImmunityMoE([as_expert(network, "stem", 10)], evaluation_gate="trained")
    double = ImmunityMoE([as_expert(copy.deepcopy(network).double(), "stem", 10)], evaluation_gate="trained")
    state = double.state_dict().values()
    assert {one.dtype for one in state} == {torch.float64}
    torch.testing.assert_close(double(images.double()), single(images).double(), rtol=0, atol=1e-5)
    away = ImmunityMoE([single.experts[0].to("meta")])
    assert {one.device.type for one in away.parameters()} == {"meta"}


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    ("changes", "layer", "message"),
    [
        ({}, "layer9", "unknown layer 'layer9'; the network has stem, bend, pool, flat, linear"),
        ({}, "linear", r"gives .*2, 10.*activations \(2, K, u, v\)"),
        ({}, "pool", r"gives .*2, 4, 1, 1.*more than one pixel; choose an earlier layer"),
        ({"linear": nn.Linear(4, 7)}, "stem", r"gives .*2, 7.*logits \(2, 10\); mend num_cl"),
        ({"end": Call(lambda x: {"logits": x})}, "stem", "gives .*dict.*logits"),
        ({"flat": Call(lambda x: x.detach().flatten(1))}, "bend", "logits not .*choose another"),
        ({"bend": nn.ReLU(inplace=True)}, "stem", "overwrites .*in place; .*inplace=False"),
        ({"bend": nn.Hardsigmoid()}, "stem", "differentiated twice.*hardsigmoid"),
        ({"pool": nn.MaxPool2d(64)}, "stem", r"eval mode: images \(2, 3, 32, 32\) cannot"),
        ({"bend": nn.Dropout(inplace=True)}, "stem", "train mode: .*overwrites"),
    ],
)
def test_D18_what_cannot_be_an_expert_is_refused_with_what_one_needs(changes, layer, message):
    with pytest.raises(ValueError, match=message):
        as_expert(network_of(**changes), layer, 10)
    with pytest.raises(TypeError, match="network is a str"):
        as_expert("resnet18", layer, 10)


# Networks of cells


@pytest.mark.parametrize(
    ("name", "options", "ten_classes", "hundred_classes"),
    [("pdarts", {"auxiliary": True}, 3_910_224, 4_031_364), ("pdarts", {"width": 64 / 36}, 10_521_802, 10_614_052),
     ("advrush", {"auxiliary": True}, 4_634_472, 4_755_612)],
)  # fmt: skip
def test_parameter_counts(name, options, ten_classes, hundred_classes):
    for num_classes, expected in ((10, ten_classes), (100, hundred_classes)):
        assert parameters(build_expert(name, num_classes, **options)) == expected


# Those that no logits of the original code vouch for
@pytest.mark.parametrize(
    ("name", "expected"),
    [("advrush", [32760, 34056, *[35352] * 4, 66888, 117360, *[127728] * 5, 258192, 442080, *[483552] * 5]),
     ("robnet-large-v1", [49896, 51192, *[52488] * 4, 203472, 182736, *[193104] * 5, 780192, 697248, *[738720] * 5])],
)  # fmt: skip
def test_parameters_of_every_cell(name, expected):
    stages = build_expert(name, 10).stages
    assert [parameters(stages.get_submodule(f"cell{k}")) for k in range(20)] == expected


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", cells.OPERATIONS)
def test_gradients_in_bfloat16_are_those_in_float32_but_for_rounding(name, stride):
    torch.manual_seed(0)
    operation = cells.OPERATIONS[name](16, stride, True).to(memory_format=torch.channels_last)
    state = torch.rand(8, 16, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    aim = torch.randn(8, 16, 32 // stride, 32 // stride)

    def gradients(precision: torch.dtype) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            answer = operation(state)
        return torch.autograd.grad((answer * aim).sum(), [state, *operation.parameters()])

    for rounded, exact in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert (rounded - exact).norm() < 0.2 * exact.norm()


def test_drop_path_spares_plain_skips_and_makes_up_for_what_it_drops():
    torch.manual_seed(0)
    state = torch.rand(2000, 4, 2, 2), torch.rand(2000, 4, 2, 2)
    skips, pooled = [("skip_connect", 0), ("skip_connect", 1)], [("avg_pool_3x3", 0)]
    for edges, dropped in ((skips, False), (pooled, True)):
        cell = cells.Cell([edges], 4, 4, 4, halves=False, after_halving=False, affine=True).eval()
        cell.preprocess_before_last[1].eps = cell.preprocess_last[1].eps = 1e-9
        whole = cell(state)[1]
        cell.training, cell.drop_path = True, torch.tensor(0.3)  # batch norms stay in eval mode
        thinned = cell(state)[1]
        zeroed = (thinned.flatten(1) == 0).all(1)
        assert zeroed.float().mean().item() == pytest.approx(0.3 if dropped else 0.0, abs=0.05)
        kept = thinned[~zeroed]
        torch.testing.assert_close(kept, whole[~zeroed] / (0.7 if dropped else 1.0))
        cell.eval()
        assert torch.equal(cell(state)[1], whole)


@pytest.mark.parametrize("name", ["pdarts", "robnet-free"])
def test_cells_are_their_published_graph_edge_by_edge(name, images):
    """There, each edge has a ReLU of its own, and RobNet computes its absent edges as zeros."""
    network = calibrate(small(name), images)
    ours = network(images)
    graph = partial(edge_by_edge, absent_edges=name == "robnet-free")
    with patch.object(cells.Cell, "forward", lambda cell, outputs: graph(cell, outputs)):
        torch.testing.assert_close(network(images), ours)


def test_fewer_layers_keep_the_shape_of_robnet_free():
    for layers in (3, 5, 8, 20):
        kept, halving = cells._kept_cells(layers), cells.reduction_cells(layers)
        assert len(kept) == layers and kept == sorted(set(kept))
        assert (kept[halving[0]], kept[halving[1]]) == (6, 13)
