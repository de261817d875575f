"""ReLU and max-pooling: linear, but for where they bend, which does not move with the input."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from immunity_lib.layers.passes import State


class _Relu(Function):
    @staticmethod
    def forward(ctx, images):
        out = images.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        (out,) = ctx.saved_tensors
        return _ReluGradient.apply(grad_output, out.detach())


class _ReluGradient(Function):
    """Linear in grad_output; which pixels are positive does not move with the input."""

    @staticmethod
    def forward(ctx, grad_output, out):
        ctx.save_for_backward(out)
        return torch.ops.aten.threshold_backward(grad_output, out, 0)

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        return _ReluGradient.apply(grad, out), None


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` with a cheap second derivative."""

    def forward(self, images: Tensor) -> Tensor:
        if not State.cheap_second_derivatives:
            return super().forward(images)
        return _Relu.apply(images)


class _MaxPool(Function):
    @staticmethod
    def forward(ctx, images, window):
        out, places = torch.ops.aten.max_pool2d_with_indices(images, *window)
        ctx.save_for_backward(images, places)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx, grad_output):
        images, places = ctx.saved_tensors
        return _MaxPoolGradient.apply(grad_output, images.detach(), places, ctx.window), None


class _MaxPoolGradient(Function):
    """Linear in grad_output; where the maxima are does not move with the input."""

    @staticmethod
    def forward(ctx, grad_output, images, places, window):
        ctx.save_for_backward(places)
        return torch.ops.aten.max_pool2d_with_indices_backward(
            grad_output, images, *window, [1, 1], False, places
        )

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        to_output = grad.flatten(2).gather(2, places.flatten(2)).view(places.shape)
        return to_output, None, None, None


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` (square windows) with a cheap second derivative."""

    def forward(self, images: Tensor) -> Tensor:
        if not State.cheap_second_derivatives:
            return super().forward(images)
        window = ([self.kernel_size] * 2, [self.stride] * 2, [self.padding] * 2)
        return _MaxPool.apply(images, window)
