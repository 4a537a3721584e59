"""A tensor in pieces: tensors that lie below one another in it, which a writer need not join to write them behind one another."""

from torch import Tensor, cat

Rows = tuple[Tensor, ...]
"""The rows of a larger tensor, in order; all have its other dims."""


def whole(tensor: Tensor | Rows) -> Tensor:
    """A tensor in one piece."""
    return tensor if isinstance(tensor, Tensor) else tensor[0] if len(tensor) == 1 else cat(tensor)


def pieces(tensor: Tensor | Rows) -> Rows:
    """A tensor as rows, which one piece is too."""
    return (tensor,) if isinstance(tensor, Tensor) else tensor


def shape_of(tensor: Tensor | Rows) -> tuple[int, ...]:
    """The shape of the tensor in one piece."""
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else (sum(row.shape[0] for row in tensor), *tensor[0].shape[1:])
