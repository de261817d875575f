"""The adaptive evaluation: what it reports, and that its checks catch faked robustness."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from immunity_lib import ImmunityMoE
from immunity_lib.attacks import (
    ATTACKS,
    FAMILIES,
    Effort,
    adaptive_attacks,
    attack_images,
    auto_attack,
    check_budget,
    exact_pgd,
    random_noise,
)
from immunity_lib.evaluate import _what_checks_need, evaluate_adaptively, sanity_checks
from immunity_lib.moe import ConstantGate, verdicts

EFFORT = Effort(8 / 255, 2 / 255, steps=10, samples=(1, 3), auto_attack_steps=4)
SMALL = Effort(8 / 255, 4 / 255, steps=2, samples=(1,), auto_attack_steps=1)


class Decoy(nn.Module):
    """An expert that does something to its images or logits."""

    def __init__(self, expert, to_images, to_logits):
        super().__init__()
        self.expert, self.num_classes, self.normalise = expert, expert.num_classes, nn.Identity()
        self.to_images, self.to_logits = to_images, to_logits

    def forward_with_features(self, images):
        activations, logits = self.expert.forward_with_features(self.to_images(images))
        return activations, self.to_logits(logits)


def spoil(model, to_images=lambda images: images, to_logits=lambda logits: logits):
    experts = [Decoy(expert, to_images, to_logits) for expert in model.experts]
    return ImmunityMoE(experts, model.gate).eval()


def evaluate(model, images, effort=EFFORT, **options):
    """Results and summary on images that the plain ensemble gets right."""
    with torch.no_grad():
        labels = model(images, "uniform").argmax(1)
    quiet = {"tell": lambda line: None} | options
    return evaluate_adaptively(model, images, labels, effort, {}, **quiet)


@pytest.fixture(scope="module")
def many_images(dataset):
    return dataset.splits["test"].images[:16].float() / 255


def test_an_honest_model_passes_every_check_under_every_family(make_linear_model, many_images):
    results, summary = evaluate(make_linear_model(3, sharpness=3.0), many_images)
    families = [told["family"] for _, told in results.values()]
    assert families == sorted(families, key=list(FAMILIES).index) and set(families) == set(FAMILIES)
    for found, told in results.values():
        assert found.switched.shape == (16, 6) and found.experts.shape == (16, 3) and told["flags"] == []
    assert [finding["passed"] for finding in summary["checks"]] == [True] * 8


@pytest.mark.parametrize(
    ("decoy", "checks"),
    [
        ({"to_images": lambda images: (8 * images).round() / 8},  # a step function has no slope
         {"no gradient is zero", "attacks with gradients beat those without",
          "accuracy falls to zero as eps grows to 1", "AutoAttack raises no flag"}),
        ({"to_logits": lambda logits: logits + 3 * torch.randn_like(logits)},
         {"with a fixed gate it gives the same answer twice", "AutoAttack raises no flag"}),
    ],
    ids=["kills gradients", "adds noise"],
)  # fmt: skip
def test_a_model_that_fakes_robustness_is_caught(make_linear_model, many_images, decoy, checks):
    _, summary = evaluate(spoil(make_linear_model(3, sharpness=3.0), **decoy), many_images)
    assert checks <= {one["check"] for one in summary["checks"] if not one["passed"]}


def test_a_gradient_of_nan_stops_the_attack_and_counts_as_none(make_linear_model, many_images, monkeypatch):
    """The slope of a root at 0 is infinite, and times 0 it is NaN; here, of the first half."""

    def root_of_zero(images):
        first, others = images.tensor_split(2)
        return torch.cat((first + (first - first.detach()).square().sqrt(), others))

    model = make_linear_model(2, sharpness=3.0)
    decoy, results = spoil(model, to_images=root_of_zero), evaluate(model, many_images, SMALL)[0]
    with torch.no_grad():
        labels = decoy(many_images, "uniform").argmax(1)
    batch, budget = (many_images, labels), {"eps": 0.1, "step_size": 0.1, "steps": 1}
    every = [partial(attack_images, decoy, attack=name, gate="switch", **budget) for name in ATTACKS]
    others = {one.name: one.perturb for one in adaptive_attacks(model, SMALL, {"decoy": decoy})}  # they look through
    for run in (*every, partial(exact_pgd, decoy, **budget), others["pgd-decoy"],
                lambda *_: evaluate(decoy, many_images, SMALL)):  # fmt: skip
        with pytest.raises(ValueError, match="is NaN, or too large for momentum, where an attack stands still"):
            run(*batch)
    # Training goes on: a network in eval mode may give NaN until its batch norms have seen enough
    assert all(perturb(*batch, strict=False).isfinite().all() for perturb in every)
    monkeypatch.setattr("immunity_lib.evaluate.exact_pgd", lambda _, images, *__, **___: images)
    for target, share in ((model, 0.0), (decoy, 0.5)):
        assert _what_checks_need(target, many_images, labels, SMALL, results)["zero_gradients"] == share


def test_a_model_that_cannot_be_attacked_is_refused_with_what_works(make_linear_model, many_images):
    decoy = spoil(make_linear_model(2), to_images=torch.detach)
    decoy.gate = ConstantGate(2)
    with pytest.raises(ValueError, match=r"gives no gradient.*\('square',\)\) and random_noise"):
        evaluate(decoy, many_images)
    with pytest.raises(ValueError, match="got a Linear; attacks that work on any model.*PGD"):
        adaptive_attacks(nn.Linear(2, 2), EFFORT, {})
    with pytest.raises(ValueError, match="got a Decoy"):  # before it is asked for a gate's answers
        evaluate_adaptively(decoy.experts[0], many_images, torch.arange(len(many_images)) % 10, SMALL, {})
    with pytest.raises(ValueError, match="a surrogate is called 'expert-1'"):
        adaptive_attacks(decoy, EFFORT, {"expert-1": decoy})


def test_a_single_network_meets_the_attacks_that_need_no_switch(make_linear_model, many_images):
    results, summary = evaluate(make_linear_model(1, sharpness=3.0), many_images, SMALL)
    assert {told["family"] for _, told in results.values()} == set(FAMILIES) - {"sampled"}
    assert not {"pgd-uniform", "autoattack-uniform", "eotpgd-1"} & results.keys()
    for found, _ in results.values():
        assert torch.equal(found.switched[:, 0], found.trained) and torch.equal(found.experts[:, 0], found.trained)
    assert len(summary["checks"]) == 8


def test_auto_attack_and_what_needs_no_gradient_judge_so_many_images(make_linear_model, many_images):
    results, _ = evaluate(make_linear_model(2), many_images, replace(SMALL, auto_attack_images=5))
    for found, told in results.values():
        assert len(found.trained) == (5 if told["family"] in ("judges", "black box") else 16)


SOUND = {
    "by_budget": {0: 0.9, 0.1: 0.3, 1: 0.0}, "pgd": 0.2, "fgsm": 0.4, "white": torch.tensor([0.5, 1.0, 1.0]),
    "black": torch.tensor([0.5, 0.0, 0.9]), "once": 0.5, "twice": 0.497, "zero_gradients": 0.0, "frozen": 0.2,
    "alone": [0.1, 0.2], "difference": 1e-6, "flags": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("found", "check"),
    [
        ({}, None),
        ({"by_budget": {0: 0.9, 0.1: 0.3, 0.5: 0.4, 1: 0.0}}, "accuracy falls to zero"),
        ({"by_budget": {0: 0.9, 1: 0.1}}, "accuracy falls to zero"),
        ({"pgd": 0.5}, "iterative attack beats"), ({"twice": 0.49}, "twice the steps"),
        ({"black": torch.tensor([0.0, 1.0, 1.0]), "white": torch.tensor([0.5, 0.0, 1.0])},
         "attacks with gradients beat"),
        ({"zero_gradients": 0.1}, "no gradient is zero"), ({"frozen": 0.6}, "with a frozen gate"),
        ({"difference": 1e-3}, "with a fixed gate"), ({"flags": ["a warning"]}, "AutoAttack"),
    ],
)  # fmt: skip
def test_each_check_tells_faked_robustness_from_none(found, check):
    failed = [one for one in sanity_checks(**SOUND | found) if not one.passed]
    assert [one.check.startswith(check) for one in failed] == [True] * (check is not None)
    if "black" in found:
        assert "1 of 3 images" in failed[0].evidence


def test_what_is_done_is_not_made_again_and_what_is_made_is_kept(make_linear_model, many_images, monkeypatch):
    """So a run that was stopped goes on; neither an attack nor a check depends on what was done before it."""
    model, kept, again = make_linear_model(2), {}, {}
    anywhere = lambda _, images, *__, **___: torch.rand_like(images)  # noqa: E731
    monkeypatch.setattr("immunity_lib.evaluate.exact_pgd", anywhere)  # so that a check shows what it draws
    results, summary = evaluate(model, many_images, SMALL, keep=lambda *of: kept.update({of[0]: of[1:]}))
    assert kept == results
    done = {name: kept[name] for name in ("fgsm", "bim", "mim")}
    _, of_rest = evaluate(model, many_images, SMALL, done=done, keep=lambda *of: again.update({of[0]: of[1:]}))
    assert of_rest == summary == evaluate(model, many_images, SMALL, done=kept)[1]
    assert again.keys() == results.keys() - done.keys()
    for name, (found, _) in again.items():
        assert torch.equal(found.switched, kept[name][0].switched)


@pytest.mark.parametrize("classes", [2, 3])
def test_C1_with_few_classes_auto_attack_is_left_out_and_the_rest_works(make_linear_model, many_images, classes):
    model = make_linear_model(2, classes=classes)
    results, summary = evaluate(model, many_images, SMALL)
    assert {told["family"] for _, told in results.values()} == set(FAMILIES) - {"judges"}
    assert "square" in results and len(summary["checks"]) == 8
    with pytest.raises(ValueError, match=f"at least 4 classes, the model has {classes}; attacks that work"):
        auto_attack(model, many_images, torch.zeros(16, dtype=torch.long), "uniform", eps=0.03)


def test_more_draws_of_noise_fool_no_fewer(make_distant_images):
    """Of 3,072 pixels at random, the sum deviates by 55: one draw in six goes that far."""
    model, images, labels = make_distant_images([0.2 / 3072**0.5] * 16)
    failures = []
    for draws in (1, 60):
        torch.manual_seed(0)
        points = random_noise(model, images, labels, eps=0.2, draws=draws)
        check_budget(images, points, 0.2)
        failures.append(verdicts(model.expert_outputs(points), labels).failure)
    assert (failures[1] >= failures[0]).all() and failures[1].sum() > failures[0].sum()


@pytest.mark.parametrize("only", ["square", ("sqare",), ("apgd-ce", "apgd")])
def test_parts_of_auto_attack_that_there_are_not_are_refused_with_those_there_are(model, images, labels, only):
    with pytest.raises(ValueError, match=f"{re.escape(repr(only))}; give a tuple .*apgd-ce, .*, fab-t, square"):
        auto_attack(model, images, labels, "uniform", eps=0.03, only=only)


@pytest.mark.parametrize("only", [(), ("square",)])
def test_square_and_auto_attack_break_the_gate_they_see(make_linear_model, many_images, only):
    model = make_linear_model(3, sharpness=3.0)
    with torch.no_grad():
        labels = model(many_images, "uniform").argmax(1)
    state = torch.get_rng_state()
    adversarial, _ = auto_attack(model, many_images, labels, "uniform", eps=0.03, steps=20 if only else 5, only=only)
    assert torch.equal(torch.get_rng_state(), state)
    check_budget(many_images, adversarial, 0.03)
    found = verdicts(model.expert_outputs(adversarial), labels)
    assert found.uniform.double().mean() < 0.7
    assert model.evaluation_gate == "switch"


@pytest.mark.parametrize("slope", [1e36, float("inf")])
def test_a_slope_too_large_for_momentum_is_no_robustness(make_linear_model, many_images, slope):
    """Its mean over an image overflows, and what is divided by that is zero or NaN."""

    def steep(images):
        if images.requires_grad:
            images.register_hook(lambda gradient: gradient.sign() * slope)
        return images

    model = spoil(make_linear_model(1, sharpness=3.0), to_images=steep)
    labels, budget = model(many_images).argmax(1), {"eps": 0.03, "step_size": 0.01, "steps": 4}
    with pytest.raises(ValueError, match="where an attack stands still"):
        attack_images(model, many_images, labels, "mim", "uniform", **budget, early_exit=True)
