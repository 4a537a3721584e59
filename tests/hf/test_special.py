"""What DeepSeek, Gemma and gpt-oss have and others don't: read as published, refused where it would be lost, and the parts of a folder that
are left out or kept in fp32.

Left out: logits and weights, which test_families.py proves.
"""

import pytest
import torch

from engine.config import Model
from engine.hf import FAMILIES, read_model
from engine.hf.export import export
from engine.hf.fields import HFError
from engine.hf.load import open_hf
from engine.models import FAMILIES as SIZES

# config.json as published, without what says nothing about the architecture.
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
V2_LITE = {"architectures": ["DeepseekV2ForCausalLM"], "attention_bias": False, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
           "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
           "model_type": "deepseek_v2", "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
           "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
           "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
           "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000, "routed_scaling_factor": 1.0,
           "scoring_func": "softmax", "seq_aux": True, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
      "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
      "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
      "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
      "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
      "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
      "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280}
GEMMA2 = {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 128,
          "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
          "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
          "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000}
GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
          "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
          "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
          "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
          "sliding_window_pattern": 6, "vocab_size": 262144}
GPT_OSS = {"architectures": ["GptOssForCausalLM"], "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
           "hidden_size": 2880, "initial_context_length": 4096, "intermediate_size": 2880,
           "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072, "model_type": "gpt_oss",
           "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
           "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                                                   "rope_type": "yarn", "truncate": False},
           "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088}


@pytest.mark.parametrize("family, size, hf", [("deepseek_v2", "16b_lite", V2_LITE), ("deepseek_v3", "671b", V3), ("gemma2", "27b", GEMMA2),
                                              ("gemma3", "1b", GEMMA3), ("gpt_oss", "20b", GPT_OSS)], ids=lambda x: x if isinstance(x, str) else "")
def test_published_configs_are_the_sizes_of_engine_models(family, size, hf):
    from engine.models import family_defaults

    ours = Model(family=family, **family_defaults(family, size)).model_dump()
    theirs = read_model(hf).model_dump()
    for fields in (ours, theirs):
        fields["moe"]["aux_loss_coeff"] = fields["head_dim"] = 0  # training; and what may be spelled out
    assert theirs == ours


@pytest.mark.parametrize("hf, message", [
    (V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob=true is not supported"),
    (V2_LITE | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported"),
    (V2_LITE | {"attention_bias": True, "rope_interleave": False}, "attention_bias=true.*rope_interleave=false"),
    (V2_LITE | {"num_experts_per_tok": None}, "lacks num_experts_per_tok"),
    (V2_LITE | {"num_key_value_heads": 4}, "num_key_value_heads=4 differs from num_attention_heads=16"),
    (V3 | {"norm_topk_prob": False, "scoring_func": "softmax"}, "scoring_func='softmax'.*norm_topk_prob=false"),
    (V3 | {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    (V3 | {"num_hidden_layers": 3}, "num_nextn_predict_layers=1 behind a last layer that is dense"),
    (V3 | {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers='one' is not a whole number"),
    (V3 | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    (GEMMA2 | {"use_bidirectional_attention": True, "attention_bias": True}, "attention_bias=true.*use_bidirectional_attention"),
    (GEMMA2 | {"layer_types": ["full_attention", "sliding_attention"] * 23}, "no pattern of windows"),
    (GEMMA3 | {"attn_logit_softcapping": 50.0}, "which transformers ignores"),
    (GEMMA3 | {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear"}}}, "'linear' of layers with a sliding window"),
    (GEMMA3 | {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration.*known:"),
    (GEMMA3 | {"rope_parameters": [1]}, "full_attention are .1., not a mapping"),
    (GEMMA3 | {"sliding_window_pattern": "six"}, "sliding_window_pattern='six' is not a number"),
    (GPT_OSS | {"attention_bias": False}, "attention_bias=false"),
    (GPT_OSS | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
])
def test_foreign_configs_are_refused(hf, message):
    with pytest.raises(HFError, match=message):
        read_model(hf)


@pytest.mark.parametrize("family, config, sizes", [
    ("deepseek_v2", "DeepseekV2Config", dict(num_experts_per_tok=2)), ("deepseek_v3", "DeepseekV3Config", dict(num_key_value_heads=32, num_hidden_layers=4)),
    ("gemma2", "Gemma2Config", {}), ("gemma3", "Gemma3TextConfig", dict(num_hidden_layers=7)), ("gpt_oss", "GptOssConfig", {}),
], ids=["deepseek_v2", "deepseek_v3", "gemma2", "gemma3", "gpt_oss"])
def test_defaults_are_those_of_transformers(family, config, sizes):
    """A terse config.json means what transformers takes it to mean."""
    import transformers

    terse = dict(vocab_size=9, hidden_size=64, intermediate_size=6, num_hidden_layers=2, num_attention_heads=32) | sizes
    architecture = {"architectures": [FAMILIES[family].ARCHITECTURE]}
    assert read_model(terse | architecture) == read_model(getattr(transformers, config)(**terse).to_dict() | architecture)


RARE = {"norm_place": "both", "norm_zero_centered": True, "scale_embeddings": True, "logits_softcap": 3.0, "attention_softcap": 3.0,
        "query_pre_attn_scalar": 7.0, "attention_sinks": True, "rope_local_theta": 100.0, "activation": "clamped_swiglu",
        "mla": {"kv_lora_rank": 4}, "mtp": {"num_layers": 1}, "moe": {"num_experts": 4, "num_groups": 2, "group_top_k": 1}}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_drops_what_it_has_no_place_for(family):
    """Each rare part is either refused by name or found again in what is read back."""
    size = dict(num_layers=2, hidden_size=8, ffn_hidden_size=6, num_attention_heads=2, num_query_groups=2, vocab_size=9, max_position=16)
    base = {**SIZES[family].DEFAULTS, **size, "sliding_window": 4 if SIZES[family].DEFAULTS.get("sliding_window") else 0}
    if "moe" in base:
        shared = 6 if family.startswith("deepseek") else 0
        base["moe"] = {**base["moe"], "num_experts": 4, "top_k": 2, "ffn_hidden_size": 6, "first_dense_layers": 0, "shared_expert_ffn_hidden_size": shared}
    for field, value in RARE.items():
        fields = {**base, field: {**base.get(field, {}), **value} if isinstance(value, dict) else value}
        model = Model(family=family, **fields)
        try:
            back = read_model(FAMILIES[family].hf_config(model, 16))
        except HFError as error:
            assert field in str(error) or "no latent attention" in str(error), f"{field}: {error}"
        else:
            kept, given = back.model_dump()[field], model.model_dump()[field]
            assert kept == given or isinstance(value, dict) and all(kept[key] == given[key] for key in value), field


def test_stacked_experts_of_another_number_are_refused(tiny):
    model = tiny("gpt_oss")
    tensors = dict(model.tensors)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name][:-1]
    with pytest.raises(HFError, match=f"{name} stacks 5 parts, but the configuration makes it 6"):
        dict(model.family.from_hf(model.run.model, tensors))


def test_the_bias_of_experts_keeps_fp32(tiny, tmp_path):
    model = tiny("deepseek_v3")
    _, tensors = open_hf(export(model.run, model.engine_tensors(), tmp_path / "out", dtype="bf16"))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(tensors[name], model.tensors[name]) and tensors[name].dtype == torch.float32
    assert {tensor.dtype for key, tensor in tensors.items() if key != name} == {torch.bfloat16}
