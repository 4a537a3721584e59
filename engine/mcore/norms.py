"""Norms in places that megatron has none for, in layers of either backend: behind a sublayer, and over all query (key) heads at once.

    spec = placed(spec, config, model, Norm, ColumnParallelLinear)      # a layer's ModuleSpec, with the norms that `model` asks for

OLMo-2 (arXiv 2501.00656, section 3.1) normalises what attention and MLP put out, before the residual is added, and queries and keys over
their whole width. The first happens where megatron adds bias and residual, so it is one place for dense layers and experts. For the second
each tp rank holds its heads' part of the weight, and ranks add up sums of squares.
Left out: an RMSNorm of whole width that is fused, which nothing here has.
"""

import contextlib
import functools
from dataclasses import replace

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from engine.mcore.ops_torch import RMSNorm


def placed(layer: ModuleSpec, config, model, norm, column) -> ModuleSpec:
    """`layer` with its norms where model.norm_place and model.qk_norm_width say. norm: the backend's; column: its column-parallel layer that
    has no norm in front, which takes the place of one that has."""
    if model.qk_norm and model.qk_norm_width == "all":
        heads = {"q_layernorm": config.num_attention_heads, "k_layernorm": config.num_query_groups}
        layer = with_attention(layer, **{name: ModuleSpec(module=WholeNorm, params={"num_heads": num}) for name, num in heads.items()})
    if model.norm_place == "post":
        if hasattr(layer.submodules.self_attention.submodules, "linear_qkv"):  # latent attention never has the norm in one of its layers
            layer = with_attention(layer, linear_qkv=column)
        parts = replace(layer.submodules, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp)
        if hasattr(parts.mlp.submodules, "linear_fc1"):  # of experts the norm in front is always a layer of its own
            parts = replace(parts, mlp=replace(parts.mlp, submodules=replace(parts.mlp.submodules, linear_fc1=column)))
        layer = replace(layer, submodules=parts)
    if model.norm_place == "pre":
        return layer
    add = ModuleSpec(module=NormedAdd, params={"config": config, "norm": norm})
    return replace(layer, module=Layer, submodules=replace(layer.submodules, self_attn_bda=add, mlp_bda=add))


def with_attention(layer: ModuleSpec, **changes) -> ModuleSpec:
    """`layer` with other parts in its attention."""
    attention = layer.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, **changes))
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


class Layer(TransformerLayer):
    """megatron's, whose sublayers' outputs are added in the caller's gradient mode. megatron switches gradients on there, for the sake of an
    older torch; with a norm in that place every forward pass would keep a graph."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias_dropout_add_exec_handler = contextlib.nullcontext


class NormedAdd(MegatronModule):
    """residual + dropout(norm(x + bias)), in the place of megatron's bias_dropout_add."""

    def __init__(self, config, norm):
        super().__init__(config=config)
        self.post_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool):
        """As megatron's get_bias_dropout_add: a function of (x, bias), residual and the share that is dropped."""
        return functools.partial(self._add, training)

    def _add(self, training: bool, x_with_bias, residual, prob: float):
        return residual + torch.nn.functional.dropout(self.normed(*x_with_bias), prob, training)

    def normed(self, x, bias):
        return self.post_layernorm(x if bias is None else x + bias)


class WholeNorm(RMSNorm):
    """RMSNorm over all heads of all tp ranks: x [s, b, heads of this rank, d]."""

    def __init__(self, config, hidden_size: int, eps: float, num_heads: int):
        assert config.normalization == "RMSNorm"
        self.tp = mpu.get_tensor_model_parallel_world_size()
        super().__init__(num_heads // self.tp * hidden_size, eps=eps)
        self.width = num_heads * hidden_size
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x):
        flat = x.flatten(-2)
        if self.tp == 1:
            return super().forward(flat).view_as(x)
        squares = _over_ranks(flat.float().square().sum(-1, keepdim=True))
        return (flat * torch.rsqrt(squares / self.width + self.eps) * self.weight).to(x.dtype).view_as(x)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
                                                   tp_group=mpu.get_tensor_model_parallel_group(), dp_cp_group=metadata["dp_cp_group"])


def _over_ranks(squares):
    """The sum over tp ranks. Every rank uses it for its own heads, so the gradients of these uses are summed too."""
    return copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
