"""Trained models by name: loaded where they are, trained where they are not yet.

Looked for in `runs/` first, then in `pretrained/`, whose weights come with the project.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from pydantic import ValidationError
from torch import nn

from immunity_lib import parallel
from immunity_lib.data import Dataset, load_dataset
from immunity_lib.experts import multiply_accumulates
from immunity_lib.moe import ConstantGate, ImmunityMoE
from immunity_lib.recipes import ModelName, Recipe, members, own_recipe, recipe
from immunity_lib.records import (
    DamagedFile,
    provenance,
    read_record,
    read_tensors,
    set_aside,
    write_record,
    write_tensors,
)
from immunity_lib.settings import ROOT, Settings
from immunity_lib.training import build_model, selected_entry, train

PRETRAINED = ROOT / "pretrained"


def chosen_device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dataset_of(settings: Settings, name: str = "") -> Dataset:
    """The preset's data set, or one of its further ones, with as many images as it says."""
    dataset = load_dataset(
        name or settings.dataset, settings.data_folder or None,
        settings.train_images, settings.validation_images, settings.test_images,
    )  # fmt: skip
    available = len(dataset.splits["test"])
    for field in ("attacked_images", "judged_images"):
        count = getattr(settings, field)
        if count is not None and count > available:
            raise ValueError(
                f"{field} is {count}, but {dataset.name} has only {available} test images; lower it"
            )
    return dataset


def model_folder(settings: Settings, name: ModelName) -> Path:
    """Where everything about a model lies: what was trained here goes before what came with the
    project."""
    own = own_folder(settings, name)
    if not (own / "record.json").exists() and is_pretrained(settings, name):
        return pretrained_folder(settings, name)
    return own


def own_folder(settings: Settings, name: ModelName) -> Path:
    """Where a model lies that was trained here."""
    return settings.runs / "models" / str(name)


def pretrained_folder(settings: Settings, name: ModelName) -> Path:
    """Where a model lies that comes with the project."""
    return PRETRAINED / settings.preset / str(name)


def is_pretrained(settings: Settings, name: ModelName) -> bool:
    """Whether the project brings weights of this model, trained with these settings."""
    folder = pretrained_folder(settings, name)
    if not (settings.pretrained and (folder / settings.weights_file).exists()):
        return False
    known = read_record(folder / "record.json")["recipe"]
    return Recipe.model_validate(known) == recipe(settings, name)


def trained_model(settings: Settings, name: ModelName, dataset: Dataset) -> ImmunityMoE:
    """A model of the preset, in eval mode; trained first if it is not there yet.

    Weights that are damaged, or were trained with other settings or data, are set aside and made
    anew. An ensemble is put together from its members, with equal weights.
    """
    if name.method == "ensemble":
        return _ensemble([trained_model(settings, one, dataset) for one in members(settings, name)])
    wanted, folder = recipe(settings, name), own_folder(settings, name)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a second process waits, then finds the model trained
        model = _load(settings, folder, wanted, dataset) or _load_pretrained(
            settings, name, wanted, dataset
        )
        if model is None:
            _train_and_save(settings, folder, wanted, dataset, name)
            model = _load(settings, folder, wanted, dataset)
    return model.to(chosen_device()).eval()


def training_record(settings: Settings, name: ModelName) -> dict:
    """The record that the training of a model left beside its weights."""
    return read_record(model_folder(settings, name) / "record.json")


def weights_checksum(settings: Settings, record: dict) -> str:
    """Of the reported epoch's weights, from a training record."""
    return record["weights"] if settings.reported_epoch == "last" else record["selected"]["weights"]


def _load(settings: Settings, folder: Path, wanted: Recipe, dataset: Dataset) -> ImmunityMoE | None:
    """The model in the folder, or None if there is none that can be used."""
    weights, record = folder / settings.weights_file, folder / "record.json"
    if not (weights.exists() and record.exists()):
        return None
    try:
        return _stored_model(settings, folder, wanted, dataset)
    except DamagedFile as error:
        for path in (weights, record):
            set_aside(path, f"{error}; the model is trained anew")
        return None


def _load_pretrained(
    settings: Settings, name: ModelName, wanted: Recipe, dataset: Dataset
) -> ImmunityMoE | None:
    """The model that comes with the project, or None; its files stay as they are."""
    if not is_pretrained(settings, name):
        return None
    try:
        model = _stored_model(settings, pretrained_folder(settings, name), wanted, dataset)
    except DamagedFile as error:
        print(f"the weights of {name} that come with the project are not used: {error}")
        return None
    _say_pretrained(name)
    return model


@cache
def _say_pretrained(name: ModelName) -> None:
    """Once in a process."""
    print(f"{name}: weights that come with the project")


def _stored_model(
    settings: Settings, folder: Path, wanted: Recipe, dataset: Dataset
) -> ImmunityMoE:
    """The model in the folder; DamagedFile says why it cannot be used."""
    try:
        known = read_record(folder / "record.json")
        tensors, _ = read_tensors(folder / settings.weights_file, weights_checksum(settings, known))
        same = Recipe.model_validate(known["recipe"]) == wanted
        same_data = known["data"]["checksum"] == dataset.splits["train"].checksum
    except (ValidationError, KeyError) as error:
        raise DamagedFile(repr(error) if isinstance(error, KeyError) else str(error)) from error
    if not (same and same_data):
        raise DamagedFile("it was trained with other settings or other data")
    model = build_model(wanted, dataset)
    model.load_state_dict(tensors)
    return model


def _train_and_save(
    settings: Settings, folder: Path, wanted: Recipe, dataset: Dataset, name: ModelName
) -> None:
    device = chosen_device()
    together = f", {settings.processes} processes" if settings.processes > 1 else ""
    print(f"training {name} on {device}{together}, data from {dataset.source}", flush=True)
    started = time.perf_counter()
    if settings.processes > 1:  # what they leave is a whole training, which is then loaded below
        parallel.train_together(
            _train_share, settings, name, dataset.splits["train"].checksum,
            processes=settings.processes,
        )  # fmt: skip
    model, log = train(wanted, dataset, folder, name=str(name), device=device)
    cost = [multiply_accumulates(expert) for expert in model.experts]
    checksum = write_tensors(folder / "model.safetensors", model.state_dict(), {"name": str(name)})
    selected, published = selected_entry(log), own_recipe(settings, name)
    write_record(
        folder / "record.json",
        {
            "kind": "training",
            "model": str(name),
            "recipe": wanted.model_dump(mode="json"),
            "data": {
                "source": dataset.source,
                "images": len(dataset.splits["train"]),
                "checksum": dataset.splits["train"].checksum,
            },
            "published": published.model_dump(include={"source", "gaps"}) if published else None,
            "weights": checksum,
            "selected": {"epoch": selected["epoch"], "weights": selected["weights"]},
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "multiply_accumulates": sum(one.head + one.tail for one in cost),
            "log": log,
            "processes": sorted({entry.get("processes", 1) for entry in log}),
            "seconds": round(sum(entry["seconds"] for entry in log), 1),
            "seconds_in_this_process": round(time.perf_counter() - started, 1),
            "provenance": provenance(),
        },
    )
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)  # the model has superseded it


def _train_share(settings: Settings, name: ModelName, checksum: str) -> None:
    """What each of several processes does; a large data set is loaded rather than handed over."""
    dataset = dataset_of(settings, name.dataset)
    if dataset.splits["train"].checksum != checksum:
        raise ValueError(
            "several processes can only train on the preset's own data set; set processes to 1"
        )
    train(
        recipe(settings, name), dataset, own_folder(settings, name), name=str(name),
        device=chosen_device(),
    )  # fmt: skip


def _ensemble(networks: list[ImmunityMoE]) -> ImmunityMoE:
    experts: list[nn.Module] = [network.experts[0] for network in networks]
    gate = ConstantGate(len(experts)).to(chosen_device())
    return ImmunityMoE(experts, gate, evaluation_gate="uniform").eval()
