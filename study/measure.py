"""What is measured of a trained model: accuracy under attack, heat-map scores, adaptive attacks.

A measurement is one long frame, with a row for each split, attack and image:

    split, image, label   "test" or "test-shifted", the image's row in it, and its class
    attack, family, sees  what was done: "clean", or an attack, its kind and what it looked through
    gates                 bytes: right under each permutation of the gate, packed by numpy
    switched              share of the permutations that are right, 0 .. 1
    uniform, trained      whether the plain ensemble is right, and the gate as trained
    experts               share of the experts that are right alone, 0 .. 1
    (scores alone)        independence_score, causality_score, mutual_information, and empty_maps,
                          the share of the image's maps that are empty

It is made once: found again, it is kept if its record answers the same question about the same
weights, and set aside and made anew otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from immunity_lib import scores
from immunity_lib.attacks import Effort
from immunity_lib.data import Dataset, ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.evaluate import (
    BATCH,
    evaluate_adaptively,
    verdicts_over_gates,
    verdicts_under_attack,
)
from immunity_lib.files import DamagedFile
from immunity_lib.heatmaps import expert_heatmaps, is_empty
from immunity_lib.moe import GateVerdicts, ImmunityMoE
from study.catalogue import ModelName, members, surrogates
from study.settings import Settings
from study.store import (
    chosen_device,
    provenance,
    read_frame,
    read_json,
    record_path,
    set_record_aside,
    trained_model,
    training_record,
    write_frame,
    write_json,
)

if TYPE_CHECKING:
    import pandas as pd


ASKED = {  # the settings that each kind of frame depends on
    "attacks": ("attacks", "attack_gates", "eps", "step_size", "steps", "attacked_images"),
    "adaptive": (
        "eps",
        "step_size",
        "steps",
        "gate_samples",
        "auto_attack_steps",
        "adaptive_count",
    ),
    "scores": (),
}


def question_of(settings: Settings, kind: str) -> dict[str, Any]:
    """What a preset asks of a kind of frame, for a JSON file."""
    asked = {field: getattr(settings, field) for field in (*ASKED[kind], "test_images")}
    return asked | {field: str(asked[field]) for field in ("eps", "step_size") if field in asked}


def measure_attacks(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """A model on all test images as they are, and on the first `attacked_images` of them under
    every attack of the preset, on each of the gates that it attacks."""

    def measure(model: ImmunityMoE) -> tuple[pd.DataFrame, dict]:
        device, seconds = chosen_device(), {}
        frames = [
            _frame(
                verdicts_over_gates(model, evaluation_batches(images, BATCH, device)),
                images.labels, split=split,
            )
            for split, images in test_splits(dataset)
        ]  # fmt: skip
        target = dataset.splits["test"].first(settings.attacked_images)
        # A single expert has one gate, whatever its name
        gates = settings.attack_gates if len(model.experts) > 1 else settings.attack_gates[:1]
        for gate in gates:
            for attack in settings.attacks:
                started = time.perf_counter()
                found = verdicts_under_attack(
                    model, target, attack, gate, eps=float(settings.eps),
                    step_size=float(settings.step_size), steps=settings.steps, device=device,
                )  # fmt: skip
                took = seconds[f"{attack} on {gate}"] = round(time.perf_counter() - started, 1)
                print(
                    f"{name}: {found.accuracy.switched:.1%} expected under {attack} on the {gate} "
                    f"gate ({found.accuracy.worst:.1%} at the worst gate), {took:.0f} s",
                    flush=True,
                )
                frames.append(_frame(found, target.labels, attack, "paper", gate))
        return _concatenate(frames), {"seconds": seconds}

    _measure_once("attacks", settings, name, dataset, {}, measure)


def measure_scores(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """Clean accuracy and heat-map scores on all test images, in the one fixed reading.

    The summary has for each test split "expert_accuracy" (N); on Parts-10 also "part_coverage"
    (N, P), an expert's share of heat on each part where that part is visible, and
    "background_heat" (N), its share of heat off the object.
    """

    def measure(model: ImmunityMoE) -> tuple[pd.DataFrame, dict]:
        found = {split: _scores(model, images, split) for split, images in test_splits(dataset)}
        frames = [frame for frame, _ in found.values()]
        return _concatenate(frames), {split: summary for split, (_, summary) in found.items()}

    _measure_once("scores", settings, name, dataset, {}, measure)


def _scores(model: ImmunityMoE, images: ImageSet, split: str) -> tuple[pd.DataFrame, dict]:
    parts, found, correct = [], [], []
    batches = evaluation_batches(images, BATCH, chosen_device())
    for batch, labels in tqdm(batches, "heat maps", -(-len(images) // BATCH), leave=False):
        parts.append(expert_heatmaps(model, batch, labels).cpu())
        found.append(verdicts_over_gates(model, [(batch, labels)]))
        with torch.no_grad():
            answers = model.expert_outputs(batch).logits.argmax(-1)
        correct.append((answers == labels[:, None]).double().cpu())
    maps, experts = torch.cat(parts), torch.cat(correct)
    frame = _frame(GateVerdicts.join(found), images.labels, split=split, experts=experts.mean(1))
    frame = frame.assign(
        independence_score=scores.independence_by_image(maps).numpy(),
        causality_score=scores.causality_by_image(maps).numpy(),
        mutual_information=scores.information_by_image(maps).numpy(),
        empty_maps=is_empty(maps).float().mean(1).numpy(),
    )
    summary = {"expert_accuracy": experts.mean(0).tolist()}
    if images.part_masks is not None and images.background is not None:
        summary["part_coverage"] = part_coverage(maps, images.part_masks).tolist()
        background = images.background[:, None]
        summary["background_heat"] = (maps * background).sum((-2, -1)).mean(0).tolist()
    return frame, summary


def part_coverage(maps: Tensor, part_masks: Tensor) -> Tensor:
    """Share of each expert's heat on each part, (N, P), mean over the images that show the part.

    maps: (B, N, a, b), each summing to 1; part_masks: (B, P, a, b) bool.
    """
    heat = torch.einsum("bnuv,bpuv->bnp", maps, part_masks.to(maps.dtype))
    visible = part_masks.any(-1).any(-1).to(maps.dtype)
    return (heat * visible[:, None]).sum(0) / visible.sum(0).clamp(min=1)


def measure_adaptive(settings: Settings, name: ModelName, dataset: Dataset) -> None:
    """A model under every adaptive attack, on the first `adaptive_images` test images.

    The summary is that of `evaluate_adaptively`, with "threat_model", and "attacks", what is told
    of each. What a run that was stopped had finished is kept beside the record, and used again.
    """
    others = surrogates(settings, name)
    for one in others:  # which weights they have is part of the question
        trained_model(settings, one, dataset)
    through = {str(one): training_record(settings, one)["weights"] for one in others}
    asked = {"surrogates": through}
    unfinished = record_path(settings, name, "adaptive").with_suffix(".unfinished")

    def measure(model: ImmunityMoE) -> tuple[pd.DataFrame, dict]:
        question = _question("adaptive", settings, name, dataset, asked)
        target = dataset.splits["test"].first(settings.adaptive_count)
        ((images, labels),) = evaluation_batches(target, len(target), chosen_device())
        effort = Effort(
            float(settings.eps), float(settings.step_size), settings.steps,
            tuple(settings.gate_samples), settings.auto_attack_steps,
        )  # fmt: skip
        done = _read_unfinished(unfinished, question)

        def keep(attack: str, found: GateVerdicts, told: dict) -> None:
            done[attack] = found, told
            attacks = {one: _pack(*result) for one, result in done.items()}
            write_json(unfinished, {"question": question, "attacks": attacks})

        results, summary = evaluate_adaptively(
            model, images, labels, effort,
            {one.method: trained_model(settings, one, dataset) for one in others},
            tell=lambda line: print(f"{name}: {line}", flush=True), done=dict(done), keep=keep,
        )  # fmt: skip
        batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
        clean = verdicts_over_gates(model, batches)
        frames = [_frame(clean, target.labels)]
        for attack, (found, told) in results.items():
            frames.append(_frame(found, target.labels, attack, told["family"], told["sees"]))
        told = [{"attack": attack} | one for attack, (_, one) in results.items()]
        threat = {"threat_model": threat_model(settings)}
        return _concatenate(frames), threat | {"attacks": told} | summary

    _measure_once("adaptive", settings, name, dataset, asked, measure)
    unfinished.unlink(missing_ok=True)


def threat_model(settings: Settings) -> dict[str, str]:
    """Who attacks, what they may do and what they know (Carlini et al. 2019, section 2.2)."""
    return {
        "goal": "any wrong class",
        "may do": f"change every pixel by at most {255 * float(settings.eps):g}/255, once for each "
        "image",
        "knows": "architecture, weights, gate and the law of its switching",
        "does not know": "which permutation the next query will draw",
        "also reported": "success if the attacker may try several times, or knows the permutation",
    }


def _pack(found: GateVerdicts, told: dict) -> dict[str, Any]:
    right = torch.cat([found.trained[:, None], found.uniform[:, None], found.switched], dim=1)
    bits = np.packbits(right.cpu().numpy()).tobytes().hex()
    return {"told": told, "shape": list(right.shape), "right": bits}


def _unpack(packed: dict[str, Any]) -> tuple[GateVerdicts, dict]:
    rows, columns = packed["shape"]
    bits = np.frombuffer(bytes.fromhex(packed["right"]), np.uint8)
    right = np.unpackbits(bits, count=rows * columns).reshape(rows, columns).astype(bool)
    right = torch.from_numpy(right).to(chosen_device())
    return GateVerdicts(right[:, 0], right[:, 1], right[:, 2:]), packed["told"]


def _read_unfinished(path: Path, question: dict[str, Any]) -> dict[str, tuple[GateVerdicts, dict]]:
    """Attacks that an earlier run of the same question had done."""
    try:
        known = read_json(path)
        same = known["question"] == question
        return {one: _unpack(packed) for one, packed in known["attacks"].items()} if same else {}
    except (DamagedFile, OSError, KeyError):
        return {}


def test_splits(dataset: Dataset) -> list[tuple[str, ImageSet]]:
    """The test images of a data set, by the name of their split."""
    return [(split, images) for split, images in dataset.splits.items() if split.startswith("test")]


def _frame(
    found: GateVerdicts, labels: Tensor, attack: str = "clean", family: str = "clean",
    sees: str = "", split: str = "test", experts: Tensor | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The rows of one attack on the images of one split."""
    import pandas as pd

    gates = np.packbits(found.switched.cpu().numpy(), axis=1)
    return pd.DataFrame({
        "split": split,
        "image": np.arange(len(labels)),
        "label": labels.numpy(),
        "attack": attack,
        "family": family,
        "sees": sees,
        "gates": [row.tobytes() for row in gates],
        "switched": found.switched.double().mean(1).cpu().numpy(),
        "uniform": found.uniform.cpu().numpy(),
        "trained": found.trained.cpu().numpy(),
        "experts": np.nan if experts is None else experts.numpy(),
    })  # fmt: skip


def _concatenate(frames: list[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(frames, ignore_index=True)


def _question(
    kind: str, settings: Settings, name: ModelName, dataset: Dataset, further: dict[str, Any]
) -> dict[str, Any]:
    """What a record answers: of which weights and test images, and what is asked of them."""
    trained = members(settings, name) if name.method == "ensemble" else [name]
    return {
        "weights": [training_record(settings, one)["weights"] for one in trained],
        "data": {split: images.checksum for split, images in test_splits(dataset)},
        "asked": question_of(settings, kind) | further,
    }


def _measure_once(
    kind: str,
    settings: Settings,
    name: ModelName,
    dataset: Dataset,
    further: dict[str, Any],
    measure: Callable[[ImmunityMoE], tuple[pd.DataFrame, dict]],
) -> None:
    """Leave a kind of measurement of a trained model on disk, unless it is there. further: what the
    answer depends on beside the settings."""
    path = record_path(settings, name, kind)
    model = trained_model(settings, name, dataset)
    question = _question(kind, settings, name, dataset, further)
    if path.exists():
        try:
            known = read_json(path)
            read_frame(settings, [name], kind)
            if all(known.get(key) == value for key, value in question.items()):
                return
            reason = "it is about other weights, data or settings"
        except (DamagedFile, FileNotFoundError) as error:
            reason = str(error)
        set_record_aside(path, reason)
    started = time.perf_counter()
    frame, summary = measure(model)
    write_frame(path.with_suffix(".parquet"), frame)
    content = {
        "kind": kind,
        "model": str(name),
        **question,
        "summary": summary,
        "data_source": dataset.source,
        "seconds": round(time.perf_counter() - started, 1),
        "provenance": provenance(),
    }
    write_json(path, content)
