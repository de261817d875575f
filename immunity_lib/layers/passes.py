"""What the passes through a network are for, which its layers cannot see by themselves."""

from collections.abc import Iterator
from contextlib import contextmanager


class State:
    """Of the two context managers below; the layers read it."""

    cheap_second_derivatives = False
    weights_left_out = False


@contextmanager
def differentiated_twice(expected: bool = True) -> Iterator[None]:
    """Within it, forward passes prepare for a second derivative, if one is expected."""
    before, State.cheap_second_derivatives = State.cheap_second_derivatives, expected
    try:
        yield
    finally:
        State.cheap_second_derivatives = before


@contextmanager
def activations_only() -> Iterator[None]:
    """Within it, backward passes leave out the gradients of convolutions' weights.

    For a gradient for activations alone. PyTorch's own layers see by themselves which gradients
    one asks for; a Function is not told.
    """
    before, State.weights_left_out = State.weights_left_out, True
    try:
        yield
    finally:
        State.weights_left_out = before
