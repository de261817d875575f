"""The paper's PGD and AutoAttack on the demo's MoE, ours against the libraries' own loops over the model as it is.

Goals: PGD of 20 steps twice as fast as torchattacks, AutoAttack on the uniform gate 1.5 times as fast as pyautoattack,
with as many images right.
"""

import torch
import torchattacks
from pyautoattack import AutoAttack

from benchmarks.sides import ratios, take_turns
from immunity_lib.attacks import attack_images, auto_attack, fold
from immunity_lib.data.batches import evaluation_batches
from study.catalogue import ModelName
from study.settings import load_preset
from study.store import load_data, trained_model

SETTINGS = load_preset("demo")
NAME = ModelName.parse("parts10-moe-resnet18-adversarial-seed0")
IMAGES, ROUNDS, EPS, STEP, STEPS = 100, 3, 8 / 255, 2 / 255, 20


def main() -> None:
    dataset = load_data(SETTINGS)
    model = trained_model(SETTINGS, NAME, dataset)
    model.evaluation_gate = "uniform"
    rows = dataset.splits["test"].balanced(IMAGES)
    ((images, labels),) = evaluation_batches(dataset.splits["test"].select(rows), IMAGES)
    budget = {"eps": EPS, "step_size": STEP, "steps": STEPS}

    def judge_by_pyautoattack() -> torch.Tensor:
        judge = AutoAttack(model, eps=EPS, version="standard", seed=0, device=images.device)
        judge.attacks_to_run = ["apgd-ce"]  # its first: the others take hours, and gain as much from a folded model
        return judge.run_standard_evaluation(images, labels, batch_size=IMAGES)[0]

    def judge() -> torch.Tensor:
        return auto_attack(model, images, labels, "uniform", eps=EPS, only=("apgd-ce",))[0]

    cases = {
        "PGD of 20 steps, against torchattacks": (
            lambda: attack_images(fold(model), images, labels, "pgd", "uniform", **budget, early_exit=True),
            lambda: torchattacks.PGD(model, EPS, STEP, STEPS)(images, labels),
        ),
        "AutoAttack's APGD, against pyautoattack": (judge, judge_by_pyautoattack),
    }
    for title, (ours, theirs) in cases.items():
        seconds = take_turns({"ours": ours, "theirs": theirs}, ROUNDS)
        right = [int((model(attack()).argmax(-1) == labels).sum()) for attack in (ours, theirs)]
        print(
            f"{title}: {ratios(seconds['theirs'], seconds['ours'])} our time; "
            f"of {IMAGES} images {right[0]} right under ours, {right[1]} under theirs"
        )
