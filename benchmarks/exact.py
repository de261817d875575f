"""What it costs to know all 120 gates of five experts, in accuracy and in attacks.

Goals: accuracy over all gates at most 1.1 times a plain pass of the experts, and 50 times faster
than a pass for each gate; PGD on the exact expectation at most 1.15 times PGD on the fixed gate,
and a tenth of torchattacks' EOTPGD with 10 samples a step, which it is at least as strong as
(tests/core/test_attacks.py).
"""

from itertools import permutations

import torch
import torchattacks

from benchmarks.sides import random_mixture, ratios, take_turns
from immunity_lib.attacks import attack_images, exact_pgd, fold
from immunity_lib.moe import verdicts

IMAGES, WIDTH, ROUNDS, STEPS = 64, 0.125, 5, 5
EPS, STEP = 8 / 255, 2 / 255


def main() -> None:
    model, images, labels = random_mixture("googlenet", WIDTH, IMAGES)
    with torch.no_grad():
        model.gate.linear.bias.copy_(torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0]))
    model = fold(model.eval())

    @torch.no_grad()
    def plain_pass() -> None:
        model.expert_outputs(images)

    @torch.no_grad()
    def all_gates() -> None:
        verdicts(model.expert_outputs(images), labels)

    @torch.no_grad()
    def gate_by_gate() -> None:
        for gate in permutations(range(len(model.experts))):
            model(images, gate)

    seconds = take_turns({"all": all_gates, "plain": plain_pass}, ROUNDS)
    one_by_one = take_turns({"each": gate_by_gate, "all": all_gates}, 1)
    print(
        f"accuracy over 120 gates takes {ratios(seconds['all'], seconds['plain'])} a plain pass; "
        f"a pass for each gate takes {ratios(one_by_one['each'], one_by_one['all'])} its time"
    )

    budget = {"eps": EPS, "step_size": STEP, "steps": STEPS}

    def fixed_gate() -> torch.Tensor:
        return attack_images(model, images, labels, "pgd", "trained", **budget)

    def exact() -> torch.Tensor:
        return exact_pgd(model, images, labels, **budget)

    def sampled() -> torch.Tensor:
        model.evaluation_gate = "switch"
        return torchattacks.EOTPGD(model, EPS, STEP, STEPS, eot_iter=10)(images, labels)

    seconds = take_turns({"exact": exact, "fixed": fixed_gate, "sampled": sampled}, ROUNDS)
    print(
        f"PGD on the exact expectation takes {ratios(seconds['exact'], seconds['fixed'])} the time "
        f"of PGD on the trained gate, EOTPGD with 10 samples "
        f"{ratios(seconds['sampled'], seconds['exact'])} that of the exact one"
    )
