"""How a mixture does, clean and under attack, exactly over every state of its gate.

A gate of N weights has N! states, and every expert's output is shared by all of them: one pass of the experts gives
the mixture under each. For N = 5 that is 120, so nothing is sampled; of more than six experts' gates, as many are
drawn as six have. Images are (B, 3, 32, 32) in [0, 1], labels (B,)."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from immunity_lib.attacks import (
    BLACK_BOX,
    WHITE_BOX,
    AdaptiveAttack,
    Effort,
    adaptive_attacks,
    attack_images,
    check_budget,
    exact_pgd,
    fold,
)
from immunity_lib.data import ImageSet
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.moe import (
    Gate,
    GateVerdicts,
    ImmunityMoE,
    check_batch,
    in_eval_mode,
    switched_probabilities,
    verdicts,
)

BATCH = 250
BUDGETS = tuple(k / 255 for k in (0, 2, 4, 8, 16, 32, 64, 128, 255))  # eps of the first check
Result = tuple[GateVerdicts, dict]  # of an attack: verdicts, and what is told of it


def verdicts_over_gates(model: ImmunityMoE, batches: Iterable[tuple[Tensor, Tensor]]) -> GateVerdicts:
    """Verdicts of a model, in eval mode meanwhile, over batches of (images, labels), one pass each. Raises ValueError
    for images outside of [0, 1], labels that are no class, and where there are none."""
    found = []
    with in_eval_mode(model), torch.no_grad():
        for images, labels in batches:
            check_batch(model, images, labels)
            found.append(verdicts(model.expert_outputs(images), labels))
    if not found:
        raise ValueError("no images to judge; give at least one batch")
    return GateVerdicts.join(found)


def verdicts_under_attack(
    model: ImmunityMoE, image_set: ImageSet, attack: str, gate: Gate, *,
    eps: float, step_size: float, steps: int, seed: int = 0, device: torch.device | None = None,
) -> GateVerdicts:  # fmt: skip
    """Verdicts on adversarial images made against the given gate.

    The attack, one of `attacks.ATTACKS`, is on the model's folded copy. Its random starts and gates are drawn from
    `seed`, without touching the caller's random state.
    """
    target, budget = fold(model), {"eps": eps, "step_size": step_size, "steps": steps}

    def judge(rows: slice) -> GateVerdicts:
        ((images, labels),) = evaluation_batches(image_set.select(rows), BATCH, device)
        adversarial = attack_images(target, images, labels, attack, gate, **budget, early_exit=True)
        return verdicts_over_gates(model, [(adversarial, labels)])

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GateVerdicts.join(in_parts(judge, len(image_set), title=f"{attack} on the {gate} gate"))


def in_parts(measure: Callable[[slice], Any], count: int, size: int = BATCH, title: str = "") -> list:
    """What is measured of `count` images, `size` at a time; where a GPU's memory is too small, of half as many."""
    results, start = [], 0
    with tqdm(desc=title, total=count, leave=False, disable=not title) as shown:
        while start < count:
            rows = slice(start, min(start + size, count))
            try:
                results.append(measure(rows))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
                print(f"out of memory; goes on with {size} images at a time", flush=True)
            else:
                start = rows.stop
                shown.update(rows.stop - rows.start)
    return results


def evaluate_adaptively(
    model: ImmunityMoE, images: Tensor, labels: Tensor, effort: Effort,
    surrogates: Mapping[str, ImmunityMoE], *, tell: Callable[[str], None] = print,
    done: Mapping[str, Result] = {},
    keep: Callable[[str, GateVerdicts, dict], None] = lambda name, found, told: None,
) -> tuple[dict[str, Result], dict]:  # fmt: skip
    """Every adaptive attack on a model, as it is in eval mode, over all gates image by image, and the checks.

    surrogates: other models whose images are tried. tell: gets a line after every attack. done: results of attacks
    that need not be made again. keep: gets each attack's name and result.

    Returns by the name of each attack its verdicts and what is told of it ("family", "sees", "flags", "seconds"); and
    a summary: "agreement" (see there), "by_budget", pairs of eps and expected accuracy under exact PGD, and "checks",
    a list of `Finding` as dictionaries. Raises ValueError for a model without gradients, and as `adaptive_attacks`."""
    attacks = adaptive_attacks(model, effort, surrogates)
    target, results = fold(model), dict(done)
    if not target(images[:1].clone().requires_grad_(), "uniform").requires_grad:
        raise ValueError(
            "the model gives no gradient in its images, which most of these attacks follow; "
            "attacks that work: auto_attack(only=('square',)) and random_noise"
        )
    with torch.random.fork_rng():
        for attack in attacks:
            if attack.name not in results:
                torch.manual_seed(0)  # so that an attack does not depend on those before it
                few = slice(effort.auto_attack_images if attack.family in ("judges", "black box") else None)
                results[attack.name] = _attack(target, images[few], labels[few], attack, effort.eps)
                keep(attack.name, *results[attack.name])
            found, told = results[attack.name]
            tell(
                f"{found.accuracy.switched:.1%} expected under {attack.name} ({found.accuracy.every:.1%} under every "
                f"gate, plain ensemble {found.accuracy.uniform:.1%}), {told['seconds']:.0f} s"
            )
        torch.manual_seed(0)  # nor do the checks depend on them, which need no more images
        measured = _what_checks_need(target, images[:BATCH], labels[:BATCH], effort, results)
    return results, {
        "agreement": agreement(model, images),
        "by_budget": [list(pair) for pair in measured["by_budget"].items()],
        "checks": [finding._asdict() for finding in sanity_checks(**measured)],
    }


def _attack(target: ImmunityMoE, images: Tensor, labels: Tensor, attack: AdaptiveAttack, eps: float) -> Result:
    started, flags = time.perf_counter(), []

    def judge(rows: slice) -> GateVerdicts:
        adversarial, said = attack.perturb(images[rows], labels[rows])
        check_budget(images[rows], adversarial, eps)
        flags.extend(said)
        return verdicts_over_gates(target, [(adversarial, labels[rows])])

    return GateVerdicts.join(in_parts(judge, len(images))), {
        "family": attack.family,
        "sees": attack.sees,
        "flags": list(dict.fromkeys(flags)),
        "seconds": round(time.perf_counter() - started, 1),
    }


@torch.no_grad()
def agreement(model: ImmunityMoE, images: Tensor) -> dict[str, float]:
    """How far a model's answers depend on the gate: "unanimous", the share of images to which all gates give one
    answer, and "pairs", the probability that two gates drawn at random agree."""
    votes = []
    with in_eval_mode(model):
        for some in images.split(BATCH):
            answers = switched_probabilities(outputs := model.expert_outputs(some)).argmax(-1)
            votes.append(functional.one_hot(answers, outputs.logits.shape[-1]).double().mean(1))
    shares = torch.cat(votes)
    return {
        "unanimous": (shares.amax(1) == 1).double().mean().item(),
        "pairs": shares.square().sum(1).mean().item(),
    }


def _what_checks_need(
    target: ImmunityMoE, images: Tensor, labels: Tensor, effort: Effort, results: dict[str, Result]
) -> dict[str, Any]:
    """The arguments of `sanity_checks`."""

    def under_exact(eps: float, step_size: float, steps: int) -> float:
        """Accuracy expected over the gate under PGD on the exact expectation."""
        budget = {"eps": eps, "step_size": step_size, "steps": steps, "early_exit": True}

        def judge(rows: slice) -> GateVerdicts:
            return verdicts_over_gates(
                target, [(exact_pgd(target, images[rows], labels[rows], **budget), labels[rows])]
            )

        return 1 - GateVerdicts.join(in_parts(judge, len(images))).failure.mean().item()

    def worst(families: Sequence[str]) -> Tensor:
        """On the images that every one of the attacks has met."""
        failures = [found.failure for found, told in results.values() if told["family"] in families]
        return torch.stack([one[: effort.auto_attack_images] for one in failures]).amax(0)

    def gradient(rows: slice) -> Tensor:
        points = images[rows].clone().requires_grad_()
        # Under other gates the gate's own gradient could hide that experts have none
        loss = functional.nll_loss(target(points, "uniform"), labels[rows], reduction="sum")
        return torch.autograd.grad(loss, points)[0]

    gradients = torch.cat(in_parts(gradient, len(images)))
    with torch.no_grad():
        twice_the_same = target(images, "trained") - target(images, "trained")
    return {
        # The step grows with eps, so that every point of the ball can be reached
        "by_budget": {eps: under_exact(eps, 2.5 * eps / effort.steps, effort.steps) for eps in BUDGETS},
        "pgd": results["pgd"][0].accuracy.switched,
        "fgsm": results["fgsm"][0].accuracy.switched,
        "white": worst(WHITE_BOX),
        "black": worst(BLACK_BOX),
        "once": under_exact(effort.eps, effort.step_size, effort.steps),
        "twice": under_exact(effort.eps, effort.step_size, 2 * effort.steps),
        # An attack stands still on NaN as on zero, and NaN is not above 0
        "zero_gradients": (~(gradients.flatten(1).abs() > 0).any(1)).double().mean().item(),
        "frozen": results["pgd-trained"][0].accuracy.trained,
        "alone": [
            results[f"pgd-expert-{k + 1}"][0].experts[:, k].double().mean().item() for k in range(len(target.experts))
        ],
        "difference": twice_the_same.abs().max().item(),
        "flags": list(dict.fromkeys(flag for _, told in results.values() for flag in told["flags"])),
    }


class Finding(NamedTuple):
    """One check's outcome, which speaks for itself: what was found, why it matters, who says so."""

    check: str
    passed: bool
    evidence: str
    why: str
    source: str


TOLERANCE = 0.005  # half a point of accuracy
CARLINI = "Carlini et al. 2019, arXiv 1902.06705"


def sanity_checks(
    *, by_budget: Mapping[float, float], pgd: float, fgsm: float, white: Tensor, black: Tensor,
    once: float, twice: float, zero_gradients: float, frozen: float, alone: Sequence[float],
    difference: float, flags: Sequence[str],
) -> list[Finding]:  # fmt: skip
    """Checks that must pass before numbers under attack mean anything. One that fails says that the attack was too
    weak, or that the model hides its gradients; not that the model is robust.

    All are accuracies, 0 .. 1, but for white and black, each image's failure probability (B,) under the strongest
    attack with and without gradients; zero_gradients, the share of images whose gradient is exactly zero or NaN; and
    difference, the largest of a log-probability between two passes. by_budget: by eps, up to 1. once, twice: under an
    attack and one of twice its steps. frozen, alone: of the mixture with its gate frozen and of each expert, attacked
    through its own gradients. flags: AutoAttack's warnings.
    """
    curve = [by_budget[eps] for eps in sorted(by_budget)]
    rise = max((later - sooner for sooner, later in pairwise(curve)), default=0)
    missed = int((black > white + 1e-9).sum())
    return [
        Finding("accuracy falls to zero as eps grows to 1", max(rise, curve[-1]) <= TOLERANCE,
            ", ".join(f"{255 * eps:.0f}/255: {by_budget[eps]:.1%}" for eps in sorted(by_budget)),
            "A ball of radius 1 holds every image: what survives there was not found.",
            f"{CARLINI}, section 5.2"),
        Finding("iterative attack beats a single step", pgd <= fgsm + TOLERANCE,
            f"{pgd:.1%} under PGD, {fgsm:.1%} under FGSM",
            "One long step can only do better where the gradient points the wrong way.",
            "Athalye et al. 2018, arXiv 1802.00420, section 3.1"),
        Finding("attacks with gradients beat those without", bool(black.mean() <= white.mean() + TOLERANCE),
            f"{1 - white.mean():.1%} left with gradients, {1 - black.mean():.1%} without; "
            f"{missed} of {len(white)} images fail more often without",
            "If noise, queries or other models' images find more, the gradients are masked.",
            f"{CARLINI}, section 5.4"),
        Finding("twice the steps change less than half a point", abs(once - twice) < TOLERANCE,
            f"{once:.1%}, with twice the steps {twice:.1%}",
            "An attack that gains from more steps has not converged: its number is too high.",
            f"{CARLINI}, section 4.8"),
        Finding("no gradient is zero", zero_gradients == 0,
            f"{zero_gradients:.1%} of images have a zero gradient",
            "Where the gradient is zero, an attack that follows it stands still.",
            f"{CARLINI}, section 4.4, and AutoAttack's flags"),
        Finding("with a frozen gate it breaks like a plain network", frozen <= max(alone) + 0.05,
            f"frozen gate {frozen:.1%}; experts alone {min(alone):.1%} to {max(alone):.1%}",
            "An attack that does not break a network without randomness (within five points of the "
            "strongest expert) fails for another reason than randomness.",
            f"{CARLINI}, section 4.6"),
        Finding("with a fixed gate it gives the same answer twice", difference < 1e-4,
            f"largest difference of a log-probability {difference:.1e}",
            "Any randomness but the gate's would have to be averaged over, too.",
            f"{CARLINI}, section 4.6"),
        Finding("AutoAttack raises no flag", not flags, "; ".join(flags) or "no flags",
            "AutoAttack tells where its own verdict is not to be trusted.",
            "Croce & Hein 2020, arXiv 2003.01690, and its flags_doc.md"),
    ]  # fmt: skip
