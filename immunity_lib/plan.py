"""What a preset costs, before anything runs: `make plan PRESET=paper`.

Arithmetic is counted in forward passes of the network, in multiply-accumulates of convolutions and
linear layers. For one image of one epoch, T being the share behind the Grad-CAM layer:

    a training step               3          forward, and backward for activations and weights
    the heat-map losses         + 3 T        one more backward of the tail, and its own backward
    each step of an attack      + 2          forward, and backward for activations alone
    TRADES, logit pairing       + 3          the other images of the pair

An attack with s steps on a test image takes 2 s, each measurement of accuracy 1, heat maps 1 + T.
The adaptive attacks of notebook 06 are counted as if every image resisted, which few do.
Left out: batch norms, losses, augmentation, the small held-out split. Hours are this arithmetic
over an assumed sustained speed, the same for all. On a CPU, measured epochs (`make bench`) keep to
the proportions within a third for networks of plain convolutions, ResNet18 at half its bill aside;
networks of cells, with their depthwise convolutions, take 4 to 5 times theirs. Memory is weights,
gradients and momentum, and what the forward pass of one training batch keeps for the backward one,
counted on shapes alone; a GPU's libraries take 1 to 2 GB beside it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache

import pandas as pd
import torch

from immunity_lib.attacks.auto_attack import DRAWS, QUERIES_PER_STEP
from immunity_lib.attacks.black_box import DRAWS_PER_STEP
from immunity_lib.attacks.sanity import BUDGETS
from immunity_lib.command_line import preset_parser
from immunity_lib.data import Dataset, cifar, folder, parts
from immunity_lib.experts import multiply_accumulates
from immunity_lib.moe import ImmunityMoE
from immunity_lib.objective import training_loss
from immunity_lib.recipes import (
    ModelName,
    Recipe,
    attacked_models,
    judged_models,
    recipe,
    trained_models,
)
from immunity_lib.settings import Settings, load_preset
from immunity_lib.training import build_model

ASSUMED_TFLOPS = 10.0  # sustained; a guess for one data-centre GPU on images this small


@dataclass(frozen=True)
class Job:
    """One model: its training and, if it is attacked, its attacks."""

    name: ModelName
    parameters: int
    forward: int  # multiply-accumulates of one image
    training: int  # multiply-accumulates
    scores: int  # heat maps and accuracy on all test images
    attacks: int
    judging: int  # the adaptive attacks
    memory: int  # bytes, in training

    @property
    def evaluation(self) -> int:
        """Multiply-accumulates of everything behind the training."""
        return self.scores + self.attacks + self.judging

    def hours(self, tflops: float) -> float:
        """All of it at a sustained speed in TFLOP/s."""
        return hours(self.training + self.evaluation, tflops)


def hours(multiply_accumulates: int, tflops: float) -> float:
    """At a sustained speed in TFLOP/s; a multiply-accumulate is two operations."""
    return 2 * multiply_accumulates / (tflops * 1e12) / 3600


def planned_jobs(settings: Settings) -> list[Job]:
    """Every model that the preset trains. Nothing is computed and no data are read, but for the
    names of the files of a data set of your own."""
    attacked, judged = set(attacked_models(settings)), set(judged_models(settings))
    return [
        planned_job(settings, name, name in attacked, name in judged)
        for name in trained_models(settings)
    ]


def passes_of_training(wanted: Recipe, tail_share: float) -> float:
    """Forward passes that training costs for every image of every epoch; see above."""
    passes = 3.0
    if wanted.beta or wanted.gamma:
        passes += 3 * tail_share
    if wanted.adversary:
        passes += 2 * (wanted.adversary_steps if wanted.adversary == "pgd" else 1)
    if wanted.pairing != "none":
        passes += 3
    return passes


def passes_of_attacks(settings: Settings, single: bool) -> float:
    """Forward passes that the attacks cost for every attacked image."""
    steps = [1 if attack == "fgsm" else settings.steps for attack in settings.attacks]
    gates = 1 if single else len(settings.attack_gates)
    return gates * sum(2 * count + 1 for count in steps)


def passes_of_judging(settings: Settings) -> int:
    """Forward passes that the adaptive attacks cost, at most, for every judged image."""
    of_pgd = 3 + 2 + 2 + 1 + 3  # the paper's, frozen gates, exact, single experts, other mixtures
    of_checks = len(BUDGETS) + 2
    arc = 2 + settings.experts  # a gradient of every expert, and an answer after each
    per_step = 2 * (of_pgd + of_checks + sum(settings.gate_samples)) + arc
    # AutoAttack on two fixed gates: APGD, on nine targets too, FAB on nine and Square; on the
    # switched one, two APGD with 20 draws; then Square alone and noise
    standard, rand = 2 + 9 * 2 + 9 * 3 + QUERIES_PER_STEP, 2 * 2 * DRAWS
    per_judge_step = 2 * standard + rand + QUERIES_PER_STEP + DRAWS_PER_STEP
    return settings.steps * per_step + settings.judge_steps * per_judge_step


def memory_of_training(model: ImmunityMoE, wanted: Recipe) -> int:
    """Bytes: weights, gradients, momentum, and what one batch keeps for the backward pass.

    model: on the meta device, of this recipe.
    """
    weights = 3 * sum(parameter.nbytes for parameter in model.parameters())
    return weights + wanted.batch_size * _kept_for_backward(model, wanted) // 2


def _kept_for_backward(model: ImmunityMoE, wanted: Recipe) -> int:
    """Bytes that the loss of a batch of two holds on to, weights aside, each tensor once."""
    images = torch.zeros(2, 3, 32, 32, device="meta")
    labels = torch.zeros(2, dtype=torch.long, device="meta")
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}  # holds the storages, so that none is counted under another's address

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        exact = wanted.model_copy(update={"precision": "float32"})
        training_loss(model.train(), images, labels, exact, wanted.epochs, images)
    return sum(storage.nbytes() for storage in kept.values())


def shapes_of(wanted: Recipe, classes: int) -> ImmunityMoE:
    """The model without values: on the meta device, where nothing is computed."""
    names = ("",) * classes
    stand_in = Dataset("", names, (0.5,) * 3, (0.25,) * 3, (), "shapes alone", {})
    with torch.device("meta"):
        return build_model(wanted, stand_in)


def planned_job(settings: Settings, name: ModelName, attacked: bool, judged: bool = False) -> Job:
    """One model of the preset, trained and measured; attacked, judged: whether under the attacks
    and the adaptive attacks too."""
    wanted = recipe(settings, name)
    classes, train_images, test_images = _images(settings, name.dataset)
    parameters, head, tail, memory = _counted(
        wanted.model_copy(update={"seed": 0}).model_dump_json(), classes
    )
    forward = head + tail
    under_attack = 0.0
    if attacked:
        single = wanted.experts == 1
        under_attack += settings.attacked_images * passes_of_attacks(settings, single) + test_images
    judging = settings.judged_count * passes_of_judging(settings) if judged else 0
    passes = passes_of_training(wanted, tail / forward)
    return Job(
        name, parameters, forward,
        training=round(train_images * wanted.epochs * passes * forward),
        scores=2 * test_images * forward,  # accuracy, and heat maps with a backward pass
        attacks=round(under_attack * forward),
        judging=judging * forward,
        memory=memory,
    )  # fmt: skip


@cache  # models that differ by their seed are counted once
def _counted(wanted_json: str, classes: int) -> tuple[int, int, int, int]:
    """Parameters, multiply-accumulates of heads and of tails, and the memory of training."""
    wanted = Recipe.model_validate_json(wanted_json)
    model = shapes_of(wanted, classes)
    cost = [multiply_accumulates(expert) for expert in model.experts]
    return (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(one.head for one in cost),
        sum(one.tail for one in cost),
        memory_of_training(model, wanted),
    )


def _images(settings: Settings, data: str) -> tuple[int, int, int]:
    """Classes, training images and test images of a data set, as the preset takes them."""
    if data in cifar.CIFAR:
        classes, available = len(cifar.CIFAR[data].class_names), {"train": 50_000, "test": 10_000}
    else:
        source = parts.source() if data == "parts10" else folder.source(settings.data_folder)
        classes, available = len(source.class_names), source.available
    train = settings.train_images or available["train"] - settings.validation_images
    return classes, train, settings.test_images or available["test"]


def printed_plan(settings: Settings, jobs: list[Job], tflops: float) -> str:
    """The bill as text: a line for all seeds of a model, the totals, and what they assume."""
    lines = []
    for job in jobs:
        wanted = recipe(settings, job.name)
        lines.append(
            {
                "model": str(job.name).rsplit("-seed", 1)[0],
                "epochs": wanted.epochs,
                "batch": wanted.batch_size,
                "parameters (M)": job.parameters / 1e6,
                "forward (GMAC)": job.forward / 1e9,
                "training (PMAC)": job.training / 1e15,
                "attacks (PMAC)": job.evaluation / 1e15,
                "GPU hours": job.hours(tflops),
                "memory (GB)": job.memory / 1e9,
            }
        )
    frame = pd.DataFrame(lines).groupby("model", sort=False)
    table = frame.mean()
    table.insert(0, "jobs", frame.size())
    each = [job.hours(tflops) for job in jobs]
    disk = sum(8 * job.parameters for job in jobs) + 2e6 * len(jobs)
    return "\n".join(
        [
            f"Preset {settings.preset}: what it would cost; per job, seeds of a model in one line.",
            table.to_string(float_format="{:,.3g}".format, formatters={"epochs": "{:.0f}".format}),
            "",
            f"{len(jobs)} trainings, {sum(job.training for job in jobs) / 1e18:.3g} EMAC in "
            f"training and {sum(job.evaluation for job in jobs) / 1e18:.3g} EMAC in attacks and "
            f"scores",
            f"{sum(each):,.0f} GPU hours in all, {max(each):,.1f} for the longest job, at an "
            f"assumed {tflops:g} TFLOP/s sustained (--tflops); nothing here was run on a GPU",
            f"{max(job.memory for job in jobs) / 1e9:.1f} GB for the largest job in float32, and 1 "
            "to 2 GB for a GPU's libraries",
            f"{disk / 1e9:.1f} GB of disk: weights of the last and the selected epoch, and about 2 "
            "MB a model for logs, records and notebooks",
            "",
            __doc__.split("\n\n", 1)[1].strip(),
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the plan of a preset; returns the exit status."""
    parser = preset_parser(
        "plan", "What a preset costs, before anything runs.", default="paper", output=False
    )
    parser.add_argument(
        "--tflops",
        type=float,
        default=ASSUMED_TFLOPS,
        help=f"sustained speed of the machine, TFLOP/s (default: {ASSUMED_TFLOPS:g})",
    )
    options = parser.parse_args(arguments)
    try:
        if not options.tflops > 0:
            raise ValueError(f"--tflops is {options.tflops}; it must be above 0")
        settings = load_preset(options.preset, data_folder=options.data)
        print(printed_plan(settings, planned_jobs(settings), options.tflops))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
