"""The paper's attacks, by torchattacks: l_inf, images in [0, 1], eps = 8/255; and two more that
robustness tables report beside them, "cw" and "apgd".

torchattacks calls a bare `model(images)`, so the gate that the attacker sees is the model's
`evaluation_gate`, set here explicitly, and it switches the whole model to eval mode; the mode of
every sub-module is saved and restored here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from immunity_lib.checks import ROUNDING, check_images, check_labels
from immunity_lib.moe import Gate, ImmunityMoE


def _margin_pgd(library, model, eps, step, steps):
    """PGD on the Carlini-Wagner margin, as Madry et al. (2018, arXiv 1706.06083) use that loss at
    a given eps; torchattacks' own CW is an l_2 attack without one.

    To the last step, since the adversarial images are judged under all gates.
    """
    from immunity_lib.attacks.frozen import FrozenPGD, margin  # imports torchattacks

    return FrozenPGD(model, eps, step, steps, loss=margin, stop_early=False)


def _auto_pgd(library, model, eps, step, steps):
    """Auto-PGD (Croce & Hein 2020, arXiv 2003.01690) on the cross entropy, from one start; it
    chooses its step sizes itself.

    Its point of the highest loss, for every image. As torchattacks calls it, it would hand back
    unmoved what it did not fool or what was misclassified anyway: right for one fixed gate, but
    too weak for the others.
    """
    attack = library.APGD(model, eps=eps, steps=steps, n_restarts=1, loss="ce", eot_iter=1)
    return lambda images, labels: attack.perturb(images, labels, best_loss=True)[1]


# Each builds an attack from (model, eps, step size, number of steps). PGD starts at a random point
# of the ball and BIM at the image, their one difference; MIM's momentum decays by 1.0.
ATTACKS: dict[str, Callable] = {
    "fgsm": lambda library, model, eps, step, steps: library.FGSM(model, eps),
    "bim": lambda library, model, eps, step, steps: library.BIM(model, eps, step, steps),
    "mim": lambda library, model, eps, step, steps: library.MIFGSM(model, eps, step, steps, 1.0),
    "pgd": lambda library, model, eps, step, steps: library.PGD(model, eps, step, steps, True),
    # PGD on the divergence from the clean answer, which TRADES trains on
    "tpgd": lambda library, model, eps, step, steps: library.TPGD(model, eps, step, steps),
    # FGSM from a random start with a step of 1.25 eps: adversarial training on small machines
    "ffgsm": lambda library, model, eps, step, steps: library.FFGSM(model, eps, 1.25 * eps),
    "cw": _margin_pgd,
    "apgd": _auto_pgd,
}


def attack_images(
    model: ImmunityMoE,
    images: Tensor,
    labels: Tensor,
    attack: str,
    gate: Gate,
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Adversarial images (B, 3, 32, 32) within eps of `images`, checked to be so.

    attack: one of ATTACKS. gate: what the attacker's forward passes use, see `ImmunityMoE`.
    eps, step_size: in units of the image's range [0, 1]. Raises ValueError on bad input.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; valid names: {', '.join(ATTACKS)}")
    check_images(images)
    check_labels(labels, model.experts[0].num_classes)
    import torchattacks  # costs a second, which only attackers should pay

    with modes_restored(model), model.evaluated_with(gate):
        perturb = ATTACKS[attack](torchattacks, model, eps, step_size, steps)
        adversarial = perturb(images, labels)
    check_budget(images, adversarial, eps)
    return adversarial


def check_budget(images: Tensor, adversarial: Tensor, eps: float) -> None:
    """Raise ValueError unless adversarial images lie in [0, 1] and within eps of the images."""
    check_images(adversarial)
    distance = (adversarial - images).abs().max().item()
    if not distance <= eps + ROUNDING:
        raise ValueError(
            f"an adversarial image is {distance:g} away from its image; eps is {eps:g}"
        )


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
