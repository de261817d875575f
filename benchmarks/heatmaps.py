"""Heat maps of five experts, ours against pytorch-grad-cam on the same networks and images.

Goal: 3 times faster.
"""

import copy

from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from benchmarks.sides import random_mixture, ratios, take_turns
from immunity_lib import expert_heatmaps

IMAGES, ROUNDS, WIDTH = 64, 7, 0.25


def main() -> None:
    model, images, labels = random_mixture("googlenet", WIDTH, IMAGES)
    model.eval()
    targets = [ClassifierOutputTarget(label) for label in labels.tolist()]
    # One pytorch-grad-cam per expert, on the last stage of its head; its hooks are on copies
    copies = copy.deepcopy(model.experts)
    theirs = [GradCAM(expert, [expert.stages[expert.head_stages - 1]]) for expert in copies]

    seconds = take_turns(
        {
            "immunity_lib": lambda: expert_heatmaps(model, images, labels),
            "pytorch-grad-cam": lambda: [cam(images, targets) for cam in theirs],
        },
        ROUNDS,
    )
    ratio = ratios(seconds["pytorch-grad-cam"], seconds["immunity_lib"])
    print(f"googlenet, width {WIDTH}, {len(copies)} experts: pytorch-grad-cam takes {ratio} our time")
