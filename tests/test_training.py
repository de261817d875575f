"""Training follows its recipe, learns, and speaks when it fails."""

import math
from dataclasses import replace

import pytest
import torch

from immunity_lib import objective, training
from immunity_lib.baselines.cells import Cell
from immunity_lib.diagnosis import diagnose
from immunity_lib.objective import training_loss
from immunity_lib.optimisation import learning_rate_factor, optimiser_of
from immunity_lib.records import read_tensors
from immunity_lib.training import TrainingDiverged, build_model, train

STEPS = 3  # an epoch: 48 images in batches of 16


def test_inner_attack_gets_the_recipe_s_budget_and_the_trained_gate(
    make_recipe, dataset, tmp_path, monkeypatch
):
    seen = []

    def attack(model, images, labels, name, gate, **budget):
        seen.append((name, gate, budget, model.training))
        return images

    monkeypatch.setattr(objective, "attack_images", attack)
    train(make_recipe(regime="adversarial", epochs=1, eps="4/255"), dataset, tmp_path / "run")
    call = ("pgd", "trained", {"eps": 4 / 255, "step_size": 2 / 255, "steps": 2})
    assert seen == [(*call, True)] * STEPS + [(*call, False)]  # the last one for the log


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
    monkeypatch.delattr(objective, "grad_cam")
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

    def loss(*arguments):
        parts = training_loss(*arguments)
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
    assert text.startswith("a model epoch 1/1: cross entropy") and "attack" not in text
    attacked = training.progress_line("a model", 1, entry | {"robust_accuracy": 0.125})
    assert ", 12.5% under its own attack, gate entropy" in attacked


def test_learning_rate_schedules():
    def factors(schedule):
        return [learning_rate_factor(schedule, done) for done in (0, 0.125, 0.25, 0.5, 0.75, 1)]

    assert factors("constant") == [1] * 6
    assert factors("multistep") == pytest.approx([1, 1, 1, 0.1, 0.01, 0.01])
    assert factors("one-cycle") == pytest.approx([1e-3, 0.5, 1, 2 / 3, 1 / 3, 1e-3])
    cosine = [(1 + math.cos(math.pi * done)) / 2 for done in (0, 0.125, 0.25, 0.5, 0.75, 1)]
    assert factors("cosine") == pytest.approx(cosine)
    assert cosine[0] == 1 and cosine[3] == pytest.approx(0.5)


def test_the_robnets_schedule_passes_through_its_published_rates():
    rates = {0: 0.02, 10: 0.61, 20: 1.2, 95: (1.2 + 0.001) / 2, 170: 0.001}  # by epoch of 170
    for epoch, rate in rates.items():
        assert 1.2 * learning_rate_factor("warmup-cosine", epoch / 170) == pytest.approx(rate)


def test_selected_weights_are_those_of_the_best_validation_epoch(
    make_recipe, dataset, tmp_path, monkeypatch
):
    accuracies, states = iter([0.3, 0.7, 0.7, 0.5]), []

    def diagnose(model, *_):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return {"accuracy": next(accuracies), "robust_accuracy": 0.1}

    monkeypatch.setattr(training, "diagnose", diagnose)
    monkeypatch.setattr(training, "progress_line", lambda *_: "")
    monkeypatch.setattr(
        training, "selected_entry", lambda log: max(log, key=lambda entry: entry["accuracy"])
    )
    _, log = train(make_recipe("moe", epochs=4), dataset, tmp_path)
    assert ["weights" in entry for entry in log] == [True, True, False, False]
    kept, _ = read_tensors(tmp_path / "selected.safetensors", log[1]["weights"])
    assert all(torch.equal(kept[key], states[1][key]) for key in kept)


def test_selection_is_by_accuracy_under_the_training_s_own_attack_if_there_is_one():
    clean = [{"accuracy": accuracy} for accuracy in (0.5, 0.9, 0.9)]
    assert training.selected_entry(clean) is clean[1]
    attacked = [entry | {"robust_accuracy": 1 - entry["accuracy"]} for entry in clean]
    assert training.selected_entry(attacked) is attacked[0]


def test_measuring_robust_accuracy_leaves_the_random_state_alone(make_recipe, dataset):
    recipe = make_recipe("moe", "adversarial")
    model = build_model(recipe, dataset)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    entry = diagnose(model, dataset.splits["validation"], recipe, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert 0 <= entry["robust_accuracy"] <= 1


def test_drop_path_rises_linearly(make_recipe, dataset, tmp_path, monkeypatch):
    shares = []

    def loss(model, *arguments):
        shares.append({m.drop_path for m in model.modules() if isinstance(m, Cell)})
        return training_loss(model, *arguments)

    monkeypatch.setattr(training, "training_loss", loss)
    changes = {"expert": "pdarts", "layers": 3, "drop_path": 0.3, "auxiliary_weight": 0.4}
    recipe = make_recipe("standalone").model_copy(update=changes)
    train(recipe, dataset, tmp_path)
    assert shares == [{0.0}] * STEPS + [{0.3 / 3}] * STEPS + [{0.3 * 2 / 3}] * STEPS


def test_weight_decay_may_leave_vectors_alone(make_recipe, dataset):
    recipe = make_recipe("moe", weight_decay=0.1)
    model = build_model(recipe, dataset)
    everything = optimiser_of(model, recipe).param_groups
    assert [group["weight_decay"] for group in everything] == [0.1]
    sparing = recipe.model_copy(update={"decayed": "convolutions and classifier"})
    decayed, spared = optimiser_of(model, sparing).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {one.ndim for one in spared["params"]} == {1}
    assert {one.ndim for one in decayed["params"]} == {2, 4}
    count = len(decayed["params"]) + len(spared["params"])
    assert count == len(list(model.parameters()))


def test_only_training_without_heat_map_losses_is_compiled(
    make_recipe, dataset, tmp_path, monkeypatch
):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call: compiled.append(call) or call)
    for method, experts in (("moe", 2), ("immunity", 0)):
        compiled.clear()
        train(make_recipe(method, compiled=True, epochs=1), dataset, tmp_path / method)
        assert len(compiled) == experts


@pytest.mark.slow
def test_compiled_training_does_what_it_does_otherwise(make_recipe, dataset, tmp_path):
    logs = []
    for compiled in (False, True):
        recipe = make_recipe("moe", compiled=compiled, epochs=1)
        logs += train(recipe, dataset, tmp_path / str(compiled))[1]
    for part in ("cross_entropy", "gate_entropy", "input_gradient"):
        assert logs[1][part] == pytest.approx(logs[0][part], rel=1e-2)  # 1e-3 was measured
