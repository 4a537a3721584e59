"""Multi-head latent attention for the torch backend (DeepSeek-V2, arXiv 2405.04434, sec. 2.1; V3 has the same).

    hidden [s, b, h] -> q = up(norm(down(h)))  or  q = W h                    [s, b, heads, rope + nope]
                        c = norm(down(h)),  k = [RoPE key shared by all heads; up(c)],  v = up(c)

A head's dims begin with those that RoPE turns, so that megatron's attention turns them, keeps them in a key cache and splits them over
tp and cp as it does for any head of which a part is turned. The order is a matter of the weights' rows; engine/hf/deepseek_v2.py has it.
The two projections down are small and whole on every tp rank; those up are split by heads.
Left out: a cache of the latents themselves (answers are drawn from whole keys and values), biases, and Transformer Engine.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.module import MegatronModule

NORM_EPS = 1e-6  # of the norms of latents, whatever that of the layers is


@dataclass
class LatentSubmodules:
    """What a layer spec names: the norm, the attention over heads, and config.Mla."""

    norm: type
    core_attention: type
    mla: object
    linear_proj: type = RowParallelLinear


class LatentAttention(Attention):
    """The attention of a layer; config.kv_channels is the size of a query head."""

    def __init__(self, config, submodules: LatentSubmodules, layer_number, attn_mask_type=None, cp_comm_type=None, pg_collection=None):
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection)
        mla, hidden, heads = submodules.mla, config.hidden_size, config.num_attention_heads
        self.mla, self.val_hidden_size = mla, mla.v_head_dim

        def split_by_heads(width: int, dims: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(width, heads * dims, config=config, init_method=config.init_method, bias=False, gather_output=False,
                                        tp_group=self.tp_group)

        if mla.q_lora_rank:
            self.linear_q_down_proj = Whole(config, hidden, mla.q_lora_rank)
            self.q_layernorm = submodules.norm(config, mla.q_lora_rank, eps=NORM_EPS)
            self.linear_q_up_proj = split_by_heads(mla.q_lora_rank, config.kv_channels)
        else:
            self.q_layernorm = None
            self.linear_q_proj = split_by_heads(hidden, config.kv_channels)
        self.linear_kv_down_proj = Whole(config, hidden, mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.kv_layernorm, self.k_layernorm = submodules.norm(config, mla.kv_lora_rank, eps=NORM_EPS), None
        self.linear_kv_up_proj = split_by_heads(mla.kv_lora_rank, mla.qk_nope_head_dim + mla.v_head_dim)
        if mla.v_head_dim != config.kv_channels:  # megatron sizes it by the query
            self.linear_proj = RowParallelLinear(heads * mla.v_head_dim, hidden, config=config, init_method=config.output_layer_init_method,
                                                 bias=False, input_is_parallel=True, skip_bias_add=True, tp_group=self.tp_group)

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, split_qkv=True, output_gate=False):
        """hidden [s, b, h] (a tp rank's part of s under sequence parallel) -> query and key [s, b, heads, d], value [s, b, heads, v]."""
        mla = self.mla
        if mla.q_lora_rank:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)))
        else:
            query, _ = self.linear_q_proj(hidden_states)
        latent, rope_key = self.linear_kv_down_proj(hidden_states).split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        up, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        # Each tp rank's heads read the whole key, so its gradient is the sum over ranks.
        if self.config.sequence_parallel:
            rope_key = gather_from_sequence_parallel_region(rope_key, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            rope_key = copy_to_tensor_model_parallel_region(rope_key, group=self.tp_group)
        query = query.unflatten(-1, (-1, self.config.kv_channels))
        key, value = up.unflatten(-1, (query.size(2), -1)).split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        rope_key = rope_key.unsqueeze(2).expand(-1, -1, query.size(2), -1)
        return query, torch.cat([rope_key, key], dim=-1), value


class Whole(MegatronModule):
    """A linear layer without bias, whole on every tp rank."""

    def __init__(self, config, width: int, num_out: int):
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.empty(num_out, width, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # each rank then sees a part of the sequence, and gradients are summed

    def forward(self, x):
        return F.linear(x, self.weight)
