"""What is measured of a trained model: accuracy under attack, heat-map scores, adaptive attacks.

A measurement is one long frame, with a row for each split, attack and image:

    split, image, label   "test" or "test-shifted", the image's row in it, and its class
    attack, family, sees  what was done: "clean", or an attack, its kind and what it looked through
    gates                 bytes: right under each permutation of the gate, packed by numpy
    switched              share of the permutations that are right, 0 .. 1
    uniform, trained      whether the plain ensemble is right, and the gate as trained
    experts               bytes: right by each expert alone, packed likewise
    (scores alone)        independence_score, the same of maps divided by their maxima (independence_of_peaks),
                          causality_score, mutual_information, and empty_maps, the share of the image's maps that
                          are empty; on Parts-10 background and background_heat, its share of pixels and of heat

It is made once: found again, it is kept if its record answers the same question about the same weights, and set aside
and made anew otherwise."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from immunity_lib import evaluate, scores
from immunity_lib.attacks import Effort, adaptive_attacks
from immunity_lib.data import Dataset, ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.files import DamagedFile, read_tensors, write_atomically, write_tensors
from immunity_lib.heatmaps import expert_heatmaps, is_empty
from immunity_lib.moe import GateVerdicts, ImmunityMoE
from study import catalogue, store
from study.catalogue import ModelName
from study.settings import Settings


def measure_attacks(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """A model on all test images, and on `attacked_images` under every attack of the preset on its gates."""

    def measure(model: ImmunityMoE) -> tuple[pd.DataFrame, dict]:
        device, seconds, frames = store.chosen_device(), {}, []
        for split, images in test_splits(dataset):
            found = evaluate.verdicts_over_gates(model, evaluation_batches(images, evaluate.BATCH, device))
            frames.append(_frame(found, torch.arange(len(images)), images.labels, split=split))
        rows = dataset.splits["test"].balanced(settings.attacked_images)
        target = dataset.splits["test"].select(rows)
        # A single expert has one gate, whatever its name
        gates = settings.attack_gates if len(model.experts) > 1 else settings.attack_gates[:1]
        eps, step_size = float(settings.recipe.eps), float(settings.recipe.step_size)
        wanted = [("paper", attack, attack, gate, eps, step_size) for gate in gates for attack in settings.attacks]
        for one in settings.magnitudes:  # the step grows with the budget, so that every point of it can be reached
            wanted.append(("magnitude", f"pgd at {one}", "pgd", gates[0], float(one), step_size * float(one) / eps))
        for family, title, attack, gate, size, step in wanted:
            started = time.perf_counter()
            budget = {"eps": size, "step_size": step, "steps": settings.steps}
            found = evaluate.verdicts_under_attack(model, target, attack, gate, **budget, device=device)
            took = seconds[f"{title} on {gate}"] = round(time.perf_counter() - started, 1)
            told = f"{name}: {found.accuracy.switched:.1%} expected under {title} on the {gate} gate"
            print(f"{told} ({found.accuracy.worst:.1%} at the worst gate), {took:.0f} s", flush=True)
            frames.append(_frame(found, rows, target.labels, title, family, gate))
        return pd.concat(frames, ignore_index=True), {"seconds": seconds}

    _measure_once("attacks", settings, name, dataset, {}, measure)


def measure_scores(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """Clean accuracy and heat-map scores on all test images, in the one fixed reading.
    The summary has for each test split "expert_accuracy" (N); on Parts-10 also "part_coverage" (N, P), an expert's
    share of heat on each part where that part is visible, and "background_heat" (N), its share off the object."""

    def measure(model: ImmunityMoE) -> tuple[pd.DataFrame, dict]:
        found = {split: _scores(model, images, split) for split, images in test_splits(dataset)}
        frame = pd.concat([frame for frame, _ in found.values()], ignore_index=True)
        return frame, {split: summary for split, (_, summary) in found.items()}

    _measure_once("scores", settings, name, dataset, {}, measure)


def _scores(model: ImmunityMoE, images: ImageSet, split: str) -> tuple[pd.DataFrame, dict]:
    def look(rows: slice) -> tuple[Tensor, GateVerdicts]:
        ((batch, labels),) = evaluation_batches(images.select(rows), evaluate.BATCH, store.chosen_device())
        return expert_heatmaps(model, batch, labels).cpu(), evaluate.verdicts_over_gates(model, [(batch, labels)])

    parts, verdicts = zip(*evaluate.in_parts(look, len(images), title="heat maps"), strict=True)
    maps, found = torch.cat(parts), GateVerdicts.join(verdicts)
    frame = _frame(found, torch.arange(len(images)), images.labels, split=split).assign(
        independence_score=scores.independence_by_image(maps).numpy(),
        independence_of_peaks=scores.independence_by_image(maps / maps.amax((-2, -1), keepdim=True)).numpy(),
        causality_score=scores.causality_by_image(maps).numpy(),
        mutual_information=scores.information_by_image(maps).numpy(),
        empty_maps=is_empty(maps).float().mean(1).numpy(),
    )
    summary = {"expert_accuracy": found.experts.double().mean(0).tolist()}
    if images.part_masks is not None and images.background is not None:
        summary["part_coverage"] = part_coverage(maps, images.part_masks).tolist()
        heat = (maps * images.background[:, None]).sum((-2, -1))
        summary["background_heat"] = heat.mean(0).tolist()
        background = images.background.double().mean((-2, -1)).numpy()
        frame = frame.assign(background_heat=heat.mean(1).numpy(), background=background)
    return frame, summary


def part_coverage(maps: Tensor, part_masks: Tensor) -> Tensor:
    """Share of each expert's heat on each part, (N, P), mean over the images that show the part.
    maps: (B, N, a, b), each summing to 1; part_masks: (B, P, a, b) bool."""
    heat = torch.einsum("bnuv,bpuv->bnp", maps, part_masks.to(maps.dtype))
    visible = part_masks.any(-1).any(-1).to(maps.dtype)
    return (heat * visible[:, None]).sum(0) / visible.sum(0).clamp(min=1)


def measure_adaptive(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """A model under every adaptive attack, on `adaptive_count` test images, balanced.
    The summary is that of `evaluate_adaptively`, with "attacks", what is told of each. What a run that was stopped had
    finished is kept beside the record, and used again."""
    if _comes_with_the_project("adaptive", settings, name, dataset):
        return
    others = catalogue.surrogates(settings, name)
    surrogates = {one.method: store.trained_model(settings, one, dataset) for one in others}
    eps, step_size = float(settings.recipe.eps), float(settings.recipe.step_size)
    judges = settings.auto_attack_steps, settings.auto_attack_images
    effort = Effort(eps, step_size, settings.steps, tuple(settings.gate_samples), *judges)
    attacks = adaptive_attacks(store.trained_model(settings, name, dataset), effort, surrogates)
    # Which attacks there are, and which weights the other models have, is part of the question
    further = {"attacks": [attack.name for attack in attacks]}
    further["surrogates"] = {str(one): store.read_record(settings, one, "training")["weights"] for one in others}
    unfinished = store.record_path(settings, name, "adaptive").with_suffix(".unfinished")

    def measure(model: ImmunityMoE) -> tuple[pd.DataFrame, dict]:
        # The record tells of one version of the code, which made all of it
        question = _question("adaptive", settings, name, dataset, further) | {"library": store.provenance()["library"]}
        done = _read_unfinished(unfinished, question)

        def keep(attack: str, found: GateVerdicts, told: dict) -> None:
            done[attack] = found, told
            right = {f"{one} {gate}": right for one, (found, _) in done.items() for gate, right in vars(found).items()}
            told = [[one, told] for one, (_, told) in done.items()]
            write_tensors(unfinished, right, {"question": question, "told": told})

        rows = dataset.splits["test"].balanced(settings.adaptive_count)
        target = dataset.splits["test"].select(rows)
        ((images, labels),) = evaluation_batches(target, len(target), store.chosen_device())
        results, summary = evaluate.evaluate_adaptively(
            model, images, labels, effort, surrogates, done=dict(done), keep=keep,
            tell=lambda line: print(f"{name}: {line}", flush=True),
        )  # fmt: skip
        few = zip(images.split(evaluate.BATCH), labels.split(evaluate.BATCH), strict=True)
        frames = [_frame(evaluate.verdicts_over_gates(model, few), rows, target.labels)]
        for attack, (found, told) in results.items():
            frames.append(_frame(found, rows, target.labels, attack, told["family"], told["sees"]))
        told = [{"attack": attack} | one for attack, (_, one) in results.items()]
        return pd.concat(frames, ignore_index=True), {"attacks": told} | summary

    _measure_once("adaptive", settings, name, dataset, further, measure)
    unfinished.unlink(missing_ok=True)


def _read_unfinished(path: Path, question: dict) -> dict[str, tuple[GateVerdicts, dict]]:
    """Attacks that an earlier run of the same question and code had done."""
    done, device = {}, store.chosen_device()
    with suppress(DamagedFile, KeyError):  # or kept by an older version of the code
        tensors, notes = read_tensors(path)
        for attack, told in notes["told"] if notes["question"] == question else ():
            right = {gate.name: tensors[f"{attack} {gate.name}"].to(device) for gate in fields(GateVerdicts)}
            done[attack] = GateVerdicts(**right), told
    return done


def test_splits(dataset: Dataset) -> list[tuple[str, ImageSet]]:
    """The test images of a data set, by the name of their split."""
    return [(split, images) for split, images in dataset.splits.items() if split.startswith("test")]


def _frame(found: GateVerdicts, rows: Tensor, labels: Tensor, attack="clean", family="clean", sees="", split="test"):
    """The rows of one attack on images of one split, given by their numbers; all or the first of them were judged."""
    judged = slice(len(found.trained))

    def packed(right: Tensor) -> list[bytes]:
        return [row.tobytes() for row in np.packbits(right.cpu().numpy(), axis=1)]

    return pd.DataFrame({
        "split": split, "image": rows[judged].numpy(), "label": labels[judged].numpy(),
        "attack": attack, "family": family, "sees": sees,
        "gates": packed(found.switched), "experts": packed(found.experts),
        "switched": found.switched.double().mean(1).cpu().numpy(),
        "uniform": found.uniform.cpu().numpy(), "trained": found.trained.cpu().numpy(),
    })  # fmt: skip


def _question(kind: str, settings: Settings, name: ModelName, dataset: Dataset, further: dict) -> dict[str, Any]:
    """What a record answers: of which trainings and test images, and what is asked of them."""
    return {
        "weights": store.weights_of(settings, name, store.record_path(settings, name, kind)),
        "data": {split: images.checksum for split, images in test_splits(dataset)},
        "asked": store.question_of(settings, kind) | further,
    }


def _is_measured(kind: str, settings: Settings, name: ModelName, dataset: Dataset, further: dict) -> bool:
    """Whether there is a whole record of these settings and weights, of these images and with what is asked further."""
    try:
        store.read_frame(settings, [name], kind)
        known = store.read_record(settings, name, kind)
    except (FileNotFoundError, DamagedFile):
        return False
    question = _question(kind, settings, name, dataset, further)
    return known.get("data") == question["data"] and further.items() <= known["asked"].items()


def _comes_with_the_project(kind: str, settings: Settings, name: ModelName, dataset: Dataset) -> bool:
    """Whether such a record came along; it needs no weights, of this model or others."""
    shipped = store.find_record(settings, name, kind) != store.record_path(settings, name, kind)
    return shipped and _is_measured(kind, settings, name, dataset, {})


def _measure_once(
    kind: str, settings: Settings, name: ModelName, dataset: Dataset, further: dict,
    measure: Callable[[ImmunityMoE], tuple[pd.DataFrame, dict]],
) -> None:  # fmt: skip
    """Leave a measurement of a trained model on disk, unless it is there. further: of the question, beside settings."""
    if _comes_with_the_project(kind, settings, name, dataset):
        return
    model, path = store.trained_model(settings, name, dataset), store.record_path(settings, name, kind)
    if _is_measured(kind, settings, name, dataset, further):
        return
    if path.exists():
        store.set_record_aside(path, "it is about other weights, data or settings")
    started = time.perf_counter()
    frame, summary = measure(model)
    write_atomically(path.with_suffix(".parquet"), frame.to_parquet(index=False))
    content = {"kind": kind, "model": str(name), "frame": store.checksum(path.with_suffix(".parquet"))}
    content |= _question(kind, settings, name, dataset, further)
    content |= {"summary": summary, "data_source": dataset.source}
    took = round(time.perf_counter() - started, 1)
    store.write_json(path, content | {"seconds": took, "provenance": store.provenance()})
