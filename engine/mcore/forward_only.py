"""A network's layers as drawing answers wants them: with a cache, without gradients, and without the cost of what only training needs.

    with forward_only(model) as attentions:                     # spec_torch.Attention of each layer; give each a kv_cache.LayerCache
        hidden = run_layers(network, hidden, turn, local)       # [s, b, h] through the layers of one chunk

One new token is so little work that megatron's own forward passes cost as much as the arithmetic: their context managers, autograd functions
and checks are two thirds of a step of a small model on a CPU. So linear layers, norms and gates compute plainly meanwhile (their class changes,
their weights stay), and run_layers says what a layer is in ten lines. Layers of other kinds (Transformer Engine's, adapters, routers and
dispatchers of experts) run as they are.
Left out: dropout, recomputation and FP8, which are off here.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from engine.mcore.build import bare
from engine.mcore.norms import NormedAdd
from engine.mcore.ops_torch import RMSNorm
from engine.mcore.spec_torch import Attention, ExpertRow


class Turn(NamedTuple):
    """What rotary embedding multiplies with, computed once for all layers: [s, b or 1, 1, r], in the dtype of what is turned.

    cos of each angle twice, for both halves of a head; sin likewise, negative for the first half. A factor of both is in them.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor, factor: float, dtype) -> "Turn":
        """angles: fp32 [s, b or 1, 1, r / 2]."""
        cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return cls(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))

    def apply(self, t: Tensor) -> Tensor:
        """t [s, b, heads, d], its first r <= d dims turned (RoFormer, arXiv 2104.09864)."""
        r = self.cos.size(-1)
        if r < t.size(-1):
            return torch.cat([self.apply(t[..., :r]), t[..., r:]], -1)
        return (t * self.cos).addcmul_(t.roll(r // 2, -1), self.sin)


def run_layers(network, hidden: Tensor, turn: Turn | None, local: Turn | None) -> Tensor:
    """Hidden states [s, b, h] through all layers of a bare chunk, and the norm behind the last layer where the chunk has it.

    turn: None without RoPE. local: the turn in layers with a sliding window.
    """
    for layer in network.decoder.layers:
        attention = layer.self_attention
        query, key, value = attention.get_query_key_value_tensors(layer.input_layernorm(hidden), None)
        if turn is not None:
            own = local if attention.core_attention.window else turn
            query, key = own.apply(query), own.apply(key)
        hidden = _added(layer.self_attn_bda, hidden, attention.linear_proj(attention.core_attention(query, key, value, None)))
        hidden = _added(layer.mlp_bda, hidden, layer.mlp(layer.pre_mlp_layernorm(hidden)))
    norm = network.decoder.final_layernorm
    return hidden if norm is None else norm(hidden)


def _added(how, residual: Tensor, output: tuple[Tensor, Tensor | None]) -> Tensor:
    out, bias = output
    if isinstance(how, NormedAdd):
        return residual + how.normed(out, bias)
    return residual + (out if bias is None else out + bias)


class _Column(ColumnParallelLinear):
    def forward(self, x):
        bias = self.bias
        return (F.linear(x, self.weight), bias) if self.skip_bias_add else (F.linear(x, self.weight, bias), None)


class _Row(RowParallelLinear):
    def forward(self, x):
        if self.tp_group.size() > 1 or not self.skip_bias_add:
            return super().forward(x)
        return F.linear(x, self.weight), self.bias


class _RMSNorm(RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


_PLAIN = {ColumnParallelLinear: _Column, RowParallelLinear: _Row, ExpertRow: _Row, RMSNorm: _RMSNorm}  # exactly these, none that derive from them

# What may be on while training, and what stands for off: of modules and dispatchers of experts, and of configurations.
_OFF = {"sequence_parallel": False, "scatter_to_sequence_parallel": False, "reduce_scatter_embeddings": False, "drop_and_pad": False}
_OFF_IN_CONFIG = {"sequence_parallel": False, "fp8": None, "moe_expert_capacity_factor": None}


@contextlib.contextmanager
def forward_only(model) -> Iterator[list[Attention]]:
    """Change the network of a ParallelModel for the time being; afterwards everything is as it was. Yields the attention of each layer."""
    changes, attentions = [], []
    for chunk in model.chunks:
        for module in chunk.modules():
            changes.append((module, "training", False))
            for owner, off in (module, _OFF), (getattr(module, "config", None), _OFF_IN_CONFIG), (getattr(module, "token_dispatcher", None), _OFF):
                changes += [(owner, name, value) for name, value in off.items() if getattr(owner, name, value) != value]
            if type(module) in _PLAIN:
                changes.append((module, "__class__", _PLAIN[type(module)]))
        for layer in bare(chunk).decoder.layers:
            attention = layer.self_attention.core_attention
            if not isinstance(attention, Attention):  # Transformer Engine's, which knows no cache of ours; its sinks are all it has
                sinks = attention.softmax_offset
                attention = Attention(layer.config, layer.layer_number, None, "self", softmax_scale=layer.config.softmax_scale).eval()
                attention.softmax_offset = sinks
                changes.append((layer.self_attention, "core_attention", attention))
            attentions.append(attention)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            yield attentions
    finally:
        for attention in attentions:
            attention.cache = None
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
