"""Shared fixtures: the smallest data, settings and models on which meaning can be tested."""

import copy
import os
import signal
import subprocess
import sys
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
from immunity_lib.moe import ExpertOutputs
from study.catalogue import ModelName, recipe_of
from study.settings import ROOT, read_settings
from study.store import write_json

torch.set_num_threads(1)  # on tensors this small, threads cost more than they bring
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
hypothesis_settings.register_profile("reproducible", deadline=None, max_examples=40, derandomize=True, database=None)
hypothesis_settings.load_profile("reproducible")


def pytest_collection_modifyitems(items):
    """What takes minutes to an hour is slow, too. First comes what needs a run of the smoke preset, the longest."""
    items.sort(key=lambda item: "smoke" not in item.fixturenames)
    for item in items:
        if item.get_closest_marker("node"):
            item.add_marker("slow")


def pytest_xdist_make_scheduler(config, log):
    """Files of tests beside each other; those that share the run of the smoke preset stay together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "smoke" if file.endswith(("test_faults.py", "test_reproduce.py")) else file

    return Scheduling(config, log)


def pytest_addoption(parser):
    parser.addoption(
        "--fixture-seed", type=int, default=0, metavar="N",
        help="what the shared models and the random numbers of tests are drawn from; every test "
        "passes with every N",
    )  # fmt: skip
    parser.addoption("--screenshots", type=Path, help="folder for the pictures that the browser tests take")
    parser.addoption("--image-storage", type=Path, help="folder that keeps the container image between tests")


@pytest.fixture(scope="session")
def fixture_seed(pytestconfig):
    return pytestconfig.getoption("fixture_seed")


@pytest.fixture(autouse=True)
def random_state(fixture_seed):
    """The same for each test, whatever ran before it."""
    torch.manual_seed(fixture_seed)


TINY = {
    "preset": "tiny", "dataset": "parts10", "train_images": 48, "validation_images": 16, "test_images": 32,
    "attacked_images": 16, "compared_experts": ["resnet18"], "expert": "resnet18", "experts": 2, "width": 0.0625,
    "epochs": 3, "batch_size": 16, "learning_rate": 0.05, "adversary_steps": 2, "steps": 3, "gradient_clip": 2.0,
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
    return lambda **changes: read_settings(TINY | changes)


@pytest.fixture(scope="session")
def make_recipe(make_settings, fixture_seed):
    """The recipe of a tiny model, by method and regime."""

    def make(method="immunity", regime="standard", **changes):
        name = ModelName.parse(f"parts10-{method}-resnet18-{regime}-seed{fixture_seed}")
        return recipe_of(make_settings(**changes), name)

    return make


def calibrate(model, images):
    """A model in eval mode, its batch norms with the statistics of these images, as training would
    give them in time."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


@pytest.fixture(scope="session")
def _shared_model(images, fixture_seed):
    torch.manual_seed(fixture_seed)
    mixture = ImmunityMoE([build_expert("resnet18", 10, 0.0625) for _ in range(3)])
    with torch.no_grad():
        mixture.gate.linear.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    return calibrate(mixture, images)


@pytest.fixture
def model(_shared_model):
    """An untrained mixture of three experts in eval mode, with distinct gate weights."""
    return copy.deepcopy(_shared_model)


def draw_outputs(seed, experts=3, scale=3.0, images=4):
    """What experts and a gate may give of five classes, in float64, drawn from a seed; without activations."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, experts, 5, generator=generator, dtype=torch.float64)
    gate = torch.randn(images, experts, generator=generator, dtype=torch.float64)
    return ExpertOutputs(logits, gate.log_softmax(1), ())


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
def make_linear_model(fixture_seed):
    """A mixture of linear experts whose gate differs from image to image."""

    def make(experts, classes=10, sharpness=1.0):
        torch.manual_seed(fixture_seed)
        model = ImmunityMoE([LinearExpert(classes) for _ in range(experts)])
        with torch.no_grad():
            model.gate.linear.weight.mul_(20)
            for expert in model.experts:
                expert.linear.weight.mul_(sharpness)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_distant_images(make_linear_model):
    """A model of two classes, and images (B, 3, 32, 32) of class 0 whose pixels all lie as far
    from the boundary as is asked for each image: an attack breaks those that it takes further."""

    def make(distances):
        model = make_linear_model(1, classes=2)
        model.evaluation_gate = "trained"
        uphill = torch.where(torch.arange(3 * 32 * 32) % 2 == 0, 1.0, -1.0)
        with torch.no_grad():
            model.experts[0].linear.bias.zero_()
            model.experts[0].linear.weight.copy_(torch.stack([-uphill, uphill]) * 0.01)
        images = 0.5 - torch.tensor(distances)[:, None] * uphill
        return model, images.view(-1, 3, 32, 32), torch.zeros(len(distances), dtype=torch.long)

    return make


@st.composite
def heat_maps(draw):
    """Maps (B, N, 5, 5) in float64 that sum to 1, with exact zeros among them."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 4)), 5, 5)
    pixels = st.sampled_from([0.0, 1e-6, 1.0]) | st.floats(0, 10, allow_subnormal=False)
    heat = draw(arrays(np.float64, shape, elements=pixels))
    heat = np.where(heat.sum((2, 3), keepdims=True) > 1e-9, heat, 1.0)
    return torch.from_numpy(heat / heat.sum((2, 3), keepdims=True))


@pytest.fixture
def closing_figures():
    """No window, and no figure left open behind the test."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def snakemake():
    """Snakemake itself, on a graph that a configuration describes, without a GPU."""

    def make(config, *options):
        folder = Path(config["output_folder"])
        write_json(folder / "graph.json", config)
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *options, "--snakefile", ROOT / "Snakefile", "--cores", "8",
             "--directory", folder, "--configfile", folder / "graph.json"],
            capture_output=True, text=True, timeout=900, cwd=folder, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip

    return make
