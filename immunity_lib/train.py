"""Training of a mixture by eq (12), standard or adversarial, resumable after every epoch.

After every epoch the weights, the optimiser's momentum, the random state and the log go into one checkpoint: a run
that was killed or stopped goes on from there and ends where an undisturbed one would have (on the CPU, bit for bit).
"""

import json
import math
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from immunity_lib.attacks import attack_images
from immunity_lib.data import Dataset, ImageSet
from immunity_lib.data.batches import evaluation_batches, training_batches
from immunity_lib.evaluate import BATCH, in_parts
from immunity_lib.experts import build_expert
from immunity_lib.files import DamagedFile, read_tensors, set_aside, write_atomically, write_tensors
from immunity_lib.heatmaps import grad_cam, is_empty, normalise_maps
from immunity_lib.losses import ImmunityLoss, immunity_loss
from immunity_lib.moe import ConstantGate, ConvolutionalGate, ExpertOutputs, ImmunityMoE
from immunity_lib.recipe import Recipe
from immunity_lib.scores import mutual_information

LOGGED = ("cross_entropy", "mutual_information_loss", "position_stability_loss", "loss")
CHECKPOINT = "checkpoint.safetensors"
STOPPED = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM ended


class TrainingDiverged(ArithmeticError):
    """A loss that is not finite; the message says which, where, and what to try."""


def build_model(recipe: Recipe, dataset: Dataset) -> ImmunityMoE:
    """The untrained model of a recipe, initialised from its seed."""
    mean, std = (dataset.mean, dataset.std) if recipe.normalise else ((0.0,) * 3, (1.0,) * 3)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)  # the CPU's alone
        experts = [
            build_expert(
                recipe.expert, len(dataset.class_names), recipe.width, mean, std,
                recipe.heatmap_layer, layers=recipe.layers, auxiliary=bool(recipe.auxiliary_weight),
            )
            for _ in range(recipe.experts)
        ]  # fmt: skip
        gate = {"convolutional": ConvolutionalGate, "constant": ConstantGate}[recipe.gate_network]
        return ImmunityMoE(experts, gate(recipe.experts)).to(memory_format=torch.channels_last)


def train(
    recipe: Recipe, dataset: Dataset, folder: Path, *, name: str = "", device: torch.device | None = None,
    tell: Callable[[dict], None] = lambda entry: None,
) -> tuple[ImmunityMoE, list[dict]]:  # fmt: skip
    """Train a recipe from its last checkpoint in `folder`, or from the start.

    Returns the model after the last epoch and its log, in `folder/log.jsonl` too: for each epoch what `_train_epoch`
    and `diagnose` say. name: for the progress lines. tell: gets the entry of each epoch once its checkpoint is written.
    Raises TrainingDiverged at the first loss that is not finite. SIGTERM (as SystemExit(143)) and Ctrl-C end it at
    once, with the last epoch's checkpoint left to go on from.
    """
    if recipe.pairing != "none" and recipe.adversary is None:
        raise ValueError(f"pairing is {recipe.pairing}, but adversary is None; choose pgd or ffgsm, or pairing none")
    for split, least in (("train", 2), ("validation", 1)):  # for a batch norm, and for the log
        if (count := len(dataset.splits.get(split, ()))) < least:
            raise ValueError(f"{count} {split} images of {dataset.name}; training needs at least {least}: load more")
        if (highest := dataset.splits[split].labels.max().item()) >= (classes := len(dataset.class_names)):
            raise ValueError(f"{split} label {highest} of {dataset.name}, which has {classes} classes, from 0 on")
    model, folder = build_model(recipe, dataset).to(device), Path(folder)
    loss = compiled_loss() if is_compiled(recipe, next(model.parameters()).device) else training_loss
    optimiser = make_optimiser(model, recipe)
    name, log, data = name or folder.name, [], dataset.splits["train"].checksum
    with torch.random.fork_rng(), ExitStack() as at_end:
        if threading.current_thread() is threading.main_thread():  # no other handles signals
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
            at_end.callback(signal.signal, signal.SIGTERM, before or signal.SIG_DFL)
        torch.manual_seed(recipe.seed)
        try:
            log = _restore(folder, recipe, data, model, optimiser)
            if 0 < len(log) < recipe.epochs:
                print(f"{folder.name} goes on after epoch {len(log)} of {recipe.epochs}", flush=True)
            while len(log) < recipe.epochs:
                started = time.perf_counter()
                entry = {"epoch": len(log) + 1}
                entry |= _train_epoch(model, loss, optimiser, recipe, dataset, len(log), name)
                entry |= diagnose(model, dataset.splits["validation"], recipe)
                entry["seconds"] = round(time.perf_counter() - started, 2)
                write_atomically(folder / "log.jsonl", "".join(json.dumps(one) + "\n" for one in [*log, entry]))
                notes = {"recipe": recipe.as_json(), "data": data, "log": [*log, entry]}
                _save(folder, notes, model, optimiser)
                log.append(entry)
                print(progress_line(name, recipe.epochs, entry), flush=True)
                tell(entry)
        except (SystemExit, KeyboardInterrupt):
            print(f"{name} stopped; the same command goes on after epoch {len(log)} of {recipe.epochs}", flush=True)
            raise
    return model.eval(), log


def _train_epoch(model, loss, optimiser, recipe, dataset, epoch, name) -> dict[str, float]:
    """One epoch; means over its batches of the loss's parts and of their weighted total."""
    model.train()
    if recipe.drop_path:
        for expert in model.experts:
            expert.set_drop_path(recipe.drop_path * epoch / recipe.epochs)
    batches = training_batches(
        dataset.splits["train"], recipe.batch_size, torch.default_generator, recipe.augment,
        next(model.parameters()).device, rotation=recipe.rotation, cutout=recipe.cutout,
        fill=dataset.mean if recipe.normalise else (0.0,) * 3,
    )  # fmt: skip
    # But for a last batch of a single image, which is dropped
    steps, sums = math.ceil((len(dataset.splits["train"]) - 1) / recipe.batch_size), defaultdict(float)
    remedy = "lower learning_rate, beta or gamma, or set gradient_clip"
    shown = tqdm(batches, f"{name} {epoch + 1}/{recipe.epochs}", steps, leave=False)
    for number, (images, labels) in enumerate(shown, start=1):
        done = epoch + (number - 1) / steps
        rate = recipe.learning_rate * learning_rate_factor(recipe.schedule, done / recipe.epochs)
        for group in optimiser.param_groups:
            group["lr"] = rate
        adversarial = adversarial_images(model, images, labels, recipe)
        parts = loss(model, images, labels, recipe, done, adversarial)
        optimiser.zero_grad()
        parts.total.backward()
        if recipe.gradient_clip:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        optimiser.step()
        told = (parts.cross_entropy, parts.mutual_information, parts.position_stability, parts.total)
        # Together, since a GPU is waited for each time
        for part, value in zip(LOGGED, torch.stack(told).tolist(), strict=True):
            if not math.isfinite(value):
                where = f"in epoch {epoch + 1}, batch {number} of {steps}"
                raise TrainingDiverged(f"{name}: {part} is {value} {where}; {remedy}")
            sums[part] += value
        shown.set_postfix(loss=f"{sums['loss'] / number:.3f}", refresh=False)
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise TrainingDiverged(f"{name}: a weight is not finite after epoch {epoch + 1}; {remedy}")
    return {part: total / number for part, total in sums.items()}


def compiled_loss(**options: Any) -> Callable[..., ImmunityLoss]:
    """`training_loss`, compiled; options: of `torch.compile`. A compiled loss is one for each value of its weights and
    for each size of a batch, so that steps of the warm-up and smaller batches are not compiled. Whatever else is
    compiled in this process is compiled anew."""
    torch.compiler.assume_constant_result(_has_bfloat16)  # what a machine can do is not to be traced
    torch._dynamo.reset()  # it takes no more than eight of one function
    torch._dynamo.config.trace_autograd_ops = True  # the heat maps' gradient, inside the loss
    compiled = torch.compile(training_loss, dynamic=False, **options)

    def loss(model, images, labels, recipe, epochs_done, adversarial=None) -> ImmunityLoss:
        if epochs_done < recipe.warmup_epochs or len(images) != recipe.batch_size:
            return training_loss(model, images, labels, recipe, epochs_done, adversarial)
        return compiled(model, images, labels, recipe, recipe.warmup_epochs, adversarial)

    return loss


def training_loss(
    model: ImmunityMoE, images: Tensor, labels: Tensor, recipe: Recipe, epochs_done: float,
    adversarial: Tensor | None = None,
) -> ImmunityLoss:  # fmt: skip
    """Eq (12) on one batch, beta and gamma rising linearly over the warm-up, and what the recipe's pairing and
    auxiliary classifier add. adversarial: the images under attack, if any."""
    warm = min(epochs_done / recipe.warmup_epochs, 1.0) if recipe.warmup_epochs else 1.0
    beta, gamma = warm * recipe.beta, warm * recipe.gamma
    clean_is_classified = adversarial is None or recipe.pairing == "trades"
    classified, other = (images, adversarial) if clean_is_classified else (adversarial, images)
    with mixed_precision(recipe, images.device):
        if recipe.auxiliary_weight:  # of a stand-alone network, which has no gate to ask
            logits = model.experts[0].forward_with_auxiliary(classified)
            own, auxiliary = (one.to(images.dtype) for one in logits)
            outputs = ExpertOutputs(own[:, None], own.new_zeros(len(images), 1), ())
        else:
            outputs = model.expert_outputs(classified)
        other_log_probs = model(other, gate="trained") if recipe.pairing != "none" else None
    maps = positions = None
    if beta or gamma:
        heat = grad_cam(outputs, labels, create_graph=True, explained=recipe.explained)
        maps = normalise_maps(heat, recipe.floor)
        # A floor's centre of mass never moves, so that eq (11) would reward maps for shrinking
        positions = normalise_maps(heat, recipe.floor, constant_share=True)
    terms = {"alpha": recipe.alpha, "beta": beta, "gamma": gamma}
    loss = immunity_loss(outputs, labels, maps, positions, coordinates=recipe.coordinates, **terms)
    total, mixture = loss.total, outputs.mixture()
    if recipe.pairing == "trades":  # its eq (5): KL(clean || adversarial)
        far = functional.kl_div(other_log_probs, mixture, reduction="batchmean", log_target=True)
        total = total + recipe.pairing_weight * far
    if recipe.pairing == "alp":
        total = total + recipe.pairing_weight * functional.mse_loss(mixture, other_log_probs)
    if recipe.auxiliary_weight:
        total = total + recipe.auxiliary_weight * functional.cross_entropy(auxiliary, labels)
    return replace(loss, total=total)


def adversarial_images(model: ImmunityMoE, images: Tensor, labels: Tensor, recipe: Recipe) -> Tensor | None:
    """The images of a batch under the recipe's attack on the trained gate; None if it has none."""
    if recipe.adversary is None:
        return None
    eps, attack = float(recipe.eps), recipe.adversary
    budget = {"step_size": float(recipe.step_size), "steps": recipe.adversary_steps}
    if recipe.pairing == "trades":
        # It raises the divergence from the clean answer; FFGSM is its one step on a cross entropy
        budget = {"step_size": 1.25 * eps, "steps": 1} if attack == "ffgsm" else budget
        attack = "tpgd"
    with mixed_precision(recipe, images.device):
        return attack_images(model, images, labels, attack, "trained", eps=eps, strict=False, **budget)


def diagnose(model: ImmunityMoE, validation: ImageSet, recipe: Recipe) -> dict:
    """What the log says of the model, in eval mode; it leaves the random state as it was.

    accuracy of the mixture under the trained gate and of every expert; entropy of the gate in nats; of maps in the
    fixed reading, the share that is empty and I(C, E) in nats; mean norm of the input's gradient of the mixture's
    cross entropy; robust_accuracy of the mixture under the recipe's own attack, if it has one.
    """
    model.eval()
    device = next(model.parameters()).device

    def look(rows: slice) -> dict[str, Tensor | float]:
        """Sums over some of the images."""
        ((images, labels),) = evaluation_batches(validation.select(rows), BATCH, device)
        images.requires_grad_()
        outputs = model.expert_outputs(images)
        mixture, maps = outputs.mixture(), normalise_maps(grad_cam(outputs, labels)).detach()
        cross_entropy = functional.nll_loss(mixture, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(cross_entropy, images)
        found = {
            "accuracy": (mixture.argmax(-1) == labels).sum(),
            "expert_accuracy": (outputs.logits.argmax(-1) == labels[:, None]).sum(0),
            "gate_entropy": -(outputs.gate * outputs.log_gate).sum().detach(),
            "empty_maps": is_empty(maps).float().mean(0).mean() * len(labels),
            "mutual_information": mutual_information(maps) * len(labels),
            "input_gradient": gradient.flatten(1).norm(dim=1).sum(),
        }
        if recipe.adversary:
            with torch.random.fork_rng():
                torch.manual_seed(recipe.seed)
                attacked = adversarial_images(model, images.detach(), labels, recipe)
            with torch.no_grad():
                predicted = model(attacked, gate="trained").argmax(-1)
            found["robust_accuracy"] = (predicted == labels).sum()
        return found

    parts = in_parts(look, len(validation))
    return {key: torch.as_tensor(sum(one[key] for one in parts)).div(len(validation)).tolist() for key in parts[0]}


def progress_line(name: str, epochs: int, entry: dict) -> str:
    """One epoch of the log as a line of text."""
    robust, experts = entry.get("robust_accuracy"), entry["expert_accuracy"]
    attacked = "" if robust is None else f", {robust:.1%} under its own attack"
    return (
        f"{name} epoch {entry['epoch']}/{epochs}: cross entropy {entry['cross_entropy']:.3f}, "
        f"MI {entry['mutual_information_loss']:.3f}, PS {entry['position_stability_loss']:.3g}, "
        f"accuracy {entry['accuracy']:.1%} (experts {min(experts):.1%} to {max(experts):.1%})"
        f"{attacked}, gate entropy {entry['gate_entropy']:.2f}, "
        f"empty maps {entry['empty_maps']:.1%}, input gradient {entry['input_gradient']:.3f}, "
        f"{entry['seconds']:.0f} s"
    )


def make_optimiser(model: ImmunityMoE, recipe: Recipe) -> torch.optim.Optimizer:
    """Stochastic gradient descent on all weights of the model."""
    groups, momentum, decay = model.parameters(), recipe.momentum, recipe.weight_decay
    if recipe.decayed != "everything":  # biases and batch norms, which are vectors, are left alone
        vectors = [one for one in model.parameters() if one.ndim < 2]
        others = [one for one in model.parameters() if one.ndim >= 2]
        groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, recipe.learning_rate, momentum, weight_decay=decay)


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


def mixed_precision(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    """Within it, convolutions and products are in bfloat16 if the recipe says so."""
    return torch.autocast(device.type, torch.bfloat16) if is_mixed(recipe, device) else nullcontext()


def is_mixed(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe trains in bfloat16 there: with "auto", where the device computes in it, and does not emulate."""
    return _has_bfloat16(device.type) if recipe.precision == "auto" else recipe.precision == "bfloat16"


def _has_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def is_compiled(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe's step is compiled there: with "auto", on a GPU; a CPU took 0.87 of
    the time for an Immunity of ResNet18s and 1.1 for the plain mixture, and a minute to compile."""
    return device.type == "cuda" if recipe.compiled == "auto" else recipe.compiled


def _save(folder: Path, notes: dict, model: nn.Module, optimiser) -> None:
    """Write weights, momentum, random state and notes (recipe, data, log) as one file."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors[f"momentum.{index}"] = state["momentum_buffer"]
    tensors["random.cpu"] = torch.get_rng_state()
    if (device := next(model.parameters()).device).type == "cuda":  # the GPU that draws, which need not be the first
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    write_tensors(folder / CHECKPOINT, tensors, notes)


def _restore(folder: Path, recipe: Recipe, data: str, model: nn.Module, optimiser) -> list[dict]:
    """Load the checkpoint, if there is one of this recipe and of the data with this checksum; the log so far. Any other
    is set aside, and training starts from the beginning."""
    path, weights = folder / CHECKPOINT, model.state_dict()
    if not path.exists():
        return []
    try:
        tensors, notes = read_tensors(path)
        log = [dict(entry) for entry in notes["log"]]
        if not (recipe.is_that_of(notes["recipe"]) and notes["data"] == data):
            raise DamagedFile("it belongs to other settings or data")
        parameters = [one for group in optimiser.param_groups for one in group["params"]]
        needed = {f"model.{key}": value.shape for key, value in weights.items()}
        possible = {f"momentum.{index}": one.shape for index, one in enumerate(parameters)}
        found = {key: one.shape for key, one in tensors.items() if not key.startswith("random.")}
        if not needed.items() <= found.items() <= (needed | possible).items():
            raise DamagedFile("it belongs to another version of the code")
        torch.set_rng_state(tensors["random.cpu"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        set_aside(path, f"{error}; training starts anew")
        return []
    model.load_state_dict({key: tensors[f"model.{key}"] for key in weights})
    for index, weight in enumerate(parameters):
        if (buffer := tensors.get(f"momentum.{index}")) is not None:
            # In the memory format of its weight, without which the next step is slow
            optimiser.state[weight]["momentum_buffer"] = torch.empty_like(weight).copy_(buffer)
    if (device := parameters[0].device).type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], device)
    return log
