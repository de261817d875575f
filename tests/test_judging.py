"""The adaptive evaluation: what it reports, and that its checks catch faked robustness."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn

from immunity_lib import ImmunityMoE, judging
from immunity_lib.attacks import check_budget, sanity
from immunity_lib.attacks.auto_attack import auto_attack
from immunity_lib.attacks.black_box import random_noise, square
from immunity_lib.attacks.suite import Effort, adaptive_attacks
from immunity_lib.judging import adaptive_record, agreement, judge
from immunity_lib.moe import ConstantGate
from immunity_lib.per_image import success_within, unpacked, worst_case
from immunity_lib.recipes import ModelName, judged_models, surrogates
from immunity_lib.records import read_record, write_record

EFFORT = Effort(8 / 255, 2 / 255, steps=10, samples=(1, 3), judge_steps=4)
NAME = ModelName.parse("parts10-immunity-resnet18-standard-seed0")
JUDGED = {"epochs": 1, "judged_images": 6, "gate_samples": [1], "judge_steps": 1, "steps": 1}


class Decoy(nn.Module):
    """An expert that is broken on purpose."""

    def __init__(self, expert):
        super().__init__()
        self.expert, self.num_classes, self.normalise = expert, expert.num_classes, nn.Identity()


class KillsGradients(Decoy):
    """It rounds its images, and a step function has no slope."""

    def forward_with_features(self, images):
        return self.expert.forward_with_features((8 * images).round() / 8)


class AddsNoise(Decoy):
    """It adds noise to its logits, whatever the gate."""

    def forward_with_features(self, images):
        activations, logits = self.expert.forward_with_features(images)
        return activations, logits + 3 * torch.randn_like(logits)


def spoilt(model, decoy):
    return ImmunityMoE([decoy(expert) for expert in model.experts], model.gate).eval()


def judged(model, images):
    """The report on a model, on images that its plain ensemble gets right."""
    with torch.no_grad():
        labels = model(images, "uniform").argmax(1)
    return judge(model, images, labels, EFFORT, {}, tell=lambda line: None)


@pytest.fixture(scope="module")
def many_images(dataset):
    return dataset.splits["test"].images[:16].float() / 255


@pytest.fixture(scope="module")
def honest(make_linear_model, many_images):
    return judged(make_linear_model(3, sharpness=3.0), many_images)


def failed(report):
    return {finding["check"] for finding in report["checks"] if not finding["passed"]}


def test_an_honest_model_passes_every_check(honest):
    assert failed(honest) == set()
    assert len(honest["checks"]) == 8
    for finding in honest["checks"]:
        assert finding["evidence"] and finding["why"].endswith(".") and finding["source"]


def test_a_model_that_kills_gradients_is_caught(make_linear_model, many_images):
    decoy = spoilt(make_linear_model(3, sharpness=3.0), KillsGradients)
    caught = failed(judged(decoy, many_images))
    assert "no gradient is zero" in caught
    assert "attacks with gradients beat those without" in caught
    assert "accuracy falls to zero as eps grows to 1" in caught
    assert "AutoAttack raises no flag" in caught


def test_a_model_that_adds_noise_is_caught(make_linear_model, many_images):
    decoy = spoilt(make_linear_model(3, sharpness=3.0), AddsNoise)
    report = judged(decoy, many_images)
    caught = failed(report)
    assert "with a fixed gate it gives the same answer twice" in caught
    assert "AutoAttack raises no flag" in caught
    (flags,) = [f["evidence"] for f in report["checks"] if f["check"].startswith("AutoAttack")]
    assert "randomized defense" in flags


def test_a_defence_whose_frozen_gate_holds_is_told():
    assert not sanity.frozen_gate_breaks(0.6, [0.1, 0.2]).passed
    assert sanity.frozen_gate_breaks(0.2, [0.1, 0.2]).passed


def test_an_unconverged_attack_is_told():
    assert not sanity.doubling_steps_changes_little(0.5, 0.49).passed
    assert sanity.doubling_steps_changes_little(0.5, 0.497).passed


@pytest.mark.parametrize(
    ("curve", "passed"),
    [({0: 0.9, 0.1: 0.3, 1: 0.0}, True), ({0: 0.9, 0.1: 0.3, 0.5: 0.4, 1: 0.0}, False),
     ({0: 0.9, 1: 0.1}, False)],
)  # fmt: skip
def test_what_grows_with_the_budget_is_told(curve, passed):
    assert sanity.falls_to_zero(curve).passed == passed


def test_an_iterative_attack_weaker_than_one_step_is_told():
    assert not sanity.iterative_beats_single_step(0.5, 0.4).passed


def test_images_that_only_black_boxes_break_are_counted():
    white, black = np.array([0.5, 0.0, 1.0]), np.array([0.0, 1.0, 0.9])
    finding = sanity.white_box_beats_black_box(white, black)
    assert not finding.passed and "1 of 3 images" in finding.evidence


def test_every_family_is_there_and_every_number_follows_from_the_images(honest):
    assert {entry["family"] for entry in honest["attacks"]} == {
        "paper", "frozen", "sampled", "exact", "judges", "black box", "transfer"
    }  # fmt: skip
    for entry in honest["attacks"]:
        gates = unpacked(entry["per_image"]["gates"])
        assert len(gates) == 16 and entry["gates"] == 6
        assert entry["switched"] == pytest.approx(gates.mean() / 6)
        assert entry["every"] == pytest.approx((gates == 6).mean())
        assert entry["uniform"] == pytest.approx(unpacked(entry["per_image"]["uniform"]).mean())


def test_the_worst_case_is_at_least_as_bad_as_every_attack(honest):
    worst = worst_case(honest["attacks"])
    for entry in honest["attacks"]:
        assert 1 - worst["failure"].mean() <= entry["switched"] + 1e-9
        assert 1 - worst["uniform"].mean() <= entry["uniform"] + 1e-9
    (only,) = [e for e in honest["attacks"] if e["attack"] == "exact-expected"]
    assert 1 - worst_case([only])["failure"].mean() == pytest.approx(only["switched"])


def test_an_attacker_with_more_tries_succeeds_more_often():
    failure = np.array([0.0, 0.5, 1.0])
    assert success_within(failure, 1) == pytest.approx(0.5)
    assert success_within(failure, 2) == pytest.approx((0 + 0.75 + 1) / 3)
    assert success_within(failure, 1000) == pytest.approx(2 / 3)


def test_agreement_is_that_of_gates_drawn_in_pairs(make_linear_model, images, labels):
    model = make_linear_model(3, sharpness=3.0)
    found = agreement(model, images, labels)
    with torch.no_grad():
        answers = torch.stack([model(images, gate).argmax(1) for gate in permutations(range(3))])
    assert found["pairs"] == pytest.approx(
        (answers[:, None] == answers[None]).double().mean().item()
    )
    assert found["unanimous"] == (answers == answers[0]).all(0).double().mean().item()
    assert found["unanimous"] < 1  # the test is not vacuous


def test_more_draws_of_noise_fool_no_fewer(make_linear_model, images, labels):
    model = make_linear_model(3, sharpness=3.0)
    failures = []
    for draws in (1, 60):
        torch.manual_seed(0)
        points = random_noise(model, images, labels, eps=0.2, draws=draws)
        check_budget(images, points, 0.2)
        failures.append(sanity.verdicts_on(model, points, labels).failure)
    assert (failures[1] >= failures[0]).all() and failures[1].sum() > failures[0].sum()


def test_square_and_auto_attack_break_the_gate_they_see(make_linear_model, many_images):
    model = make_linear_model(3, sharpness=3.0)
    with torch.no_grad():
        labels = model(many_images, "uniform").argmax(1)
    for attack in (
        lambda: auto_attack(model, many_images, labels, "uniform", eps=0.03, steps=5)[0],
        lambda: square(model, many_images, labels, "uniform", eps=0.03, steps=20),
    ):
        adversarial = attack()
        check_budget(many_images, adversarial, 0.03)
        assert sanity.verdicts_on(model, adversarial, labels).uniform.double().mean() < 0.7


def test_auto_attack_of_few_classes_is_refused(make_linear_model, images, labels):
    with pytest.raises(ValueError, match="at least 4 classes, the model has 3; attacks that work"):
        auto_attack(make_linear_model(2, classes=3), images, labels % 3, "uniform", eps=0.03)


def test_a_model_without_a_gate_is_refused_with_what_works():
    with pytest.raises(ValueError, match="got a Linear; attacks that work on any model.*PGD"):
        adaptive_attacks(nn.Linear(2, 2), EFFORT, {})


class Detaches(Decoy):
    """It hands no gradient on at all."""

    def forward_with_features(self, images):
        return self.expert.forward_with_features(images.detach())


def test_a_model_without_gradients_is_refused_with_what_works(make_linear_model, many_images):
    decoy = spoilt(make_linear_model(2), Detaches)
    decoy.gate = ConstantGate(2)
    with pytest.raises(ValueError, match="gives no gradient.*that work: square and random_noise"):
        judged(decoy, many_images)


def test_who_is_judged_and_through_whom(make_settings):
    settings = make_settings()
    assert len(judged_models(settings)) == 4
    assert [one.method for one in surrogates(settings, NAME)] == ["moe", "moe-mi", "moe-ps"]
    adversarial = NAME.model_copy(update={"regime": "adversarial", "method": "moe"})
    assert [one.method for one in surrogates(settings, adversarial)] == ["immunity"]


def test_a_judgement_that_was_stopped_goes_on(make_settings, dataset, tmp_path, monkeypatch):
    settings = make_settings(output_folder=str(tmp_path), **JUDGED)
    unfinished = tmp_path / "runs/tiny/records" / f"{NAME}.adaptive-unfinished.json"
    made, cut, attack = [], [], judging._attacked

    def stopped(target, images, labels, one, effort):
        made.append(one.name)
        if one.name == "pgd-trained" and not cut:
            cut.append(True)
            raise RuntimeError("a power cut")
        return attack(target, images, labels, one, effort)

    monkeypatch.setattr(judging, "_attacked", stopped)
    with pytest.raises(RuntimeError, match="power cut"):
        adaptive_record(settings, NAME, dataset)
    assert [e["attack"] for e in read_record(unfinished)["attacks"]] == [
        "fgsm",
        "bim",
        "mim",
        "pgd",
    ]
    record = adaptive_record(settings, NAME, dataset)
    assert made.count("fgsm") == 1 and made.count("pgd-trained") == 2
    assert not unfinished.exists()
    assert record["result"]["threat_model"]["may do"].startswith(
        "change every pixel by at most 8/255"
    )
    assert adaptive_record(settings, NAME, dataset) == record

    write_record(unfinished, {"weights": ["of another model"], "attacks": [{"attack": "fgsm"}]})
    made.clear()
    changed = settings.model_copy(update={"steps": 2})
    assert adaptive_record(changed, NAME, dataset)["asked"]["steps"] == 2
    assert made.count("fgsm") == 1
