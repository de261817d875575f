"""The library by itself: in an environment that has none of the study's packages."""

import subprocess
import sys

ABSENT = [  # of what `pip install .` does not bring
    "IPython", "ipywidgets", "jinja2", "jupyterlab", "matplotlib", "nbconvert", "pandas", "papermill", "psutil",
    "pyarrow", "pydantic", "seaborn", "snakemake", "study", "voila", "yaml",
]  # fmt: skip
READER = f"import sys; sys.modules |= dict.fromkeys({ABSENT})  # importing one is an error"
READER += """
import immunity_lib.cells  # before all else of the library, which its modules do not rely on
import torch
from immunity_lib import ImmunityMoE, build_expert, expert_heatmaps
from immunity_lib.attacks import attack_images, exact_pgd
from immunity_lib.data import load_dataset
from immunity_lib.data.batches import training_batches
from immunity_lib.losses import immunity_loss

data = load_dataset("parts10", train_images=16, validation_images=2, test_images=4)
model = ImmunityMoE([build_expert("resnet18", 10, 0.0625) for _ in range(2)])
optimiser = torch.optim.SGD(model.parameters(), 0.01)
for images, labels in training_batches(data.splits["train"], 8, torch.default_generator):
    maps = expert_heatmaps(model, images, labels, create_graph=True, floor=0.1)
    loss = immunity_loss(model.expert_outputs(images), labels, maps, alpha=1, beta=1, gamma=100)
    optimiser.zero_grad()
    loss.total.backward()
    optimiser.step()
budget = {"eps": 8 / 255, "step_size": 2 / 255, "steps": 2}
attacked = attack_images(model.eval(), images, labels, "pgd", "switch", **budget)
exact_pgd(model, images, labels, **budget)
assert expert_heatmaps(model, attacked, labels).shape == (8, 2, 32, 32)
"""


def test_D13_a_reader_trains_attacks_and_looks_in_a_loop_of_his_own():
    done = subprocess.run([sys.executable, "-c", READER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
