"""PGD-20 under a fixed gate, ours against torchattacks on the same network and images.

Goal: twice as fast, with the same robust accuracy. How much is saved depends on how many images
are fooled, and how soon. So there are two cases: an adversarially trained network under the paper's
attack, and the worst case, in which every image resists to the last step and only the folded batch
norms help.
Run with `python -m benchmarks.attacks`.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
import torchattacks
from torch import Tensor

from benchmarks.timing import ratios, take_turns
from immunity_lib import ImmunityMoE
from immunity_lib.attacks.frozen import FrozenPGD
from immunity_lib.data.batches import evaluation_batches
from immunity_lib.models import dataset_of
from immunity_lib.recipes import ModelName, recipe
from immunity_lib.settings import load_preset
from immunity_lib.training import train

SETTINGS = load_preset("demo", width=0.125, epochs=4, test_images=250)
NAME = ModelName.parse("parts10-standalone-googlenet-adversarial-seed0")
STEPS, ROUNDS = 20, 3
ATTACKS = {"immunity_lib": FrozenPGD, "torchattacks": torchattacks.PGD}


def trained_network() -> tuple[ImmunityMoE, Tensor, Tensor]:
    """An adversarially trained network, images it has not seen, and their labels."""
    dataset = dataset_of(SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = train(recipe(SETTINGS, NAME), dataset, Path(folder), name=str(NAME))
    model.evaluation_gate = "trained"
    return model.eval(), *next(evaluation_batches(dataset.splits["test"], SETTINGS.test_images))


def main() -> None:
    torch.set_num_threads(1)
    model, images, labels = trained_network()
    with torch.no_grad():
        predicted = model(images).argmax(1)
    cases = (
        ("eps 8/255", 8 / 255, labels),
        ("worst case, every image resists", 1e-6, predicted),
    )
    for case, eps, targets in cases:
        robust = {}

        def attack(name: str, eps=eps, targets=targets, robust=robust) -> None:
            adversarial = ATTACKS[name](model, eps, eps / 4, STEPS)(images, targets)
            with torch.no_grad():
                robust[name] = (model(adversarial).argmax(1) == targets).double().mean().item()

        seconds = take_turns({name: partial(attack, name) for name in ATTACKS}, ROUNDS)
        ratio = ratios(seconds["torchattacks"], seconds["immunity_lib"])
        print(
            f"googlenet, width {SETTINGS.width}, {case}: torchattacks takes {ratio} our time; "
            f"robust accuracy {robust['immunity_lib']:.1%}, theirs {robust['torchattacks']:.1%}"
        )


if __name__ == "__main__":
    main()
