"""Modules for further tokens (DeepSeek-V3): both ways bit by bit, what they compute beside transformers' MtpModel, and leaving them out.

transformers has no such modules in its model; random ones are laid beside a tiny model's tensors, under the names of the published folder.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.hf.convert import run_of
from engine.hf.fields import HFError
from engine.hf.load import open_hf
from engine.hf.verify import prompts, transformers_logits

ROOT = Path(__file__).parents[2]
DEPTH = 2


def with_modules(model, folder: Path, **changed) -> Path:
    """The folder of a tiny model with DEPTH random modules behind its last layer. changed: tensors that are not what they should be."""
    folder.mkdir()
    tensors = load_file(model.folder / "model.safetensors")
    layers, h, generator = model.hf["num_hidden_layers"], model.hf["hidden_size"], torch.Generator().manual_seed(3)
    last = f"model.layers.{layers - 1}."
    sizes = {name.removeprefix(last): tensor.shape for name, tensor in tensors.items() if name.startswith(last)}
    sizes |= {"enorm.weight": (h,), "hnorm.weight": (h,), "shared_head.norm.weight": (h,), "eh_proj.weight": (h, 2 * h)}
    embedding = tensors["model.embed_tokens.weight"]
    for module in (f"model.layers.{layers + k}." for k in range(DEPTH)):
        tensors |= {module + name: torch.randn(size, generator=generator) * 0.2 + (len(size) == 1) for name, size in sizes.items()}
        tensors |= {module + "embed_tokens.weight": embedding.clone(), module + "shared_head.head.weight": tensors.get("lm_head.weight", embedding).clone()}
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.hf | {"num_nextn_predict_layers": DEPTH}))
    return folder


def convert(*argv) -> int:
    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(arg) for arg in argv])


def ours(folder: Path):
    """(run, engine tensors) of a folder."""
    from engine.hf import FAMILIES

    hf, tensors = open_hf(folder)
    run = run_of(hf, tensors, folder, folder / "run")
    return run, dict(FAMILIES[run.model.family].from_hf(run.model, tensors))


def test_modules_go_both_ways_or_stay_behind_by_choice(tiny, tmp_path, capsys):
    """Through launch/convert.py, whose comparison of logits sees the main model alone."""
    folder = with_modules(tiny("deepseek_v3"), tmp_path / "theirs")
    assert convert("from-hf", folder, tmp_path / "kept") == 0, capsys.readouterr().err
    assert convert("to-hf", tmp_path / "kept", tmp_path / "back") == 0, capsys.readouterr().err
    (hf, back), (_, theirs) = open_hf(tmp_path / "back"), open_hf(folder)
    assert hf["num_nextn_predict_layers"] == DEPTH
    assert set(back) == set(theirs) and all(torch.equal(back[name], theirs[name]) for name in theirs)

    assert convert("to-hf", tmp_path / "kept", tmp_path / "without", "--drop-mtp") == 0, capsys.readouterr().err
    assert convert("from-hf", folder, tmp_path / "dropped", "--drop-mtp", "--no-verify") == 0, capsys.readouterr().err
    assert convert("to-hf", tmp_path / "dropped", tmp_path / "dropped_hf", "--no-verify") == 0, capsys.readouterr().err
    main = {name for name in theirs if not name.startswith(("model.layers.2.", "model.layers.3."))}
    for out in ("without", "dropped_hf"):
        hf, tensors = open_hf(tmp_path / out)
        assert hf["num_nextn_predict_layers"] == 0 and set(tensors) == main
        assert all(torch.equal(tensors[name], theirs[name]) for name in main)
    assert torch.equal(transformers_logits(tmp_path / "without", tokens := prompts(ours(folder)[0].model)), transformers_logits(folder, tokens))


@torch.no_grad()
def test_modules_say_what_transformers_mtp_model_says(tiny, tmp_path):
    from transformers import AutoModelForCausalLM
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    from engine.mcore import build, mtp, topology

    folder = with_modules(tiny("deepseek_v3"), tmp_path / "theirs")
    run, tensors = ours(folder)
    text = torch.randint(run.model.vocab_size, (2, 25), generator=torch.Generator().manual_seed(0))
    tokens, labels = text[:, :-1], text[:, 1:]

    topology.start_single()
    chunk = build.build_chunk(one := build.one_rank(run), build.transformer_config(one, "cpu"), "cpu", with_weights=False)
    build.fill(chunk, tensors)
    chunk.eval().further = mtp.targets({"tokens": tokens, "labels": labels, "loss_mask": torch.ones(tokens.shape)}, DEPTH)
    chunk(tokens, torch.arange(24).expand_as(tokens), None, labels=labels)
    said = chunk.further_output.chunk(DEPTH)  # log p(label) [2, 24] of each depth

    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\..*", r"model\.layers\.3\..*"]  # the published 61 stands in the class
    theirs, cache = MtpModel.from_pretrained(main).eval(), MtpCache(config=main.config.get_mtp_config())
    hidden = main.model(tokens).last_hidden_state
    for k in range(1, DEPTH + 1):
        places = 24 - k  # which have a token k further on
        positions = torch.arange(k, 24).expand(2, -1)
        hidden = theirs.forward_layer(k - 1, hidden[:, :places], positions, cache, input_ids=tokens[:, k:])
        expected = theirs._project_to_logits(hidden).log_softmax(-1).gather(-1, labels[:, k:, None])[..., 0]
        assert torch.allclose(said[k - 1][:, :places], expected, atol=2e-5, rtol=0), (said[k - 1][:, :places] - expected).abs().max()
    assert expected.std() > 0.5, "nothing was predicted that could differ"


def test_copies_of_the_shared_matrices_must_be_copies(tiny, tmp_path):
    other = tiny("deepseek_v3").tensors["lm_head.weight"] + 1
    folder = with_modules(tiny("deepseek_v3"), tmp_path / "theirs", **{"model.layers.3.shared_head.head.weight": other})
    with pytest.raises(HFError, match="^model.layers.3.shared_head.head.weight should hold the numbers of lm_head.weight, .* but differs"):
        ours(folder)


def test_a_tied_model_has_copies_of_its_embedding(tiny, tmp_path):
    folder = with_modules(tiny("deepseek_v3_tied"), tmp_path / "theirs")
    run, tensors = ours(folder)
    stored = load_file(folder / "model.safetensors")
    from engine.hf import deepseek_v3

    back = dict(deepseek_v3.to_hf(run.model, tensors))
    assert back.keys() == stored.keys() and all(torch.equal(back[name], stored[name]) for name in stored)


def test_a_folder_that_speaks_of_modules_and_has_none_is_one_without(tiny, tmp_path):
    """transformers saves such a folder of every model that it read from one with modules."""
    tiny("deepseek_v3").network.config.num_mtp_layers = 1
    try:
        tiny("deepseek_v3").network.save_pretrained(tmp_path / "theirs")
    finally:
        tiny("deepseek_v3").network.config.num_mtp_layers = 0
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    hf, _ = open_hf(tmp_path / "theirs")
    assert hf["num_nextn_predict_layers"] == 0 and ours(tmp_path / "theirs")[0].model.mtp.num_layers == 0
