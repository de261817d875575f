"""The bill is the arithmetic that a step really does, and what a preset really trains."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from immunity_lib import plan
from immunity_lib.attacks import attack_images
from immunity_lib.objective import training_loss
from immunity_lib.recipes import ModelName, attacked_models, recipe, trained_models


def counted(step) -> float:
    """Multiply-accumulates of a step, counted operator by operator."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 2


def meta_batch(count=4):
    return (
        torch.zeros(count, 3, 32, 32, device="meta"),
        torch.zeros(count, dtype=torch.long, device="meta"),
    )


@pytest.mark.parametrize(
    ("method", "expert", "regime"),
    [
        ("standalone", "googlenet", "standard"),
        ("moe", "resnet18", "standard"),
        ("immunity", "googlenet", "standard"),
        ("immunity", "googlenet-kuangliu", "standard"),
        ("moe", "resnet18", "trades"),
    ],
)
def test_formula_agrees_with_the_operators_of_a_real_step(make_settings, method, expert, regime):
    """Within one per cent: the first layer needs no gradient for the images, and the gate and
    the resizing of maps are not in the formula. (Of depthwise convolutions, PyTorch's counter
    counts the backward pass too high.)"""
    settings = make_settings(expert=expert, width=0.5)
    name = ModelName.parse(f"parts10-{method}-{expert}-{regime}-seed0")
    wanted = recipe(settings, name)
    model = plan.shapes_of(wanted, 10).train()
    (images, labels), adversarial = meta_batch(), meta_batch()[0]
    measured = counted(
        lambda: training_loss(model, images, labels, wanted, 9.0, adversarial).total.backward()
    )
    job = plan.planned_job(settings, name, attacked=False)
    passes = measured / 4 / job.forward
    attack = 2 * wanted.adversary_steps if wanted.adversary else 0
    expected = plan.passes_of_training(wanted, _tail_share(model)) - attack
    assert passes == pytest.approx(expected, rel=0.01)


def _tail_share(model) -> float:
    cost = [plan.multiply_accumulates(expert) for expert in model.experts]
    return sum(one.tail for one in cost) / sum(one.head + one.tail for one in cost)


def test_attacks_cost_two_passes_a_step(make_settings, model, images, labels, monkeypatch):
    forward = sum(sum(plan.multiply_accumulates(expert)) for expert in model.experts)
    attacked = images.clone().requires_grad_() * 1.0

    def step():
        torch.autograd.grad(model(attacked, gate="uniform").sum(), attacked)

    assert counted(step) / len(images) / forward == pytest.approx(2, rel=0.05)
    passes = []
    monkeypatch.setattr(model, "forward", lambda *_: passes.append(1) or forward_of(*_))
    forward_of = type(model).forward.__get__(model)
    attack_images(model, images, labels, "pgd", "uniform", eps=0.1, step_size=0.1, steps=5)
    settings = make_settings(attacks=["pgd"], steps=5, attack_gates=["switch"])
    # One pass more than the attack's is the measurement's
    assert plan.passes_of_attacks(settings, single=False) == 2 * len(passes) + 1


def test_memory_is_what_the_backward_pass_needs(make_settings):
    """A chain of known tensors: doubling the batch doubles all but weights, gradients, momentum."""
    name = ModelName.parse("parts10-moe-resnet18-standard-seed0")
    sizes = {}
    for batch in (8, 16, 32):
        wanted = recipe(make_settings(batch_size=batch), name)
        model = plan.shapes_of(wanted, 10)
        sizes[batch] = plan.memory_of_training(model, wanted)
    weights = 3 * 4 * sum(parameter.numel() for parameter in model.parameters())
    assert sizes[32] - weights == 2 * (sizes[16] - weights) == 4 * (sizes[8] - weights)
    # Each expert keeps the output of its 17 three-by-three convolutions at the least
    assert sizes[8] - weights > 8 * 2 * 4 * (5 * 4 * 32**2 + 4 * 8 * 16**2 + 4 * 16 * 8**2)


def test_every_model_is_billed_once_and_the_attacked_ones_for_their_attacks(make_settings):
    settings = make_settings(baselines=["pdarts"], baseline_layers=3, seeds=[0, 1])
    jobs = plan.planned_jobs(settings)
    assert [job.name for job in jobs] == trained_models(settings)
    attacked = set(attacked_models(settings))
    scores_only = 2 * settings.test_images
    for job in jobs:
        assert (job.evaluation > scores_only * job.forward) == (job.name in attacked)


def test_printed_plan_adds_up(make_settings, capsys):
    assert plan.main(["--preset", "smoke", "--tflops", "0.5"]) == 0
    text = capsys.readouterr().out
    settings = plan.load_preset("smoke")
    jobs = plan.planned_jobs(settings)
    assert f"{len(jobs)} trainings" in text and "an assumed 0.5 TFLOP/s" in text
    operations = 2 * sum(job.training + job.evaluation for job in jobs)
    assert sum(job.hours(0.5) for job in jobs) == pytest.approx(operations / 0.5e12 / 3600)
    for job in jobs:
        assert str(job.name).rsplit("-seed", 1)[0] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "large"], "unknown preset 'large'; valid names: .*paper"),
        (["--tflops", "0"], "--tflops is 0.0; it must be above 0"),
    ],
)
def test_bad_arguments_are_errors(arguments, message, capsys):
    assert plan.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
