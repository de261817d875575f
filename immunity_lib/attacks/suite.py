"""Every attack of the adaptive evaluation, by name and in the order of a report: from the paper's
setting over sampled gates to their exact expectation, and the standard judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from immunity_lib.attacks.arc import ArcAttack
from immunity_lib.attacks.auto_attack import auto_attack
from immunity_lib.attacks.black_box import DRAWS_PER_STEP, random_noise, square
from immunity_lib.attacks.exact import ExactPGD
from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.paper import attack_images
from immunity_lib.moe import ConstantGate, ImmunityMoE

FAMILIES = {
    "paper": "the paper's setting",
    "frozen": "one frozen gate",
    "sampled": "expectation by sampling",
    "exact": "exact over all gates",
    "judges": "standard judges",
    "black box": "without gradients",
    "transfer": "from other models",
}
# AutoAttack is in neither: it ends with Square, which needs no gradient
WHITE_BOX, BLACK_BOX = ("paper", "frozen", "sampled", "exact"), ("black box", "transfer")


@dataclass(frozen=True)
class Effort:
    """How hard to attack. eps, step_size: in units of the image's range [0, 1]."""

    eps: float
    step_size: float
    steps: int  # of PGD and its kin
    samples: tuple[int, ...]  # of the gate for each gradient of EOTPGD, an attack for each
    judge_steps: int  # of AutoAttack; Square has 50 queries and noise 100 draws for each


@dataclass(frozen=True)
class SuiteAttack:
    """One attack: `perturb` takes images and labels, and gives adversarial images and what the
    attack has to say about the model, if anything."""

    name: str
    family: str
    sees: str  # the gate, or the other model, through which it looks
    perturb: Callable[[Tensor, Tensor], tuple[Tensor, list[str]]]


def adaptive_attacks(
    model: ImmunityMoE, effort: Effort, surrogates: Mapping[str, ImmunityMoE]
) -> list[SuiteAttack]:
    """All attacks on the model's folded copy. surrogates: other trained models by name, through
    whose plain ensembles it is attacked too.

    Raises ValueError for a model that cannot give what they need: a mixture's experts and gate.
    """
    if not isinstance(model, ImmunityMoE):
        raise ValueError(
            f"the attacks on all gates need a mixture with a gate (ImmunityMoE), and got a "
            f"{type(model).__name__}; attacks that work on any model that gives gradients: "
            "torchattacks' FGSM, BIM, MIFGSM and PGD, and without gradients: its Square"
        )
    target = folded(model)
    attacks: list[SuiteAttack] = []

    def add(name: str, family: str, sees: str, perturb: Callable[[Tensor, Tensor], Tensor]) -> None:
        attacks.append(SuiteAttack(name, family, sees, lambda *batch: (perturb(*batch), [])))

    def by_torchattacks(name: str, gate: str, through: ImmunityMoE = target) -> Callable:
        return lambda images, labels: attack_images(
            through, images, labels, name, gate,
            eps=effort.eps, step_size=effort.step_size, steps=effort.steps,
        )  # fmt: skip

    def exact(aim: str) -> Callable:
        return ExactPGD(target, effort.eps, effort.step_size, effort.steps, aim=aim)

    for name in ("fgsm", "bim", "mim", "pgd"):
        add(name, "paper", "switch", by_torchattacks(name, "switch"))
    add("pgd-trained", "frozen", "trained", by_torchattacks("pgd", "trained"))
    add("pgd-uniform", "frozen", "uniform", by_torchattacks("pgd", "uniform"))
    for samples in effort.samples:
        add(f"eotpgd-{samples}", "sampled", "switch", _eotpgd(target, effort, samples))
    add("exact-expected", "exact", "all gates", exact("expected"))
    add("exact-weakest", "exact", "all gates", exact("weakest"))
    arc = ArcAttack(target, effort.eps, effort.step_size, effort.steps)
    add("arc", "exact", "all gates", arc)
    for gate in ("trained", "uniform", "switch"):
        attacks.append(
            SuiteAttack(f"autoattack-{gate}", "judges", gate, _auto_attack(target, gate, effort))
        )
    add(
        "square", "black box", "uniform",
        lambda *batch: square(target, *batch, "uniform", eps=effort.eps, steps=effort.judge_steps),
    )  # fmt: skip
    draws = DRAWS_PER_STEP * effort.judge_steps
    add(
        "noise", "black box", "all gates",
        lambda *batch: random_noise(target, *batch, eps=effort.eps, draws=draws),
    )  # fmt: skip
    for number, expert in enumerate(target.experts, start=1):
        alone = ImmunityMoE([expert], ConstantGate(1), "uniform")
        name = f"expert {number} alone"
        add(f"pgd-expert-{number}", "transfer", name, by_torchattacks("pgd", "uniform", alone))
    for name, surrogate in surrogates.items():
        through = folded(surrogate)
        add(f"pgd-{name}", "transfer", name, by_torchattacks("pgd", "uniform", through))
    return attacks


def _eotpgd(target: ImmunityMoE, effort: Effort, samples: int) -> Callable:
    def perturb(images: Tensor, labels: Tensor) -> Tensor:
        from torchattacks import EOTPGD

        with target.evaluated_with("switch"):
            attack = EOTPGD(target, effort.eps, effort.step_size, effort.steps, samples)
            return attack(images, labels)

    return perturb


def _auto_attack(target: ImmunityMoE, gate: str, effort: Effort) -> Callable:
    return lambda images, labels: auto_attack(
        target, images, labels, gate, eps=effort.eps, steps=effort.judge_steps
    )
