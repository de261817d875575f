"""Resident memory over 500 regularised training steps: it must not grow."""

import gc
import resource

import torch

from benchmarks.sides import random_mixture
from immunity_lib.train import training_loss
from study.catalogue import ModelName, recipe_of
from study.settings import load_preset

STEPS, WARM_UP = 500, 50
NAME = ModelName.parse("parts10-immunity-resnet18-standard-seed0")
WANTED = recipe_of(load_preset("demo"), NAME)


def resident_megabytes() -> float:
    """Resident memory of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def growth(steps: int = STEPS) -> tuple[float, float]:
    """Megabytes after the warm-up, and by how many they grew over the steps after it."""
    model, images, labels = random_mixture("resnet18", 0.0625, 16, experts=2)
    optimiser = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    before = 0.0
    for step in range(WARM_UP + steps):
        loss = training_loss(model, images, labels, WANTED, epochs_done=10.0)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        if step == WARM_UP - 1:
            gc.collect()
            before = resident_megabytes()
    gc.collect()
    return before, resident_megabytes() - before


def main() -> None:
    before, grown = growth()
    print(f"{STEPS} regularised steps: resident memory {before:.0f} MB, grown by {grown:+.1f} MB")
