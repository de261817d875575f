"""Standard and adversarial training of a mixture, resumable to the bit.

After every epoch, and when SIGTERM warns of the end, the weights, the optimiser's momentum, the
random state and the log so far go into one checkpoint, written atomically. A run that was killed
or stopped goes on from there and ends where an uninterrupted one would have (on the CPU, bit for
bit). Processes that train together (`parallel`) share each batch, and the first writes the files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from immunity_lib import parallel
from immunity_lib.checkpoints import Progress, restore_checkpoint, save_checkpoint, write_log
from immunity_lib.data import Dataset
from immunity_lib.data.batches import training_batches
from immunity_lib.diagnosis import diagnose
from immunity_lib.experts import build_expert
from immunity_lib.losses import ImmunityLoss
from immunity_lib.moe import ConstantGate, ConvolutionalGate, ImmunityMoE
from immunity_lib.objective import adversarial_images, training_loss
from immunity_lib.optimisation import learning_rate_factor, optimiser_of
from immunity_lib.randomness import seeded
from immunity_lib.recipes import Recipe
from immunity_lib.records import write_tensors
from immunity_lib.stopping import STOPPED, sigterm_noted


class TrainingDiverged(ArithmeticError):
    """A loss that is not finite; the message says which, where, and what to try."""


def build_model(recipe: Recipe, dataset: Dataset) -> ImmunityMoE:
    """The untrained model of a recipe, initialised from its seed."""
    normalisation = (dataset.mean, dataset.std) if recipe.normalise else ((0.0,) * 3, (1.0,) * 3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # the CPU's alone
        experts = [
            build_expert(
                recipe.expert, len(dataset.class_names), recipe.width, *normalisation,
                recipe.heatmap_layer, layers=recipe.layers,
                auxiliary=bool(recipe.auxiliary_weight),
            )
            for _ in range(recipe.experts)
        ]  # fmt: skip
        gates = {"convolutional": ConvolutionalGate, "constant": ConstantGate}
        model = ImmunityMoE(experts, gates[recipe.gate_network](recipe.experts))
    return model.to(memory_format=torch.channels_last)


def train(
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    *,
    name: str = "",
    device: torch.device | None = None,
) -> tuple[ImmunityMoE, list[dict]]:
    """Train a recipe from its last checkpoint in `folder`, or from the start.

    Returns the model after the last epoch and its log, one entry an epoch as described in
    `diagnose` and `_train_epoch`; the log is in `folder/log.jsonl` too, and the weights of the
    epoch that was best on the validation images (`selected_entry`) in `selected.safetensors`.
    name: for the progress lines. Raises TrainingDiverged at the first loss that is not finite, and
    SystemExit(143) when SIGTERM has come: the checkpoint is then of the batch just done.
    """
    model = build_model(recipe, dataset).to(device)
    if recipe.compiled:
        for expert in model.experts:
            expert.forward_with_features = torch.compile(expert.forward_with_features)
    # A stand-alone network with an auxiliary classifier does without its gate
    loss = parallel.averaged(TrainingLoss(model, recipe), unused=bool(recipe.auxiliary_weight))
    optimiser = optimiser_of(model, recipe)
    name = name or folder.name
    with seeded(recipe.seed), sigterm_noted() as sigterms:
        checksum = dataset.splits["train"].checksum
        source = {"recipe": recipe.model_dump(mode="json"), "data": checksum}
        with parallel.first_goes_first():
            progress = restore_checkpoint(folder, source, model, optimiser)
        while len(progress.log) < recipe.epochs:
            started = time.perf_counter() - progress.seconds
            whole = _train_epoch(
                model, loss, optimiser, recipe, dataset, progress, name, device, sigterms
            )
            progress.seconds = time.perf_counter() - started
            if whole:
                entry = _finish_epoch(model, recipe, dataset, progress, folder, device)
                progress = Progress([*progress.log, entry])
            if parallel.rank() == 0:
                write_log(folder, progress.log)
                save_checkpoint(folder, source, progress, model, optimiser)
            if whole:
                print(progress_line(name, recipe.epochs, entry), flush=True)
            if parallel.agreed(bool(sigterms) or not whole):
                print(
                    f"{name} stopped by SIGTERM after {_place(progress, recipe, dataset)}; "
                    "the same command goes on from there",
                    flush=True,
                )
                raise SystemExit(STOPPED)
    return model, progress.log


def selected_entry(log: list[dict]) -> dict:
    """The first epoch of the highest accuracy on the validation images, under the training's own
    attack if it has one; the test images have no say."""
    return max(log, key=lambda entry: entry.get("robust_accuracy", entry["accuracy"]))


def progress_line(name: str, epochs: int, entry: dict) -> str:
    """One epoch of the log as a line of text."""
    robust = entry.get("robust_accuracy")
    attacked = "" if robust is None else f", {robust:.1%} under its own attack"
    return (
        f"{name} epoch {entry['epoch']}/{epochs}: cross entropy {entry['cross_entropy']:.3f}, "
        f"MI {entry['mutual_information_loss']:.3f}, PS {entry['position_stability_loss']:.3g}, "
        f"accuracy {entry['accuracy']:.1%} (experts "
        f"{min(entry['expert_accuracy']):.1%} to {max(entry['expert_accuracy']):.1%}){attacked}, "
        f"gate entropy {entry['gate_entropy']:.2f}, empty maps {entry['empty_maps']:.1%}, "
        f"input gradient {entry['input_gradient']:.3f}, {entry['seconds']:.0f} s"
    )


class TrainingLoss(nn.Module):
    """A model with its loss: what processes share is a module with all gradients but those of the
    weights inside its forward pass."""

    def __init__(self, model: ImmunityMoE, recipe: Recipe):
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(
        self, images: Tensor, labels: Tensor, epochs_done: float, adversarial: Tensor | None
    ) -> ImmunityLoss:
        return training_loss(self.model, images, labels, self.recipe, epochs_done, adversarial)


def _train_epoch(model, loss, optimiser, recipe, dataset, progress, name, device, sigterms) -> bool:
    """Train on the epoch's batches that are not done yet; False if SIGTERM cut it short. The
    progress gets their number and the sums of the loss's parts and their weighted total."""
    epoch, steps = len(progress.log), _steps(recipe, dataset)
    model.train()
    for expert in model.experts:
        if recipe.drop_path:
            expert.set_drop_path(recipe.drop_path * epoch / recipe.epochs)
    batches = _batches_to_do(recipe, dataset, progress, device)
    shown = tqdm(
        batches, f"{name} {epoch + 1}/{recipe.epochs}", steps, leave=False,
        initial=progress.batches, disable=parallel.rank() > 0,
    )  # fmt: skip
    for images, labels in shown:
        done = epoch + progress.batches / steps
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(
                recipe.schedule, done / recipe.epochs
            )
        if parallel.rank():  # random numbers of its own; the first one's go on from batch to batch
            torch.manual_seed(hash((recipe.seed, epoch, progress.batches, parallel.rank())))
        adversarial = adversarial_images(model, images, labels, recipe)
        parts = loss(images, labels, done, adversarial)
        optimiser.zero_grad()
        parts.total.backward()
        if recipe.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimiser.step()
        values = _joint_values(parts)
        progress.batches += 1
        for part, value in values.items():
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"{name}: {part} is {value} in epoch {epoch + 1}, batch {progress.batches} of "
                    f"{steps}; lower learning_rate, beta or gamma, or set gradient_clip"
                )
            progress.sums[part] = progress.sums.get(part, 0.0) + value
        shown.set_postfix(loss=f"{progress.sums['loss'] / progress.batches:.3f}", refresh=False)
        if parallel.agreed(bool(sigterms)):
            return False
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainingDiverged(
            f"{name}: a weight is not finite after epoch {epoch + 1}; "
            "lower learning_rate, beta or gamma, or set gradient_clip"
        )
    return True


def _joint_values(parts: ImmunityLoss) -> dict[str, float]:
    """The parts of the loss on the whole batch."""
    own = {
        "cross_entropy": parts.cross_entropy.item(),
        "mutual_information_loss": parts.mutual_information.item(),
        "position_stability_loss": parts.position_stability.item(),
        "loss": parts.total.item(),
    }
    values = dict(zip(own, parallel.sums(own.values()), strict=True))
    for part in own.keys() - {"position_stability_loss"}:  # eq (11) is a sum, the others are means
        values[part] /= parallel.processes()
    return values


def _batches_to_do(recipe: Recipe, dataset: Dataset, progress: Progress, device) -> Iterator:
    """Those of the epoch that are not done yet, drawn as they were when it began."""
    now = parallel.of_the_first(torch.get_rng_state())
    if not progress.batches:
        progress.epoch_random = now
    torch.set_rng_state(progress.epoch_random)
    batches = training_batches(
        dataset.splits["train"], recipe.batch_size, torch.default_generator, recipe.augment,
        device, rotation=recipe.rotation, cutout=recipe.cutout,
        fill=dataset.mean if recipe.normalise else (0.0,) * 3, skipped=progress.batches,
    )  # fmt: skip
    if progress.batches:
        torch.set_rng_state(now)
    return batches


def _finish_epoch(model, recipe, dataset, progress, folder, device) -> dict:
    """The log's entry of an epoch whose batches are done; the best epoch's weights are kept."""
    started = time.perf_counter()
    entry = {"epoch": len(progress.log) + 1}
    entry |= {part: total / progress.batches for part, total in progress.sums.items()}
    # Logits that compiled code puts out do not depend on the activations beside them, as maps need
    with torch.compiler.set_stance("force_eager") if recipe.compiled else nullcontext():
        entry |= diagnose(model, dataset.splits["validation"], recipe, device)
    entry["seconds"] = round(progress.seconds + time.perf_counter() - started, 2)
    entry["processes"] = parallel.processes()
    if parallel.rank() == 0 and selected_entry([*progress.log, entry]) is entry:
        entry["weights"] = write_tensors(
            folder / "selected.safetensors", model.state_dict(), {"epoch": entry["epoch"]}
        )
    return entry


def _steps(recipe: Recipe, dataset: Dataset) -> int:
    """Batches of an epoch."""
    return math.ceil(len(dataset.splits["train"]) / recipe.batch_size)


def _place(progress: Progress, recipe: Recipe, dataset: Dataset) -> str:
    """Where a training stands, in words."""
    if progress.batches:
        steps = _steps(recipe, dataset)
        return f"batch {progress.batches} of {steps} of epoch {len(progress.log) + 1}"
    return f"epoch {len(progress.log)} of {recipe.epochs}"
