"""Where a training stands, on disk: what it needs to go on as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from immunity_lib.records import (
    DamagedFile,
    read_tensors,
    set_aside,
    write_atomically,
    write_tensors,
)


@dataclass
class Progress:
    """How far a training is: epochs that are logged, and batches of the epoch that follows."""

    log: list[dict]
    batches: int = 0
    sums: dict[str, float] = field(default_factory=dict)  # of the loss's parts over these batches
    seconds: float = 0.0  # that these batches took
    epoch_random: Tensor | None = None  # the CPU's random state when their epoch began


def save_checkpoint(
    folder: Path,
    source: dict,
    progress: Progress,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write weights, momentum, random state, progress and source (recipe, data) as one file."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{index}"] = state["momentum_buffer"]
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    notes = source | {"log": progress.log}
    if progress.batches:
        tensors["random.epoch"] = progress.epoch_random
        notes["epoch"] = {
            "batches": progress.batches, "sums": progress.sums, "seconds": progress.seconds
        }  # fmt: skip
    write_tensors(folder / "checkpoint.safetensors", tensors, notes)


def restore_checkpoint(
    folder: Path, source: dict, model: nn.Module, optimiser: torch.optim.Optimizer
) -> Progress:
    """Load the checkpoint, if there is one of this recipe and data; returns how far it is. Any
    other is set aside, and training starts from the beginning."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return Progress([])
    try:
        tensors, notes = read_tensors(path)
    except DamagedFile as error:
        set_aside(path, f"{error}; training starts anew")
        return Progress([])
    if any(notes.get(key) != value for key, value in source.items()):
        set_aside(path, "it belongs to other settings or data; training starts anew")
        return Progress([])
    model.load_state_dict(_under("model.", tensors))
    state = {
        int(index): {"momentum_buffer": tensor}
        for index, tensor in _under("momentum.", tensors).items()
    }
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    epoch = notes.get("epoch", {})  # none where the checkpoint is of an epoch's end
    progress = Progress(notes["log"], **epoch, epoch_random=tensors.get("random.epoch"))
    epochs = source["recipe"]["epochs"]
    further = f" and {progress.batches} batches" if progress.batches else ""
    if len(progress.log) < epochs:
        print(f"{folder.name} goes on after epoch {len(progress.log)}{further} of {epochs}")
    return progress


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}


def write_log(folder: Path, log: list[dict]) -> None:
    """Write the log so far, one line an epoch."""
    write_atomically(folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in log))
