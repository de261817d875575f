"""Heat maps of five experts, ours against pytorch-grad-cam on the same networks and images.

Goal: 3 times faster. Run with `python -m benchmarks.heatmaps`.
"""

import copy

import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from benchmarks.timing import ratios, take_turns
from immunity_lib import ImmunityMoE, build_expert, expert_heatmaps

EXPERTS, IMAGES, ROUNDS, WIDTH = 5, 64, 7, 0.25


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    experts = [build_expert("googlenet", 10, WIDTH) for _ in range(EXPERTS)]
    model = ImmunityMoE(experts).to(memory_format=torch.channels_last).eval()
    images = torch.rand(IMAGES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (IMAGES,))
    targets = [ClassifierOutputTarget(label) for label in labels.tolist()]
    # One pytorch-grad-cam per expert, on the last stage of its head; its hooks are on copies
    copies = copy.deepcopy(experts)
    theirs = [GradCAM(expert, [expert.stages[expert.head_stages - 1]]) for expert in copies]

    seconds = take_turns(
        {
            "immunity_lib": lambda: expert_heatmaps(model, images, labels),
            "pytorch-grad-cam": lambda: [cam(images, targets) for cam in theirs],
        },
        ROUNDS,
    )
    ratio = ratios(seconds["pytorch-grad-cam"], seconds["immunity_lib"])
    print(f"googlenet, width {WIDTH}, {EXPERTS} experts: pytorch-grad-cam takes {ratio} our time")


if __name__ == "__main__":
    main()
