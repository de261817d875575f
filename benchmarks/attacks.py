"""The paper's PGD and AutoAttack on the demo's MoE, ours against the libraries' own loops over the model as it is.

Goals: PGD of 20 steps twice as fast as torchattacks, AutoAttack on the uniform gate 1.5 times as fast as pyautoattack,
with as many images right. AutoAttack has a tenth of its steps and queries here; published, it takes an hour.
"""

import torch
import torchattacks
from pyautoattack import AutoAttack

from benchmarks.sides import ratios, take_turns
from immunity_lib.attacks import QUERIES_PER_STEP, attack_images, auto_attack, fold
from immunity_lib.data.batches import evaluation_batches
from study.catalogue import ModelName
from study.settings import load_preset
from study.store import load_data, trained_model

SETTINGS = load_preset("demo")
NAMES = {regime: ModelName.parse(f"parts10-moe-resnet18-{regime}-seed0") for regime in ("standard", "adversarial")}
IMAGES, ROUNDS, EPS, STEP, STEPS = 100, 3, 8 / 255, 2 / 255, 20
JUDGED, JUDGED_STEPS = 30, 10


def main() -> None:
    dataset = load_data(SETTINGS)
    rows = dataset.splits["test"].balanced(IMAGES)
    ((images, labels),) = evaluation_batches(dataset.splits["test"].select(rows), IMAGES)
    budget = {"eps": EPS, "step_size": STEP, "steps": STEPS}
    for regime, name in NAMES.items():
        model = trained_model(SETTINGS, name, dataset)
        model.evaluation_gate = "uniform"
        cases = {
            "ours": lambda model=model: attack_images(
                fold(model), images, labels, "pgd", "uniform", **budget, early_exit=True
            ),
            "theirs": lambda model=model: torchattacks.PGD(model, EPS, STEP, STEPS)(images, labels),
        }
        compare(f"PGD of 20 steps, {regime} training, against torchattacks", model, labels, cases)

    images, labels = images[:JUDGED], labels[:JUDGED]  # class-balanced, too

    def judge_by_pyautoattack() -> torch.Tensor:
        judge = AutoAttack(model, eps=EPS, version="standard", seed=0, device=images.device)
        for attack in (judge.apgd, judge.apgd_targeted):
            attack.n_iter = attack.n_iter_orig = JUDGED_STEPS
        judge.fab.n_iter, judge.square.n_queries = JUDGED_STEPS, QUERIES_PER_STEP * JUDGED_STEPS
        return judge.run_standard_evaluation(images.contiguous(), labels, batch_size=JUDGED)[0]

    def judge() -> torch.Tensor:
        return auto_attack(model, images, labels, "uniform", eps=EPS, steps=JUDGED_STEPS)[0]

    cases = {"ours": judge, "theirs": judge_by_pyautoattack}
    compare(f"AutoAttack, {regime} training, against pyautoattack", model, labels, cases)


def compare(title: str, model: torch.nn.Module, labels: torch.Tensor, cases: dict) -> None:
    """Print how many times our time theirs is, and how many images are right under each."""
    seconds = take_turns(cases, ROUNDS)
    right = {side: int((model(attack()).argmax(-1) == labels).sum()) for side, attack in cases.items()}
    print(
        f"{title}: {ratios(seconds['theirs'], seconds['ours'])} our time; "
        f"of {len(labels)} images {right['ours']} right under ours, {right['theirs']} under theirs",
        flush=True,
    )
