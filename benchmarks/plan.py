"""Measured epochs against the arithmetic that `make plan` bills, as ratios to a plain network.

A ratio of 1 means that the bill is right in proportion. What it leaves out (batch norms, memory
traffic, the price of small operations) shows as ratios above 1, most of all for networks of cells,
whose depthwise convolutions are little arithmetic and much traffic.
"""

import tempfile
from pathlib import Path

from immunity_lib.train import train
from study.catalogue import ModelName, recipe_of
from study.graph.cost import cost_of
from study.settings import load_preset
from study.store import load_data

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
    dataset = load_data(SETTINGS)
    reference = None
    for model in MODELS:
        name = ModelName.parse(f"parts10-{model}-seed0")
        recipe = recipe_of(SETTINGS, name)
        with tempfile.TemporaryDirectory() as folder:
            _, log = train(recipe, dataset, Path(folder), name=str(name))
        cost = cost_of(recipe, len(dataset.class_names))
        attacked = recipe.adversary is not None  # in one step
        billed = recipe.train_images * (cost["step"] + attacked * cost["gradient"])
        seconds = log[-1]["seconds"]  # of the second epoch: the first one warms up
        reference = reference or seconds / billed
        print(
            f"{model}: {billed / 1e9:.0f} GMAC billed, {seconds:.1f} s measured, "
            f"{seconds / billed / reference:.2f} times the proportion of the first"
        )
