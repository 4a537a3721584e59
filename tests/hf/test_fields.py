"""config.json <-> config.Model: nothing is lost on the way, both generations of transformers find their keys, the rest is refused."""

import pytest

from engine.config import Model, validate
from engine.hf import FAMILIES, family_of, gpt2, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe, read_model
from engine.hf.fields import HFError
from engine.models import FAMILIES as SIZES


def published(family, size, **keys):
    run = dict(run=dict(dir="x"), data=dict(train=["c"]), train=dict(seq_len=64, global_batch=1, steps=1))
    return validate(run | {"model": dict(family=family, size=size, **keys)}).model


@pytest.mark.parametrize("family,size", [(family, size) for family in FAMILIES for size in SIZES[family].SIZES])
def test_published_sizes_survive(family, size):
    model = published(family, size)
    back = read_model(FAMILIES[family].hf_config(model, 64))
    # The names of a size, where equal widths are spelled out, and what only training knows do not travel.
    assert canonical(back) == canonical(model)


def canonical(model: Model) -> dict:
    fields = model.model_dump() | dict(size="", head_dim=model.head_size, num_query_groups=model.kv_heads)
    if model.linear_bias:
        fields["qkv_bias"] = True
    return fields


def test_config_of_transformers_survives(model):
    """What transformers reads from our config.json is what it wrote in its own."""
    ours = model.family.hf_config(model.run.model, 8)
    config = type(model.network.config)(**{key: value for key, value in ours.items() if key not in ("architectures", "model_type")})
    mine, theirs = config.to_dict(), model.network.config.to_dict()
    zero_bias = {"mlp_bias"} if model.run.model.linear_bias and not model.hf.get("mlp_bias") else set()
    training = {"router_aux_loss_coef"} - set(model.hf)
    same_as_default = {"n_inner"} if theirs.get("n_inner", 0) is None else set()
    # hidden_size / heads; what rope_parameters say too; what only transformers 4.x reads
    repeated = {"head_dim", "partial_rotary_factor", "max_window_layers"} - set(theirs)
    unused = {"max_window_layers"} if not theirs.get("use_sliding_window") else set()
    # What DeepSeek's own code reads, a name of before, and a window that no layer has.
    of_others = {"scoring_func", "topk_method", "moe_layer_freq", "aux_loss_alpha", "seq_aux", "experts_per_token", "norm_topk_prob",
                 "rope_interleave", "rope_local_base_freq"} - set(theirs)
    of_others |= {"hidden_act"} if "hidden_activation" in theirs else set()
    of_others |= {"sliding_window"} if "sliding_attention" not in theirs.get("layer_types", ["sliding_attention"]) else set()
    ignored = of_others | {"architectures", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "decoder_sparse_step",
               "mlp_only_layers"} | zero_bias | training | same_as_default | repeated | unused  # sparse layers are told in one of two ways
    mine.get("rope_parameters", {}).pop("type", None)  # the old name of rope_type
    assert {k: v for k, v in mine.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}


SCALINGS = [
    dict(kind="none"),
    dict(kind="linear", factor=3.0),
    dict(kind="dynamic", factor=3.0, original_max_position=99),
    dict(kind="yarn", factor=3.5, original_max_position=99),
    dict(kind="yarn", factor=3.5, original_max_position=99, beta_fast=20.0, beta_slow=2.0, truncate=False, mscale=0.7, mscale_all_dim=1.3,
         attention_factor=1.25),
    dict(kind="longrope", factor=3.0, original_max_position=99, short_factor=[1.0 + i / 64 for i in range(64)], long_factor=[3.0] * 64),
    dict(kind="longrope", factor=3.0, original_max_position=99, short_factor=[1.0] * 64, long_factor=[3.0] * 64, attention_factor=1.5),
    dict(kind="llama3", factor=3.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position=99),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["kind"])
def test_rope_is_spelled_for_both_generations(scaling):
    model = published("llama", "llama2_7b", rope_theta=7e4, rope_scaling=scaling)
    hf = llama.hf_config(model, 8)
    old, new = {k: v for k, v in hf.items() if k != "rope_parameters"}, dict(hf)
    del new["rope_theta"], new["rope_scaling"]
    for spelling in (old, new):
        back = read_model(spelling)
        assert back.rope_theta == 7e4 and back.rope_scaling == model.rope_scaling
    assert hf["torch_dtype"] == hf["dtype"]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["kind"])
def test_transformers_takes_our_rope_without_a_complaint(scaling, caplog):
    """Its angles are those of engine/rope.py at lengths below and above the original one, whichever spelling it reads."""
    from logging import getLogger

    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from engine.rope import inverse_frequencies

    getLogger("transformers").propagate = True      # to caplog
    model = published("llama", "llama2_7b", rope_theta=7e4, rope_scaling=scaling, max_position=297)
    hf = llama.hf_config(model, 8)
    old, new = {k: v for k, v in hf.items() if k != "rope_parameters"}, {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    for spelling in (old, new):
        config = LlamaConfig(**{key: value for key, value in spelling.items() if key not in ("architectures", "model_type")})
        for length in (50, 200):
            cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
            frequencies, factor = inverse_frequencies(7e4, 128, model.rope_scaling, length)
            assert torch.allclose(cos[0, :, :64], (torch.arange(length)[:, None] * frequencies).cos() * factor, atol=1e-5)
    wrong = [record.getMessage() for record in caplog.records if "Unrecognized keys" in record.getMessage() or "must" in record.getMessage()]
    assert wrong == []


def test_a_fixed_ntk_is_written_as_its_base_period():
    model = published("llama", "llama2_7b", rope_theta=1e4, rope_scaling=dict(kind="ntk", factor=4.0))
    hf = llama.hf_config(model, 8)
    assert hf["rope_scaling"] is None and hf["rope_parameters"]["rope_type"] == "default"
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == pytest.approx(1e4 * 4 ** (128 / 126))
    back = read_model(hf)
    assert back.rope_theta == hf["rope_theta"] and back.rope_scaling.kind == "none"


def test_dynamic_is_written_with_its_original_length():
    """transformers' dynamic stretches from max_position_embeddings on, whatever length the model was trained to since."""
    model = published("llama", "llama2_7b", max_position=4096, rope_scaling=dict(kind="dynamic", factor=2.0, original_max_position=1024))
    assert llama.hf_config(model, 8)["max_position_embeddings"] == 1024


@pytest.mark.parametrize("hf, expected", [
    (dict(rope_scaling=dict(type="yarn", factor=2)), dict(original_max_position=640, factor=2)),
    (dict(rope_scaling=dict(rope_type="yarn", factor=None, original_max_position_embeddings=64)), dict(original_max_position=64, factor=10)),
    (dict(rope_scaling=dict(rope_type="yarn", factor=2, original_max_position_embeddings=64), original_max_position_embeddings=160),
     dict(original_max_position=160, factor=2)),
    (dict(rope_parameters=dict(rope_type="longrope", short_factor=[1, 1], long_factor=[2, 3], original_max_position_embeddings=64)),
     dict(original_max_position=64, factor=10, long_factor=[2.0, 3.0])),
    (dict(rope_parameters=dict(rope_type="yarn", factor=2, mscale=None, attention_factor=None)), dict(mscale=0, attention_factor=0)),
    (dict(rope_scaling=dict(rope_type="dynamic", factor=2)), dict(original_max_position=640)),
])
def test_what_a_config_leaves_out_is_completed_as_in_transformers(hf, expected):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from engine.rope import inverse_frequencies

    full = LLAMA | dict(max_position_embeddings=640, **hf)
    model = read_model(full)
    assert {key: getattr(model.rope_scaling, key) for key in expected} == expected
    rope = hf.get("rope_scaling") or hf.get("rope_parameters")
    config = LlamaConfig(**{key: value for key, value in full.items() if key not in ("architectures", "rope_scaling", "rope_parameters")},
                         rope_parameters=dict(rope) | ({"rope_type": rope["type"]} if "type" in rope else {}))
    cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(700)[None])
    frequencies, factor = inverse_frequencies(model.rope_theta, 4, model.rope_scaling, 700)
    assert torch.allclose(cos[0, :, :2], (torch.arange(700)[:, None] * frequencies).cos() * factor, atol=1e-4)


def test_the_first_names_of_longrope():
    """Phi-3's own files call it su, and have three keys and no factor."""
    rope = dict(short_factor=[1.0, 1.5], long_factor=[2.0, 4.0])
    today = read_model(PHI3 | dict(rope_parameters=dict(rope_type="longrope", factor=4.0, **rope), original_max_position_embeddings=24))
    assert read_model(PHI3 | dict(rope_scaling=dict(type="su", **rope), original_max_position_embeddings=24)) == today
    written = phi3.hf_config(today, 8)
    assert written["rope_scaling"] == dict(type="longrope", **rope) and written["original_max_position_embeddings"] == 24
    del written["rope_parameters"]  # as transformers 4.x reads it
    assert read_model(written) == today


def test_defaults_are_those_of_transformers():
    """A terse config.json means what transformers takes it to mean."""
    import transformers

    def small(**sizes):
        return dict(vocab_size=9, hidden_size=64, intermediate_size=6, num_hidden_layers=1, num_attention_heads=32) | sizes

    for family, config, sizes in [
        (mistral, "MistralConfig", small()), (qwen2, "Qwen2Config", small()), (qwen3, "Qwen3Config", small()),
        (qwen3_moe, "Qwen3MoeConfig", small(num_hidden_layers=3)), (phi3, "Phi3Config", small()), (olmo2, "Olmo2Config", small()),
        (qwen2, "Qwen2Config", small(use_sliding_window=True, num_hidden_layers=30)), (mistral, "MistralConfig", small(sliding_window=None)),
        (qwen3, "Qwen3Config", small(use_sliding_window=True)),  # 28 layers without a window are more than it has
        (qwen3_moe, "Qwen3MoeConfig", small(num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[1], use_sliding_window=True)),
        (llama, "LlamaConfig", dict(vocab_size=9, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2)),
        (mixtral, "MixtralConfig", dict(vocab_size=9, hidden_size=32, intermediate_size=6, num_hidden_layers=1, num_attention_heads=16)),
        (gpt2, "GPT2Config", dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2)),
    ]:
        full = getattr(transformers, config)(**sizes).to_dict() | {"architectures": [family.ARCHITECTURE]}
        assert read_model({**sizes, "architectures": [family.ARCHITECTURE]}) == read_model(full), config


LLAMA = dict(architectures=["LlamaForCausalLM"], vocab_size=9, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
             num_attention_heads=2)
MIXTRAL = LLAMA | dict(architectures=["MixtralForCausalLM"], num_key_value_heads=2)
QWEN2 = MIXTRAL | dict(architectures=["Qwen2ForCausalLM"], num_hidden_layers=2)
QWEN3 = MIXTRAL | dict(architectures=["Qwen3ForCausalLM"])
QWEN3_MOE = MIXTRAL | dict(architectures=["Qwen3MoeForCausalLM"])
PHI3 = MIXTRAL | dict(architectures=["Phi3ForCausalLM"], max_position_embeddings=96)
OLMO2 = MIXTRAL | dict(architectures=["Olmo2ForCausalLM"])
GPT2 = dict(architectures=["GPT2LMHeadModel"], vocab_size=9, n_embd=8, n_layer=1, n_head=2)


@pytest.mark.parametrize("hf,message", [
    (LLAMA | dict(architectures=["MinistralForCausalLM"]), "MinistralForCausalLM.*known: LlamaForCausalLM"),
    (LLAMA | dict(architectures=["LlamaForSequenceClassification"]), "num_labels=2 is not supported"),
    (LLAMA | dict(architectures=["LlamaForTokenClassification"]), "known: LlamaForCausalLM.*ForSequenceClassification"),
    (LLAMA | dict(quantization_config={"bits": 4}), "quantization_config"),
    (LLAMA | dict(hidden_size=None, vocab_size=None), "lacks vocab_size, hidden_size"),
    (LLAMA | dict(hidden_size="8"), "hidden_size='8' is a text where a number belongs"),
    (LLAMA | dict(num_hidden_layers=-1), "num_layers=-1"),
    (LLAMA | dict(num_attention_heads=3), "3 heads do not divide the hidden size 8"),
    (LLAMA | dict(num_key_value_heads=3), "3 key/value heads do not divide 2"),
    (LLAMA | dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (LLAMA | dict(rope_scaling=dict(rope_type="proportional")), "'proportional' is not supported .default, linear, dynamic,"),
    (LLAMA | dict(rope_scaling=dict(type="ntk", factor=2.0)), "'ntk' is not supported"),
    (LLAMA | dict(rope_scaling=dict(type="dynamic", factor=2.0)), "lacks max_position_embeddings"),
    (LLAMA | dict(rope_scaling=dict(type="linear", factor="two")), "factor='two' is not a number"),
    (LLAMA | dict(rope_scaling=dict(rope_type="yarn", factor=0.5, original_max_position_embeddings=8)), "rope_scaling.factor=0.5"),
    (LLAMA | dict(rope_scaling=dict(rope_type="yarn", factor=2, beta_fast="x", original_max_position_embeddings=8)), "rope_scaling.beta_fast='x'"),
    (LLAMA | dict(rope_scaling=dict(rope_type="llama3", factor=2.0, original_max_position_embeddings=8)), "lacks low_freq_factor"),
    (LLAMA | dict(rope_scaling=dict(rope_type="longrope", factor=2.0, short_factor=[1, 1], original_max_position_embeddings=8)),
     "longrope lacks long_factor"),
    (LLAMA | dict(rope_scaling=dict(rope_type="longrope", factor=2.0, short_factor=[1, 1], long_factor=[1], original_max_position_embeddings=8)),
     "longrope has 1 entries in long_factor, but a head has 2 pairs"),
    (LLAMA | dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (MIXTRAL | dict(num_experts_per_tok=1), "num_experts_per_tok=1"),
    (MIXTRAL | dict(rope_parameters=[1]), "not a mapping"),
    (QWEN2 | dict(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]), "layer_types=.*windows in other layers than the last"),
    (QWEN2 | dict(layer_types=["full_attention", "sliding_attention"]), "use_sliding_window is not true"),
    (QWEN3 | dict(use_sliding_window=True, layer_types=["chunked_attention"]), "layer_types=.*windows in other layers"),
    (QWEN3 | dict(attention_bias=True), "attention_bias=true"),
    (QWEN3 | dict(use_sliding_window=True, max_window_layers="all"), "max_window_layers='all' is not a whole number of 0"),
    (QWEN3_MOE | dict(decoder_sparse_step=0), "decoder_sparse_step=0 is not a whole number of 1"),
    (QWEN3_MOE | dict(attention_bias=True, num_experts_per_tok=1, norm_topk_prob=True), "attention_bias=true.*num_experts_per_tok=1"),
    (QWEN3_MOE | dict(num_experts=0), "num_experts=0"),
    (PHI3 | dict(rope_scaling=dict(type="linear", factor=2.0)), "'linear' is not Phi-3's"),
    (PHI3 | dict(partial_rotary_factor=0.8), "3 dims of a head are to be rotated"),
    (PHI3 | dict(rope_scaling=dict(type="su", short_factor=[1.0], long_factor=[1.0, 2.0]), original_max_position_embeddings=24),
     "1 entries in short_factor, but a head has 2 pairs"),
    (OLMO2 | dict(attention_bias=True), "attention_bias=true"),
    (GPT2 | dict(activation_function="gelu"), "activation_function='gelu'"),
    (GPT2 | dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    (GPT2 | dict(add_cross_attention=True, scale_attn_weights=False), "scale_attn_weights.*add_cross_attention"),
])
def test_foreign_configs_are_refused(hf, message):
    with pytest.raises(HFError, match=message):
        read_model(hf)


def test_a_missing_architecture_is_told_by_its_type():
    assert family_of({"model_type": "mixtral"}) is mixtral
    with pytest.raises(HFError, match="architectures=.., model_type=None"):
        family_of({})


@pytest.mark.parametrize("family,keys,message", [
    ("llama", dict(qk_norm=True, norm="layernorm"), "model.norm=layernorm; model.qk_norm=true"),
    ("llama", dict(activation="gelu"), "model.activation=gelu"),
    ("llama", dict(rope_percent=0.5), "rope_percent=0.5"),
    ("llama", dict(sliding_window=4), "sliding_window=4"),
    ("llama", dict(position="none"), "position=none"),
    ("llama", dict(num_attention_heads=3, num_query_groups=1, head_dim=4), r"hidden_size\(8\) divisible by num_attention_heads\(3\)"),
    ("llama", dict(moe=dict(num_experts=2)), "num_experts=2"),
    ("mixtral", dict(moe=dict(num_experts=0)), "some layers are dense"),
    ("mixtral", dict(moe=dict(num_experts=2, layer_freq=2), num_layers=2), "some layers are dense"),
    ("mixtral", dict(moe=dict(num_experts=2, softmax_after_top_k=False, score="sigmoid")), "score=sigmoid; .*softmax_after_top_k=false"),
    ("mixtral", dict(moe=dict(num_experts=2, top_k=1, balance="sinkhorn")), "top_k=1; model.moe.balance=sinkhorn"),
    ("mixtral", dict(moe=dict(num_experts=2), linear_bias=True), "linear_bias=true"),
    ("llama", dict(norm_place="post"), "norm_place=post"),
    ("mistral", dict(sliding_window=4, sliding_window_freq=2, num_layers=2), "sliding_window_freq=2"),
    ("mistral", dict(qkv_bias=True), "qkv_bias=true"),
    ("qwen2", dict(qkv_bias=False), "qkv_bias=false"),
    ("qwen2", dict(sliding_window=4, sliding_window_freq=2, linear_bias=True), "linear_bias=true; model.sliding_window_freq=2"),
    ("qwen3", dict(qk_norm=False), "qk_norm=false"),
    ("qwen3", dict(qk_norm_width="all", norm_place="both"), "norm_place=both; model.qk_norm_width=all"),
    ("qwen3_moe", dict(moe=dict(num_experts=2, shared_expert_ffn_hidden_size=4, score="sigmoid")), "shared_expert_ffn_hidden_size=4; .*score=sigmoid"),
    ("qwen3_moe", dict(sliding_window=4, full_attention_layers=1, num_layers=2), "some layers have a sliding window and others none"),
    ("phi3", dict(rope_scaling=dict(kind="linear", factor=2.0)), "rope_scaling.kind=linear"),
    ("phi3", dict(rope_scaling=dict(kind="longrope", factor=3.0, original_max_position=4, short_factor=[1, 1], long_factor=[1, 1])),
     r"factor\(3\) is not max_position\(8\) / original_max_position\(4\)"),
    ("phi3", dict(head_dim=6), "head_dim=6"),
    ("olmo2", dict(qk_norm_width="head", norm_place="pre", sliding_window=4), "norm_place=pre; model.qk_norm_width=head; model.sliding_window=4"),
    ("gpt2", dict(norm="rmsnorm", norm_place="both"), "norm=rmsnorm;.*norm_place=both"),
    ("gpt2", dict(position="rope"), "position=rope"),
    ("gpt2", dict(num_query_groups=1), "num_query_groups=1"),
    ("gpt2", dict(head_dim=6), "head_dim=6"),
    ("gpt2", dict(linear_bias=False), "linear_bias=false"),
])
def test_what_transformers_cannot_express_is_refused(family, keys, message):
    size = dict(num_layers=1, hidden_size=8, ffn_hidden_size=6, num_attention_heads=2, vocab_size=9)
    model = Model(family=family, **(SIZES[family].DEFAULTS | size | keys))
    with pytest.raises(HFError, match=message):
        FAMILIES[family].hf_config(model, 8)
