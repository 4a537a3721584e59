"""open_hf reads what transformers wrote, by header only, and refuses every folder that is incomplete or contradicts itself."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.hf.fields import HFError
from engine.hf.load import INDEX, WEIGHTS, open_hf


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny Llama that a test may spoil."""
    return shutil.copytree(tiny("llama").folder, tmp_path / "model")


def edit(folder, change):
    """Rewrite the weights after change(dict of tensors)."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder, weight_map=None):
    """Turn model.safetensors into two shards and an index; entries of weight_map go before the true ones."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": dict(list(tensors.items())[:3]), "b.safetensors": dict(list(tensors.items())[3:])}
    for name, part in parts.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    places = {tensor: name for name, part in parts.items() for tensor in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places | (weight_map or {})}))


@pytest.mark.parametrize("name, changes, words", [
    ("llama", {"num_hidden_layers": 1_000_000_000}, "num_hidden_layers=1000000000, but its tensors make that impossible .* tensors"),
    ("gemma3", {"num_hidden_layers": 1e9, "layer_types": None}, "num_hidden_layers=1000000000.0, but"),
    ("mixtral", {"num_local_experts": 10**9}, "num_local_experts=1000000000, but .*no dim above"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' is a text where a number belongs; write 1e-5"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}}, "rope_theta='10000' is a text"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_theta": "1e6"}}}, "rope_theta='1e6' is a text"),
    ("gpt2", {"n_layer": "2"}, "n_layer='2' is a text"),
])
def test_numbers_that_cannot_be(tiny, tmp_path, name, changes, words):
    folder = shutil.copytree(tiny(name).folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(HFError, match=words):
        open_hf(folder)


def test_a_version_that_looks_like_a_number_is_none(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "5.0", "_name_or_path": "7"}))
    open_hf(folder)


def test_tensors_are_lazy_and_whole(model):
    assert set(model.tensors) == set(load_file(model.folder / WEIGHTS)) and len(model.tensors) == len(list(model.tensors))
    for name, tensor in load_file(model.folder / WEIGHTS).items():
        assert torch.equal(model.tensors[name], tensor) and model.tensors.shape(name) == tensor.shape
    assert "nothing" not in model.tensors


def test_shards_are_read(folder, tiny):
    shard(folder)
    _, tensors = open_hf(folder)
    assert all(torch.equal(tensors[name], tiny("llama").tensors[name]) for name in tiny("llama").tensors)


@pytest.mark.parametrize("outside", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "sub/x.safetensors", "..\\x.safetensors",
                                     "a.bin", ""])
def test_shards_outside_the_folder_are_refused(folder, outside):
    shard(folder, {"model.norm.weight": outside})
    save_file({"model.norm.weight": torch.ones(48)}, folder.parent / "elsewhere.safetensors")
    with pytest.raises(HFError, match="no safetensors file inside the folder"):
        open_hf(folder)


def test_an_index_that_misplaces_tensors_is_refused(folder):
    shard(folder, {"model.norm.weight": "a.safetensors"})
    with pytest.raises(HFError, match="disagree about where model.norm.weight is"):
        open_hf(folder)


def test_a_missing_shard_is_named(folder):
    shard(folder)
    (folder / "b.safetensors").unlink()
    with pytest.raises(HFError, match="shard b.safetensors, which is missing"):
        open_hf(folder)


@pytest.mark.parametrize("weight_map", ["null", "[]", '{"x": 3}'])
def test_a_malformed_index_is_refused(folder, weight_map):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(HFError, match="has no weight_map"):
        open_hf(folder)


def test_pickles_are_refused(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(HFError, match="only pickled weights .pytorch_model.bin."):
        open_hf(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(HFError, match="neither model.safetensors nor"):
        open_hf(folder)


def test_missing_unexpected_and_misshapen_are_told_at_once(folder):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 3)
        tensors["model.norm.weight"] = torch.zeros(47)

    edit(folder, spoil)
    with pytest.raises(HFError) as error:
        open_hf(folder)
    for part in ("1 tensors missing: model.layers.0.mlp.up_proj.weight [52, 48]", "unexpected: model.layers.2.mlp.up_proj.weight [2, 3]",
                 "model.norm.weight is [47], config.json says [48]"):
        assert part in str(error.value)


def test_a_bias_that_config_denies_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    with pytest.raises(HFError, match=r"8 tensors missing: model.layers.0.self_attn.q_proj.bias \[60\]"):
        open_hf(folder)


def test_old_buffers_are_passed_over(folder):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}))
    assert not any("rotary" in name for name in open_hf(folder)[1])


def test_gpt2_from_before_the_prefix(tiny, tmp_path):
    old = shutil.copytree(tiny("gpt2").folder, tmp_path / "old")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(old / WEIGHTS).items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 40, 40)}, old / WEIGHTS)
    _, tensors = open_hf(old)
    assert set(tensors) == set(tiny("gpt2").tensors)
    save_file(bare | {"transformer.wte.weight": bare["wte.weight"].clone()}, old / WEIGHTS)
    with pytest.raises(HFError, match="holds transformer.wte.weight twice"):
        open_hf(old)


def test_a_tied_head_must_be_the_embedding(tiny, tmp_path):
    tied = shutil.copytree(tiny("llama_tied").folder, tmp_path / "tied")
    edit(tied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in open_hf(tied)[1]
    edit(tied, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(HFError, match="ties the embeddings, but lm_head.weight differs"):
        open_hf(tied)


def test_broken_files_are_named(folder):
    whole = (folder / WEIGHTS).read_bytes()
    for content in (b"", whole[:100], whole[:-4]):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(HFError, match="no readable safetensors file"):
            open_hf(folder)
    for text, message in (("{", "is not JSON"), ("[1]", "no JSON object")):
        (folder / "config.json").write_text(text)
        with pytest.raises(HFError, match=message):
            open_hf(folder)
    (folder / "config.json").unlink()
    with pytest.raises(HFError, match="has no config.json"):
        open_hf(folder)
    with pytest.raises(HFError, match="is no folder"):
        open_hf(folder / "nowhere")
