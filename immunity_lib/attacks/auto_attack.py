"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) on a mixture under a gate, and what it flags.

It is a standard judge and no proof: it stops at the first point that fools the gate it sees, and
under a random gate one lucky draw counts as success. Its images are therefore scored over all
gates here, like those of every other attack.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from immunity_lib.attacks.folding import folded
from immunity_lib.attacks.frozen import RANDOM_GATES
from immunity_lib.checks import check_images, check_labels
from immunity_lib.moe import Gate, ImmunityMoE

DRAWS = 20  # of the gate for each gradient of a random gate, as AutoAttack's "rand" has it
QUERIES_PER_STEP = 50  # of Square: 5,000 beside 100 steps of the gradient attacks, as published


def auto_attack(
    model: ImmunityMoE, images: Tensor, labels: Tensor, gate: Gate, *, eps: float, steps: int = 100
) -> tuple[Tensor, list[str]]:
    """Adversarial images (B, 3, 32, 32) within eps, and AutoAttack's warnings about the model.

    A fixed gate gets the "standard" version (APGD on the cross entropy, targeted APGD and FAB,
    Square), a random one "rand" (APGD on cross entropy and DLR, gradients averaged over 20 draws).
    steps: of every gradient attack; 100 is AutoAttack as published. Raises ValueError for images
    and labels outside of their range, and for fewer than four classes, which DLR needs.
    """
    from pyautoattack import AutoAttack  # costs a second, which only attackers should pay

    classes = model.experts[0].num_classes
    check_images(images)
    check_labels(labels, classes)
    if classes < 4:
        raise ValueError(
            f"AutoAttack needs at least 4 classes, the model has {classes}; attacks that work: "
            "those of attack_images, ExactPGD and ArcAttack"
        )
    target = folded(model).to(memory_format=torch.contiguous_format)  # it views gradients as lines
    target.evaluation_gate, images = gate, images.contiguous()
    version = "rand" if gate in RANDOM_GATES else "standard"
    judge = AutoAttack(target, eps=eps, version=version, seed=0, device=images.device)
    for attack in (judge.apgd, judge.apgd_targeted):
        attack.n_iter = attack.n_iter_orig = steps
    judge.apgd.eot_iter = DRAWS if version == "rand" else 1
    judge.fab.n_iter = steps
    judge.square.n_queries = QUERIES_PER_STEP * steps
    targets = min(9, classes - 1)
    judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = targets
    heard = _Heard()
    judge.logger.addHandler(heard)
    try:
        adversarial, _ = judge.run_standard_evaluation(images, labels, batch_size=len(images))
    finally:
        judge.logger.removeHandler(heard)
    return adversarial.detach(), list(dict.fromkeys(heard.warnings))


class _Heard(logging.Handler):
    """Keeps what is logged as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # What it refers to is a file of its own repository
        self.warnings.append(record.getMessage().replace(" See flags_doc.md for details.", ""))
