"""The `te` layer backend: Transformer Engine's fused layers on a GPU, FP8 included.

    spec = block_spec(config, model, vp_stage)     # what GPTModel takes as transformer_layer_spec
    mtp.block_spec(layer, num_layers, BACKEND)      # and, of one of its layers, as mtp_block_spec
    check(run)                                     # what this backend cannot do, said before anything is built

megatron has the specs; this file chooses them layer by layer, puts the engine's latent attention (latent.py) into those of DeepSeek's models, and
gives document masks in the form that Transformer Engine takes: all documents of a micro-batch end to end (thd), with their boundaries, instead of a mask.
Left out: document masks under context parallel (thd needs every document padded to 2 * cp; the torch backend has masks there).
"""

import functools
from dataclasses import replace

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TEGroupedLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from engine import torch_only
from engine.mcore import gates, norms
from engine.mcore.latent import LatentAttention, LatentSubmodules


# gradient_accumulation_fusion is done by Transformer Engine in its own layers. The one ColumnParallelLinear beside them would
# ask for apex when it is built; it is build.TokenModel's output layer, which does without.
layers._grad_accum_fusion_available = True

if TEGroupedLinear is not None:  # None on a machine without Transformer Engine
    # Of recipes that keep no scales its FP8 state is empty; megatron 0.16.1 takes a pickle of scales for granted.
    _split_scales = TEGroupedLinear._split_extra_state
    TEGroupedLinear._split_extra_state = lambda self, state: _split_scales(self, state) if state.numel() else [state] * self.num_gemms

BACKEND = TESpecProvider()

_SUPPORT = {"delayed": "is_fp8_available", "tensorwise": "is_fp8_available", "blockwise": "is_fp8_block_scaling_available",
            "mxfp8": "is_mxfp8_available"}


def check(run) -> None:
    """Raises ValueError for what the te backend cannot do, on this device or at all."""
    recipe = run.train.fp8.recipe
    if recipe != "none":
        import transformer_engine.pytorch as te

        is_available, reason = getattr(te, _SUPPORT[recipe])(return_reason=True)
        if not is_available:
            raise ValueError(f"train.fp8.recipe={recipe} does not run on this GPU: {reason}; choose another recipe, or none")
    for problem in torch_only.limits(run):
        raise ValueError(problem)


def block_spec(config, model, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Specs of the layers that this pp rank (and model chunk) holds, dense or MoE as `model.moe_layers` says."""
    dense, moe = (gates.placed(norms.placed(_layer_spec(config, model, num_experts), config, model, TENorm, TEColumnParallelLinear), model)
                  for num_experts in (None, config.num_moe_experts))
    specs = [moe if is_moe else dense for is_moe in model.moe_layers]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=specs[first:first + count], layer_norm=TENorm)


def _layer_spec(config, model, num_experts) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm)
    if not model.is_latent:
        return norms.with_attention(layer, core_attention=SinkCore) if model.attention_sinks else layer
    core = functools.partial(LatentCore, k_channels=model.head_size, v_channels=model.value_size)
    attention = ModuleSpec(module=LatentAttention, params={"attn_mask_type": AttnMaskType.causal},
                           submodules=LatentSubmodules(norm=TENorm, down=Whole, up=TEColumnParallelLinear, linear_proj=TERowParallelLinear,
                                                       core_attention=core, mla=model.mla))
    # Two layers read the normalised input, so its norm is in none of them. In checkpoints it has the name that it has in every model.
    names = {**layer.submodules.sharded_state_dict_keys_map, "input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    return replace(layer, submodules=replace(layer.submodules, input_layernorm=TENorm, self_attention=attention, sharded_state_dict_keys_map=names))


class Whole(TELinear):
    """A linear layer without bias, whole on every tp rank, as latent.LatentSubmodules wants it."""

    def __init__(self, config, width: int, num_out: int):
        super().__init__(width, num_out, parallel_mode="duplicated", config=config, init_method=config.init_method, bias=False, skip_bias_add=False,
                         skip_weight_param_allocation=False)
        # Transformer Engine marks every weight as split over tp; megatron would count this one's gradient in the norm once per tp rank.
        self.weight.tensor_model_parallel = False


class SinkCore(TEDotProductAttention):
    """Attention with the sinks of this tp rank's heads among its logits, where the configuration asks for them (softmax_type)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.softmax_offset is not None:  # not marked as a part by Transformer Engine: the norm would count those of the first tp rank alone
            set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)


class LatentCore(SinkCore):
    """Attention over keys and values of different sizes. Its fused kernel takes each as a tensor of its own; values come as a part of one."""

    def forward(self, query, key, value, *args, **kwargs):
        return super().forward(query.contiguous(), key.contiguous(), value.contiguous(), *args, **kwargs)


def document_bounds(segment_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where documents begin, for attention_inputs; computed on the host, so that no step waits for the device.

    segment_ids [1, s] -> cu_seqlens int32 [documents + 1], and the longest document's length (a host scalar).
    """
    if len(segment_ids) > 1:
        raise ValueError(f"the te backend takes documents of one row, not of {len(segment_ids)}; set train.micro_batch=1, or train.backend=torch")
    ids = segment_ids[0]
    starts = torch.nonzero(ids[1:] != ids[:-1]).flatten() + 1
    bounds = torch.cat([starts.new_zeros(1), starts, starts.new_tensor([ids.numel()])]).int()
    return {"cu_seqlens": bounds, "max_document": bounds.diff().max()}


def attention_inputs(batch: dict) -> dict:
    """GPTModel's arguments that say who sees whom: plain causal, or documents end to end."""
    if "cu_seqlens" not in batch:
        return dict(attention_mask=None)
    bounds, longest = batch["cu_seqlens"], int(batch["max_document"])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    return dict(attention_mask=None, packed_seq_params=packed)
