"""Measured epochs against the arithmetic that `make plan` bills, as ratios to a plain network.

A ratio of 1 means that the bill is right in proportion. What the formula leaves out (batch norms,
memory traffic, the price of small operations) shows as ratios above 1, most of all for networks of
cells, whose depthwise convolutions are little arithmetic and much traffic.
Run with `python -m benchmarks.plan`.
"""

import tempfile
from pathlib import Path

import torch

from immunity_lib import plan
from immunity_lib.models import dataset_of
from immunity_lib.recipes import ModelName, recipe
from immunity_lib.settings import load_preset
from immunity_lib.training import train

SETTINGS = load_preset("demo", width=0.25, train_images=256, validation_images=16, epochs=2)
MODELS = (
    "standalone-googlenet-standard",
    "moe-googlenet-standard",
    "immunity-googlenet-standard",
    "moe-googlenet-adversarial",
    "standalone-resnet18-standard",
    "standalone-densenet121-standard",
    "standalone-pdarts-standard",
    "standalone-robnet-free-standard",
)


def main() -> None:
    torch.set_num_threads(1)
    dataset = dataset_of(SETTINGS)
    reference = None
    for model in MODELS:
        name = ModelName.parse(f"parts10-{model}-seed0")
        with tempfile.TemporaryDirectory() as folder:
            _, log = train(recipe(SETTINGS, name), dataset, Path(folder), name=str(name))
        billed = plan.planned_job(SETTINGS, name, attacked=False).training / SETTINGS.epochs
        seconds = log[-1]["seconds"]  # of the second epoch: the first one warms up
        reference = reference or seconds / billed
        print(
            f"{model}: {billed / 1e9:.0f} GMAC billed, {seconds:.1f} s measured, "
            f"{seconds / billed / reference:.2f} times the proportion of the first"
        )


if __name__ == "__main__":
    main()
