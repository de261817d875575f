"""Training follows its recipe, learns, and speaks when it fails."""

import math
from dataclasses import replace

import pytest
import torch

from immunity_lib import training
from immunity_lib.training import (
    TrainingDiverged,
    build_model,
    learning_rate_factor,
    train,
    training_loss,
)

STEPS = 3  # an epoch: 48 images in batches of 16


def test_inner_attack_gets_the_recipe_s_budget_and_the_trained_gate(
    make_recipe, dataset, tmp_path, monkeypatch
):
    seen = []

    def attack(model, images, labels, name, gate, **budget):
        seen.append((name, gate, budget, model.training))
        return images

    monkeypatch.setattr(training, "attack_images", attack)
    train(make_recipe(regime="adversarial", epochs=1, eps="4/255"), dataset, tmp_path / "run")
    budget = {"eps": 4 / 255, "step_size": 2 / 255, "steps": 2}
    assert seen == [("pgd", "trained", budget, True)] * STEPS


def test_seeds_differ_and_the_caller_s_random_state_stays(make_recipe, dataset, tmp_path):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    recipe = make_recipe("standalone", epochs=1)
    one, _ = train(recipe, dataset, tmp_path / "0")
    other, _ = train(recipe.model_copy(update={"seed": 1}), dataset, tmp_path / "1")
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one.experts[0].classifier.weight, other.experts[0].classifier.weight)


def test_experts_of_one_model_start_differently(make_recipe, dataset):
    first, second = build_model(make_recipe(), dataset).experts
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


def test_training_learns(trained, dataset):
    train_set = dataset.splits["train"]
    with torch.no_grad():
        predicted = trained(train_set.images.float() / 255, gate="trained").argmax(1)
    assert (predicted == train_set.labels).double().mean() > 0.3  # chance is 0.1


def batch_of(dataset):
    return dataset.splits["train"].images[:8].float() / 255, dataset.splits["train"].labels[:8]


def test_without_heat_map_losses_no_maps_are_made(make_recipe, dataset, monkeypatch):
    monkeypatch.delattr(training, "grad_cam")
    for method in ("moe", "standalone"):
        recipe = make_recipe(method)
        loss = training_loss(build_model(recipe, dataset), *batch_of(dataset), recipe, 5.0)
        assert loss.total == loss.cross_entropy
    with pytest.raises(NameError):  # the spy would have been seen
        recipe = make_recipe("moe-mi")
        training_loss(build_model(recipe, dataset), *batch_of(dataset), recipe, 5.0)


def test_heat_map_losses_warm_up_linearly(make_recipe, dataset):
    recipe = make_recipe(beta=2.0, gamma=5.0, warmup_epochs=2.0)
    model = build_model(recipe, dataset).eval()
    extra = []
    for epochs_done in (0.0, 0.5, 1.0, 2.0, 3.0):
        loss = training_loss(model, *batch_of(dataset), recipe, epochs_done)
        extra.append((loss.total - loss.cross_entropy).item())
    shares = [value / extra[-1] for value in extra]
    assert shares == pytest.approx([0, 0.25, 0.5, 1, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("part", "field"),
    [
        ("cross_entropy", "cross_entropy"),
        ("mutual_information_loss", "mutual_information"),
        ("position_stability_loss", "position_stability"),
    ],
)
def test_loss_that_is_not_finite_stops_the_run_and_is_named(
    make_recipe, dataset, tmp_path, monkeypatch, part, field
):
    calls = []

    def loss(model, images, labels, recipe, epochs_done):
        parts = training_loss(model, images, labels, recipe, epochs_done)
        calls.append(None)
        if len(calls) == STEPS + 2:
            return replace(parts, **{field: torch.tensor(math.nan)})
        return parts

    monkeypatch.setattr(training, "training_loss", loss)
    with pytest.raises(TrainingDiverged, match=f"{part} is nan in epoch 2, batch 2 of 3; lower"):
        train(make_recipe(), dataset, tmp_path / "run")
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 1


def test_exploding_training_is_stopped(make_recipe, dataset, tmp_path):
    recipe = make_recipe("moe", learning_rate=1e30, gradient_clip=0.0)
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        train(recipe, dataset, tmp_path / "run")


def test_log_says_how_the_model_does(make_recipe, dataset, tmp_path):
    _, log = train(make_recipe(epochs=1), dataset, tmp_path / "run")
    (entry,) = log
    assert 0 <= entry["accuracy"] <= 1 and len(entry["expert_accuracy"]) == 2
    assert 0 <= entry["gate_entropy"] <= math.log(2) + 1e-6
    assert 0 <= entry["mutual_information"] <= math.log(2)
    assert 0 <= entry["empty_maps"] <= 1 and entry["input_gradient"] > 0
    assert 0 < entry["mutual_information_loss"] <= 2 * math.log(2)
    text = training.progress_line("a model", 1, entry)
    assert text.startswith("a model epoch 1/1: cross entropy")


def test_learning_rate_schedules():
    def factors(schedule):
        return [learning_rate_factor(schedule, done) for done in (0, 0.125, 0.25, 0.5, 0.75, 1)]

    assert factors("constant") == [1] * 6
    assert factors("multistep") == pytest.approx([1, 1, 1, 0.1, 0.01, 0.01])
    assert factors("one-cycle") == pytest.approx([1e-3, 0.5, 1, 2 / 3, 1 / 3, 1e-3])
    cosine = [(1 + math.cos(math.pi * done)) / 2 for done in (0, 0.125, 0.25, 0.5, 0.75, 1)]
    assert factors("cosine") == pytest.approx(cosine)
    assert cosine[0] == 1 and cosine[3] == pytest.approx(0.5)
