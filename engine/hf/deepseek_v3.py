"""DeepSeek-V3: DeepseekV3ForCausalLM of transformers, V2 with a router of sigmoid scores that a bias per expert balances (arXiv 2412.19437).

As in deepseek_v2.py. The bias (e_score_correction_bias) is the engine's aux-free expert bias: it chooses experts, weighs none, and moves with
their load while the model trains. A model balanced by a loss is written with a bias of zero, which computes the same.
The module that predicts a second token (num_nextn_predict_layers) is no part of the engine's model: a folder that holds one is converted
without it when asked to (launch/convert.py --drop-mtp), and exports have none.
Left out, and refused: weights that are not renormalised, router weights without a sigmoid, rope_interleave=false, FP8 folders.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import deepseek_v2, llama, names
from engine.hf.fields import named, need, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"
EMBEDDING = llama.EMBEDDING
IN_FP32 = ("e_score_correction_bias",)  # transformers computes with it in fp32 too

# What transformers takes where config.json is silent.
DEFAULTS = dict(max_position_embeddings=4096, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                n_routed_experts=256, n_shared_experts=1, moe_intermediate_size=2048, first_k_dense_replace=3, routed_scaling_factor=2.5,
                num_experts_per_tok=8)


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x.

    seq_len: tokens per training sample, the longest position where model.max_position is 0.
    Raises HFError where DeepseekV3ForCausalLM cannot express the model.
    """
    moe = model.moe
    per_group = moe.num_experts // max(moe.num_groups, 1)
    refuse(deepseek_v2.inexpressible(model) | {
        f"model.moe.score={moe.score}": moe.score != "sigmoid",
        f"model.moe.balance={moe.balance}": moe.balance == "sinkhorn",
        f"model.moe.group_score_top={moe.group_score_top}": moe.num_groups > 1 and moe.group_score_top != 2,
        f"transformers scores groups by two experts, and there are {per_group} in each": per_group < 2,
    }, f"{ARCHITECTURE} cannot express this model")
    return deepseek_v2.common_config(model, seq_len, dtype) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "n_group": moe.num_groups or 1,
        "topk_group": moe.group_top_k if moe.num_groups else 1,
        "num_nextn_predict_layers": 0,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    refuse({
        f"topk_method={hf.get('topk_method')!r} is not supported (noaux_tc is)": hf.get("topk_method", "noaux_tc") != "noaux_tc",
        f"scoring_func={hf.get('scoring_func')!r} is not supported (sigmoid is)": hf.get("scoring_func", "sigmoid") != "sigmoid",
        "norm_topk_prob=false is not supported": hf.get("norm_topk_prob", True) is False,
    }, "config.json")
    groups, group_top_k = need({"n_group": 8, "topk_group": 4, **hf}, "n_group", "topk_group")
    fields = deepseek_v2.common_fields(hf, DEFAULTS)
    fields["moe"] |= {"score": "sigmoid", "balance": "aux_free", "num_groups": groups if groups > 1 else 0,
                      "group_top_k": group_top_k if groups > 1 else 0, "group_score_top": 2}
    return fields | {"family": "deepseek_v3"}


def pairs(model: Model) -> list[Pair]:
    """The tensors of DeepseekV3ForCausalLM, in model order."""
    return deepseek_v2.trunk(model, _router)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def mtp_prefixes(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of tensors begin that belong to modules for further tokens: layers after the last one."""
    if not hf.get("num_nextn_predict_layers"):
        return ()
    layers, num_modules = need(hf, "num_hidden_layers", "num_nextn_predict_layers")
    return tuple(f"model.layers.{layers + i}." for i in range(num_modules))


def _router(model: Model, engine: str, hf: str) -> list[Pair]:
    bias, num_experts = hf + "e_score_correction_bias", model.moe.num_experts
    is_biased = model.moe.balance == "aux_free"
    return deepseek_v2.router(model, engine, hf) + [
        names.same(engine + "expert_bias", bias, num_experts) if is_biased else names.must_be_zero(bias, num_experts)]
