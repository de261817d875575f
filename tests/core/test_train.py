"""Training follows its recipe, descends, and speaks when it fails; what it descends beside eq (12),
against independent computations."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch.nn import functional

from immunity_lib import train as training
from immunity_lib.cells import Cell
from immunity_lib.experts import build_expert
from immunity_lib.heatmaps import grad_cam, normalise_maps
from immunity_lib.losses import immunity_loss
from immunity_lib.recipe import Recipe
from immunity_lib.train import TrainingDiverged, adversarial_images, build_model, train, training_loss

STEPS = 3  # an epoch: 48 images in batches of 16


@pytest.mark.parametrize(
    ("field", "value", "must"),
    [
        ("train_images", 1, "at least 2"), ("validation_images", 0, "at least 1"),
        ("batch_size", 1, "at least 2"), ("layers", 2, "at least 3"), ("epochs", 0, "at least 1"),
        ("experts", 0, "at least 1"), ("seed", 2**64, "at most"), ("seed", -1, "at least 0"),
        ("width", 0.0, "above 0"), ("width", 5.0, "at most 4"), ("learning_rate", 0.0, "above 0"),
        ("eps", Fraction(0), "at least 1/1000000"), ("eps", Fraction(2), "at most 1"),
        ("momentum", 1.0, "below 1"), ("drop_path", 1.0, "below 1"), ("gamma", -1.0, "at least 0"),
        ("beta", math.nan, "at least 0"), ("learning_rate", math.inf, "at least 0"),
        ("schedule", "cosin", "one of constant, cosine, multistep, one-cycle, warm"), ("dataset", "mnist", ".*parts10"),
        ("precision", None, ".*bfloat16"), ("expert", "resnet", ".*resnet18, .*pdarts"),
        ("compiled", "yes", ".* auto, False, True"), ("adversary", "fgsm", "one of pgd, ffgsm, None"),
        ("drop_path", 0.2, "0 for googlenet, which has no cells"), ("auxiliary_weight", 0.4, "0 for googlenet"),
    ],
)  # fmt: skip
def test_D16_what_no_training_can_have_is_refused_by_name(field, value, must):
    """A misspelt schedule would train by another one, and drop_path fail after the first epoch."""
    with pytest.raises(ValueError, match=f"{field} is .*; it must be {must}"):
        replace(Recipe(), **{field: value})


def test_an_auxiliary_classifier_is_for_one_expert_alone():
    with pytest.raises(ValueError, match="auxiliary_weight is 0.4; it must be 0, or experts 1"):
        replace(Recipe(), auxiliary_weight=0.4, expert="pdarts")
    with pytest.raises(ValueError, match="auxiliary_weight is 0.4; it must be 0, or .* gamma 0"):
        replace(Recipe(), auxiliary_weight=0.4, expert="pdarts", experts=1, beta=0.0, gamma=100.0)


def test_what_no_epoch_can_end_on_is_refused_before_training(make_recipe, dataset, tmp_path):
    """Pairing without an adversary, too few images, and a label of no class."""
    few = {
        split: {"splits": dataset.splits | {split: dataset.splits[split].first(count)}}
        for split, count in (("train", 1), ("validation", 0))
    }
    for recipe, data, told in (
        ({"pairing": "alp"}, {}, "pairing is alp, but adversary is None; choose pgd"),
        ({}, few["train"], "1 train images of parts10; training needs at least 2: load"),
        ({}, few["validation"], "0 validation images of parts10; training needs at least 1: load"),
        ({}, {"class_names": dataset.class_names[:-1]}, "train label 9 of parts10, which has 9 classes, from 0 on"),
    ):
        with pytest.raises(ValueError, match=told):
            train(replace(make_recipe(), **recipe), replace(dataset, **data), tmp_path)


def test_a_recipe_is_known_again_from_json(make_recipe):
    """Also from before a field was there, which then stands for its default."""
    recipe = make_recipe(regime="adversarial", eps="4/255")
    known = json.loads(json.dumps(recipe.as_json()))
    assert known["eps"] == "4/255" and recipe.is_that_of(known)
    assert not recipe.is_that_of(known | {"eps": "8/255"})
    del known["compiled"], known["step_size"]
    assert recipe.is_that_of(known)
    assert not replace(recipe, step_size=Fraction(1, 255)).is_that_of(known)
    assert not recipe.is_that_of(known | {"a field of another version": 1})


def test_inner_attack_gets_the_recipe_s_budget_and_drop_path_rises_linearly(
    make_recipe, dataset, tmp_path, monkeypatch
):
    seen, shares = [], []

    def attack(model, images, labels, name, gate, **budget):
        seen.append((name, gate, budget, model.training))
        shares.append({m.drop_path and round(m.drop_path.item(), 6) for m in model.modules() if isinstance(m, Cell)})
        return images

    monkeypatch.setattr(training, "attack_images", attack)
    recipe = make_recipe("standalone", "adversarial", epochs=2, eps="4/255")
    train(replace(recipe, expert="pdarts", layers=3, drop_path=0.3), dataset, tmp_path)
    call = ("pgd", "trained", {"eps": 4 / 255, "step_size": 2 / 255, "steps": 2, "strict": False})
    assert seen == ([(*call, True)] * STEPS + [(*call, False)]) * 2  # the last one of an epoch for the log
    assert shares == [{None}] * (STEPS + 1) + [{0.3 / 2}] * (STEPS + 1)


def test_seeds_and_experts_differ_and_the_caller_s_random_state_stays(make_recipe, dataset):
    state, recipe = torch.get_rng_state(), make_recipe("moe")
    one, other = (build_model(replace(recipe, seed=seed), dataset) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [expert.classifier.weight for expert in (*one.experts, other.experts[0])]
    assert not any(torch.equal(*pair) for pair in itertools.combinations(weights, 2))


def test_A10_training_learns(make_recipe, dataset, tmp_path):
    """Of all images at once, each step descends: what is learnt in ten does not hang on luck."""
    steady = {"batch_size": 48, "learning_rate": 0.01, "augment": False, "schedule": "constant"}
    _, log = train(make_recipe("standalone", epochs=10, **steady), dataset, tmp_path)
    assert log[-1]["cross_entropy"] < 0.9 * log[0]["cross_entropy"]


@pytest.fixture(scope="module")
def batch(dataset):
    return dataset.splits["train"].images[:8].float() / 255, dataset.splits["train"].labels[:8]


def test_heat_map_losses_warm_up_linearly_from_no_maps_at_all(make_recipe, dataset, batch, monkeypatch):
    recipe = make_recipe(beta=2.0, gamma=5.0, warmup_epochs=2.0)
    model = build_model(recipe, dataset).eval()
    extra = []
    for epochs_done in (0.5, 1.0, 2.0, 3.0):
        loss = training_loss(model, *batch, recipe, epochs_done)
        extra.append((loss.total - loss.cross_entropy).item())
    assert [value / extra[-1] for value in extra] == pytest.approx([0.25, 0.5, 1, 1], abs=1e-3)
    monkeypatch.delattr(training, "grad_cam")
    for without, epochs_done in ((recipe, 0.0), (make_recipe("moe"), 5.0)):
        loss = training_loss(model, *batch, without, epochs_done)
        assert loss.total == loss.cross_entropy


def test_eq_11_rewards_no_map_for_shrinking_into_its_floor(make_recipe, dataset, batch):
    """Training descends it on maps whose floor is a constant share, which changes no value."""
    recipe = make_recipe(gamma=1e4)
    model, weights = eval_model(recipe, dataset), {"alpha": 1.0, "beta": 1.0, "gamma": 1e4}
    outputs, parameters = model.expert_outputs(batch[0]), list(model.experts.parameters())
    heat = grad_cam(outputs, batch[1], create_graph=True)
    maps, positions = (normalise_maps(heat, recipe.floor, constant_share=constant) for constant in (False, True))

    def slope(loss):
        gradients = torch.autograd.grad(loss.total, parameters, retain_graph=True)
        return torch.cat([one.flatten() for one in gradients])

    found = slope(training_loss(model, *batch, recipe, 5.0))
    expected = slope(immunity_loss(outputs, batch[1], maps, positions, **weights))
    rewarding = slope(immunity_loss(outputs, batch[1], maps, **weights))
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)
    assert (rewarding - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("part", ["cross_entropy", "mutual_information", "position_stability"])
def test_loss_that_is_not_finite_stops_the_run_and_is_named(make_recipe, dataset, tmp_path, monkeypatch, part):
    calls = []

    def loss(*arguments):
        calls.append(training_loss(*arguments))
        spoilt = {part: torch.tensor(math.nan)} if len(calls) == STEPS + 2 else {}
        return replace(calls[-1], **spoilt)

    monkeypatch.setattr(training, "training_loss", loss)
    with pytest.raises(TrainingDiverged, match=f"{part}.* is nan in epoch 2, batch 2 of 3; lower"):
        train(make_recipe(), dataset, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_log_says_how_the_model_does(make_recipe, dataset, tmp_path):
    recipe = make_recipe(regime="adversarial", epochs=1)
    model, (entry,) = train(recipe, dataset, tmp_path)
    state = torch.get_rng_state()
    assert training.diagnose(model, dataset.splits["validation"], recipe).items() <= entry.items()
    assert torch.equal(torch.get_rng_state(), state)  # though the attack starts at random
    assert len(entry["expert_accuracy"]) == 2
    for part in ("gate_entropy", "mutual_information", "mutual_information_loss"):
        assert 0 <= entry[part] <= 2 * math.log(2) + 1e-6
    assert "under its own attack" in training.progress_line("a model", 1, entry)


QUARTER = (1 + math.sqrt(0.5)) / 2
ROBNETS = {0: 0.02, 10: 0.61, 20: 1.2, 95: (1.2 + 0.001) / 2, 170: 0.001}  # as published


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [("constant", {0: 1, 0.25: 1, 1: 1}), ("multistep", {0: 1, 0.25: 1, 0.5: 0.1, 0.75: 0.01, 1: 0.01}),
     ("one-cycle", {0: 1e-3, 0.125: 0.5, 0.25: 1, 0.5: 2 / 3, 0.75: 1 / 3, 1: 1e-3}),
     ("cosine", {0: 1, 0.25: QUARTER, 0.5: 0.5, 0.75: 1 - QUARTER, 1: 0}),
     ("warmup-cosine", {epoch / 170: rate / 1.2 for epoch, rate in ROBNETS.items()})],
)  # fmt: skip
def test_learning_rate_schedules(schedule, factors):
    assert {done: training.learning_rate_factor(schedule, done) for done in factors} == pytest.approx(factors)


def test_weight_decay_may_leave_vectors_alone(make_recipe, dataset):
    recipe = make_recipe("moe", weight_decay=0.1)
    model = build_model(recipe, dataset)
    for one, decay_of_vectors in ((recipe, 0.1), (replace(recipe, decayed="convolutions and classifier"), 0.0)):
        groups = training.make_optimiser(model, one).param_groups
        found = [(weight.ndim > 1, group["weight_decay"]) for group in groups for weight in group["params"]]
        assert set(found) == {(True, 0.1), (False, decay_of_vectors)}
        assert len(found) == len(list(model.parameters()))


@pytest.mark.slow
def test_compiled_training_does_what_it_does_otherwise(make_recipe, dataset, tmp_path, monkeypatch):
    """The step is captured whole, with the heat maps' gradient in it, and once for all steps behind the warm-up. Its
    kernels, which take minutes to compile, are PyTorch's own, and are not made here."""
    graphs, logs = [], []

    def backend(graph, examples):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, examples)

    captured = partial(torch.compile, backend=backend, fullgraph=True)
    for compiled in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", captured)
            recipe = make_recipe(compiled=compiled, precision="auto", epochs=2)
            logs.append(train(recipe, dataset, tmp_path / str(compiled))[1][-1])
    assert len(graphs) == 1
    for part in ("cross_entropy", "loss", "gate_entropy", "input_gradient"):
        assert logs[1][part] == pytest.approx(logs[0][part], rel=1e-2)  # 1e-3 was measured


@pytest.mark.slow
def test_a_network_of_cells_is_compiled_once_however_its_drop_path_rises(make_recipe, dataset, batch):
    recipe, graphs = replace(make_recipe("standalone", batch_size=8), expert="pdarts", layers=3), []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    loss, model = training.compiled_loss(backend=backend, fullgraph=True), build_model(recipe, dataset).train()
    for share in (0.1, 0.2, 0.3):
        model.experts[0].set_drop_path(share)
        loss(model, *batch, recipe, recipe.warmup_epochs)
    assert len(graphs) == 1


# What training descends beside eq (12)


def eval_model(recipe, dataset):
    """With batch statistics and large logits, so that answers differ between images."""
    model = build_model(recipe, dataset)
    with torch.no_grad():
        for _ in range(20):
            model.train()(dataset.splits["train"].images[:32].float() / 255)
        for expert in model.experts:
            expert.classifier.weight.mul_(20)
    return model.eval()


@pytest.mark.parametrize(("method", "regime"), [("moe", "trades"), ("immunity", "trades"), ("moe", "alp")])
def test_pairing_adds_how_far_the_answers_under_attack_are(make_recipe, dataset, batch, method, regime):
    """TRADES adds a divergence to the clean images' loss, ALP a distance to the attacked's."""
    recipe = make_recipe(method, regime, trades_weight=3.0, pairing_weight=0.5)
    model, (images, labels) = eval_model(recipe, dataset), batch
    other_images = (images + torch.rand_like(images)) / 2
    loss = training_loss(model, images, labels, recipe, 5.0, other_images)
    classified = images if regime == "trades" else other_images
    plain = training_loss(model, classified, labels, make_recipe(method), 5.0)
    assert loss.cross_entropy == plain.cross_entropy
    clean, attacked = (model(one, gate="trained").double() for one in (images, other_images))
    expected = {
        "trades": 3.0 * (clean.exp() * (clean - attacked)).sum(1).mean(),
        "alp": 0.5 * (clean - attacked).square().mean(),
    }[regime].item()
    assert expected > 1e-3
    assert (loss.total - plain.total).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("adversary", ["pgd", "ffgsm"])
def test_inner_attack_of_trades_raises_the_divergence(make_recipe, dataset, batch, adversary):
    recipe = make_recipe("moe", "trades", adversary=adversary)
    model, (images, labels) = eval_model(recipe, dataset), batch
    attacked = adversarial_images(model, images, labels, recipe)
    noise = images + float(recipe.eps) * (2 * torch.rand_like(images) - 1).sign()
    clean = model(images, "trained")
    found, of_noise = ((clean.exp() * (clean - model(one, "trained"))).sum() for one in (attacked, noise.clamp(0, 1)))
    assert found > 2 * of_noise


def test_auxiliary_classifier_adds_its_cross_entropy(make_recipe, dataset, batch):
    recipe = replace(make_recipe("standalone"), expert="pdarts", layers=3, auxiliary_weight=0.4)
    model, (images, labels) = eval_model(recipe, dataset), batch
    loss = training_loss(model, images, labels, recipe, 5.0)
    logits, auxiliary = model.experts[0].forward_with_auxiliary(images)
    torch.testing.assert_close(logits, model.experts[0](images))
    assert loss.cross_entropy == functional.cross_entropy(logits, labels)
    expected = loss.cross_entropy + 0.4 * functional.cross_entropy(auxiliary, labels)
    torch.testing.assert_close(loss.total, expected)
    with pytest.raises(ValueError, match="without its auxiliary classifier"):
        build_expert("pdarts", 10, 0.125, layers=3).forward_with_auxiliary(images)


@pytest.mark.parametrize(
    ("able", "device", "mixed", "compiled"),
    [({"avx512_bf16": True}, "cpu", True, False), ({"amx_bf16": True}, "cpu", True, False), ({}, "cpu", False, False),
     ({"avx512_bw": True, "amx_bf16": False}, "cpu", False, False), ({}, "cuda", True, True)],
)  # fmt: skip
def test_what_is_left_to_the_machine_is_what_it_does_fast(make_recipe, monkeypatch, able, device, mixed, compiled):
    """bfloat16 where it is computed, not emulated, at a seventh of the speed; compiled steps on a GPU."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    recipe, device = make_recipe(precision="auto", compiled="auto"), torch.device(device)
    assert (training.is_mixed(recipe, device), training.is_compiled(recipe, device)) == (mixed, compiled)
    for asked in (True, False):  # it does as it is told, wherever
        told = make_recipe(precision="bfloat16" if asked else "float32", compiled=asked)
        assert training.is_mixed(told, device) == training.is_compiled(told, device) == asked


def test_mixed_precision_is_close_and_ends_before_probabilities(make_recipe, dataset, batch):
    """bfloat16 keeps 8 bits: the losses agree to a few per cent, the maps still sum to 1."""
    losses = []
    for precision in ("float32", "bfloat16"):
        recipe = make_recipe("immunity", precision=precision, gamma=10.0)
        model = build_model(recipe, dataset).train()
        losses.append(training_loss(model, *batch, recipe, 5.0))
    for part in ("cross_entropy", "mutual_information", "total"):
        exact, mixed = (getattr(loss, part).item() for loss in losses)
        assert mixed == pytest.approx(exact, rel=0.05) and mixed != exact
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model.expert_outputs(batch[0])
    maps = normalise_maps(grad_cam(outputs, batch[1]))
    assert outputs.activations[0].dtype == torch.bfloat16
    assert outputs.log_probs.dtype == maps.dtype == torch.float32
    torch.testing.assert_close(outputs.gate.sum(1), torch.ones(8))
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(8, 2))
