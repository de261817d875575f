"""Layers whose gradient can be differentiated again at little cost.

The heat maps of eq (3) are gradients, and eqs (9) and (11) are losses on them, so training
differentiates a gradient. PyTorch's second derivatives of these layers are correct but wasteful:
that of a convolution uses filters as large as the grid, for one group of channels at a time, that
of batch norm is assembled from some twenty element-wise steps, and those of ReLU and max-pooling
fill and add whole tensors of zeros. Here each says what it needs and no more.

That costs a little in the first pass, so it is done within `differentiated_twice` alone; elsewhere
the layers are PyTorch's own. Either way they have the same parameters and the same results.
"""

from immunity_lib.layers.batch_norm import BatchNorm2d
from immunity_lib.layers.convolution import Conv2d
from immunity_lib.layers.passes import activations_only, differentiated_twice
from immunity_lib.layers.piecewise_linear import MaxPool2d, ReLU

__all__ = ["BatchNorm2d", "Conv2d", "MaxPool2d", "ReLU", "activations_only", "differentiated_twice"]
