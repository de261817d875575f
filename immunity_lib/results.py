"""What is measured of a trained model, as records: accuracy under attack, and heat-map scores.

A record is made once: found again, it is used as it is if it is intact and answers the same
question about the same weights, and set aside and made anew otherwise. Beside every mean stand the
numbers of each image ("per_image", see `packed`), from which differences of models are judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from immunity_lib import scores
from immunity_lib.data import Dataset, ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.evaluation import (
    GateAccuracy,
    GateVerdicts,
    verdicts_over_gates,
    verdicts_under_attack,
)
from immunity_lib.heatmaps import empty_share, expert_heatmaps
from immunity_lib.models import (
    chosen_device,
    pretrained_folder,
    trained_model,
    training_record,
    weights_checksum,
)
from immunity_lib.moe import ImmunityMoE
from immunity_lib.per_image import packed
from immunity_lib.recipes import ModelName, members
from immunity_lib.records import (
    DamagedFile,
    provenance,
    read_record,
    set_aside,
    write_atomically,
    write_record,
)
from immunity_lib.settings import Settings

BATCH = 250


def attack_record(settings: Settings, name: ModelName, dataset: Dataset) -> dict:
    """Accuracy of a model, clean and under every attack of the preset.

    "clean" is a `GateAccuracy` on all test images of each test split, "attacks" a list of
    `GateAccuracy` with "attack" and "attacked_gate", on the first `attacked_images` of "test". Per
    image: under how many of the gates it is right ("gates"), and whether the plain ensemble is
    ("uniform").
    """

    def measure(model: ImmunityMoE) -> dict:
        device = chosen_device()
        clean = {
            split: scored(
                model, verdicts_over_gates(model, evaluation_batches(images, BATCH, device))
            )
            for split, images in test_splits(dataset)
        }
        attacks = []
        target = dataset.splits["test"].first(settings.attacked_images)
        # A single expert has one gate, whatever its name
        gates = settings.attack_gates if len(model.experts) > 1 else settings.attack_gates[:1]
        for gate in gates:
            for attack in settings.attacks:
                started = time.perf_counter()
                found = verdicts_under_attack(
                    model, target, attack, gate, eps=float(settings.eps),
                    step_size=float(settings.step_size), steps=settings.steps,
                    batch_size=BATCH, device=device,
                )  # fmt: skip
                seconds = round(time.perf_counter() - started, 1)
                accuracy = scored(model, found)
                print(
                    f"{name}: {accuracy['switched']:.1%} expected under {attack} on the {gate} "
                    f"gate ({accuracy['worst']:.1%} at the worst gate), {seconds:.0f} s",
                    flush=True,
                )
                entry = {"attack": attack, "attacked_gate": gate, "seconds": seconds}
                attacks.append(entry | accuracy)
        return {"clean": clean, "attacks": attacks}

    return recorded("attacks", settings, name, dataset, attack_question(settings), measure)


def attack_question(settings: Settings) -> dict[str, Any]:
    """The settings that an attack record depends on."""
    return {
        "attacks": settings.attacks,
        "attack_gates": settings.attack_gates,
        "eps": str(settings.eps),
        "step_size": str(settings.step_size),
        "steps": settings.steps,
        "images": settings.attacked_images,
        "test_images": settings.test_images,
    }


def adaptive_question(settings: Settings) -> dict[str, Any]:
    """The settings that an adaptive record depends on."""
    return {
        "eps": str(settings.eps),
        "step_size": str(settings.step_size),
        "steps": settings.steps,
        "gate_samples": settings.gate_samples,
        "judge_steps": settings.judge_steps,
        "images": settings.judged_count,
        "test_images": settings.test_images,
    }


def score_record(settings: Settings, name: ModelName, dataset: Dataset) -> dict:
    """Clean accuracy and heat-map scores of a model on the test images, in the one fixed reading.

    For each test split: "accuracy" (a `GateAccuracy`), "expert_accuracy" (N), "independence_score",
    "causality_score", "mutual_information" (nats), "empty_maps" (share); on Parts-10 also
    "part_coverage" (N, P), an expert's share of heat on each part where that part is visible, and
    "background_heat" (N), its share of heat off the object. Per image: the three scores, under how
    many gates it is right ("gates"), and of how many experts alone ("experts").
    """
    asked = {"test_images": settings.test_images}

    def measure(model: ImmunityMoE) -> dict:
        return {split: _scores(model, images) for split, images in test_splits(dataset)}

    return recorded("scores", settings, name, dataset, asked, measure)


def record_path(settings: Settings, name: ModelName, kind: str) -> Path:
    """Where the record of a kind, "attacks", "scores" or "adaptive", lies."""
    return settings.runs / "records" / f"{name}.{kind}.json"


def question_of(
    settings: Settings, name: ModelName, dataset: Dataset, asked: dict[str, Any]
) -> dict[str, Any]:
    """What a record answers: of which weights and test images, and what is asked of them."""
    trained = members(settings, name) if name.method == "ensemble" else [name]
    return {
        "weights": [weights_checksum(settings, training_record(settings, one)) for one in trained],
        "data": {split: images.checksum for split, images in test_splits(dataset)},
        "asked": asked,
    }


def recorded(
    kind: str,
    settings: Settings,
    name: ModelName,
    dataset: Dataset,
    asked: dict[str, Any],
    measure: Callable[[ImmunityMoE], dict],
) -> dict:
    """The record of a kind of measurement on a trained model: read, or else measured and written.

    asked: the settings that the answer depends on."""
    path = record_path(settings, name, kind)
    model = trained_model(settings, name, dataset)
    question = question_of(settings, name, dataset, asked)

    def answers(record: dict) -> bool:
        return all(record.get(key) == value for key, value in question.items())

    published = pretrained_folder(settings, name) / f"{kind}.json"
    if not path.exists() and published.exists() and answers(read_record(published)):
        write_atomically(path, published.read_bytes())  # of the weights that come with the project
    if path.exists():
        try:
            record = read_record(path)
        except DamagedFile as error:
            set_aside(path, f"{error}; it is made anew")
        else:
            if answers(record):
                return record
            set_aside(path, "it is about other weights, data or settings; it is made anew")
    started = time.perf_counter()
    result = measure(model)
    record = {
        "kind": kind,
        "model": str(name),
        **question,
        "reported_epoch": settings.reported_epoch,
        "result": result,
        "data_source": dataset.source,
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": provenance(),
    }
    write_record(path, record)
    return record


def scored(model: ImmunityMoE, verdicts: GateVerdicts) -> dict:
    """The fields of a `GateAccuracy`, and "per_image": under how many "gates" each image is right,
    and whether under the "uniform" and the "trained" one."""
    return asdict(GateAccuracy.of(verdicts, len(model.experts))) | {
        "per_image": {
            "gates": packed(verdicts.switched.sum(1)),
            "uniform": packed(verdicts.uniform.long()),
            "trained": packed(verdicts.trained.long()),
        }
    }


def test_splits(dataset: Dataset) -> list[tuple[str, ImageSet]]:
    """The test images of a data set, by the name of their split."""
    return [(split, images) for split, images in dataset.splits.items() if split.startswith("test")]


def _scores(model: ImmunityMoE, images: ImageSet) -> dict:
    device = chosen_device()
    batches = evaluation_batches(images, BATCH, device)
    maps, correct = [], []
    for batch, labels in tqdm(batches, "heat maps", -(-len(images) // BATCH), leave=False):
        maps.append(expert_heatmaps(model, batch, labels).cpu())
        with torch.no_grad():
            predicted = model.expert_outputs(batch).logits.argmax(-1)
        correct.append((predicted == labels[:, None]).double().cpu())
    all_maps = torch.cat(maps)
    accuracy = scored(model, verdicts_over_gates(model, evaluation_batches(images, BATCH, device)))
    experts = torch.cat(correct)
    by_image = {
        "independence_score": scores.independence_by_image(all_maps),
        "causality_score": scores.causality_by_image(all_maps),
        "mutual_information": scores.information_by_image(all_maps),
    }
    result = {
        "accuracy": accuracy,
        "expert_accuracy": experts.mean(0).tolist(),
        **{score: values.mean().item() for score, values in by_image.items()},
        "empty_maps": empty_share(all_maps).mean().item(),
        "per_image": {score: packed(values) for score, values in by_image.items()}
        | {"gates": accuracy.pop("per_image")["gates"], "experts": packed(experts.sum(1))},
    }
    if images.part_masks is not None and images.background is not None:
        result["part_coverage"] = part_coverage(all_maps, images.part_masks).tolist()
        background = images.background[:, None]
        result["background_heat"] = (all_maps * background).sum((-2, -1)).mean(0).tolist()
    return result


def part_coverage(maps: Tensor, part_masks: Tensor) -> Tensor:
    """Share of each expert's heat on each part, (N, P), mean over the images that show the part.

    maps: (B, N, a, b), each summing to 1; part_masks: (B, P, a, b) bool.
    """
    heat = torch.einsum("bnuv,bpuv->bnp", maps, part_masks.to(maps.dtype))
    visible = part_masks.any(-1).any(-1).to(maps.dtype)
    return (heat * visible[:, None]).sum(0) / visible.sum(0).clamp(min=1)
