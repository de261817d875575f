"""Batch norm and its second derivative, over the whole batch even where processes share it."""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from immunity_lib.layers.passes import State
from immunity_lib.parallel import mean_over_processes, processes


class _BatchNorm(Function):
    """Batch norm in train mode: w (x - mean) / deviation + b, statistics over the batch."""

    @staticmethod
    def forward(ctx, images, weight, bias, running_mean, running_var, momentum, eps):
        if processes() == 1:
            out, mean, inverse_deviation = torch.native_batch_norm(
                images, weight, bias, running_mean, running_var, True, momentum, eps
            )
        else:
            mean, variance = _joint_statistics(images)
            count = _pixels(images) * processes()
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(variance * count / (count - 1), momentum)
            out, _, _ = torch.native_batch_norm(
                images, weight, bias, mean, variance, False, momentum, eps
            )
            inverse_deviation = (variance + eps).rsqrt()
        ctx.save_for_backward(images, weight, mean, inverse_deviation)
        return out

    @staticmethod
    def backward(ctx, grad_output):
        gradients = _BatchNormGradients.apply(grad_output, *ctx.saved_tensors)
        return *gradients, *(None,) * 4


class _BatchNormGradients(Function):
    """Gradients for (images, weight, bias) as a function of (grad_output, images, weight)."""

    @staticmethod
    def forward(ctx, grad_output, images, weight, mean, inverse_deviation):
        *gradients, o_xhat, o = _first_derivative(
            grad_output, images, weight, mean, inverse_deviation
        )
        ctx.save_for_backward(grad_output, images, weight, mean, inverse_deviation, o_xhat, o)
        ctx.set_materialize_grads(False)
        return (*gradients,)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_of_weight, grad_of_bias):
        grad_output, images, weight, mean, inverse_deviation, o_xhat, o = ctx.saved_tensors
        if grad_of_weight is not None or grad_of_bias is not None:
            # Not of a heat map, which is made of the activations' gradient alone
            gradients = (grad, grad_of_weight, grad_of_bias)
            return *_general_second_derivative(ctx.saved_tensors[:5], gradients), None, None
        # Let <.> be the mean over a channel of n values, xhat = (x - mean)/s, g = grad and
        # o = grad_output. The images' gradient contracted with g is
        #     L = (n w / s) Q,   Q = <g o> - <g><o> - <g xhat><o xhat>,
        # symmetric in g and o, so that dL/do is what a batch norm does to g. x moves the mean and
        # s too: dL/dx = -(w / s^2) (<o xhat>(g - <g>) + <g xhat>(o - <o>) + r xhat),
        # r = Q - 2 <g xhat><o xhat>.
        to_output, _, _, g_xhat, g = _first_derivative(
            grad, images, weight, mean, inverse_deviation
        )
        q = mean_over_processes((grad * grad_output).mean((0, 2, 3))) - g * o - g_xhat * o_xhat
        scale = -weight * inverse_deviation**2
        of_images = scale * (q - 2 * g_xhat * o_xhat) * inverse_deviation
        constant = -scale * (g * o_xhat + o * g_xhat) - of_images * mean
        to_images = torch.addcmul(_per_channel(constant), images, _per_channel(of_images))
        to_images.addcmul_(grad, _per_channel(scale * o_xhat))
        to_images.addcmul_(grad_output, _per_channel(scale * g_xhat))
        return to_output, to_images, q * inverse_deviation * _pixels(images), None, None


def _first_derivative(grad_output, images, weight, mean, inverse_deviation):
    """Gradients for images, weight and bias, then <o xhat> and <o>."""
    count, joint = _pixels(images), processes() > 1
    # Without the statistics' share in the gradient for images, where that is not known here
    gradient, o_xhat, o = torch.ops.aten.native_batch_norm_backward(
        grad_output, images, weight, mean, inverse_deviation**-2, mean, inverse_deviation,
        not joint, 0.0, [True] * 3,
    )  # fmt: skip
    if not joint:
        return gradient, o_xhat, o, o_xhat / count, o / count
    o_xhat_mean, o_mean = mean_over_processes(torch.stack([o_xhat, o]) / count)
    slope = -weight * inverse_deviation**2 * o_xhat_mean
    constant = -weight * inverse_deviation * o_mean - slope * mean
    gradient.add_(torch.addcmul(_per_channel(constant), images, _per_channel(slope)))
    return gradient, o_xhat, o, o_xhat_mean, o_mean


def _joint_statistics(images):
    """Mean and variance of each channel over what all processes hold."""
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    own = torch.stack(torch.batch_norm_update_stats(values, None, None, 0.0))
    mean, variance = own.double()  # in which it does no harm that squares of means cancel
    mean, square = mean_over_processes(torch.stack([mean, variance + mean.square()]))
    return mean.to(own.dtype), (square - mean.square()).to(own.dtype)


def _pixels(images: Tensor) -> int:
    """Of a channel, in all images that this process holds."""
    return images.numel() // images.shape[1]


def _general_second_derivative(inputs, grads):
    """PyTorch's own, of all three gradients for (grad_output, images, weight)."""
    if processes() > 1:
        raise NotImplementedError(
            "processes that train together cannot differentiate the gradients of a batch norm's "
            "weights again; do it in one process"
        )
    *variables, mean, inverse_deviation = inputs
    with torch.enable_grad():
        variables = [one.detach().requires_grad_() for one in variables]
        gradients = _first_derivative(*variables, mean, inverse_deviation)[:3]
        pairs = [pair for pair in zip(gradients, grads, strict=True) if pair[1] is not None]
        outputs, weights = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, variables, weights, allow_unused=True)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]


class BatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with a cheap second derivative in train mode; its statistics are
    those of the whole batch where several processes share it."""

    def forward(self, images: Tensor) -> Tensor:
        joint = self.training and processes() > 1
        usual = self.affine and self.track_running_stats and self.momentum is not None
        if not (joint or (State.cheap_second_derivatives and self.training and usual)):
            return super().forward(images)
        self.num_batches_tracked.add_(1)
        weight, bias = self.weight, self.bias
        if not self.affine:
            weight, bias = torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean)
        return _BatchNorm.apply(
            images, weight, bias, self.running_mean, self.running_var, self.momentum, self.eps
        )
