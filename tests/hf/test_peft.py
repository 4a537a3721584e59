"""Adapters in PEFT's own hands: it reads what we write, we read what it writes, and merged models compute the same.

Left out: training (tests/test_lora.py).
"""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.hf.fields import HFError
from engine.hf.load import open_hf
from engine.hf.peft import CONFIG, WEIGHTS, Merged, load_adapter, other_base, peft_logits, save_adapter
from engine.hf.verify import agreement, prompts, transformers_logits
from engine.stage_sections import Lora

ROOT = Path(__file__).parents[2]
LORA = {"rank": 4, "alpha": 8.0}
CASES = {
    "lora": ("llama", LORA),
    "dora rslora some targets": ("llama_bias", {**LORA, "dora": True, "rslora": True, "targets": ["k_proj", "up_proj", "down_proj"]}),
    "experts": ("mixtral", LORA),
    "experts rslora": ("mixtral", {**LORA, "rslora": True}),
    "qkv bias": ("qwen2", LORA),
    "norms of q and k": ("qwen3", {**LORA, "dora": True}),
    "post-norms": ("olmo2", LORA),
    "experts of qwen": ("qwen3_moe", LORA),
    "experts beside dense layers": ("qwen3_moe_mixed", {**LORA, "targets": ["q_proj", "v_proj"]}),
    "norms around zero": ("gemma2", LORA),
    "windows and two ropes, dora": ("gemma3", {**LORA, "dora": True}),
    "latent attention": ("deepseek_v3", {**LORA, "targets": ["o_proj"]}),
    "sinks and biases": ("gpt_oss", {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "beside fused layers": ("phi3", {**LORA, "targets": ["o_proj", "down_proj"]}),
    "attention beside experts, dora": ("mixtral", {**LORA, "dora": True, "targets": ["q_proj", "o_proj"]}),
}


def adapted(model, lora):
    """(run, whole engine tensors) of a Tiny with random adapters."""
    from engine.mcore import topology

    topology.start_single()
    from engine.mcore import build

    run = model.run.model_copy(update={"lora": Lora(**lora)})
    one = build.one_rank(run)
    fresh = build.build_chunk(one, build.transformer_config(one, "cpu"), "cpu").state_dict()
    generator, tensors = torch.Generator().manual_seed(2), model.engine_tensors()
    for name in (name for name in fresh if ".lora." in name):
        noise = torch.randn(fresh[name].shape, generator=generator)
        tensors[name] = 1 + noise.abs() if name.endswith("magnitude") else 0.1 * noise
    return run, tensors


def logits_of(run, tensors):
    from engine.mcore.build import single_rank_logits

    return single_rank_logits(run, tensors, prompts(run.model))


@pytest.mark.parametrize("name, lora", CASES.values(), ids=CASES)
def test_peft_reads_what_we_write_and_so_do_we(tiny, name, lora, tmp_path):
    model = tiny(name)
    run, tensors = adapted(model, lora)
    ours, plain = logits_of(run, tensors), transformers_logits(model.folder, prompts(run.model))
    assert (ours - plain).abs().max() > 0.1 * plain.abs().max()      # the adapters do something
    save_adapter(run.model, run.lora, tensors, tmp_path, "some/base")
    agreement(ours, peft_logits(model.folder, tmp_path, prompts(run.model)), tolerance=1e-5)
    again, found = load_adapter(tmp_path, run.model)
    assert found.keys() == {name for name in tensors if ".lora." in name} and all(found[name].equal(tensors[name]) for name in found)
    assert again.targets == Lora(**lora).targets and again.dora == run.lora.dora
    agreement(logits_of(run.model_copy(update={"lora": again}), tensors), ours, tolerance=1e-6)


@pytest.mark.parametrize("name, lora", [*CASES.values(), ("mixtral", {**LORA, "dora": True}), ("gpt2", {
    **LORA, "dora": True, "targets": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]})], ids=[*CASES, "experts dora", "gpt2"])
def test_merged_weights_compute_the_same(tiny, name, lora):
    run, tensors = adapted(tiny(name), lora)
    weights = Merged(tensors, run.model, run.lora)
    assert set(weights) == set(tiny(name).engine_tensors()) and len(weights) == len(set(weights))
    agreement(logits_of(run.model_copy(update={"lora": Lora()}), weights), logits_of(run, tensors), tolerance=1e-5)


def test_we_read_what_peft_writes(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    network = get_peft_model(copy.deepcopy(model.network), LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=r".*\.(q_proj|gate_proj)"))
    with torch.no_grad():
        for parameter in (p for p in network.parameters() if p.requires_grad):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
        theirs = network.eval()(prompts(model.run.model)).logits
    network.save_pretrained(tmp_path)
    lora, tensors = load_adapter(tmp_path, model.run.model)
    assert (lora.rank, lora.alpha, lora.dora, lora.targets) == (3, 7.0, True, ["q_proj", "gate_proj"])
    agreement(logits_of(model.run.model_copy(update={"lora": lora}), model.engine_tensors() | tensors), theirs, tolerance=1e-5)


def test_a_value_head_is_a_saved_module(tiny, tmp_path):
    """PEFT puts it in the place of the classifier that a sequence classification model has."""
    from peft import PeftModel
    from transformers import LlamaForSequenceClassification

    model = tiny("llama")
    run, tensors = adapted(model, LORA)
    tensors["value_head.weight"] = torch.randn(1, run.model.hidden_size)
    save_adapter(run.model, run.lora, tensors, tmp_path, "some/base")
    network = LlamaForSequenceClassification.from_pretrained(model.folder, num_labels=1)
    network = PeftModel.from_pretrained(network, tmp_path)
    assert network.base_model.model.score.weight.equal(tensors["value_head.weight"])
    assert load_adapter(tmp_path, run.model)[1]["value_head.weight"].equal(tensors["value_head.weight"])


def test_a_saved_head_takes_the_place_of_the_folders(tiny, tmp_path):
    """An adapter of a reward model brings a head along, as PEFT saves it: that one counts."""
    from types import SimpleNamespace

    from families import random_network

    from engine import conversions
    from engine.mcore.checkpoint import read_tensors

    random_network("llama", head="SequenceClassification", num_labels=1).save_pretrained(tmp_path / "base")
    run, tensors = adapted(tiny("llama"), LORA)
    tensors["value_head.weight"] = torch.randn(1, run.model.hidden_size)
    save_adapter(run.model, run.lora, tensors, tmp_path / "adapter", "some/base")
    args = SimpleNamespace(source=tmp_path / "base", target=tmp_path / "ckpt", adapter=tmp_path / "adapter", drop_mtp=False, allow_pickle=False,
                           no_hashes=False, no_verify=False, tolerance=1e-4, dtype=None)
    assert "differ by at most" in conversions.from_hf(args, tmp_path / "ckpt")
    assert read_tensors(tmp_path / "ckpt")["value_head.weight"].equal(tensors["value_head.weight"])


@pytest.mark.parametrize("name, lora, words", [
    ("gpt2", {**LORA, "targets": ["q_proj"]}, "gpt2"),
    ("mixtral", {**LORA, "dora": True}, "no DoRA for experts"),
    ("mixtral", {**LORA, "targets": ["up_proj"]}, "one of gate_proj and up_proj"),
    ("llama", {"rank": 0}, "has none"),
    ("phi3", {**LORA, "targets": ["q_proj", "o_proj"]}, "lora.targets names q_proj: a Hugging Face phi3 fuses"),
    ("deepseek_v3", {**LORA, "targets": ["up_proj", "gate_proj"]}, "shared experts beside the others"),
    ("gpt_oss", {**LORA, "targets": ["down_proj"]}, "take turns in one parameter"),
    ("qwen3_moe_mixed", LORA, "some layers are dense"),
], ids=["gpt2", "experts dora", "half a pair", "no adapters", "fused", "shared experts", "interleaved", "experts beside dense layers"])
def test_what_peft_cannot_express_is_refused(tiny, name, lora, words, tmp_path):
    with pytest.raises(HFError, match=words):
        save_adapter(tiny(name).run.model, Lora(**lora), {}, tmp_path / "out", "some/base")
    assert not (tmp_path / "out").exists()


def spoil_config(**changes):
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def spoil_weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(iter(tensors)))
        save_file(tensors, folder / WEIGHTS)
    return spoil


@pytest.mark.parametrize("spoil, words", [
    (spoil_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    (spoil_config(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (spoil_config(peft_type="IA3"), "IA3"),
    (spoil_config(r=-1), "adapter_config.json.*rank"),
    (spoil_weights(lambda tensors, name: tensors.pop(name)), "1 tensors missing"),
    (spoil_weights(lambda tensors, name: tensors.update({name: torch.zeros(4, 5)})), "has shape"),
    (spoil_weights(lambda tensors, name: tensors.update(more=torch.zeros(1))), "holds more"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"no"), "no readable safetensors"),
    (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
], ids=["pissa", "patterns", "kind", "rank", "missing", "shape", "unknown", "damaged", "no weights"])
def test_a_foreign_folder_is_refused(tiny, spoil, words, tmp_path):
    run, tensors = adapted(tiny("llama"), LORA)
    save_adapter(run.model, run.lora, tensors, tmp_path, "some/base")
    load_adapter(tmp_path, run.model)
    spoil(tmp_path)
    with pytest.raises(HFError, match=words):
        load_adapter(tmp_path, run.model)


def test_an_adapter_of_fused_layers_is_not_taken_for_one_of_q(tiny, tmp_path):
    run, tensors = adapted(tiny("phi3"), {**LORA, "targets": ["o_proj"]})
    save_adapter(run.model, run.lora, tensors, tmp_path, "some/base")
    spoil_weights(lambda stored, name: stored.update({name.replace("o_proj", "qkv_proj"): stored.pop(name)}))(tmp_path)
    with pytest.raises(HFError, match="qkv_proj.*q, k and v .gate and up. have an adapter each"):
        load_adapter(tmp_path, run.model)


@pytest.mark.parametrize("named, folder, expected", [
    ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B", ""), ("meta-llama/Llama-3.2-1B", "Llama-3.2-3B", "meta-llama/Llama-3.2-1B"),
    ("meta-llama/Llama-3.2-1B", "models--meta-llama--Llama-3.2-1B/snapshots/0a1b", ""), ("/elsewhere/mine", "mine", ""), (None, "mine", ""),
])
def test_the_base_model_is_compared_by_name(named, folder, expected, tmp_path):
    base = tmp_path / folder
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (tmp_path / CONFIG).write_text(json.dumps({"base_model_name_or_path": named}))
    assert other_base(tmp_path, base) == expected


def test_convert_carries_adapters_there_and_back(tiny, tmp_path, capsys):
    """PEFT folder + model -> checkpoint -> PEFT folder with the same tensors, and -> a merged model that needs no PEFT."""
    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    model = tiny("llama")
    run, tensors = adapted(model, {**LORA, "dora": True, "targets": ["q_proj", "down_proj"]})
    adapter, ckpt, back, merged = (str(tmp_path / name) for name in ("adapter", "ckpt", "back", "merged"))
    save_adapter(run.model, run.lora, tensors, adapter, "some/base")
    assert convert.main(["from-hf", str(model.folder), ckpt, "--adapter", adapter]) == 0, capsys.readouterr().err
    assert "says that it adapts some/base" in capsys.readouterr().err
    assert convert.main(["to-peft", ckpt, back, "--base", "some/base"]) == 0, capsys.readouterr().err
    first, second = (load_file(f"{folder}/{WEIGHTS}") for folder in (adapter, back))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    assert convert.main(["to-hf", ckpt, merged, "--dtype", "fp32"]) == 0, capsys.readouterr().err
    agreement(transformers_logits(merged, prompts(run.model)), peft_logits(model.folder, adapter, prompts(run.model)), tolerance=1e-5)
    assert not any(".lora" in name for name in open_hf(merged)[1])
    assert convert.main(["to-hf", ckpt, str(tmp_path / "half"), "--dtype", "bf16"]) == 0, capsys.readouterr().err
