"""The name map: HF -> engine -> HF gives every bit back, the fused layouts are megatron's, and wrong tensors are refused."""

import pytest
import torch

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import HFError


def test_roundtrip_is_bit_equal(model):
    back = dict(model.family.to_hf(model.run.model, model.engine_tensors()))
    for name in model.tensors:
        assert torch.equal(back.pop(name), model.tensors[name]), name
    # What is left are the biases that this HF model does without and the engine has.
    assert all(name.endswith(".bias") and not tensor.any() for name, tensor in back.items())
    has_own = model.hf["model_type"] == "gpt_oss"  # whose experts have biases under other names
    assert bool(back) == (not has_own and model.hf.get("attention_bias", False) != model.hf.get("mlp_bias", False))


def test_vocabulary_is_padded_with_zeros(model):
    config, tensors = model.run.model, model.engine_tensors()
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & set(tensors):
        assert tensors[name].shape == (config.padded_vocab_size, config.hidden_size) != (config.vocab_size, config.hidden_size)
        assert not tensors[name][config.vocab_size:].any()
        assert tensors[name][:config.vocab_size].any()
    assert ("output_layer.weight" in tensors) == (not config.tie_embeddings)


def test_fused_qkv_goes_group_by_group():
    """4 query heads, 2 groups, head size 3: rows are q0 q1 k0 v0 q2 q3 k1 v1."""
    config = Model(family="llama", num_layers=1, hidden_size=5, ffn_hidden_size=4, num_attention_heads=4, num_query_groups=2,
                   head_dim=3, vocab_size=9)
    def head(number):
        return torch.full((3, 5), number)

    q, k, v = torch.cat([head(n) for n in (0, 1, 2, 3)]), torch.cat([head(10), head(11)]), torch.cat([head(20), head(21)])
    fused = names.whole(names.fuse_qkv(config, q, k, v))
    assert fused[::3, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert all(torch.equal(a, b) for a, b in zip(names.split_qkv(config, fused), (q, k, v)))


def test_gated_fc1_is_gate_then_up(tiny):
    model = tiny("llama")
    fc1 = model.engine_tensors()["decoder.layers.1.mlp.linear_fc1.weight"]
    gate, up = (model.tensors[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(fc1, torch.cat([gate, up]))


def test_gpt2_qkv_is_transposed_and_regrouped(tiny):
    """Head 1 of 4, size 9: its key is columns 36 + 9 .. of c_attn, and rows 27 + 9 .. of linear_qkv."""
    model = tiny("gpt2")
    ours = model.engine_tensors()["decoder.layers.0.self_attention.linear_qkv.weight"]
    theirs = model.tensors["transformer.h.0.attn.c_attn.weight"]
    assert torch.equal(ours[27 + 9:27 + 18], theirs[:, 36 + 9:36 + 18].T)
    assert torch.equal(ours[27 + 18:27 + 27], theirs[:, 72 + 9:72 + 18].T)


def test_qkv_bias_alone_is_exported_with_a_zero_output_bias(tiny):
    config = tiny("llama_bias").run.model.model_copy(update={"linear_bias": False})
    tensors = {name: t for name, t in tiny("llama_bias").engine_tensors().items()
               if not name.endswith(".bias") or "linear_qkv" in name}
    back = dict(llama.to_hf(config, tensors))
    assert not back["model.layers.0.self_attn.o_proj.bias"].any() and back["model.layers.0.self_attn.q_proj.bias"].any()
    assert "model.layers.0.mlp.up_proj.bias" not in back
    assert llama.hf_config(config, 8)["attention_bias"] and not llama.hf_config(config, 8)["mlp_bias"]
    assert set(dict(llama.from_hf(config, back))) == set(tensors)
    back["model.layers.0.self_attn.o_proj.bias"][0] = 1
    with pytest.raises(HFError, match="o_proj.bias is not zero"):
        list(llama.from_hf(config, back))


def test_wrong_engine_tensors_are_refused(tiny):
    model, tensors = tiny("llama"), tiny("llama").engine_tensors()
    proj = "decoder.layers.0.self_attention.linear_proj.weight"
    with pytest.raises(HFError, match=r"linear_proj.weight has shape \[60, 48\], but the configuration makes it \[48, 60\]"):
        list(model.family.to_hf(model.run.model, tensors | {proj: tensors[proj].T}))
    with pytest.raises(HFError, match="q_layernorm.weight, for which the HF architecture has no place"):
        list(model.family.to_hf(model.run.model, tensors | {"decoder.layers.0.self_attention.q_layernorm.weight": torch.ones(10)}))
    del tensors[proj]
    with pytest.raises(HFError, match=r"linear_proj.weight \[48, 60\] is missing"):
        list(model.family.to_hf(model.run.model, tensors))
    tensors[proj] = torch.zeros(48, 60)
    list(model.family.to_hf(model.run.model, tensors | {"decoder.layers.0.mlp.linear_fc1._extra_state": torch.zeros(0)}))
