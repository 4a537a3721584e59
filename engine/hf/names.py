"""The rules by which HF tensors and engine tensors hold the same numbers; a family file is a list of them.

A Pair ties one engine tensor to the HF tensors with its numbers. Its `join` makes the engine tensor from them, its `split` undoes
that, bit by bit. `from_hf` and `to_hf` walk a list of Pairs in model order and read every tensor once, when its turn comes, so a
lazy mapping never holds a whole model. `rows_from_hf` and `rows_to_hf` leave unjoined what only lies below one another, for who writes it anyway.
Engine names and shapes are those of a megatron GPTModel.state_dict() at tp = pp = ep = 1.
An HF tensor that stacks the experts of a layer is tied part by part, under names of slice_of.
Left out: parallel shards (the checkpoint reader has put them together) and changes of dtype (export's affair).
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from engine.config import Model
from engine.hf.fields import HFError
from engine.rows import Rows, shape_of, whole

Shape = tuple[int, ...]
_SLICE = re.compile(r"(.+)\[(\d+)/(\d+)\]")


@dataclass(frozen=True)
class Pair:
    """One engine tensor and the HF tensors that hold its numbers."""

    engine: str
    """Name in the engine; empty when the engine has no such tensor, and then the HF ones must be zero."""
    hf: dict[str, Shape]
    """HF names with their shapes, in the order that join takes and split gives."""
    join: Callable[..., Tensor | Rows]
    """HF tensors -> engine tensor, or what lies below one another in it."""
    split: Callable[[Tensor], Sequence[Tensor | Rows]]
    """Engine tensor -> HF tensors, each in one piece or not."""
    is_optional: bool = False
    """The HF tensors may all be absent, which means zeros: a bias that this HF model does without."""

    @property
    def engine_shape(self) -> Shape:
        return shape_of(self.join(*(torch.empty(shape, device="meta") for shape in self.hf.values())))


def same(engine: str, hf: str, *shape: int, is_optional: bool = False) -> Pair:
    """The same tensor under another name."""
    return Pair(engine, {hf: shape}, lambda t: t, lambda t: (t,), is_optional)


def transposed(engine: str, hf: str, rows: int, cols: int) -> Pair:
    """Engine [rows, cols] = [out, in]; HF's Conv1D keeps [in, out]."""
    return Pair(engine, {hf: (cols, rows)}, lambda t: t.T, lambda t: (t.T,))


def stacked(engine: str, hf: Sequence[str], *shape: int, is_optional: bool = False) -> Pair:
    """HF tensors of one shape on top of each other; the gated fc1 is [gate; up]."""
    return Pair(engine, {name: shape for name in hf}, lambda *t: t, lambda t: t.chunk(len(hf)), is_optional)


def vocabulary(engine: str, hf: str, model: Model) -> Pair:
    """[padded_vocab, h] in the engine, [vocab, h] in HF; the added rows are zero, and the engine masks their logits."""
    return Pair(engine, {hf: (model.vocab_size, model.hidden_size)}, partial(pad_rows, model.padded_vocab_size),
                lambda t: (t[: model.vocab_size],))


def head(model: Model) -> list[Pair]:
    """What stands on the last layer: the output matrix, unless it is the embedding's, or the row vector of a reward."""
    if model.head == "scalar":
        return [same("value_head.weight", "score.weight", 1, model.hidden_size)]
    return [] if model.tie_embeddings else [vocabulary("output_layer.weight", "lm_head.weight", model)]


def qkv(engine: str, hf: Sequence[str], model: Model, *cols: int, is_optional: bool = False) -> Pair:
    """HF's q, k and v as one engine tensor, group by group; cols is (h,) for weights and () for biases."""
    q_rows, kv_rows = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    shapes = [(q_rows, *cols), (kv_rows, *cols), (kv_rows, *cols)]
    return Pair(engine, dict(zip(hf, shapes)), partial(fuse_qkv, model), partial(unfused_rows, model), is_optional)


def slice_of(hf: str, index: int, count: int) -> str:
    """Name, in Pair.hf, of one of the `count` parts that an HF tensor stacks along a first dim of its own (the experts of a layer)."""
    return f"{hf}[{index}/{count}]"


def copied(pair: Pair, names: Sequence[str]) -> Pair:
    """`pair`, of a single HF tensor, where HF keeps the same numbers under further names too."""
    (name, shape), = pair.hf.items()

    def join(first: Tensor, *others: Tensor) -> Tensor:
        differing = [other for other, t in zip(names, others) if not t.is_meta and not torch.equal(t, first)]
        if differing:
            raise HFError(f"{some(differing)} should hold the numbers of {name}, which the engine keeps once, but differs")
        return pair.join(first)

    return Pair(pair.engine, {other: shape for other in (name, *names)}, join, lambda t: (1 + len(names)) * tuple(pair.split(t)), pair.is_optional)


def must_be_zero(hf: str, *shape: int) -> Pair:
    """An HF tensor that the engine's model does without."""
    return Pair("", {hf: shape}, lambda t: t, lambda t: (t,))


def pad_rows(rows: int, tensor: Tensor) -> Rows:
    """[n, h] -> [rows, h], zeros below."""
    return (tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])) if rows > tensor.shape[0] else (tensor,)


def fuse_qkv(model: Model, q: Tensor, k: Tensor, v: Tensor) -> Rows:
    """q [heads * d, ...], k and v [groups * d, ...] -> [(heads + 2 * groups) * d, ...].

    For each KV group its query heads, then its key head, then its value head: the order of megatron's linear_qkv.
    """
    return tuple(block for blocks in zip(*(t.chunk(model.kv_heads) for t in (q, k, v))) for block in blocks)


def split_qkv(model: Model, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of fuse_qkv."""
    return tuple(map(whole, unfused_rows(model, fused)))


def unfused_rows(model: Model, fused: Tensor) -> tuple[Rows, Rows, Rows]:
    """The same, q, k and v in their pieces."""
    d, q_rows = model.head_size, model.num_attention_heads // model.kv_heads * model.head_size
    return tuple(zip(*(block.split([q_rows, d, d]) for block in fused.split(q_rows + 2 * d))))


def hf_shapes(pairs: Sequence[Pair]) -> dict[str, Shape]:
    """HF names with their shapes, in model order."""
    shapes = {}
    for pair in pairs:
        for name, shape in pair.hf.items():
            stack, _, count = _parsed(name)
            shapes[stack] = (count, *shape) if count else shape
    return shapes


def from_hf(pairs: Sequence[Pair], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Engine (name, tensor) in model order. Raises HFError for a missing tensor or a wrong shape."""
    return ((name, whole(rows)) for name, rows in rows_from_hf(pairs, tensors))


def rows_from_hf(pairs: Sequence[Pair], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | Rows]]:
    """The same with some tensors not in one piece yet."""
    dtype, tensors = torch.float32, _Sliced(tensors)
    for pair in pairs:
        if pair.is_optional and not any(name in tensors for name in pair.hf):
            # The HF model has no such bias; a zero one computes the same. It takes the dtype of its neighbours.
            yield pair.engine, torch.zeros(pair.engine_shape, dtype=dtype)
            continue
        parts = [_checked(tensors, name, shape) for name, shape in pair.hf.items()]
        dtype = parts[0].dtype
        if pair.engine:
            yield pair.engine, pair.join(*parts)
        elif any(part.any() for part in parts):
            raise HFError(f"{', '.join(pair.hf)} is not zero, and this model has no place for it; set model.linear_bias=true")


def to_hf(pairs: Sequence[Pair], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """HF (name, tensor) in model order. Raises HFError for a missing tensor, a wrong shape, or one that HF has no place for."""
    return ((name, whole(rows)) for name, rows in rows_to_hf(pairs, tensors))


def rows_to_hf(pairs: Sequence[Pair], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor | Rows]]:
    """The same with some tensors not in one piece yet."""
    homeless = sorted(name for name in set(tensors) - {pair.engine for pair in pairs} if not name.endswith("_extra_state"))
    if homeless:
        raise HFError(f"the checkpoint holds {some(homeless)}, for which the HF architecture has no place")
    dtype, stacks = torch.float32, {}
    for pair in pairs:
        if not pair.engine:
            yield from ((name, torch.zeros(shape, dtype=dtype)) for name, shape in pair.hf.items())
            continue
        tensor = _checked(tensors, pair.engine, pair.engine_shape)
        dtype = tensor.dtype
        for name, part in zip(pair.hf, pair.split(tensor)):
            stack, _, count = _parsed(name)
            if not count:
                yield name, part
                continue
            stacks.setdefault(stack, []).append(whole(part))
            if len(stacks[stack]) == count:
                yield stack, torch.stack(stacks.pop(stack))


def ways(pairs: Callable[[Model], list[Pair]]):
    """(to_hf, from_hf) of a family whose tensors are pairs(model): functions of (model, tensors) that walk them."""
    def engine_to_hf(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Engine tensors -> HF (name, tensor)."""
        return to_hf(pairs(model), tensors)

    def hf_to_engine(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """HF tensors -> engine (name, tensor)."""
        return from_hf(pairs(model), tensors)

    return engine_to_hf, hf_to_engine


class _Sliced:
    """`tensors` in which a name of slice_of can be looked up too; the last stacked tensor is kept."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors, self._last = tensors, (None, None)

    def __contains__(self, name: str) -> bool:
        return _parsed(name)[0] in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        stack, index, count = _parsed(name)
        if not count:
            return self._tensors[name]
        if self._last[0] != stack:
            self._last = stack, self._tensors[stack]
        if self._last[1].shape[0] != count:
            raise HFError(f"tensor {stack} stacks {self._last[1].shape[0]} parts, but the configuration makes it {count}")
        return self._last[1][index]


def _parsed(name: str) -> tuple[str, int, int]:
    """(the HF tensor's name, index, count) of a name of slice_of; count 0 for any other."""
    found = _SLICE.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else (name, 0, 0)


def some(words: Sequence[str], limit: int = 4) -> str:
    """The first few words and how many more there are, for messages."""
    return ", ".join(words[:limit]) + (f" and {len(words) - limit} more" if len(words) > limit else "")


def _checked(tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
    if name not in tensors:
        raise HFError(f"tensor {name} {list(shape)} is missing")
    tensor = tensors[name]
    if tuple(tensor.shape) != shape:
        raise HFError(f"tensor {name} has shape {list(tensor.shape)}, but the configuration makes it {list(shape)}")
    return tensor
