"""The mixture of eq (1), its gates, and what follows from switching them."""

import copy
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from immunity_lib import ImmunityMoE
from immunity_lib.evaluation import switched_probabilities
from immunity_lib.moe import GATES, ConstantGate, ExpertOutputs


def drawn_outputs(seed, experts=3, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, experts, 5, generator=generator, dtype=torch.float64)
    gate = torch.randn(4, experts, generator=generator, dtype=torch.float64)
    return ExpertOutputs(logits, gate.log_softmax(1), ())


def by_permutation(outputs):
    """The mixture under every permutation of the gate, by its tuple."""
    experts = range(outputs.gate.shape[1])
    return {order: outputs.mixture(order) for order in itertools.permutations(experts)}


def test_trained_gate_weighs_every_expert_as_eq_1_says():
    outputs = drawn_outputs(0)
    for q in range(4):
        expected = sum(
            outputs.gate[q, i] * functional.softmax(outputs.logits[q, i], 0) for i in range(3)
        )
        torch.testing.assert_close(outputs.mixture("trained")[q].exp(), expected)


@given(seed=st.integers(0, 1000), experts=st.integers(1, 4))
def test_mixture_under_a_permutation_gives_expert_i_the_weight_of_its_image(seed, experts):
    outputs = drawn_outputs(seed, experts)
    for order, found in by_permutation(outputs).items():
        weights = torch.stack([outputs.gate[:, j] for j in order], dim=1)
        expected = (weights[..., None] * outputs.logits.softmax(-1)).sum(1)
        torch.testing.assert_close(found.exp(), expected)


@given(seed=st.integers(0, 1000), experts=st.integers(1, 5))
def test_expectation_over_all_permutations_is_the_plain_ensemble(seed, experts):
    outputs = drawn_outputs(seed, experts)
    ensemble = outputs.logits.softmax(-1).mean(1)
    torch.testing.assert_close(switched_probabilities(outputs).mean(1), ensemble)
    torch.testing.assert_close(outputs.mixture("uniform").exp(), ensemble)


@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0, 1e3]))
def test_log_probabilities_are_logits_of_themselves(seed, scale):
    """softmax(log y_hat) = y_hat, which sums to 1, also where experts are all but certain."""
    log_mixture = drawn_outputs(seed, scale=scale).mixture()
    torch.testing.assert_close(log_mixture.softmax(-1), log_mixture.exp())
    torch.testing.assert_close(log_mixture.exp().sum(-1), torch.ones(4, dtype=torch.float64))


def test_switching_draws_one_permutation_for_all_images_and_each_equally_often():
    outputs = drawn_outputs(0)
    torch.manual_seed(0)
    known, drawn = by_permutation(outputs), Counter()
    for _ in range(600):
        mixture = outputs.mixture("switch")
        drawn[next(order for order, one in known.items() if torch.equal(one, mixture))] += 1
    assert len(drawn) == 6
    assert all(60 < count < 140 for count in drawn.values())  # four deviations from 100


def test_switching_per_image_draws_a_permutation_for_each():
    outputs = drawn_outputs(0)
    torch.manual_seed(0)
    known, drawn = by_permutation(outputs), Counter()
    for _ in range(150):
        mixture = outputs.mixture("switch-per-image")
        orders = [
            next(order for order, one in known.items() if torch.equal(one[q], mixture[q]))
            for q in range(4)
        ]
        drawn.update(orders)
        drawn["differ"] += len(set(orders)) > 1
    assert drawn.pop("differ") > 140  # all four agree once in 216 times
    assert len(drawn) == 6
    assert all(60 < count < 140 for count in drawn.values())


@pytest.mark.parametrize("gate", [*GATES, (2, 0, 1)])
def test_gate_is_independent_of_train_and_eval(model, images, gate):
    def mixture():
        torch.manual_seed(3)
        return model(images, gate=gate)

    expected = mixture()
    model.training = True  # the mixture's own mode; batch norm stays in eval mode
    torch.testing.assert_close(mixture(), expected)


def test_permuting_the_rows_of_the_gate_s_linear_layer_permutes_its_weights(model, images):
    """Section 4.1 switches parameters; permuting outputs is the same."""
    order = [2, 0, 1]
    before = model.expert_outputs(images)
    with torch.no_grad():
        model.gate.linear.weight.copy_(model.gate.linear.weight[order])
        model.gate.linear.bias.copy_(model.gate.linear.bias[order])
    after = model.expert_outputs(images)
    torch.testing.assert_close(after.gate, before.gate[:, order])
    torch.testing.assert_close(after.mixture("trained"), before.mixture(order))


def test_bare_call_uses_the_evaluation_gate_which_is_restored(model, images):
    assert model.evaluation_gate == "switch"
    with pytest.raises(KeyboardInterrupt), model.evaluated_with((1, 2, 0)):
        torch.testing.assert_close(model(images), model(images, gate=(1, 2, 0)))
        raise KeyboardInterrupt
    assert model.evaluation_gate == "switch"


def test_gate_weights_are_distinct_and_sum_to_1(model, images):
    gate = model.expert_outputs(images).gate
    torch.testing.assert_close(gate.sum(1), torch.ones(len(images)))
    assert (gate.diff(dim=1).abs() > 0.01).all()


def test_constant_gate_starts_uniform_and_ignores_the_image(model, images):
    constant = ImmunityMoE(list(model.experts), ConstantGate(3)).eval()
    torch.testing.assert_close(
        constant(images, gate="trained"), model(images, gate="uniform"), rtol=1e-4, atol=1e-5
    )
    with torch.no_grad():
        constant.gate.weights.copy_(torch.tensor([0.0, 1.0, 2.0]))
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0).expand(len(images), -1)
    torch.testing.assert_close(constant.expert_outputs(images).gate, expected)


def test_state_dict_holds_everything(model, images):
    expected, saved = model(images, "trained"), copy.deepcopy(model.state_dict())
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.load_state_dict(saved)
    assert torch.equal(model(images, "trained"), expected)


@pytest.mark.parametrize("gate", ["random", "Switch", "", (0, 1), (0, 1, 1), (1, 2, 3), 3])
def test_unknown_gates_name_the_valid_ones(model, images, gate):
    with pytest.raises(ValueError, match="trained, uniform, switch, switch-per-image or a perm"):
        model(images, gate=gate)


def test_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one expert"):
        ImmunityMoE([])
