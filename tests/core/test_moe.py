"""The mixture of eq (1), its gates, and what follows from switching them."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import draw_outputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

from immunity_lib import ImmunityMoE, build_expert
from immunity_lib.moe import ConstantGate, switched_probabilities, verdicts


@given(seed=st.integers(0, 1000), experts=st.integers(1, 4))
def test_under_a_permutation_of_eq_1_expert_i_gets_the_weight_of_its_image(seed, experts):
    """And the expectation over all permutations is the plain ensemble."""
    outputs = draw_outputs(seed, experts)
    together, labels = switched_probabilities(outputs), torch.tensor([0, 1, 2, 3])
    found = verdicts(outputs, labels)
    for state, order in enumerate(itertools.permutations(range(experts))):
        weights = torch.stack([outputs.gate[:, j] for j in order], dim=1)
        expected = (weights[..., None] * outputs.logits.softmax(-1)).sum(1)
        torch.testing.assert_close(outputs.mixture(order).exp(), expected)
        torch.testing.assert_close(together[:, state], expected)
        assert torch.equal(found.switched[:, state], expected.argmax(1) == labels)
    # The first is the identity, which is the trained gate
    torch.testing.assert_close(outputs.mixture("trained").exp(), together[:, 0])
    assert torch.equal(found.trained, found.switched[:, 0])
    ensemble = outputs.logits.softmax(-1).mean(1)
    torch.testing.assert_close(together.mean(1), ensemble)
    torch.testing.assert_close(outputs.mixture("uniform").exp(), ensemble)
    assert torch.equal(found.uniform, ensemble.argmax(1) == labels)


def test_nan_is_no_answer():
    """Not class 0, where the largest of nothing but NaN is found. Whatever rests on it is wrong, and nothing else."""
    outputs, labels = draw_outputs(0), torch.zeros(4, dtype=torch.long)
    expected = verdicts(outputs, labels)
    outputs.logits[1, 2], outputs.log_gate[2] = torch.nan, torch.nan  # of one expert, and of the gate
    expected.uniform[1] = expected.experts[1, 2] = False
    expected.trained[1:3] = expected.switched[1:3] = False
    torch.testing.assert_close(vars(verdicts(outputs, labels)), vars(expected))
    for wrong in (labels[:, None], labels[:1]):  # which would be compared with every image's answer
        with pytest.raises(ValueError, match=r"labels of shape \(.* for 4 images; give each"):
            verdicts(outputs, wrong)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 1e3]))
def test_log_probabilities_are_logits_of_themselves(seed, scale):
    """softmax(log y_hat) = y_hat, which sums to 1, also where experts are all but certain."""
    log_mixture = draw_outputs(seed, scale=scale).mixture()
    torch.testing.assert_close(log_mixture.softmax(-1), log_mixture.exp())
    torch.testing.assert_close(log_mixture.exp().sum(-1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("gate", ["switch", "switch-per-image"])
def test_switching_draws_each_permutation_equally_often(gate):
    """One for all images of a pass, or one for each."""
    outputs, drawn, differ = draw_outputs(0), Counter(), 0
    known = {order: outputs.mixture(order) for order in itertools.permutations(range(3))}
    for _ in range(600):
        mixture = outputs.mixture(gate)
        orders = [next(order for order, one in known.items() if torch.equal(one[q], mixture[q])) for q in range(4)]
        drawn[orders[0]] += 1
        differ += len(set(orders)) > 1
    assert len(drawn) == 6 and all(50 < count < 150 for count in drawn.values())  # five deviations from 100
    assert differ == 0 if gate == "switch" else differ > 570  # all four agree once in 216 times


def test_permuting_the_rows_of_the_gate_s_linear_layer_permutes_its_weights(model, images):
    """Section 4.1 switches parameters; permuting outputs is the same, and so is a bare call under such a gate."""
    order = [2, 0, 1]
    before = model.expert_outputs(images)
    assert model.evaluation_gate == "switch"
    model.evaluation_gate = order
    torch.testing.assert_close(model(images), before.mixture(order))
    torch.testing.assert_close(before.gate.sum(1), torch.ones(len(images)))
    assert (before.gate.diff(dim=1).abs() > 0.01).all()
    with torch.no_grad():
        model.gate.linear.weight.copy_(model.gate.linear.weight[order])
        model.gate.linear.bias.copy_(model.gate.linear.bias[order])
    after = model.expert_outputs(images)
    torch.testing.assert_close(after.gate, before.gate[:, order])
    torch.testing.assert_close(after.mixture("trained"), before.mixture(order))


def test_truth_values_are_a_permutation_of_two_experts_and_no_mask():
    outputs = draw_outputs(0, experts=2)
    assert torch.equal(outputs.mixture([True, False]), outputs.mixture((1, 0)))


@pytest.mark.parametrize("gate", ["random", "Switch", "", (0, 1), (0, 1, 1), (1, 2, 3), 3])
def test_unknown_gates_name_the_valid_ones(model, images, gate):
    with pytest.raises(ValueError, match="trained, uniform, switch, switch-per-image or a perm"):
        model(images, gate=gate)


@pytest.mark.parametrize("weights", [1, 2, 4])
def test_a_gate_of_another_number_of_weights_than_experts_is_refused(model, images, weights):
    """The one weight of `ConstantGate(1)`, given to each of three experts, would make probabilities sum to 3."""
    model.gate = ConstantGate(weights)
    with pytest.raises(ValueError, match=rf"gives {weights} weights for 3 experts; .*ConstantGate\(3\)"):
        model(images)
    model.gate = ConstantGate(3)
    torch.testing.assert_close(model(images, "trained").exp().sum(1), torch.ones(len(images)))


@pytest.mark.parametrize("network", [resnet18, lambda: nn.Linear(3, 2)])
def test_D18_a_network_that_is_no_expert_is_refused_with_what_one_needs(model, network):
    needs = "lacks forward_with_features, num_classes, normalise.*as_expert makes one of any"
    with pytest.raises(TypeError, match=needs):
        ImmunityMoE([model.experts[0], network()])
    with pytest.raises(ValueError, match="at least one expert"):
        ImmunityMoE([])
    with pytest.raises(ValueError, match="experts of 10, 5 classes; build all with one"):
        ImmunityMoE([model.experts[0], build_expert("resnet18", 5, 0.0625)])
