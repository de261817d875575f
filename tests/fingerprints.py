"""Numbers that a network gives for weights and images from a formula, to compare with others."""

import pytest
import torch
from torch import Tensor

from immunity_lib.experts import build_expert

NO_NORMALISATION = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def pseudo_random(count: int, frequency: float) -> Tensor:
    """Portable numbers in [0, 1): the fraction of 43758.5453 sin(frequency k), k = 1 .. count."""
    steps = torch.arange(1, count + 1, dtype=torch.float64)
    return (43758.5453 * torch.sin(frequency * steps)) % 1


def assert_fingerprint(name, first_half, second_half, second_image, mean_and_std) -> None:
    """Logits in train mode: all ten of image 0, four of image 1, mean and deviation of all 8."""
    expert = build_expert(name, 10, **NO_NORMALISATION).double().train()
    with torch.no_grad():
        for parameter_name, parameter in expert.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter.numel() / parameter.shape[0]
                values = (2 * pseudo_random(parameter.numel(), 12.9898) - 1) * (6 / fan_in) ** 0.5
                parameter.copy_(values.view_as(parameter))
            else:
                parameter.fill_(0.1 if parameter_name.endswith("bias") else 1.0)
        images = pseudo_random(8 * 3 * 32 * 32, 78.233).view(8, 3, 32, 32)
        logits = expert(images)
    expected = torch.tensor(first_half + second_half + second_image, dtype=torch.float64)
    actual = torch.cat((logits[0], logits[1, :4]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert logits.mean().item() == pytest.approx(mean_and_std[0], abs=1e-4)
    assert logits.std().item() == pytest.approx(mean_and_std[1], abs=1e-4)
