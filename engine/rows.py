"""A tensor in pieces: tensors that lie below one another in it, which a writer need not join to write them behind one another."""

from torch import Tensor, cat, empty

Rows = tuple[Tensor, ...]
"""The rows of a larger tensor, in order; all have its other dims."""


def whole(tensor: Tensor | Rows) -> Tensor:
    """A tensor in one piece."""
    if isinstance(tensor, Tensor):
        return tensor
    if len(tensor) == 1:
        return tensor[0]
    if tensor[0].is_meta:  # torch would load its compiler to join tensors without numbers
        return empty(shape_of(tensor), dtype=tensor[0].dtype, device="meta")
    return cat(tensor)


def pieces(tensor: Tensor | Rows) -> Rows:
    """A tensor as rows, which one piece is too."""
    return (tensor,) if isinstance(tensor, Tensor) else tensor


def shape_of(tensor: Tensor | Rows) -> tuple[int, ...]:
    """The shape of the tensor in one piece."""
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else (sum(row.shape[0] for row in tensor), *tensor[0].shape[1:])
