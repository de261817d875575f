"""A convolution and its second derivative."""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from immunity_lib.layers.passes import State


class _Convolution(Function):
    @staticmethod
    def forward(ctx, images, weight, bias, window):
        ctx.save_for_backward(images, weight)
        ctx.window = window
        return torch.convolution(images, weight, bias, *window)

    @staticmethod
    def backward(ctx, grad_output):
        images, weight = ctx.saved_tensors
        of_images, of_weight, of_bias, _ = ctx.needs_input_grad
        if State.weights_left_out:
            of_weight = of_bias = False
        wanted = [of_images, of_weight, of_bias]
        gradients = _ConvolutionGradients.apply(grad_output, images, weight, ctx.window, wanted)
        return *gradients, None


class _ConvolutionGradients(Function):
    """Gradients for (images, weight, bias) as a function of (grad_output, images, weight)."""

    @staticmethod
    def forward(ctx, grad_output, images, weight, window, wanted):
        ctx.save_for_backward(grad_output, images, weight)
        ctx.window = window
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution_backward(
            grad_output, images, weight, [len(weight)], *window, wanted
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_of_weight, grad_of_bias):
        grad_output, images, weight = ctx.saved_tensors
        if grad_of_weight is not None or grad_of_bias is not None:
            # Not of a heat map, which is made of the activations' gradient alone
            to_output, to_images, to_weight = torch.ops.aten._convolution_double_backward(
                grad, grad_of_weight, grad_of_bias, grad_output, weight, images, *ctx.window,
                [True] * 3,
            )  # fmt: skip
            return to_output, to_images, to_weight, None, None
        # The images' gradient contracted with g is <conv(g, weight), grad_output>: for the weight,
        # a convolution of the images g
        to_output = torch.convolution(grad, weight, None, *ctx.window)
        _, to_weight, _ = torch.ops.aten.convolution_backward(
            grad_output, grad, weight, None, *ctx.window, [False, True, False]
        )
        return to_output, None, to_weight, None, None


def _mixed_precision() -> bool:
    """Whether autocast is on, which chooses operators by name and does not know a Function."""
    return any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` (padded with zeros) with a cheap second derivative."""

    def forward(self, images: Tensor) -> Tensor:
        if not State.cheap_second_derivatives or _mixed_precision():
            return super().forward(images)
        window = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        return _Convolution.apply(images, self.weight, self.bias, window)
