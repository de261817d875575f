"""A model under every attack of the suite, on one set of images: what notebook 06 reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from immunity_lib.attacks import check_budget, sanity
from immunity_lib.attacks.exact import ExactPGD
from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.suite import BLACK_BOX, WHITE_BOX, Effort, adaptive_attacks
from immunity_lib.data import Dataset
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.evaluation import GateVerdicts, switched_probabilities, verdicts
from immunity_lib.models import chosen_device, trained_model, training_record, weights_checksum
from immunity_lib.moe import ImmunityMoE
from immunity_lib.per_image import worst_case
from immunity_lib.randomness import seeded
from immunity_lib.recipes import ModelName, surrogates
from immunity_lib.records import DamagedFile, read_record, write_record
from immunity_lib.results import (
    BATCH,
    adaptive_question,
    question_of,
    record_path,
    recorded,
    scored,
)
from immunity_lib.settings import Settings


def adaptive_record(settings: Settings, name: ModelName, dataset: Dataset) -> dict:
    """A model under the whole suite (see `judge`), on the first `judged_images` test images.

    What a run that was stopped had finished is kept in a file beside the record, and used again.
    """
    others = surrogates(settings, name)
    for one in others:  # which weights they have is part of the question
        trained_model(settings, one, dataset)
    asked = adaptive_question(settings) | {
        "surrogates": {
            str(one): weights_checksum(settings, training_record(settings, one)) for one in others
        }
    }
    unfinished = record_path(settings, name, "adaptive-unfinished")

    def measure(model: ImmunityMoE) -> dict:
        question = question_of(settings, name, dataset, asked)
        target = dataset.splits["test"].first(settings.judged_count)
        batches = list(evaluation_batches(target, len(target), chosen_device()))
        (images, labels), effort = batches[0], effort_of(settings)
        result = judge(
            model, images, labels, effort,
            {one.method: trained_model(settings, one, dataset) for one in others},
            tell=lambda line: print(f"{name}: {line}", flush=True),
            done=_finished(unfinished, question),
            keep=lambda attacks: write_record(unfinished, question | {"attacks": attacks}),
        )  # fmt: skip
        return {"threat_model": threat_model(effort)} | result

    record = recorded("adaptive", settings, name, dataset, asked, measure)
    unfinished.unlink(missing_ok=True)
    return record


def effort_of(settings: Settings) -> Effort:
    """How hard a preset attacks."""
    return Effort(
        float(settings.eps), float(settings.step_size), settings.steps,
        tuple(settings.gate_samples), settings.judge_steps,
    )  # fmt: skip


def threat_model(effort: Effort) -> dict[str, str]:
    """Who attacks, what they may do and what they know (Carlini et al. 2019, section 2.2)."""
    return {
        "goal": "any wrong class",
        "may do": f"change every pixel by at most {255 * effort.eps:g}/255, once for each image",
        "knows": "architecture, weights, gate and the law of its switching",
        "does not know": "which permutation the next query will draw",
        "also reported": "success if the attacker may try several times, or knows the permutation",
    }


def _finished(path: Path, question: dict[str, Any]) -> list[dict]:
    """Attacks that an earlier run of the same question had done."""
    try:
        known = read_record(path)
    except (DamagedFile, OSError):
        return []
    same = all(known.get(key) == value for key, value in question.items())
    return known["attacks"] if same else []


def judge(
    model: ImmunityMoE,
    images: Tensor,
    labels: Tensor,
    effort: Effort,
    through: Mapping[str, ImmunityMoE],
    *,
    tell: Callable[[str], None] = print,
    done: list[dict] | None = None,
    keep: Callable[[list[dict]], None] = lambda attacks: None,
) -> dict:
    """Every attack on a model in eval mode, scored over all gates image by image, and the checks.

    images: (B, 3, 32, 32) in [0, 1]; labels: (B,); through: other models whose images are tried.
    tell: gets a line after every attack. done: results of attacks that need not be made again;
    keep: gets all results after every attack.

    Returns "agreement" (see `agreement`), "attacks", a list with "attack", "family", "sees",
    "flags", "seconds", the fields of a `GateAccuracy`, and per image under how many gates it is
    right and whether the "uniform" and the "trained" gate are; "by_budget", pairs of eps and
    expected accuracy; "checks", a list of `Finding`.
    """
    suite = adaptive_attacks(model, effort, through)
    target = folded(model)
    sanity.check_gives_gradients(target, images[:1])
    results = {entry["attack"]: entry for entry in done or []}
    with seeded(0):
        for attack in suite:
            if attack.name not in results:
                torch.manual_seed(0)  # so that an attack does not depend on those before it
                results[attack.name] = _attacked(target, images, labels, attack, effort)
                keep(list(results.values()))
            entry = results[attack.name]
            tell(
                f"{entry['switched']:.1%} expected under {attack.name} ({entry['every']:.1%} under "
                f"every gate, plain ensemble {entry['uniform']:.1%}), {entry['seconds']:.0f} s"
            )
        some, theirs = images[:BATCH], labels[:BATCH]  # the checks need no more
        by_budget = sanity.accuracy_by_budget(target, some, theirs, effort.steps)
        checks = _checks(target, some, theirs, effort, results, by_budget)
    return {
        "agreement": agreement(model, images, labels),
        "attacks": list(results.values()),
        "by_budget": [list(pair) for pair in by_budget.items()],
        "checks": [asdict(finding) for finding in checks],
    }


@torch.no_grad()
def agreement(model: ImmunityMoE, images: Tensor, labels: Tensor) -> dict:
    """How far the answers depend on the gate, on images as they are.

    "unanimous": share of images to which all gates give one answer; "pairs": probability that two
    gates drawn at random agree; with the fields of a `GateAccuracy`.
    """
    votes, found = [], []
    for some, theirs in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        outputs = model.expert_outputs(some)
        answers = switched_probabilities(outputs).argmax(-1)
        votes.append(functional.one_hot(answers, outputs.logits.shape[-1]).double().mean(1))
        found.append(verdicts(outputs, theirs))
    shares = torch.cat(votes)
    return {
        "unanimous": (shares.amax(1) == 1).double().mean().item(),
        "pairs": shares.square().sum(1).mean().item(),
    } | scored(model, GateVerdicts.joined(found))


def _attacked(target, images, labels, attack, effort) -> dict:
    started = time.perf_counter()
    parts, flags = [], []
    for some, theirs in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        adversarial, said = attack.perturb(some, theirs)
        check_budget(some, adversarial, effort.eps)
        with torch.no_grad():
            outputs = target.expert_outputs(adversarial)
        alone = outputs.logits.argmax(-1) == theirs[:, None]
        parts.append((verdicts(outputs, theirs), alone))
        flags += said
    found = GateVerdicts.joined([verdict for verdict, _ in parts])
    right_alone = torch.cat([alone for _, alone in parts])
    return {
        "attack": attack.name,
        "family": attack.family,
        "sees": attack.sees,
        "flags": list(dict.fromkeys(flags)),
        "experts_alone": right_alone.double().mean(0).tolist(),
        "seconds": round(time.perf_counter() - started, 1),
    } | scored(target, found)


def _checks(target, images, labels, effort, results, by_budget) -> list[sanity.Finding]:
    alone = [
        results[f"pgd-expert-{number + 1}"]["experts_alone"][number]
        for number in range(len(target.experts))
    ]
    attack = ExactPGD(target, effort.eps, effort.step_size, effort.steps)
    once = sanity.expected_accuracy(target, attack(images, labels), labels)
    attack.steps *= 2
    twice = sanity.expected_accuracy(target, attack(images, labels), labels)
    flags = dict.fromkeys(flag for entry in results.values() for flag in entry["flags"])
    return [
        sanity.falls_to_zero(by_budget),
        sanity.iterative_beats_single_step(results["pgd"]["switched"], results["fgsm"]["switched"]),
        sanity.white_box_beats_black_box(
            worst_case(results.values(), WHITE_BOX)["failure"],
            worst_case(results.values(), BLACK_BOX)["failure"],
        ),
        sanity.doubling_steps_changes_little(once, twice),
        sanity.gradients_are_not_zero(sanity.share_of_zero_gradients(target, images, labels)),
        sanity.frozen_gate_breaks(results["pgd-trained"]["trained"], alone),
        sanity.fixed_gate_answers_alike(sanity.difference_of_two_passes(target, images)),
        sanity.auto_attack_flags_nothing(list(flags)),
    ]
