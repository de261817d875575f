"""Accuracy over all states of the gate, against one forward pass per state."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from immunity_lib.data import ImageSet
from immunity_lib.evaluation import (
    GateAccuracy,
    GateVerdicts,
    accuracy_over_gates,
    permutations,
    switched_probabilities,
    verdicts,
    verdicts_under_attack,
)
from immunity_lib.moe import ExpertOutputs


@pytest.fixture
def five_experts(make_linear_model):
    return make_linear_model(5, sharpness=3.0)


@pytest.fixture(scope="module")
def image_set(dataset):
    return dataset.splits["test"]


def as_batch(image_set):
    return image_set.images.float() / 255, image_set.labels


def some_labels(model, images):
    """Labels that the mixture hits about half the time, differently for every gate."""
    with torch.no_grad():
        outputs = model.expert_outputs(images)
    return torch.where(
        torch.arange(len(images)) % 3 > 0, outputs.mixture("trained").argmax(1),
        outputs.logits[:, 1].argmax(1),
    )  # fmt: skip


def test_exact_accuracy_is_that_of_120_forward_passes(five_experts, image_set):
    images, _ = as_batch(image_set)
    labels = some_labels(five_experts, images)
    with torch.no_grad():
        correct = torch.stack([
            five_experts(images, gate=order).argmax(1) == labels
            for order in itertools.permutations(range(5))
        ]).double()  # fmt: skip
        alone = {gate: five_experts(images, gate=gate) for gate in ("trained", "uniform")}
    batches = zip(images.split(10), labels.split(10), strict=True)
    found = accuracy_over_gates(five_experts, batches)
    assert len(correct) == 120 and found.images == 32
    assert found.switched == pytest.approx(correct.mean().item())
    assert found.best == pytest.approx(correct.mean(1).max().item())
    assert found.worst == pytest.approx(correct.mean(1).min().item())
    assert found.every == pytest.approx(correct.min(0).values.mean().item())
    assert found.trained == correct[0].mean().item()  # the identity comes first
    for gate, mixture in alone.items():
        assert getattr(found, gate) == (mixture.argmax(1) == labels).double().mean().item()
    assert found.every < found.worst < found.switched < found.best  # the test is not vacuous


@given(seed=st.integers(0, 1000), experts=st.integers(1, 4), images=st.integers(1, 6))
def test_accuracies_are_ordered(seed, experts, images):
    """every <= worst <= switched <= best, and the trained gate is one of the permutations."""
    torch.manual_seed(seed)
    outputs = ExpertOutputs(
        torch.randn(images, experts, 3), torch.randn(images, experts).log_softmax(1), ()
    )
    found = GateAccuracy.of(verdicts(outputs, torch.randint(3, (images,))), experts)
    assert found.every <= found.worst <= found.switched + 1e-12 <= found.best + 2e-12
    assert found.worst <= found.trained <= found.best
    assert found.gates == math.factorial(experts) and found.drawing_error == 0


def test_failure_is_the_share_of_gates_that_are_wrong():
    right = torch.tensor([[True, True], [True, False], [False, False]])
    found = GateVerdicts(right[:, 0], right[:, 0], right).failure
    assert found.tolist() == [0, 0.5, 1]


def test_probabilities_of_every_gate_are_those_of_the_mixture(five_experts, image_set):
    images, _ = as_batch(image_set)
    with torch.no_grad():
        outputs = five_experts.expert_outputs(images)
        found = switched_probabilities(outputs)
    for state, order in enumerate(permutations(5).tolist()):
        torch.testing.assert_close(found[:, state], outputs.mixture(order).exp())


def test_a_single_expert_has_one_gate(make_linear_model, image_set):
    found = accuracy_over_gates(make_linear_model(1), [as_batch(image_set)])
    assert found.trained == found.uniform == found.switched == found.best == found.every


def test_permutations_are_all_and_distinct():
    states = permutations(4)
    assert len({tuple(state) for state in states.tolist()}) == 24
    assert states[0].tolist() == [0, 1, 2, 3]
    assert (states.sort(dim=1).values == torch.arange(4)).all()


def test_gates_of_many_experts_are_drawn_and_it_is_said(make_linear_model, image_set):
    """Against all 5,040 gates of seven experts, which is slow but can be counted."""
    permutations.cache_clear()
    model, (images, _) = make_linear_model(7, sharpness=20.0), as_batch(image_set)
    labels = some_labels(model, images)
    with pytest.warns(UserWarning, match="7 experts have 5,040 gates.* estimate from 720 drawn"):
        found = accuracy_over_gates(model, [(images, labels)])
    with torch.no_grad():
        outputs = model.expert_outputs(images)
        every = torch.tensor(list(itertools.permutations(range(7))))
        right = (outputs.gate[:, every] @ outputs.log_probs.exp()).argmax(-1) == labels[:, None]
    exact = right.double().mean().item()
    assert found.gates == 720 and 0 < found.drawing_error < 0.05
    assert abs(found.switched - exact) < 2 * found.drawing_error
    assert (permutations(7).sort(1).values == torch.arange(7)).all()


def under_attack(model, image_set, attack, gate="uniform", seed=0, batch_size=250):
    found = verdicts_under_attack(
        model, image_set, attack, gate, eps=8 / 255, step_size=2 / 255, steps=3, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    return GateAccuracy.of(found, len(model.experts))


def test_attack_none_is_the_clean_accuracy(five_experts, image_set):
    clean = accuracy_over_gates(five_experts, [as_batch(image_set)])
    assert under_attack(five_experts, image_set, "none", batch_size=7) == clean


def test_attacks_lower_the_accuracy_of_the_gate_they_aim_at(trained, dataset):
    train_set = dataset.splits["train"]
    clean = accuracy_over_gates(trained, [as_batch(train_set)])
    for attack in ("fgsm", "pgd"):
        attacked = under_attack(trained, train_set, attack, gate="trained")
        assert attacked.trained < clean.trained - 0.1
        assert attacked.images == len(train_set)


def test_attacks_are_drawn_from_the_seed_and_leave_the_random_state(five_experts, image_set):
    images, _ = as_batch(image_set)
    labels = some_labels(five_experts, images)
    image_set = ImageSet(image_set.images, labels)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = under_attack(five_experts, image_set, "pgd", gate="switch")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert under_attack(five_experts, image_set, "pgd", gate="switch") == first
    others = [under_attack(five_experts, image_set, "pgd", "switch", seed) for seed in range(1, 6)]
    assert any(other != first for other in others)
