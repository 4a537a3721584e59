"""Multi-head latent attention, of the layers of either backend (DeepSeek-V2, arXiv 2405.04434, sec. 2.1; V3 has the same).

    hidden [s, b, h] -> q = up(norm(down(h)))  or  q = W h                    [s, b, heads, rope + nope]
                        c = norm(down(h)),  k = [RoPE key shared by all heads; up(c)],  v = up(c)

A head's dims begin with those that RoPE turns, so that megatron's attention turns them, keeps them in a key cache and splits them over
tp and cp as it does for any head of which a part is turned. The order is a matter of the weights' rows; engine/hf/deepseek_v2.py has it.
The two projections down are small and whole on every tp rank; those up are split by heads. Names in checkpoints are the same whatever the parts are.
Left out: a cache of the latents themselves (answers are drawn from whole keys and values), and biases.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule

NORM_EPS = 1e-6  # of the norms of latents, whatever that of the layers is


@dataclass
class LatentSubmodules:
    """What a layer spec names: the backend's classes for the parts, and config.Mla.

    down(config, width, num_out): a linear layer without bias, whole on every tp rank. up: column-parallel. linear_proj: row-parallel.
    core_attention: takes keys of config.kv_channels dims and values of mla.v_head_dim.
    """

    norm: type
    down: type
    up: type
    linear_proj: type
    core_attention: type
    mla: object


class LatentAttention(Attention):
    """The attention of a layer; config.kv_channels is the size of a query head."""

    def __init__(self, config, submodules: LatentSubmodules, layer_number, attn_mask_type=None, cp_comm_type=None, pg_collection=None):
        # Without an output layer, whose input megatron would make as wide as the queries.
        super().__init__(config, replace(submodules, linear_proj=IdentityOp), layer_number, attn_mask_type, "self", cp_comm_type, pg_collection)
        mla, hidden, heads = submodules.mla, config.hidden_size, config.num_attention_heads
        self.mla, self.val_hidden_size = mla, mla.v_head_dim

        def split_by_heads(width: int, dims: int):
            return submodules.up(width, heads * dims, config=config, init_method=config.init_method, gather_output=False, bias=False,
                                 skip_bias_add=False, is_expert=False, tp_group=self.tp_group)

        if mla.q_lora_rank:
            self.linear_q_down_proj = submodules.down(config, hidden, mla.q_lora_rank)
            self.q_layernorm = submodules.norm(config, mla.q_lora_rank, eps=NORM_EPS)
            self.linear_q_up_proj = split_by_heads(mla.q_lora_rank, config.kv_channels)
        else:
            self.q_layernorm = None
            self.linear_q_proj = split_by_heads(hidden, config.kv_channels)
        self.linear_kv_down_proj = submodules.down(config, hidden, mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.kv_layernorm, self.k_layernorm = submodules.norm(config, mla.kv_lora_rank, eps=NORM_EPS), None
        self.linear_kv_up_proj = split_by_heads(mla.kv_lora_rank, mla.qk_nope_head_dim + mla.v_head_dim)
        self.linear_proj = submodules.linear_proj(heads * mla.v_head_dim, hidden, config=config, init_method=config.output_layer_init_method, bias=False,
                                                  input_is_parallel=True, skip_bias_add=True, is_expert=False, tp_group=self.tp_group)
        if config.fp8 and config.fp8_recipe != "delayed":  # as megatron's attention does, which keeps that input anyway: not once more in FP8
            self.linear_proj.save_original_input = True

    def get_query_key_value_tensors(self, hidden_states, key_value_states=None, split_qkv=True, output_gate=False):
        """hidden [s, b, h] (a tp rank's part of s under sequence parallel) -> query and key [s, b, heads, d], value [s, b, heads, v]."""
        mla = self.mla
        if mla.q_lora_rank:
            latent, _ = self.linear_q_down_proj(hidden_states)
            query, _ = self.linear_q_up_proj(self.q_layernorm(latent))
        else:
            query, _ = self.linear_q_proj(hidden_states)
        down, _ = self.linear_kv_down_proj(hidden_states)
        latent, rope_key = down.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
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
    """A linear layer without bias, whole on every tp rank: the torch layers' `down`."""

    def __init__(self, config, width: int, num_out: int):
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(torch.empty(num_out, width, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # each rank then sees a part of the sequence, and gradients are summed

    def forward(self, x):
        """[..., width] -> ([..., num_out], no bias)"""
        return F.linear(x, self.weight), None
