"""Folding: a model under evaluation no longer changes, so its batch norms can become part of the
convolutions before them."""

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Module = TypeVar("Module", bound=nn.Module)


def folded(model: Module) -> Module:
    """A copy for evaluation: the same function within rounding, computed faster.

    It is in eval mode, and its parameters take no gradients. Every batch norm right behind a
    convolution in an `nn.Sequential` is folded into that convolution; others stay as they are.
    What happens to the model later does not reach the copy.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            _fold(module)
    return model.eval()  # the layers that are new, too


def _fold(sequence: nn.Sequential) -> None:
    for index in range(len(sequence) - 1):
        convolution, norm = sequence[index], sequence[index + 1]
        if not (isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        if norm.track_running_stats:
            sequence[index] = fuse_conv_bn_eval(convolution, norm)
            sequence[index + 1] = nn.Identity()
            if index + 2 < len(sequence) and isinstance(sequence[index + 2], nn.ReLU):
                # Nothing else reads what the convolution puts out, its own gradient included
                sequence[index + 2] = nn.ReLU(inplace=True)
