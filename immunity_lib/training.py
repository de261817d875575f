"""Standard and adversarial training of a mixture, resumable to the bit.

After every epoch the weights, the optimiser's momentum, the random state and the log so far go
into one checkpoint, written atomically. A killed run goes on from there and ends where an
uninterrupted one would have (on the CPU, bit for bit).
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from immunity_lib import scores
from immunity_lib.checkpoints import restore_checkpoint, save_checkpoint, write_log
from immunity_lib.data import Dataset, ImageSet
from immunity_lib.data.batches import evaluation_batches, training_batches
from immunity_lib.experts import build_expert
from immunity_lib.heatmaps import empty_share, heatmaps_from_outputs
from immunity_lib.moe import ConstantGate, ConvolutionalGate, ImmunityMoE
from immunity_lib.objective import adversarial_images, training_loss
from immunity_lib.randomness import seeded
from immunity_lib.recipes import Recipe
from immunity_lib.records import write_tensors


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
    `_diagnose` and `_train_epoch`; the log is in `folder/log.jsonl` too, and the weights of the
    epoch that was best on the validation images (`selected_entry`) in `selected.safetensors`.
    name: for the progress lines. Raises TrainingDiverged at the first loss that is not finite.
    """
    model = build_model(recipe, dataset).to(device)
    if recipe.compiled:
        for expert in model.experts:
            expert.forward_with_features = torch.compile(expert.forward_with_features)
    optimiser = _optimiser(model, recipe)
    name = name or folder.name
    with seeded(recipe.seed):
        source = {
            "recipe": recipe.model_dump(mode="json"),
            "data": dataset.splits["train"].checksum,
        }
        log = restore_checkpoint(folder, source, model, optimiser)
        for epoch in range(len(log), recipe.epochs):
            started = time.perf_counter()
            entry = {"epoch": epoch + 1}
            entry |= _train_epoch(model, optimiser, recipe, dataset, epoch, name, device)
            entry |= _diagnose(model, dataset.splits["validation"], recipe, device)
            entry["seconds"] = round(time.perf_counter() - started, 2)
            log.append(entry)
            if selected_entry(log) is entry:
                entry["weights"] = write_tensors(
                    folder / "selected.safetensors", model.state_dict(), {"epoch": entry["epoch"]}
                )
            write_log(folder, log)
            save_checkpoint(folder, source | {"log": log}, model, optimiser)
            print(progress_line(name, recipe.epochs, entry), flush=True)
    return model, log


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


def _train_epoch(model, optimiser, recipe, dataset, epoch, name, device) -> dict[str, float]:
    """Mean of the loss's parts (and their weighted total) over the epoch's batches."""
    model.train()
    for expert in model.experts:
        if recipe.drop_path:
            expert.set_drop_path(recipe.drop_path * epoch / recipe.epochs)
    train_set = dataset.splits["train"]
    batches = training_batches(
        train_set, recipe.batch_size, torch.default_generator, recipe.augment, device,
        rotation=recipe.rotation, cutout=recipe.cutout,
        fill=dataset.mean if recipe.normalise else (0.0,) * 3,
    )  # fmt: skip
    steps = math.ceil(len(train_set) / recipe.batch_size)
    sums: dict[str, float] = defaultdict(float)
    progress = tqdm(batches, f"{name} {epoch + 1}/{recipe.epochs}", steps, leave=False)
    for step, (images, labels) in enumerate(progress):
        done = epoch + step / steps
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_factor(
                recipe.schedule, done / recipe.epochs
            )
        adversarial = adversarial_images(model, images, labels, recipe)
        parts = training_loss(model, images, labels, recipe, done, adversarial)
        values = {
            "cross_entropy": parts.cross_entropy.item(),
            "mutual_information_loss": parts.mutual_information.item(),
            "position_stability_loss": parts.position_stability.item(),
            "loss": parts.total.item(),
        }
        for part, value in values.items():
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"{name}: {part} is {value} in epoch {epoch + 1}, batch {step + 1} of {steps}; "
                    "lower learning_rate, beta or gamma, or set gradient_clip"
                )
            sums[part] += value
        optimiser.zero_grad()
        parts.total.backward()
        if recipe.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimiser.step()
        progress.set_postfix(loss=f"{sums['loss'] / (step + 1):.3f}", refresh=False)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise TrainingDiverged(
            f"{name}: a weight is not finite after epoch {epoch + 1}; "
            "lower learning_rate, beta or gamma, or set gradient_clip"
        )
    return {part: total / (step + 1) for part, total in sums.items()}


def _optimiser(model: ImmunityMoE, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [{"params": parameters}]
    if recipe.decayed != "everything":  # biases and batch norms, which are vectors, are left alone
        vectors = [one for one in parameters if one.ndim < 2]
        others = [one for one in parameters if one.ndim >= 2]
        groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(
        groups, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay
    )


def learning_rate_factor(schedule: str, done: float) -> float:
    """Factor on the learning rate when the share `done` of the training lies behind."""
    if schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if schedule == "multistep":
        return 0.1 ** sum(done >= milestone for milestone in (0.5, 0.75))
    if schedule == "warmup-cosine":  # of the RobNets: 0.02 to 1.2 in 20 epochs, to 0.001 in 150
        if done < 20 / 170:
            return (0.02 + (1.2 - 0.02) * done * 170 / 20) / 1.2
        rest = (done - 20 / 170) / (150 / 170)
        return (0.001 + (1.2 - 0.001) * (1 + math.cos(math.pi * rest)) / 2) / 1.2
    if schedule == "one-cycle":  # linear up for a quarter of the training, linear down after
        return max(min(4 * done, (1 - done) / 0.75), 1e-3)
    return 1.0


def _diagnose(model: ImmunityMoE, validation: ImageSet, recipe: Recipe, device) -> dict:
    """What the log says of the model on held-out images, in eval mode, maps in the fixed reading.

    accuracy of the mixture under the trained gate and of every expert; entropy of the gate in
    nats; share of empty maps; I(C, E) in nats; mean norm of the input's gradient of the mixture's
    cross entropy; robust_accuracy of the mixture under the recipe's own attack, if it has one.
    """
    model.eval()
    sums: dict[str, Tensor | float] = defaultdict(float)
    for images, labels in evaluation_batches(validation, 250, device):
        images.requires_grad_()
        outputs = model.expert_outputs(images)
        mixture = outputs.mixture()
        cross_entropy = nn.functional.nll_loss(mixture, labels, reduction="sum")
        maps = heatmaps_from_outputs(outputs, labels).detach()
        (gradient,) = torch.autograd.grad(cross_entropy, images)
        count = len(labels)
        sums["accuracy"] += (mixture.argmax(-1) == labels).sum()
        sums["expert_accuracy"] += (outputs.logits.argmax(-1) == labels[:, None]).sum(0)
        sums["gate_entropy"] -= (outputs.gate * outputs.log_gate).sum().detach()
        sums["empty_maps"] += empty_share(maps).mean() * count
        sums["mutual_information"] += scores.mutual_information(maps) * count
        sums["input_gradient"] += gradient.flatten(1).norm(dim=1).sum()
        if recipe.adversary:
            with seeded(recipe.seed):
                attacked = adversarial_images(model, images.detach(), labels, recipe)
            with torch.no_grad():
                predicted = model(attacked, gate="trained").argmax(-1)
            sums["robust_accuracy"] += (predicted == labels).sum()
    return {
        what: torch.as_tensor(total).div(len(validation)).tolist() for what, total in sums.items()
    }
