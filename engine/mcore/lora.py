"""Low-rank adapters on the parallel linear layers: LoRA (arXiv 2106.09685), rsLoRA (2312.03732) and DoRA (2402.09353).

    adapt(network, run)        # freeze the network and put adapters on lora.targets; right before its weights are filled
    start_magnitudes(network)  # DoRA: the row norms of the weights as they are now; once the base weights are loaded

    y = W x + s B A x          A [r, in], B [out, r], s = alpha / r; one pair for each Hugging Face layer, as PEFT trains them
    y = m / |W + s B A| * (W + s B A) x       DoRA: m [out], the norm taken per output row and not differentiated (sec. 4.3)

Parameters are called `<linear>.lora.<part>.A` (`.B`, `.magnitude`). What is split in W is split in them: B and m over the output rows of
a column-parallel layer, A over the input of a row-parallel one; the other factor is whole on every tp rank. So ranks exchange only
the r numbers per token between the two. The rows of a part lie side by side in B, and meet the fused order of W at run time.
One dropout mask serves all parts of a fused layer (PEFT draws one each).
Left out: adapters on the vocabulary and the router, the Transformer Engine backend, and names (engine/adapters.py) and files (engine/hf/peft.py).
"""

import contextlib
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from engine import adapters
from engine.mcore import mtp


def adapt(network, run) -> None:
    """Freeze a bare network, all but a value head, and put adapters on the layers that run.lora names. Nothing when lora.rank is 0."""
    if not run.lora.rank:
        return
    for name, parameter in network.named_parameters():
        parameter.requires_grad = name.startswith("value_head.")
    for name, module in [(name, module) for name, module in network.named_modules() if not name.startswith(mtp.PREFIX)]:
        linear = name.rpartition(".")[2]
        if set(adapters.parts_of(linear, run.model)) & set(run.lora.targets):
            module.__class__ = AdaptedRow if isinstance(module, RowParallelLinear) else AdaptedColumn
            module.attach(adapters.block_of(linear, run.model, module.weight.size(0)), run.lora)
    if network.pre_process and run.train.recompute == "full":
        # A recomputed layer gets gradients only where its input wants some, and nothing below the first layer learns.
        network.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled()))


def fill(name: str, whole: Tensor, generator: torch.Generator) -> None:
    """Initial values of the adapter parameter `name`, whole, as PEFT draws them: A uniform in +- 1 / sqrt(in) (kaiming with a = sqrt(5)),
    B zero; a magnitude has to wait for start_magnitudes."""
    if name.endswith(".A"):
        bound = 1 / math.sqrt(whole.size(1))
        whole.uniform_(-bound, bound, generator=generator)
    else:
        whole.zero_()


@torch.no_grad()
def start_magnitudes(network) -> None:
    """DoRA's magnitudes at the row norms of W + s B A, so that the network computes what it would without them. Collective over tp."""
    for module in network.modules():
        if isinstance(module, _Adapted) and module.is_dora:
            for adapter, norms in zip(module.lora.values(), module.row_norms()):
                adapter.magnitude.copy_(norms)


class Adapter(torch.nn.Module):
    """The factors of one part. A module that is called: megatron's DDP waits for gathered parameters when a module is."""

    def __init__(self, rank: int, num_rows: int, num_cols: int, is_dora: bool, like: Tensor):
        super().__init__()
        empty = lambda *shape: torch.nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))  # noqa: E731
        self.A, self.B = empty(rank, num_cols), empty(num_rows, rank)
        self.register_parameter("magnitude", empty(num_rows) if is_dora else None)

    def forward(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(A, B, magnitude)"""
        return self.A, self.B, self.magnitude


class _Adapted:
    """What column- and row-parallel layers with adapters share. The class of a built megatron layer is changed to one of the two."""

    split_axes: dict[str, int]
    """Which dim of each kind of parameter is split over tp."""

    def attach(self, block: dict[str, int], lora) -> None:
        """Make the parameters. block: rows of every part in one block of the weight, in order (engine/adapters.py)."""
        num_rows, num_cols = self.weight.shape
        self.block, self.num_blocks = block, num_rows // sum(block.values())
        self.scale, self.dropout, self.is_dora = adapters.scale(lora), lora.dropout, lora.dora
        self.lora = torch.nn.ModuleDict({part: Adapter(lora.rank, rows * self.num_blocks, num_cols, lora.dora, self.weight)
                                         for part, rows in block.items() if part in lora.targets})
        for name, parameter in self.lora.named_parameters():
            self._tell_megatron(name.rpartition(".")[2], parameter)

    def _tell_megatron(self, kind: str, parameter) -> None:
        """The marks by which megatron reduces a gradient and counts it in the norm, those of the weight where they are split alike."""
        parameter.allreduce = getattr(self.weight, "allreduce", True)
        if kind in self.split_axes:
            set_tensor_model_parallel_attributes(parameter, True, self.split_axes[kind], 1)
        elif self.is_expert:
            # Experts are split over another group than the tp group megatron asks for copies, so a copy says so itself.
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            parameter.shared = self.tp_group.rank() > 0
        else:
            parameter.sequence_parallel = self.sequence_parallel and self.tp_group.size() > 1  # each tp rank saw a part of the tokens

    def forward(self, input_, *args, **kwargs):
        """As megatron's: [s, b, in of this rank] -> ([s, b, out of this rank], bias that is still to be added)."""
        base, bias = super().forward(input_, *args, **kwargs)
        factors = {part: adapter() for part, adapter in self.lora.items()}
        if not (self.training and self.dropout):
            return self._adapted(factors, base, base, self._low(input_)), bias
        with self._own_random_numbers():
            dropped = F.dropout(input_, self.dropout)
        through_base = super().forward(dropped, *args, **kwargs)[0] if self.is_dora else None
        return self._adapted(factors, base, through_base, self._low(dropped)), bias

    def _own_random_numbers(self):
        """Ranks that hold different numbers draw different masks; under sequence parallel megatron has forked the generator already."""
        differs = isinstance(self, RowParallelLinear) and not self.sequence_parallel and self.tp_group.size() > 1
        return get_cuda_rng_tracker().fork() if differs else contextlib.nullcontext()

    def _adapted(self, factors: dict, base: Tensor, through_base: Tensor | None, low: Tensor) -> Tensor:
        """base: W x + b; through_base: W x' + b and low: A x', of the input after dropout. -> the layer's output."""
        pieces = dict(zip(self.block, self._by_part(base, -1)))
        lows = dict(zip(self.lora, (low * self.scale).chunk(len(self.lora), dim=-1)))
        if self.is_dora:
            bias = 0 if self.bias is None or self.skip_bias_add else self.bias
            directions = dict(zip(self.block, self._by_part(through_base - bias, -1)))
            norms = dict(zip(self.lora, self.row_norms()))
        for part, (_, b, magnitude) in factors.items():
            change = F.linear(lows[part], self._summed("B", b)).unflatten(-1, (self.num_blocks, -1))
            if self.is_dora:
                ratio = (self._summed("magnitude", magnitude) / norms[part]).to(base.dtype).view(self.num_blocks, -1)
                change = (ratio - 1) * directions[part] + ratio * change
            pieces[part] = pieces[part] + change
        return torch.cat(list(pieces.values()), dim=-1).flatten(-2)

    def _by_part(self, tensor: Tensor, dim: int):
        """Views of a fused dim, one per part: its rows as two dims [blocks, rows of a block]."""
        return tensor.unflatten(dim, (self.num_blocks, -1)).split(list(self.block.values()), dim=-1 if dim == -1 else dim + 1)

    def _all_a(self) -> Tensor:
        return self._summed("A", torch.cat([adapter.A for adapter in self.lora.values()]))

    def _summed(self, kind: str, parameter: Tensor) -> Tensor:
        """A factor that all ranks of an expert's tp group hold: each sees a part of its gradient, which is summed here, for megatron
        sums such gradients of dense layers only."""
        is_partial = self.explicit_expert_comm and kind not in self.split_axes
        return copy_to_tensor_model_parallel_region(parameter, group=self.tp_group) if is_partial else parameter

    @torch.no_grad()
    def row_norms(self) -> list[Tensor]:
        """|W + s B A| per output row of each adapted part, fp32 [rows of this rank], without ever building that matrix:
        |w + s b A|^2 = |w|^2 + 2 s (w A^T) . b + s^2 b (A A^T) . b."""
        weights = dict(zip(self.block, self._by_part(self.weight, 0)))  # [blocks, rows, in]
        squares = []
        for part, adapter in self.lora.items():
            weight, a, b = weights[part], adapter.A, adapter.B.float()
            own = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square().flatten()
            crossed = (weight @ a.t()).flatten(0, 1).float() * b
            among = (b @ (a.float() @ a.float().t())) * b
            squares.append(own + 2 * self.scale * crossed.sum(1) + self.scale**2 * among.sum(1))
        if isinstance(self, RowParallelLinear) and self.tp_group.size() > 1:
            for square in squares:
                dist.all_reduce(square, group=self.tp_group)
        return [square.clamp_min(torch.finfo(torch.float32).tiny).sqrt() for square in squares]

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The weight's, as megatron describes it, and the adapters', each split where split_axes says."""
        axes = {name: self.split_axes[name.rpartition(".")[2]] for name, _ in self.named_parameters()
                if name.rpartition(".")[2] in self.split_axes}
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets,
                                                   tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])


class AdaptedColumn(_Adapted, ColumnParallelLinear):
    """A layer whose output rows are split over tp: A is whole on every rank, B is split."""

    split_axes = {"weight": 0, "bias": 0, "B": 0, "magnitude": 0}

    def _low(self, x: Tensor) -> Tensor:
        """A x of every token [s, b, parts * r]; backward sums over the ranks' rows of B."""
        low = F.linear(x, self._all_a())
        if self.explicit_expert_comm or self.tp_group.size() == 1:
            return low  # the dispatcher has gathered the tokens, and sums their gradients
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(low, group=self.tp_group)


class AdaptedRow(_Adapted, RowParallelLinear):
    """A layer whose input is split over tp: A is split, B is whole on every rank and multiplies what is summed already."""

    split_axes = {"weight": 1, "A": 1}

    def _low(self, x: Tensor) -> Tensor:
        """A x summed over the ranks' inputs; with sequence parallel for this rank's tokens only."""
        low = F.linear(x, self._all_a())
        if self.explicit_expert_comm or self.tp_group.size() == 1:
            return low  # the dispatcher sums the outputs
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(low, group=self.tp_group)
