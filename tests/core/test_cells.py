"""The networks of architecture search are the published ones: counts, wiring, values."""

import subprocess
import sys

import pytest
import torch

from immunity_lib import cells
from immunity_lib.experts import build_expert


def test_D13_cells_can_be_imported_alone():
    subprocess.run([sys.executable, "-c", "import immunity_lib.cells"], check=True)


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


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
        cell.training, cell.drop_path = True, 0.3  # batch norms stay in eval mode
        thinned = cell(state)[1]
        zeroed = (thinned.flatten(1) == 0).all(1)
        assert zeroed.float().mean().item() == pytest.approx(0.3 if dropped else 0.0, abs=0.05)
        kept = thinned[~zeroed]
        torch.testing.assert_close(kept, whole[~zeroed] / (0.7 if dropped else 1.0))
        cell.eval()
        assert torch.equal(cell(state)[1], whole)


def test_fewer_layers_keep_the_shape_of_robnet_free():
    for layers in (3, 5, 8, 20):
        kept, halving = cells._kept_cells(layers), cells.reduction_cells(layers)
        assert len(kept) == layers and kept == sorted(set(kept))
        assert (kept[halving[0]], kept[halving[1]]) == (6, 13)


@pytest.mark.parametrize(
    ("check", "design", "message"),
    [(cells.check_design, [[("skip_connect", 2)]], "comes from state 2; .*from 0 to 1"),
     (cells.check_design, [[("conv_9x9", 0)]], "unknown operation 'conv_9x9'.*sep_conv_3x3"),
     (cells.check_design, [[("skip_connect", 0)], []], "state 3 .* has no incoming edge"),
     (cells.check_design, [], "its design is empty"), (cells.decode, "11 10", "encodes no cell; one is 14 codes"),
     (cells.decode, "11 " * 13 + "12", "encodes no cell; one is 14 codes")],
)  # fmt: skip
def test_impossible_designs_are_named(check, design, message):
    with pytest.raises(ValueError, match=message):
        check(design)
