"""Shared fixtures: the smallest data, settings and models on which meaning can be tested."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from graph import reproduce
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from immunity_lib import ImmunityMoE, build_expert
from immunity_lib.data import load_dataset
from immunity_lib.recipes import ModelName, recipe
from immunity_lib.settings import Settings
from immunity_lib.training import train

torch.set_num_threads(1)  # on tensors this small, threads cost more than they bring
hypothesis_settings.register_profile(
    "reproducible", deadline=None, max_examples=40, derandomize=True, database=None
)
hypothesis_settings.load_profile("reproducible")


def pytest_collection_modifyitems(items):
    """What takes minutes to an hour is slow, too."""
    for item in items:
        if item.get_closest_marker("node"):
            item.add_marker("slow")


def pytest_addoption(parser):
    parser.addoption(
        "--screenshots", type=Path, help="folder for the pictures that the browser tests take"
    )
    parser.addoption(
        "--batch-runs", type=int, default=1, help="how often each notebook runs in batch"
    )
    parser.addoption(
        "--image-storage", type=Path, help="folder that keeps the container image between tests"
    )


TINY = {
    "preset": "tiny", "dataset": "parts10", "train_images": 48, "validation_images": 16,
    "test_images": 32, "attacked_images": 16, "compared_experts": ["resnet18"],
    "expert": "resnet18", "experts": 2, "width": 0.0625, "epochs": 3, "batch_size": 16,
    "learning_rate": 0.05, "adversary_steps": 2, "steps": 3, "gradient_clip": 2.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """A finished run of preset smoke: its folder and what the command printed."""
    output = tmp_path_factory.mktemp("smoke")
    done = reproduce(output)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


@pytest.fixture(scope="session")
def dataset():
    return load_dataset("parts10", train_images=48, validation_images=16, test_images=32)


@pytest.fixture(scope="session")
def images(dataset):
    """(8, 3, 32, 32) in [0, 1]."""
    return dataset.splits["test"].images[:8].float() / 255


@pytest.fixture(scope="session")
def labels(dataset):
    return dataset.splits["test"].labels[:8]


@pytest.fixture(scope="session")
def make_settings():
    """Settings of the tiny preset, with some fields changed."""
    return lambda **changes: Settings(**TINY | changes)


@pytest.fixture(scope="session")
def make_recipe(make_settings):
    """The recipe of a tiny model, by method and regime."""

    def make(method="immunity", regime="standard", **changes):
        name = ModelName.parse(f"parts10-{method}-resnet18-{regime}-seed0")
        return recipe(make_settings(**changes), name)

    return make


@pytest.fixture(scope="session")
def _shared_model(images):
    torch.manual_seed(0)
    mixture = ImmunityMoE([build_expert("resnet18", 10, 0.0625) for _ in range(3)])
    for module in mixture.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of these images, as training would in time
    with torch.no_grad():
        mixture.train()(images)
        mixture.gate.linear.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return mixture.eval()


@pytest.fixture
def model(_shared_model):
    """An untrained mixture of three experts in eval mode, with distinct gate weights."""
    return copy.deepcopy(_shared_model)


@pytest.fixture(scope="session")
def trained(dataset, make_recipe, tmp_path_factory):
    """A small network that has learnt something, so that attacks have something to break."""
    recipe = make_recipe("standalone", epochs=12, augment=False, schedule="constant")
    network, _ = train(recipe, dataset, tmp_path_factory.mktemp("trained"))
    return network.eval()


class LinearExpert(nn.Module):
    """Logits linear in the pixels: attacks on it have a closed form, and it costs nothing."""

    def __init__(self, classes):
        super().__init__()
        self.num_classes = classes
        self.normalise = nn.Identity()
        self.linear = nn.Linear(3 * 32 * 32, classes)

    def forward_with_features(self, images):
        return images, self.linear(images.flatten(1))


@pytest.fixture(scope="session")
def make_linear_model():
    """A mixture of linear experts whose gate differs from image to image."""

    def make(experts, classes=10, sharpness=1.0):
        torch.manual_seed(0)
        model = ImmunityMoE([LinearExpert(classes) for _ in range(experts)])
        with torch.no_grad():
            model.gate.linear.weight.mul_(20)
            for expert in model.experts:
                expert.linear.weight.mul_(sharpness)
        return model.eval()

    return make


@st.composite
def _heat_maps(draw):
    """Maps (B, N, 5, 5) in float64 that sum to 1, with exact zeros among them."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 4)), 5, 5)
    pixels = st.sampled_from([0.0, 1e-6, 1.0]) | st.floats(0, 10, allow_subnormal=False)
    heat = draw(arrays(np.float64, shape, elements=pixels))
    heat = np.where(heat.sum((2, 3), keepdims=True) > 1e-9, heat, 1.0)
    return torch.from_numpy(heat / heat.sum((2, 3), keepdims=True))


@pytest.fixture(scope="session")
def heat_maps():
    """The strategy that draws heat maps."""
    return _heat_maps()
