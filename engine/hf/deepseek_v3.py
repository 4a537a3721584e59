"""DeepSeek-V3: DeepseekV3ForCausalLM of transformers, V2 with a router of sigmoid scores that a bias per expert balances (arXiv 2412.19437).

As in deepseek_v2.py. The bias (e_score_correction_bias) is the engine's aux-free expert bias: it chooses experts, weighs none, and moves with
their load while the model trains. A model balanced by a loss is written with a bias of zero, which computes the same.
Modules that predict further tokens (num_nextn_predict_layers) are layers behind the last one, model.layers.61 in the published folder, each with
a copy of the embedding and of the output matrix: the engine has those once, so copies that differ are refused, and exports have them again.
launch/convert.py leaves the modules out when asked to (--drop-mtp). What they compute was compared with transformers' MtpModel.
Left out, and refused: weights that are not renormalised, router weights without a sigmoid, rope_interleave=false, FP8 folders.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import deepseek_v2, llama, names
from engine.hf.fields import count, head_of, named, need, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"
EMBEDDING = llama.EMBEDDING
IN_FP32 = ("e_score_correction_bias",)  # transformers computes with it in fp32 too

MODULES = "num_nextn_predict_layers"  # transformers takes 1 where config.json is silent; what tensors a folder has decides then (load.py)

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
    refuse(deepseek_v2.inexpressible(model, has_mtp=True) | {
        f"model.mtp.num_layers={model.mtp.num_layers} behind a last layer that is dense": model.mtp.num_layers > 0 and not model.moe_layers[-1],
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
        MODULES: model.mtp.num_layers,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    refuse({
        f"topk_method={hf.get('topk_method')!r} is not supported (noaux_tc is)": hf.get("topk_method", "noaux_tc") != "noaux_tc",
        f"scoring_func={hf.get('scoring_func')!r} is not supported (sigmoid is)": hf.get("scoring_func", "sigmoid") != "sigmoid",
        "norm_topk_prob=false is not supported": hf.get("norm_topk_prob", True) is False,
    }, "config.json")
    groups, group_top_k = need({"n_group": 8, "topk_group": 4, **hf}, "n_group", "topk_group")
    fields, num_modules = deepseek_v2.common_fields(hf, DEFAULTS), num_further(hf)
    refuse({f"{MODULES}={num_modules} behind a last layer that is dense (first_k_dense_replace) is not supported":
            num_modules > 0 and fields["num_layers"] <= fields["moe"]["first_dense_layers"]}, "config.json")
    fields["moe"] |= {"score": "sigmoid", "balance": "aux_free", "num_groups": groups if groups > 1 else 0,
                      "group_top_k": group_top_k if groups > 1 else 0, "group_score_top": 2}
    return fields | {"family": "deepseek_v3", "mtp": {"num_layers": num_modules}}


def pairs(model: Model) -> list[Pair]:
    """The tensors of DeepseekV3ForCausalLM, in model order, and those of modules for further tokens."""
    found, modules = deepseek_v2.trunk(model, _router), [f"model.layers.{model.num_layers + k}." for k in range(model.mtp.num_layers)]
    shared = {"embedding.word_embeddings.weight": ["embed_tokens.weight"], "output_layer.weight": ["shared_head.head.weight"]}
    if model.tie_embeddings:
        shared = {"embedding.word_embeddings.weight": sum(shared.values(), [])}
    if modules:
        found = [names.copied(pair, [module + name for module in modules for name in shared[pair.engine]]) if pair.engine in shared else pair
                 for pair in found]
    return found + [pair for k, module in enumerate(modules) for pair in _module(model, f"mtp.layers.{k}.", module)]


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def num_further(hf: Mapping[str, Any]) -> int:
    """How many modules for further tokens config.json speaks of; a classifier has none."""
    return 0 if head_of(hf) == "scalar" else count(hf, MODULES, 1)


def mtp_prefixes(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of tensors begin that belong to modules for further tokens: layers after the last one."""
    return tuple(f"model.layers.{need(hf, 'num_hidden_layers')[0] + k}." for k in range(num_further(hf)))


def without_mtp(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model without those modules."""
    return {**hf, MODULES: 0}


def _module(model: Model, engine: str, hf: str) -> list[Pair]:
    h = model.hidden_size
    return [
        names.same(engine + "enorm.weight", hf + "enorm.weight", h),
        names.same(engine + "hnorm.weight", hf + "hnorm.weight", h),
        names.same(engine + "eh_proj.weight", hf + "eh_proj.weight", h, 2 * h),  # both read [embedding, hidden state]
        *deepseek_v2.sparse_layer(model, _router, engine + "transformer_layer.", hf),
        names.same(engine + "final_layernorm.weight", hf + "shared_head.norm.weight", h),
    ]


def _router(model: Model, engine: str, hf: str) -> list[Pair]:
    bias, num_experts = hf + "e_score_correction_bias", model.moe.num_experts
    is_biased = model.moe.balance == "aux_free"
    return deepseek_v2.router(model, engine, hf) + [
        names.same(engine + "expert_bias", bias, num_experts) if is_biased else names.must_be_zero(bias, num_experts)]
