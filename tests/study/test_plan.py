"""The bill is the arithmetic that a model really does, and what a preset really trains."""

import re
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import nn

from immunity_lib.attacks import attack_images
from immunity_lib.data import load_dataset
from immunity_lib.heatmaps import expert_heatmaps
from immunity_lib.train import build_model, make_optimiser, training_loss
from study.catalogue import ModelName, measured_models, recipe_of, trained_models
from study.graph import plan
from study.graph.cost import cost_of
from study.settings import ROOT, load_preset


@pytest.mark.parametrize("expert", ["resnet18", "googlenet", "pdarts", "robnet-free"])
def test_passes_are_counted_as_by_hand(make_recipe, expert):
    """Oracle: layer by layer, outputs times inputs of each. Forward once, backward for weights and activations once
    each; depthwise convolutions too, whose backward pass PyTorch's own formula counts as a full convolution's."""
    layers = 3 if expert in ("pdarts", "robnet-free") else None
    recipe = replace(make_recipe("standalone"), expert=expert, layers=layers)
    (network,) = build_model(recipe, load_dataset("parts10", None, 2, 1, 1)).experts
    counted = []
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # whose every output is made of so many inputs
            layer.register_forward_hook(lambda of, _, out: counted.append(out[0].numel() * of.weight[0].numel()))
    network(torch.zeros(1, 3, 32, 32))
    forward, cost = sum(counted), cost_of(recipe, 10)
    assert cost["forward"] == forward
    assert cost["gradient"] == pytest.approx(2 * forward, rel=0.01)
    # The first layer needs no gradient of the images
    assert cost["step"] == pytest.approx(3 * forward - counted[0], rel=0.01)


def test_heat_maps_add_the_tail_behind_their_layer_and_a_pair_of_images_is_trained_on_twice(make_recipe):
    """Maps take a backward pass of it, and in training that is differentiated itself."""
    plain, regularised = (cost_of(make_recipe(method), 10) for method in ("moe", "immunity"))
    assert plain["forward"] == regularised["forward"]
    tail = regularised["maps"] - regularised["forward"]
    assert 0 < tail < regularised["forward"]
    assert regularised["step"] - plain["step"] == pytest.approx(3 * tail, rel=0.05)  # and the resizing
    single, pair = (cost_of(make_recipe("moe", regime), 10) for regime in ("adversarial", "trades"))
    assert pair["step"] == pytest.approx(2 * single["step"], rel=0.02)


def test_a_step_of_an_attack_is_one_gradient(make_settings, model, images, labels, monkeypatch):
    passes = []
    outputs = model.expert_outputs
    monkeypatch.setattr(model, "expert_outputs", lambda *_: passes.append(1) or outputs(*_))
    attack_images(model, images, labels, "pgd", "uniform", eps=0.1, step_size=0.1, steps=5)
    settings = make_settings(attacks=["pgd"], steps=5, attack_gates=["switch"])
    name = ModelName.parse("parts10-moe-resnet18-standard-seed0")
    cost, row = cost_of(recipe_of(settings, name), 10), plan.plan(settings).loc[str(name)]
    on_one = (row["03_attacks"] - settings.test_images * cost["forward"]) / settings.attacked_images
    assert on_one == len(passes) * cost["gradient"] + cost["forward"]


def test_D10_memory_is_that_of_the_larger_phase(make_recipe):
    """Measuring takes 250 images at a time; a larger batch in training takes in proportion more."""
    measuring, *trainings = (cost_of(replace(make_recipe("moe"), batch_size=batch), 10) for batch in (2, 1000, 2000))
    weights = 4 * measuring["parameters"]
    # Each expert keeps the output of its 17 three-by-three convolutions at the least
    maps = 2 * 4 * (5 * 4 * 32**2 + 4 * 8 * 16**2 + 4 * 16 * 8**2)
    assert measuring["memory"] > weights + 250 * maps
    kept = [one["memory"] - 3 * weights for one in trainings]
    assert kept[1] == 2 * kept[0] > 2000 * maps
    # 17.8 GB were seen for five GoogLeNets, where the plan said 3
    seen = replace(make_recipe("moe"), expert="googlenet", experts=5, width=1.0)
    assert cost_of(seen, 10)["memory"] > 5e9


def peak_of(compute) -> int:
    """The most bytes of tensors at a time that something takes, beside what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        compute()
    found = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    return max(accumulate(one.nbytes() for one in sorted(found, key=lambda one: one.start_ns())))


@pytest.mark.parametrize("expert", ["resnet18", "googlenet"])
@pytest.mark.parametrize("method", ["moe", "immunity"])
def test_G2_memory_is_what_training_and_measuring_take(make_recipe, expert, method):
    recipe = replace(make_recipe(method), expert=expert, width=0.125)
    model = build_model(recipe, load_dataset("parts10", None, 2, 1, 1)).train()
    optimiser = make_optimiser(model, recipe)
    images = torch.rand(250, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(250) % 10

    def step(count=250):
        training_loss(model, images[:count], labels[:count], recipe, 5.0).total.backward()
        optimiser.step()

    step(count=2)  # from now on there is momentum
    optimiser.zero_grad()
    weights = 4 * sum(one.numel() for one in model.experts.parameters())
    for taken, batch in (
        (2 * weights + peak_of(step), 250), (weights + peak_of(lambda: expert_heatmaps(model, images, labels)), 2),
    ):  # fmt: skip
        assert cost_of(replace(recipe, batch_size=batch), 10)["memory"] == pytest.approx(taken, rel=0.15)


def test_every_model_is_billed_once_and_for_what_is_done_with_it(make_settings):
    settings = make_settings(baselines=["pdarts"], baseline_layers=3, seeds=[0, 1])
    frame, trained = plan.plan(settings), trained_models(settings)
    assert list(frame.index) == [str(name) for name in trained]
    for column, kind in (("03_attacks", "attacks"), ("06_adaptive_attacks", "adaptive")):
        billed = [str(name) for name in trained if name in measured_models(settings, kind)]
        assert list(frame.index[frame[column] > 0]) == billed
    text = plan.format_plan(settings, 0.5)
    assert f"{len(frame)} trainings" in text and "an assumed 0.5 TFLOP/s" in text
    assert all(name.rsplit("-seed", 1)[0] in text for name in frame.index)


def test_the_speed_of_each_network_can_be_measured_instead(make_settings, monkeypatch, capsys):
    """Steps are timed on a pretended clock, whose every look takes a second."""
    monkeypatch.setattr(plan.time, "perf_counter", map(float, range(10_000)).__next__)
    settings = make_settings(baselines=["pdarts"], baseline_layers=3)
    speeds, frame = plan.measured_tflops(settings), plan.plan(settings)
    assert list(speeds.index) == list(frame.index) and (speeds > 0).all()
    moe, immunity = (f"parts10-{method}-resnet18-standard-seed0" for method in ("moe", "immunity"))
    assert speeds[moe] != speeds[immunity] and speeds[moe] == speeds[moe.replace("standard", "adversarial")]
    assert capsys.readouterr().err.count("TFLOP/s on cpu") == 3
    text = plan.format_plan(settings, speeds)
    total = (2 * frame[plan.WORK].sum(axis=1) / (speeds * 1e12) / 3600).sum()
    assert f"{total:,.0f} hours in all" in text and "as measured of each on this cpu" in text


@pytest.mark.parametrize(
    ("seeds", "told"),
    [([0, 1], "no verdicts, for which there must be 3"), ([0, 1, 2], r"an effect of \d+\.\d points would")],
)
def test_the_plan_says_beforehand_what_could_be_decided(make_settings, seeds, told):
    assert re.search(told, plan.format_power(make_settings(seeds=seeds)))
    fewer = plan.format_power(make_settings(seeds=seeds, baselines=["pdarts"], baseline_seeds=1))
    judged = plan.format_power(make_settings(seeds=seeds, attacked_images=30, adaptive_images=20))
    assert len(seeds) < 3 or re.search(r"adaptive attacks, on 20 images, one of \d\d\.\d", judged)
    assert len(seeds) < 3 or ("1 of each baseline" in fewer and fewer.endswith("; beside baselines no verdicts"))


def test_G9_what_a_job_asks_a_cluster_for_follows_the_plan(make_settings):
    settings, tflops = make_settings(controls=["standalone", "ensemble"], adaptive=["ensemble", "moe"]), 1e-4
    asked, frame = plan.requests(settings, tflops, False), plan.plan(settings)
    assert {one["mem_mb"] for one in plan.requests(settings, tflops, True).values()} == {plan.LIBRARIES}
    # Of ensembles too, which are measured and not trained
    for kind, notebook in (("attacks", "03_attacks"), ("adaptive", "06_adaptive_attacks")):
        for name in measured_models(settings, kind):
            assert frame[notebook][str(name)] > 0 and asked[f"{notebook}-{name}"]["runtime"] > plan.STARTING
    for name, row in frame.iterrows():
        training = asked[f"02_training-{name}"]
        minutes = 2 * row["02_training"] / (tflops * 1e12) / 60
        assert 2 * minutes + 10 <= training["runtime"] <= 2 * minutes + 12
        assert training["mem_mb"] > row["memory"] / 1e6
        assert f"03_attacks-{name}" in asked and f"06_adaptive_attacks-{name}" in asked
    # The mixtures of the ablation, and beside them ensembles of as many networks
    assert asked["04_ablation"]["runtime"] >= asked["05_heatmaps"]["runtime"] > 10
    faster = plan.requests(settings, 10 * tflops, False)
    for name, request in asked.items():
        assert faster[name]["runtime"] == pytest.approx(10 + (request["runtime"] - 10) / 10, abs=2)


@pytest.mark.slow
def test_the_plan_of_the_paper_preset(capsys):
    """Without its data; the longest job is one of the largest networks."""
    assert plan.main(["--preset=paper"]) == 0
    text = capsys.readouterr().out
    assert f"{len(trained_models(load_preset('paper')))} trainings" in text
    (said,) = re.findall(r"^> (.* trainings; .*)$", (ROOT / "docs/gpu-nodes.md").read_text(), re.MULTILINE)
    assert said in text
