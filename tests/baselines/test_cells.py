"""The networks of architecture search are the published ones: counts, wiring, values."""

import pytest
import torch

from immunity_lib.baselines import cells, pdarts, robnet
from immunity_lib.baselines.cells import Edge
from immunity_lib.experts import build_expert, multiply_accumulates
from tests.fingerprints import assert_fingerprint


def shapes_only(name: str, num_classes: int = 10, **options):
    """The full-size network on the meta device: shapes without values, hence without cost."""
    with torch.device("meta"):
        return build_expert(name, num_classes, **options)


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "options", "ten_classes", "hundred_classes"),
    [
        ("pdarts", {}, 3_433_798, 3_485_728),
        ("pdarts", {"auxiliary": True}, 3_910_224, 4_031_364),
        ("pdarts", {"width": 64 / 36}, 10_521_802, 10_614_052),
        ("advrush", {}, 4_158_046, 4_209_976),
        ("advrush", {"auxiliary": True}, 4_634_472, 4_755_612),
        ("robnet-free", {}, 5_439_790, 5_491_720),
        ("robnet-large-v1", {}, 6_842_710, 6_894_640),
        ("robnet-large-v2", {}, 33_326_666, 33_418_916),
    ],
)
def test_parameter_counts(name, options, ten_classes, hundred_classes):
    for num_classes, expected in ((10, ten_classes), (100, hundred_classes)):
        assert parameters(shapes_only(name, num_classes, **options)) == expected


PER_CELL = {
    "pdarts": [25416, 26712, *[28008] * 4, 73440, 92304, *[102672] * 5, 271296, 350496]
    + [391968] * 5,
    "advrush": [32760, 34056, *[35352] * 4, 66888, 117360, *[127728] * 5, 258192, 442080]
    + [483552] * 5,
    "robnet-free": [40176, 28512, 36288, 29808, 33048, 42768, 138672, 171072, 169776, 158112]
    + [111456, 146448, 123120, 736128, 520992, 606528, 518400, 562464, 650592, 606528],
    "robnet-large-v1": [49896, 51192, *[52488] * 4, 203472, 182736, *[193104] * 5]
    + [780192, 697248, *[738720] * 5],
}


@pytest.mark.parametrize("name", PER_CELL)
def test_parameters_of_every_cell(name):
    stages = shapes_only(name).stages
    assert [parameters(stages.get_submodule(f"cell{k}")) for k in range(20)] == PER_CELL[name]


@pytest.mark.parametrize(
    ("name", "giga", "larger", "at_least"),
    [
        ("pdarts", 0.532, (288, 16, 16), (576, 8, 8)),
        ("advrush", 0.645, (288, 16, 16), (576, 8, 8)),
        ("robnet-free", 0.780, (288, 16, 16), (576, 8, 8)),
        ("robnet-large-v1", 1.030, (288, 16, 16), (576, 8, 8)),
        ("robnet-large-v2", 5.095, (512, 16, 16), (1024, 8, 8)),
    ],
)
def test_cost_and_grad_cam_layer(name, giga, larger, at_least):
    expert = shapes_only(name)
    cost = multiply_accumulates(expert)
    assert cost.head + cost.tail == pytest.approx(giga * 1e9, rel=0.005)
    images = torch.zeros(2, 3, 32, 32, device="meta")
    assert expert.forward_with_features(images)[0].shape == (2, *larger)
    other = shapes_only(name, heatmap_layer="at-least-8x8")
    assert other.forward_with_features(images)[0].shape == (2, *at_least)


def test_encodings_of_robnet_free():
    codes = " ".join(robnet.FREE).split()
    assert [codes.count(code) for code in ("11", "10", "01", "00")] == [115, 66, 63, 36]


FINGERPRINTS = {
    "pdarts": (
        (0.73629, 0.13315, -0.38334, -0.16843, -0.25372),
        (0.23732, 0.17500, 0.71400, -0.10032, 1.24557),
        (0.24216, -0.14384, -0.07383, 0.11801),
        (0.183832, 0.450891),
    ),
    "robnet-free": (
        (-0.86243, -0.28088, -0.41010, -0.66622, -0.31167),
        (-1.24598, 1.29337, 0.24709, 0.34142, 2.76166),
        (-0.95563, -0.00514, -0.46147, -0.66280),
        (0.100000, 1.846841),
    ),
}


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_logits_of_the_original_code(name):
    """Logits that the published code gives for the same weights: counts miss wrong wiring."""
    assert_fingerprint(name, *FINGERPRINTS[name])


def test_drop_path_spares_plain_skips_and_makes_up_for_what_it_drops():
    torch.manual_seed(0)
    state = torch.rand(2000, 4, 2, 2), torch.rand(2000, 4, 2, 2)
    skips = [[Edge("skip_connect", 0), Edge("skip_connect", 1)]]
    pooled = [[Edge("avg_pool_3x3", 0)]]
    sides = {"halves": False, "after_halving": False, "affine": True}
    for design, dropped in ((skips, False), (pooled, True)):
        cell = cells.Cell(design, 4, 4, 4, **sides).eval()
        for norm in (cell.preprocess_before_last[1], cell.preprocess_last[1]):
            norm.eps = 1e-9
        whole = cell(state)[1]
        cell.training, cell.drop_path = True, 0.3  # batch norms stay in eval mode
        thinned = cell(state)[1]
        zeroed = (thinned.flatten(1) == 0).all(1)
        assert zeroed.float().mean().item() == pytest.approx(0.3 if dropped else 0.0, abs=0.05)
        kept = thinned[~zeroed]
        torch.testing.assert_close(kept, whole[~zeroed] / (0.7 if dropped else 1.0))
        cell.eval()
        assert torch.equal(cell(state)[1], whole)


def test_drop_path_reaches_every_cell_of_a_network():
    network = build_expert("pdarts", 10, 0.125, layers=5)
    network.set_drop_path(0.25)
    found = [m.drop_path for m in network.modules() if isinstance(m, cells.Cell)]
    assert found == [0.25] * 5


def test_auxiliary_classifier_changes_no_logits():
    network = build_expert("advrush", 10, 0.125, layers=4, auxiliary=True).eval()
    images = torch.rand(3, 3, 32, 32)
    logits, auxiliary = network.forward_with_auxiliary(images)
    torch.testing.assert_close(logits, network(images))
    assert auxiliary.shape == logits.shape and not torch.allclose(auxiliary, logits)
    with pytest.raises(ValueError, match="without its auxiliary classifier"):
        build_expert("advrush", 10, 0.125, layers=4).forward_with_auxiliary(images)


@pytest.mark.parametrize("layers", [3, 5, 8, 20])
def test_fewer_layers_keep_the_shape_of_robnet_free(layers):
    kept = robnet._kept_cells(layers)
    halving = cells.reduction_cells(layers)
    assert len(kept) == layers and kept == sorted(set(kept))
    assert (kept[halving[0]], kept[halving[1]]) == (6, 13)
    if layers == 20:
        assert kept == list(range(20))


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ([[Edge("skip_connect", 2)]], "comes from state 2; it can come from 0 to 1"),
        ([[Edge("skip_connect", -1)]], "comes from state -1; it can come from 0 to 1"),
        ([[Edge("conv_9x9", 0)]], "unknown operation 'conv_9x9'.*sep_conv_3x3"),
        ([[Edge("skip_connect", 0)], []], "state 3 of a cell has no incoming edge"),
        ([], "its design is empty"),
    ],
)
def test_impossible_designs_are_named(design, message):
    with pytest.raises(ValueError, match=message):
        cells.check_design(design)


@pytest.mark.parametrize("encoding", ["11 10", "11 " * 13 + "12", ""])
def test_impossible_encodings_are_named(encoding):
    with pytest.raises(ValueError, match="encodes no cell; one is 14 codes"):
        robnet.decode(encoding)


def test_impossible_numbers_of_layers_are_named():
    with pytest.raises(ValueError, match="layers is 2; .* at least 3"):
        build_expert("pdarts", 10, layers=2)
    with pytest.raises(ValueError, match="layers is 21; RobNet-free has designs for 20"):
        build_expert("robnet-free", 10, layers=21)
    with pytest.raises(ValueError, match="layers given for resnet18, but it is for pdarts"):
        build_expert("resnet18", 10, layers=5)


def test_factorized_reduce_reads_every_second_pixel_of_both_diagonals():
    """Against two strided convolutions, the second of the map without its first row and column."""
    reduce = cells.FactorizedReduce(3, 4, affine=True).eval()
    maps = torch.rand(2, 3, 8, 8)
    first = torch.nn.functional.conv2d(maps, reduce.even.weight, stride=2)
    second = torch.nn.functional.conv2d(maps[:, :, 1:, 1:], reduce.odd.weight, stride=2)
    torch.testing.assert_close(reduce(maps), reduce.norm(torch.cat([first, second], 1)))


def test_genotypes_put_the_reduction_cells_at_a_third_and_two_thirds():
    designs = cells.genotype_designs(pdarts.NORMAL, pdarts.REDUCTION, 20)
    assert [k for k, design in enumerate(designs) if design is pdarts.REDUCTION] == [6, 13]
    assert cells.reduction_cells(33) == (11, 22)
