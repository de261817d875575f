"""Attacks on the exact expectation over the gate: against enumeration, gate by gate."""

from itertools import permutations

import pytest
import torch
import torchattacks
from torch.nn import functional

from immunity_lib.attacks.exact import ExactPGD, cross_entropy_by_gate
from immunity_lib.attacks.frozen import FrozenPGD
from immunity_lib.moe import ConstantGate

EPS = 8 / 255
STEP = 2 / 255


def losses_one_by_one(model, images, labels):
    """The cross entropy under every gate, (N!, B), a pass for each."""
    gates = permutations(range(len(model.experts)))
    return torch.stack(
        [functional.cross_entropy(model(images, gate), labels, reduction="none") for gate in gates]
    )


def test_losses_of_all_gates_from_one_pass(make_linear_model, images, labels):
    model = make_linear_model(4)
    found = cross_entropy_by_gate(model.expert_outputs(images), labels)
    torch.testing.assert_close(found, losses_one_by_one(model, images, labels).T)


def test_a_probability_of_zero_is_no_nan(make_linear_model, images, labels):
    model = make_linear_model(3, sharpness=1e4)
    moved = images.clone().requires_grad_()
    losses = cross_entropy_by_gate(model.expert_outputs(moved), labels)
    (gradient,) = torch.autograd.grad(losses.mean(1).sum(), moved)
    assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("aim", "over_gates"),
    [("expected", lambda losses: losses.mean(0)), ("weakest", lambda losses: losses.amax(0))],
)
def test_a_step_is_along_the_gradient_over_all_gates(
    make_linear_model, images, labels, aim, over_gates
):
    model = make_linear_model(4)
    moved = images.clone().requires_grad_()
    raised = over_gates(losses_one_by_one(model, moved, labels))
    (gradient,) = torch.autograd.grad(raised.sum(), moved)
    expected = (images + STEP * gradient.sign()).clamp(0, 1)
    found = ExactPGD(model, EPS, STEP, 1, random_start=False, aim=aim)(images, labels)
    assert ((found - expected).abs() < 1e-6).double().mean() > 0.999


def test_a_gate_of_equal_weights_has_one_state(make_linear_model, images, labels):
    """All permutations are the uniform gate then, and the attack is PGD on it."""
    model = make_linear_model(3)
    model.gate = ConstantGate(3)
    model.evaluation_gate = "uniform"
    torch.manual_seed(0)
    expected = FrozenPGD(model, EPS, STEP, 5, stop_early=False)(images, labels)
    torch.manual_seed(0)
    torch.testing.assert_close(ExactPGD(model, EPS, STEP, 5)(images, labels), expected)


def test_it_raises_what_it_aims_at_more_than_samples_do(make_linear_model, images, labels):
    """The mean over all gates, against torchattacks' mean over 10 sampled ones."""
    model = make_linear_model(5, sharpness=3.0)
    model.evaluation_gate = "switch"
    reached = {}
    for name, attack in (
        ("exact", ExactPGD(model, EPS, STEP, 10, random_start=False)),
        ("sampled", torchattacks.EOTPGD(model, EPS, STEP, 10, eot_iter=10, random_start=False)),
    ):
        torch.manual_seed(0)
        adversarial = attack(images, labels)
        with torch.no_grad():
            outputs = model.expert_outputs(adversarial)
            reached[name] = cross_entropy_by_gate(outputs, labels).mean().item()
    assert reached["exact"] >= reached["sampled"] - 1e-4


def test_the_weakest_gate_is_fooled_at_least_as_surely(make_linear_model, images, labels):
    model = make_linear_model(4, sharpness=3.0)
    reached = {}
    for aim in ("expected", "weakest"):
        adversarial = ExactPGD(model, EPS, STEP, 10, random_start=False, aim=aim)(images, labels)
        with torch.no_grad():
            losses = cross_entropy_by_gate(model.expert_outputs(adversarial), labels)
        reached[aim] = losses.amax(1).mean().item()
    assert reached["weakest"] >= reached["expected"] - 1e-4


def test_bad_input_is_named(make_linear_model):
    with pytest.raises(ValueError, match="unknown aim 'mean'; choose expected or weakest"):
        ExactPGD(make_linear_model(2), aim="mean")
