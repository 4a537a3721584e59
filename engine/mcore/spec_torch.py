"""The `torch` layer backend: megatron's transformer layer built from modules that run on any device.

    spec = block_spec(config, model, vp_stage)     # what GPTModel takes as transformer_layer_spec
    mtp.block_spec(layer, num_layers, BACKEND)      # and, of one of its layers, as mtp_block_spec

Megatron supplies the linear layers, the MLP, the router, the dispatcher and the layer itself; here are the parts it only has
for CUDA: normalisation that works under sequence parallel, and attention by torch's scaled_dot_product_attention with
grouped-query heads, document masks, sliding windows and context parallel.
Models with sinks or capped logits take attention_torch.py in its place. Left out: FP8 (spec_te.py).
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from engine.mcore import attention_torch, gates, masks, norms
from engine.mcore.latent import LatentAttention, LatentSubmodules, Whole
from engine.mcore.ops_torch import RMSNorm, ZeroCentredRMSNorm, apply_rope

megatron_attention.apply_rotary_pos_emb = apply_rope  # megatron offers no choice here; ours hands other cases back to it


def block_spec(config, model, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pp rank (and model chunk) holds, dense or MoE as `model.moe_layers` says."""
    dense, moe = (gates.placed(norms.placed(_layer_spec(config, model, num_experts), config, model, Norm, ColumnParallelLinear), model)
                  for num_experts in (None, config.num_moe_experts))
    specs = [moe if is_moe else dense for is_moe in model.moe_layers]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=specs[first:first + count], layer_norm=Norm)


class TorchBackend(BackendSpecProvider):
    """Which class stands for each part of a layer."""

    def column_parallel_linear(self):
        return ColumnParallelLinear

    def row_parallel_linear(self):
        return RowParallelLinear

    def fuse_layernorm_and_linear(self):
        return False

    def column_parallel_layer_norm_linear(self):
        return None

    def layer_norm(self, rms_norm=False, for_qk=False):
        return Norm

    def core_attention(self):
        return Attention

    def grouped_mlp_modules(self, moe_use_grouped_gemm, moe_use_legacy_grouped_gemm):
        return SequentialMLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=ExpertRow)

    def activation_func(self):
        return None  # gates.placed says it


BACKEND = TorchBackend()


def _attention_spec(config, model) -> ModuleSpec:
    core = functools.partial(Attention, softcap=model.attention_softcap, has_sinks=model.attention_sinks)
    if model.is_latent:
        return ModuleSpec(module=LatentAttention, params={"attn_mask_type": AttnMaskType.causal},
                          submodules=LatentSubmodules(norm=Norm, down=Whole, up=ColumnParallelLinear, linear_proj=RowParallelLinear,
                                                      core_attention=core, mla=model.mla))
    qk_norm = Norm if config.qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=core, linear_proj=RowParallelLinear,
        q_layernorm=qk_norm, k_layernorm=qk_norm,
    )
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention)


def _layer_spec(config, model, num_experts) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=_attention_spec(config, model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=get_mlp_module_spec_for_backend(backend=BACKEND, num_experts=num_experts),
            mlp_bda=get_bias_dropout_add,
            # The te backend fuses each norm into the linear layer behind it; same names make checkpoints interchangeable.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                **({} if num_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
            },
        ),
    )


class ExpertRow(RowParallelLinear):
    """An expert's second matrix. megatron adds its bias in place, which autograd forbids for what a custom function handed through."""

    def forward(self, input_):
        output, bias = super().forward(input_)
        return (output if bias is None or not torch.is_grad_enabled() else output.clone()), bias


class Norm:
    """RMSNorm or LayerNorm as config.normalization says."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        kind = {"RMSNorm": RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        if config.layernorm_zero_centered_gamma:
            kind = ZeroCentredRMSNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            # Each tp rank sees a slice of the sequence, so megatron must sum these gradients over tp.
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class Attention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v for the heads of this tp rank, its logits capped or with sinks among them where the model has such.

    attention_mask: None for plain causal attention, or bool [batch, 1, queries, keys], True where a query may look;
    `engine/mcore/masks.py` builds it, in the key order that context parallel gathers (see there).
    """

    cache = None  # while answers are drawn, this layer's kv_cache.LayerCache

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
                 cp_comm_type=None, pg_collection=None, softcap=0.0, has_sinks=False):
        """softcap: of the logits, 0 for none. has_sinks: does each head have a learned logit without a value?"""
        super().__init__(config=config)
        self.softcap, self.softmax_offset = softcap, None  # megatron's name of the sinks
        if has_sinks:
            self.tp_group = pg_collection.tp
            self.softmax_offset = torch.nn.Parameter(torch.empty(config.num_attention_heads // self.tp_group.size(), dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)
        self.cp_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
        self.scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else 0  # tokens seen, itself included

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        """query [s, b, heads, d], key and value [s, b, kv_heads, d] -> [s, b, heads * d]."""
        assert attention_bias is None and packed_seq_params is None, "the torch backend takes document masks, not packed sequences"
        if self.cache is not None:
            if self.cache.rows.reading is None:
                return self.cache.attend(query, key, value, self.scale, self.window, self._written_out if self._is_special else None)
            self.cache.keep(key, value)
        elif self.cp_group is not None:
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        # [b, heads, s, d], contiguous: rope leaves query and key so, and for the value the copy costs less than it saves.
        q, k, v = (x.permute(1, 2, 0, 3).contiguous() for x in (query, key, value))
        mask, is_causal = self._mask(attention_mask, q.size(2), k.size(2), q.device)
        dropout = self.dropout if self.training else 0.0
        with get_cuda_rng_tracker().fork() if dropout and not self.config.sequence_parallel else contextlib.nullcontext():
            if self._is_special:
                out = self._written_out(q, k, v, mask, is_causal, dropout)
            else:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, scale=self.scale,
                                                     enable_gqa=q.size(1) != k.size(1))
        return out.permute(2, 0, 1, 3).reshape(out.size(2), out.size(0), -1)

    @property
    def _is_special(self) -> bool:
        return self.softcap > 0 or self.softmax_offset is not None

    def _written_out(self, q, k, v, mask, is_causal=False, dropout=0.0):
        return attention_torch.attend(q, k, v, mask, is_causal, self.scale, self.softcap, self.softmax_offset, dropout)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The sinks, split by heads, where there are any."""
        if self.softmax_offset is None:
            return {}
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, {"softmax_offset": 0}, sharded_offsets,
                                                   tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"])

    def _mask(self, mask, num_queries: int, num_keys: int, device):
        """(mask, is_causal) for SDPA. Fewer queries than keys means decoding with a key cache: the queries are the last ones."""
        if self.window and mask is None:
            positions = torch.arange(num_keys, device=device)
            distance = positions[num_keys - num_queries:, None] - positions[None, :]
            return (distance >= 0) & (distance < self.window), False
        if mask is None:
            if num_queries == num_keys:
                return None, num_queries > 1
            return (None if num_queries == 1 else torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(
                num_keys - num_queries)), False
        if self.window:
            mask = mask & (masks.distances(num_queries, num_keys, self.cp_group, device) < self.window)
        return mask, False
