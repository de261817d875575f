"""Two tiny trained mixtures to explore."""

import pytest

from immunity_lib.explorer import Exploration
from immunity_lib.models import trained_model
from immunity_lib.recipes import ModelName


@pytest.fixture(scope="session")
def names():
    return [
        ModelName.parse(f"parts10-{one}-resnet18-standard-seed0") for one in ("immunity", "moe")
    ]


@pytest.fixture(scope="session")
def exploration(make_settings, dataset, names, tmp_path_factory):
    settings = make_settings(output_folder=str(tmp_path_factory.mktemp("explored")))
    for name in names:
        trained_model(settings, name, dataset)
    return Exploration(settings, dataset)
