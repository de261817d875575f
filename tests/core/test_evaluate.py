"""Accuracy over all states of the gate, against one forward pass per state."""

import itertools
from dataclasses import replace

import pytest
import torch

from immunity_lib.attacks import AIMS, CLIMBS, exact_pgd
from immunity_lib.data import ImageSet
from immunity_lib.evaluate import agreement, in_parts, verdicts_over_gates, verdicts_under_attack
from immunity_lib.moe import permutations

BUDGET = {"eps": 8 / 255, "step_size": 2 / 255}


def some_labels(model, images):
    """Each image's label is the answer under a gate of its own: no gate hits all, and none fails
    more than the others do."""
    experts = len(model.experts)
    orders = torch.rand(len(images), experts, generator=torch.Generator().manual_seed(0)).argsort(1)
    with torch.no_grad():
        outputs = model.expert_outputs(images)
    own = replace(outputs, log_gate=outputs.log_gate.gather(1, orders))
    return own.mixture("trained").argmax(1)


def test_exact_accuracy_is_that_of_120_forward_passes(make_linear_model, images):
    model = make_linear_model(5, sharpness=3.0)
    labels = some_labels(model, images)
    with torch.no_grad():
        passes = [model(images, gate=order) for order in itertools.permutations(range(5))]
        ensemble = model(images, gate="uniform").argmax(1) == labels
    answers = torch.stack(passes).argmax(-1)
    correct = (answers == labels).double()
    model.experts[0].train()
    found = verdicts_over_gates(model, zip(images.split(3), labels.split(3), strict=True)).accuracy
    assert model.experts[0].training and not model.training
    assert found._asdict() == pytest.approx({
        "switched": correct.mean().item(), "best": correct.mean(1).max().item(),
        "worst": correct.mean(1).min().item(), "every": correct.min(0).values.mean().item(),
        "trained": correct[0].mean().item(),  # the identity comes first
        "uniform": ensemble.double().mean().item(),
    })  # fmt: skip
    agreed, alike = agreement(model, images), answers[:, None] == answers[None]
    assert agreed["pairs"] == pytest.approx(alike.double().mean().item())
    assert agreed["unanimous"] == alike.flatten(0, 1).all(0).double().mean().item()


def test_accuracy_over_drawn_gates_is_that_over_all_within_its_error(make_linear_model, dataset):
    """Against all 5,040 gates of seven experts, which is slow but can be counted."""
    permutations.cache_clear()
    model, images = make_linear_model(7, sharpness=20.0), dataset.splits["test"].images / 255
    labels = some_labels(model, images)
    with pytest.warns(UserWarning, match="an estimate from 720 drawn"):
        found = verdicts_over_gates(model, [(images, labels)]).switched.double().mean(0)
    with torch.no_grad():
        outputs = model.expert_outputs(images)
        every = torch.tensor(list(itertools.permutations(range(7))))
        right = (outputs.gate[:, every] @ outputs.log_probs.exp()).argmax(-1) == labels[:, None]
    assert len(found) == 720
    deviation = found.std() / 720**0.5
    assert 0 < deviation < 0.025
    assert abs(found.mean() - right.double().mean()) < 4 * deviation
    drawn = permutations(7)
    permutations.cache_clear()
    with pytest.warns(UserWarning, match="7 experts have 5,040 gates"):
        assert torch.equal(permutations(7), drawn)  # always the same ones


@pytest.mark.parametrize("attack", ["fgsm", *CLIMBS, "apgd", *AIMS])
def test_A10_attacks_break_the_images_that_lie_within_eps(make_distant_images, attack):
    """Of a model of two classes whose images lie 0.5/255, 1.5/255 and so on from its boundary."""
    model, images, labels = make_distant_images([(k + 0.5) / 255 for k in range(16)])
    image_set, budget = ImageSet((255 * images).round().byte(), labels), BUDGET | {"steps": 8}
    assert verdicts_over_gates(model, [(image_set.images / 255, labels)]).trained.all()
    with torch.no_grad():  # a caller who wants no gradients gets the attack all the same
        if attack in AIMS:
            found = verdicts_over_gates(model, [(exact_pgd(model, images, labels, **budget, aim=attack), labels)])
        else:
            found = verdicts_under_attack(model, image_set, attack, "trained", **budget)
    assert found.trained.tolist() == [False] * 8 + [True] * 8
    assert torch.equal(found.switched[:, 0], found.trained)


def test_attacks_are_drawn_from_the_seed_and_leave_the_random_state(make_distant_images):
    """Two steps from anywhere within eps, and no further, go 3.5/255 in the mean: their start
    alone decides which images break."""
    model, images, labels = make_distant_images([3.5 / 255] * 32)
    image_set = ImageSet((255 * images).round().byte(), labels)
    state, found = torch.get_rng_state(), []
    for seed in (0, 0, 1, 2, 3, 4, 5):
        one = verdicts_under_attack(model, image_set, "pgd", "switch", **BUDGET, steps=2, seed=seed)
        found.append(one.trained.tolist())
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        state = torch.get_rng_state()
    assert found[0] == found[1] and any(other != found[0] for other in found[2:])


def test_G2_where_memory_is_too_small_half_as_many_images_are_measured_at_a_time(capsys):
    """Each image once and in order; one that does not fit by itself is an error."""
    fits, tried = 30, []

    def measure(rows):
        tried.append(rows.stop - rows.start)
        if tried[-1] > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(rows.start, rows.stop))

    assert sum(in_parts(measure, 110, 100), []) == list(range(110))
    assert tried == [100, 50, 25, 25, 25, 25, 10]
    assert "goes on with 25 images at a time" in capsys.readouterr().out
    fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(measure, 110, 100)


@pytest.mark.parametrize(
    ("change", "told"),
    [(lambda images, labels: [(255 * images, labels)], "images must lie in \\[0, 1\\]"),
     (lambda images, labels: [(images, labels + 77)], "labels must lie in 0 to 9, found 7"),
     (lambda images, labels: [], "no images to judge")],
)  # fmt: skip
def test_clean_accuracy_refuses_what_attacks_refuse(make_linear_model, images, change, told):
    with pytest.raises(ValueError, match=told):
        verdicts_over_gates(make_linear_model(2), change(images, torch.arange(len(images)) % 10))
