"""What a preset costs, before anything runs: `make plan PRESET=paper`.

Arithmetic is multiply-accumulates of convolutions and products, which PyTorch counts on shapes alone in an expert's
real forward pass, training step, heat maps and gradient of the images; a step of an attack is such a gradient.
Adaptive attacks are counted as if every image resisted, which few do. Left out: the gate, batch norms, losses,
augmentation, the small held-out split. Hours are this arithmetic over a sustained speed: an assumed one, the same for
all, or, with --calibrate, that of each network's training steps on this machine, which attacks are taken to share.
On a CPU, measured epochs (`make bench`) keep to the proportions within a third for networks of plain convolutions,
ResNet18 at half its bill aside; networks of cells, with their depthwise convolutions, take 4 to 5 times theirs.
Memory is that of the larger phase, training or measuring: weights, in training also gradients and momentum, and what
a batch keeps for its backward pass; a GPU's libraries take 1 to 2 GB beside it."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from immunity_lib.attacks import AIMS, DRAWS_PER_STEP, QUERIES_PER_STEP
from immunity_lib.data import find_source
from immunity_lib.data.images import CLASS_NAMES
from immunity_lib.evaluate import BUDGETS
from immunity_lib.train import build_model, compiled_loss, is_compiled, training_loss
from study import catalogue
from study.claims import FEWEST_TRAININGS, smallest_visible, trainings_text
from study.graph import parse_options, preset_parser, refusing
from study.graph.cost import cost_of, without_images
from study.settings import Settings
from study.store import chosen_device

ASSUMED_TFLOPS = 10.0  # sustained; a guess for one data-centre GPU on images this small
CALIBRATED = 10.0  # seconds, of each network
MARGIN = 2.0  # of what a cluster is asked for: the speed is a guess, and to queue longer loses less than to be ended
STARTING = 10  # minutes, for the kernel, the libraries and the data
LIBRARIES = 4000  # MB of a process that has loaded them
WORK = ["02_training", "03_attacks", "06_adaptive_attacks", "scores"]


def plan(settings: Settings) -> pd.DataFrame:
    """A row for each model that the preset trains or measures, by its name: its `cost_of`, and the multiply-accumulates
    of all that is done with it in the notebooks of WORK; "scores" are heat maps and accuracy on all test images.
    Nothing is computed and no data are read, but for the names of the files of your own images."""
    attacked, adaptive = catalogue.measured_models(settings, "attacks"), catalogue.measured_models(settings, "adaptive")
    gradients, queries = adaptive_passes(settings)
    steps = [1 if attack == "fgsm" else settings.steps for attack in settings.attacks]
    rows = {}
    for name in planned_models(settings):
        (first, *others) = catalogue.single(settings, [name])  # an ensemble is trained as its members
        recipe, networks = catalogue.recipe_of(settings, first), 1 + len(others)
        classes, train_images, test_images = _counts(settings, name.dataset)
        cost = {what: networks * number for what, number in cost_of(recipe, classes).items()}
        forward, gradient = cost["forward"], cost["gradient"]
        own_steps = {None: 0, "ffgsm": 1, "pgd": recipe.adversary_steps}[recipe.adversary]
        gates = 1 if networks * recipe.experts == 1 else len(settings.attack_gates)
        of_attacks = settings.attacked_images * gates * (sum(steps) * gradient + len(steps) * forward)
        of_attacks += settings.attacked_images * len(settings.magnitudes) * (settings.steps * gradient + forward)
        of_adaptive = settings.adaptive_count * (gradients * gradient + queries * forward)
        rows[str(name)] = cost | {
            "epochs": recipe.epochs,
            "02_training": train_images * recipe.epochs * (cost["step"] + own_steps * gradient) * (not others),
            "03_attacks": (of_attacks + test_images * forward) * (name in attacked),
            "06_adaptive_attacks": of_adaptive * (name in adaptive),
            "scores": test_images * (forward + cost["maps"]) * (not others),
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype("float64")


def planned_models(settings: Settings) -> list[catalogue.ModelName]:
    """Every model that the preset trains or measures, once: ensembles are not trained."""
    measured = [name for kind in ("attacks", "adaptive") for name in catalogue.measured_models(settings, kind)]
    return list(dict.fromkeys([*catalogue.trained_models(settings), *measured]))


def adaptive_passes(settings: Settings) -> tuple[float, float]:
    """Gradients and forward passes alone that the adaptive attacks take for an image, at most."""
    # The paper's, frozen gates, the expected and the strongest, single experts, other mixtures
    of_pgd, checks = 3 + 2 + 1 + 2 * len(AIMS) + 1 + 3, len(BUDGETS) + 2
    gradients = settings.steps * (of_pgd + checks + len(settings.gate_samples))
    # AutoAttack on two gates: APGD, on nine targets too, FAB on nine and Square; then a fifth of Square, and noise
    judged = settings.auto_attack_steps * (settings.auto_attack_images or settings.adaptive_count)
    queries = 2 * (9 + QUERIES_PER_STEP) + QUERIES_PER_STEP / 5 + DRAWS_PER_STEP
    return gradients + 2 * (1 + 9 + 9) * judged / settings.adaptive_count, queries * judged / settings.adaptive_count


def _counts(settings: Settings, data: str) -> tuple[int, int, int]:
    """Classes, training images and test images of a data set, as the preset takes them."""
    if data in CLASS_NAMES:
        classes, available = len(CLASS_NAMES[data]), {"train": 50_000, "test": 10_000}
    else:
        source = find_source(data, settings.data_folder)
        classes, available = len(source.class_names), source.available
    train = settings.recipe.train_images or available["train"] - settings.recipe.validation_images
    if train < 1:
        told = f"validation_images is {settings.recipe.validation_images}, but {data} has only {available['train']}"
        raise ValueError(f"{told} training images; lower it")
    return classes, train, settings.test_images or available["test"]


def measured_tflops(settings: Settings) -> pd.Series:
    """The sustained speed of training steps on this machine, in TFLOP/s, by the name of each model of the plan.
    Measured of one expert of each network, on noise, for some CALIBRATED seconds after a first step."""
    speeds, by_model, device = {}, {}, chosen_device()
    for name in planned_models(settings):
        recipe = catalogue.recipe_of(settings, catalogue.single(settings, [name])[0])
        kind = name.expert, recipe.width, recipe.beta + recipe.gamma > 0  # with heat maps or without
        if kind not in speeds:
            recipe = replace(recipe, experts=1, gate_network="constant", adversary=None, pairing="none")
            classes, *_ = _counts(settings, name.dataset)
            model = build_model(recipe, without_images(classes)).to(device).train()
            loss = compiled_loss() if is_compiled(recipe, device) else training_loss
            images = torch.rand(recipe.batch_size, 3, 32, 32, device=device)
            labels = torch.randint(classes, (recipe.batch_size,), device=device)
            steps, started = -1, time.perf_counter()  # the first step, which sets up, does not count
            while steps < 1 or time.perf_counter() - started < CALIBRATED:
                loss(model, images, labels, recipe, recipe.warmup_epochs).total.backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                steps += 1
                started = started if steps else time.perf_counter()
            macs = steps * recipe.batch_size * cost_of(recipe, classes)["step"]
            speeds[kind] = 2 * macs / (time.perf_counter() - started) / 1e12
            told = "with heat maps" if kind[-1] else "without"
            print(f"{name.expert} {told}: {speeds[kind]:.3g} TFLOP/s on {device}", file=sys.stderr, flush=True)
        by_model[str(name)] = speeds[kind]
    return pd.Series(by_model)


def requests(settings: Settings, tflops: float, on_gpu: bool) -> dict[str, dict[str, int]]:
    """What each job that computes asks a cluster for: minutes ("runtime") and MB of the node's own memory ("mem_mb");
    one that ran out of either is tried again with more. tflops: sustained speed of a GPU of the cluster, or of a core
    where it has none."""
    frame, table1, table3 = plan(settings), catalogue.table1_models(settings), catalogue.table3_models(settings)
    jobs = {f"{job}-{name}": macs for job in WORK[:-1] for name, macs in frame[job].items()}
    for job, names in (("01_expert_selection", table1), ("04_ablation", table3), ("05_heatmaps", table3)):
        jobs[job] = frame["scores"][list(map(str, catalogue.single(settings, names)))].sum()
    memory = LIBRARIES + (0 if on_gpu else int(frame["memory"].max() / 1e6) + 1)  # the model's is the GPU's
    minutes = STARTING + MARGIN * 60 * hours(pd.Series(jobs), tflops)
    return {job: {"runtime": int(one) + 1, "mem_mb": memory} for job, one in minutes.items()}


def hours(multiply_accumulates, tflops):
    """At a sustained speed in TFLOP/s, of all or each; a multiply-accumulate is two operations."""
    return 2 * multiply_accumulates / (tflops * 1e12) / 3600


def format_plan(settings: Settings, tflops: float | pd.Series) -> str:
    """The bill as text: a line for all seeds of a model, the totals, and what they assume."""
    frame = plan(settings)
    measuring = frame[WORK[1:]].sum(axis=1)
    each = hours(frame["02_training"] + measuring, tflops)
    shown = pd.DataFrame({
        "epochs": frame["epochs"], "parameters (M)": frame["parameters"] / 1e6,
        "forward (GMAC)": frame["forward"] / 1e9, "training (PMAC)": frame["02_training"] / 1e15,
        "measuring (PMAC)": measuring / 1e15, "hours": each, "memory (GB)": frame["memory"] / 1e9,
    })  # fmt: skip
    by_model = shown.groupby(shown.index.str.replace("-seed[0-9]+$", "", regex=True), sort=False)
    table = by_model.mean().assign(jobs=by_model.size())
    if isinstance(tflops, pd.Series):
        speed = f"{tflops.min():.3g} to {tflops.max():.3g} TFLOP/s, as measured of each on this {chosen_device()}"
    else:
        speed = f"an assumed {tflops:g} TFLOP/s sustained (--tflops)"
    trained = frame[frame["02_training"] > 0]
    disk = (4 * trained["parameters"] + 2e6).sum() / 1e9
    _, _, assumptions = (__doc__ or "").partition("\n\n")
    return f"""\
Preset {settings.preset}: what it would cost; per job, seeds of a model in one line.
{table.to_string(float_format="{:,.3g}".format)}

{len(trained)} trainings; {each.sum():,.0f} hours in all, {each.max():,.1f} for the longest job, \
at {speed}
{disk:.1f} GB of disk: weights, and about 2 MB a model for logs, records and notebooks
{format_power(settings)}

{assumptions}"""


def format_power(settings: Settings) -> str:
    """What the preset's trainings and images can decide, as text."""
    trainings = len(settings.seeds)
    if trainings < FEWEST_TRAININGS:
        return f"Trainings of each model: {trainings}; no verdicts, for which there must be {FEWEST_TRAININGS}"
    counts = f"{trainings_text(settings)}, {settings.attacked_images} attacked images"
    visible = smallest_visible(trainings, settings.attacked_images)
    told = f"{counts}: an effect of {visible:.1f} points would be seen with a probability of 80 %"
    if (few := settings.adaptive_count) != settings.attacked_images:
        told += f", under adaptive attacks, on {few} images, one of {smallest_visible(trainings, few):.1f}"
    single = settings.baselines and (settings.baseline_seeds or trainings) < FEWEST_TRAININGS
    return told + "; beside baselines no verdicts" * bool(single)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = preset_parser("-m study.graph.plan", "What a preset costs.")
    parser.add_argument("--tflops", type=float, default=ASSUMED_TFLOPS, help="sustained speed (default: %(default)g)")
    parser.add_argument("--calibrate", action="store_true", help="measure it instead, some seconds for each network")
    options, settings = parse_options(parser, arguments)
    with refusing(parser):
        print(format_plan(settings, measured_tflops(settings) if options.calibrate else options.tflops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
