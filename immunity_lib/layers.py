"""Convolution and batch norm whose gradient can be differentiated again at little cost.

The heat maps of eq (3) are gradients, and eqs (9) and (11) are losses on them, so training
differentiates a gradient. PyTorch's own second derivatives of these two layers are general and
slow: a weight gradient written as a convolution with an image-sized kernel, and a batch norm
assembled from some twenty element-wise steps. Here each is written by hand, from the operators
that the first derivative uses anyway. The layers are drop-in: same parameters, same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_parameters_need_gradients = True


@contextmanager
def activation_gradients_only() -> Iterator[None]:
    """Within it, a backward pass skips the gradients of weights, which a heat map has no use for.

    PyTorch tells a custom function which inputs *can* have a gradient, not which of them this
    backward pass asks for; so the one caller that asks for activations alone says so here.
    """
    global _parameters_need_gradients
    before, _parameters_need_gradients = _parameters_need_gradients, False
    try:
        yield
    finally:
        _parameters_need_gradients = before


def _convolution_gradients(grad_output, images, weight, options, mask):
    """Gradients of a convolution for its (input, weight, bias), where `mask` asks for them."""
    stride, padding, dilation, groups = options
    return torch.ops.aten.convolution_backward(
        grad_output, images, weight, [weight.shape[0]],
        stride, padding, dilation, False, [0, 0], groups, mask,
    )  # fmt: skip


class _Convolution(Function):
    @staticmethod
    def forward(ctx, images, weight, bias, options):
        ctx.save_for_backward(images, weight)
        ctx.options, ctx.has_bias = options, bias is not None
        return torch.conv2d(images, weight, bias, *options)

    @staticmethod
    def backward(ctx, grad_output):
        images, weight = ctx.saved_tensors
        need_input = ctx.needs_input_grad[0]
        if torch.is_grad_enabled() and not _parameters_need_gradients:
            grad_input = _ConvolutionInputGradient.apply(
                grad_output, weight, images, ctx.options
            )
            return grad_input, None, None, None
        need_weight = _parameters_need_gradients and ctx.needs_input_grad[1]
        need_bias = _parameters_need_gradients and ctx.has_bias and ctx.needs_input_grad[2]
        mask = [need_input, need_weight, need_bias]
        return *_convolution_gradients(grad_output, images, weight, ctx.options, mask), None


class _ConvolutionInputGradient(Function):
    """The input's gradient as a function of (grad_output, weight); linear in either."""

    @staticmethod
    def forward(ctx, grad_output, weight, images, options):
        ctx.save_for_backward(grad_output, weight)
        ctx.options = options
        mask = [True, False, False]
        return _convolution_gradients(grad_output, images, weight, options, mask)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        mask = [False, True, False]
        grad_weight = _convolution_gradients(grad_output, grad, weight, ctx.options, mask)[1]
        return torch.conv2d(grad, weight, None, *ctx.options), grad_weight, None, None


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` (zero padding given as numbers) with a cheap second derivative."""

    def forward(self, images: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(images, self.weight, self.bias, options)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


def _channel_mean(images: Tensor) -> Tensor:
    return images.mean((0, 2, 3))


class _BatchNorm(Function):
    """Batch norm in train mode: w (x - mean) / deviation + b, statistics over the batch."""

    @staticmethod
    def forward(ctx, images, weight, bias, running_mean, running_var, momentum, eps):
        out, mean, inverse_deviation = torch.native_batch_norm(
            images, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(images, weight, mean, inverse_deviation)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx, grad_output):
        images, weight, mean, inverse_deviation = ctx.saved_tensors
        nothing = (None,) * 4
        if torch.is_grad_enabled():
            if _parameters_need_gradients:  # a second derivative of everything: PyTorch's own
                return *torch.ops.aten.native_batch_norm_backward(
                    grad_output, images, weight, None, None, mean, inverse_deviation,
                    True, ctx.eps, ctx.needs_input_grad[:3],
                ), *nothing  # fmt: skip
            grad_input = _BatchNormInputGradient.apply(
                grad_output, images, weight, mean, inverse_deviation
            )
            return grad_input, None, None, *nothing
        centred = images - _per_channel(mean)
        mean_grad = _channel_mean(grad_output)
        mean_product = _channel_mean(grad_output * centred) * inverse_deviation
        grad_input = _batch_norm_input_gradient(
            grad_output, centred, weight, inverse_deviation, mean_grad, mean_product
        )
        count = grad_output.numel() / grad_output.shape[1]
        return grad_input, mean_product * count, mean_grad * count, *nothing


def _batch_norm_input_gradient(
    grad, centred, weight, inverse_deviation, mean_grad, mean_product
) -> Tensor:
    """(w/s) (grad - mean(grad) - xhat mean(grad xhat)), xhat = centred/s: symmetric in grad."""
    scale = weight * inverse_deviation
    shifted = (grad - _per_channel(mean_grad)).mul_(_per_channel(scale))
    return shifted.addcmul_(centred, _per_channel(-scale * inverse_deviation * mean_product))


class _BatchNormInputGradient(Function):
    """The input's gradient as a function of (grad_output, images, weight)."""

    @staticmethod
    def forward(ctx, grad_output, images, weight, mean, inverse_deviation):
        centred = images - _per_channel(mean)
        mean_grad = _channel_mean(grad_output)
        mean_product = _channel_mean(grad_output * centred) * inverse_deviation
        ctx.save_for_backward(
            grad_output, centred, weight, inverse_deviation, mean_grad, mean_product
        )
        return _batch_norm_input_gradient(
            grad_output, centred, weight, inverse_deviation, mean_grad, mean_product
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_output, centred, weight, inverse_deviation, mean_output, product_output = (
            ctx.saved_tensors
        )
        # With <., .> the mean over a channel, xhat = centred / s, g = grad, o = grad_output, the
        # first derivative is L = (n w / s) Q, Q = <g o> - <g><o> - <g xhat><o xhat>; what follows
        # is dL/do (the same symmetric map), dL/dx (x also moves mean and s) and dL/dw.
        mean = _channel_mean(grad)
        product = _channel_mean(grad * centred) * inverse_deviation
        correlation = (
            _channel_mean(grad * grad_output) - mean * mean_output - product * product_output
        )
        to_output = _batch_norm_input_gradient(
            grad, centred, weight, inverse_deviation, mean, product
        )
        scale = -weight * inverse_deviation**2
        of_images = inverse_deviation * (correlation - 2 * product * product_output)
        constant = mean * product_output + product * mean_output
        to_images = grad * _per_channel(scale * product_output)
        to_images.addcmul_(grad_output, _per_channel(scale * product))
        to_images.addcmul_(centred, _per_channel(scale * of_images))
        to_images.sub_(_per_channel(scale * constant))
        count = grad.numel() / grad.shape[1]
        return to_output, to_images, correlation * inverse_deviation * count, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a cheap second derivative in train mode."""

    def forward(self, images: Tensor) -> Tensor:
        usual = self.affine and self.track_running_stats and self.momentum is not None
        if not (self.training and usual):
            return super().forward(images)
        self.num_batches_tracked.add_(1)
        return _BatchNorm.apply(
            images, self.weight, self.bias, self.running_mean, self.running_var,
            self.momentum, self.eps,
        )  # fmt: skip
