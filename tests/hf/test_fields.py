"""config.json <-> config.Model: nothing is lost on the way, both generations of transformers find their keys, the rest is refused."""

import pytest

from engine.config import Model, validate
from engine.hf import FAMILIES, family_of, gpt2, llama, mixtral, read_model
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
    ignored = {"architectures", "dtype", "bos_token_id", "eos_token_id", "transformers_version"} | zero_bias | training | same_as_default
    assert {k: v for k, v in mine.items() if k not in ignored} == {k: v for k, v in theirs.items() if k not in ignored}


@pytest.mark.parametrize("kind", ["none", "linear", "llama3"])
def test_rope_is_spelled_for_both_generations(kind):
    scaling = dict(kind=kind, factor=3.0, low_freq_factor=1.5, high_freq_factor=5.0, original_max_position=99)
    model = published("llama", "llama2_7b", rope_theta=7e4, rope_scaling=scaling)
    hf = llama.hf_config(model, 8)
    old, new = {k: v for k, v in hf.items() if k != "rope_parameters"}, dict(hf)
    del new["rope_theta"], new["rope_scaling"]
    for spelling in (old, new):
        back = read_model(spelling)
        assert back.rope_theta == 7e4
        assert back.rope_scaling.kind == kind and (kind == "none" or back.rope_scaling.factor == 3.0)
        assert kind != "llama3" or back.rope_scaling == model.rope_scaling
    assert hf["torch_dtype"] == hf["dtype"]


def test_defaults_are_those_of_transformers():
    """A terse config.json means what transformers takes it to mean."""
    import transformers

    for family, config, sizes in [
        (llama, "LlamaConfig", dict(vocab_size=9, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2)),
        (mixtral, "MixtralConfig", dict(vocab_size=9, hidden_size=32, intermediate_size=6, num_hidden_layers=1, num_attention_heads=16)),
        (gpt2, "GPT2Config", dict(vocab_size=9, n_embd=8, n_layer=1, n_head=2)),
    ]:
        full = getattr(transformers, config)(**sizes).to_dict() | {"architectures": [family.ARCHITECTURE]}
        assert read_model({**sizes, "architectures": [family.ARCHITECTURE]}) == read_model(full), config


LLAMA = dict(architectures=["LlamaForCausalLM"], vocab_size=9, hidden_size=8, intermediate_size=6, num_hidden_layers=1,
             num_attention_heads=2)
MIXTRAL = LLAMA | dict(architectures=["MixtralForCausalLM"], num_key_value_heads=2)
GPT2 = dict(architectures=["GPT2LMHeadModel"], vocab_size=9, n_embd=8, n_layer=1, n_head=2)


@pytest.mark.parametrize("hf,message", [
    (LLAMA | dict(architectures=["MistralForCausalLM"]), "MistralForCausalLM.*known: LlamaForCausalLM"),
    (LLAMA | dict(architectures=["LlamaForSequenceClassification"]), "known: LlamaForCausalLM"),
    (LLAMA | dict(quantization_config={"bits": 4}), "quantization_config"),
    (LLAMA | dict(hidden_size=None, vocab_size=None), "lacks vocab_size, hidden_size"),
    (LLAMA | dict(hidden_size="8"), "hidden_size='8' is not a number"),
    (LLAMA | dict(num_hidden_layers=-1), "num_layers=-1"),
    (LLAMA | dict(num_attention_heads=3), "3 heads do not divide the hidden size 8"),
    (LLAMA | dict(num_key_value_heads=3), "3 key/value heads do not divide 2"),
    (LLAMA | dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (LLAMA | dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "'yarn' is not supported"),
    (LLAMA | dict(rope_scaling=dict(type="dynamic", factor=2.0)), "'dynamic' is not supported"),
    (LLAMA | dict(rope_scaling=dict(rope_type="llama3", factor=2.0)), "lacks low_freq_factor"),
    (LLAMA | dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (MIXTRAL | dict(num_experts_per_tok=1), "num_experts_per_tok=1"),
    (MIXTRAL | dict(rope_parameters=[1]), "not a mapping"),
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
    ("gpt2", dict(norm="rmsnorm"), "norm=rmsnorm"),
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
