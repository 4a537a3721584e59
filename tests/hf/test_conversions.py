"""Averages, upcycling, and checkpoints that megatron-core alone wrote, through launch/convert.py."""

import importlib.util
from pathlib import Path

import pytest
import ranks
import torch
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def convert():
    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture(scope="module")
def two(convert, tiny, tmp_path_factory):
    """Two checkpoints of one model's shape, and the Hugging Face folders they came from."""
    from engine.hf.load import open_hf

    folder = tmp_path_factory.mktemp("two")
    model = tiny("llama")
    other = folder / "hf"
    other.mkdir()
    (other / "config.json").write_text((model.folder / "config.json").read_text())
    from safetensors.torch import save_file

    save_file({name: -3 * tensor for name, tensor in open_hf(model.folder)[1].items()}, other / "model.safetensors", metadata={"format": "pt"})
    for source, name in ((model.folder, "one"), (other, "other")):
        assert convert("from-hf", source, folder / name, "--no-verify") == 0
    return folder / "one", folder / "other", model.folder, other


@pytest.mark.parametrize("kind", ["checkpoints", "folders"])
def test_a_weighted_mean(convert, two, tmp_path, kind, capsys):
    from engine.mcore.checkpoint import read_tensors

    assert convert("average", *(two[:2] if kind == "checkpoints" else two[2:]), "--weights", 1, 3, "--output", tmp_path / "mean") == 0
    one, mean = read_tensors(two[0]), read_tensors(tmp_path / "mean")
    assert one.keys() == mean.keys() and "0.75 x" in capsys.readouterr().out
    for name in one:
        torch.testing.assert_close(mean[name], (1 * one[name] + 3 * -3 * one[name]) / 4)


def test_means_that_are_none(convert, tiny, two, tmp_path, capsys):
    assert convert("from-hf", tiny("llama_tied").folder, tmp_path / "tied", "--no-verify") == 0
    for words, says in (([two[0], tmp_path / "tied"], "is another model than"), ([two[0], two[2]], "convert one of them first"),
                        ([two[0], two[1], "--weights", "1"], "1 numbers for 2 models"),
                        ([two[0], two[1], "--weights", "nan", "1"], "finite"), ([two[0], two[1], "--weights", "inf", "1"], "finite")):
        assert convert("average", *words, "--output", tmp_path / "mean") == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()


def test_an_upcycled_model_computes_the_same(convert, two, tmp_path, capsys):
    from engine.mcore.checkpoint import read_config, read_tensors

    assert convert("upcycle", two[0], tmp_path / "moe", "--num-experts", 3, "--top-k", 2) == 0
    assert "logits of the mixture and the dense model differ by at most" in capsys.readouterr().out
    tensors, dense = read_tensors(tmp_path / "moe"), read_tensors(two[0])
    assert read_config(tmp_path / "moe").model.family == "mixtral" and tensors["decoder.layers.1.mlp.router.weight"].shape == (3, 48)
    for expert in range(3):
        assert torch.equal(tensors[f"decoder.layers.1.mlp.experts.local_experts.{expert}.linear_fc1.weight"], dense["decoder.layers.1.mlp.linear_fc1.weight"])
    assert convert("to-hf", tmp_path / "moe", tmp_path / "hf") == 0      # and transformers agrees
    assert convert("upcycle", tmp_path / "moe", tmp_path / "again") == 2 and "has experts already" in capsys.readouterr().err
    assert convert("upcycle", two[0], tmp_path / "one", "--top-k", 1) == 2 and "choose at least 2" in capsys.readouterr().err
    assert convert("upcycle", two[0], tmp_path / "again", "--num-experts", 2, "--top-k", 3) == 2


def megatron_alone(folder, tokens):
    """A GPTModel as megatron-core's own specs and saving have it; returns its logits."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from engine.mcore import cpu

    cpu.install()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(5)
    config = TransformerConfig(
        num_layers=3, hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, layernorm_epsilon=1e-5,
        gradient_accumulation_fusion=False, masked_softmax_fusion=False, bias_dropout_fusion=False, attention_dropout=0.0, hidden_dropout=0.0)
    model = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=384, max_sequence_length=64,
                     position_embedding_type="rope", share_embeddings_and_output_weights=False)
    model.eval()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 7}, str(folder))
    seq_len = tokens.size(1)
    mask = torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(seq_len).expand_as(tokens), mask)
    return logits.float().numpy()


def test_a_checkpoint_of_megatron_alone(convert, tmp_path, capsys):
    from engine.mcore import build
    from engine.mcore.checkpoint import read_config, read_tensors

    folder = tmp_path / "megatron" / "iter_0000007"
    folder.mkdir(parents=True)
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(ranks.run(1, megatron_alone, folder, tokens)[0])
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    model = {"family": "llama", "num_layers": 3, "hidden_size": 48, "ffn_hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
             "vocab_size": 301, "max_position": 64}
    config = tmp_path / "run.yaml"
    write = lambda **changes: config.write_text(yaml.safe_dump({  # noqa: E731
        "run": {"dir": "r"}, "model": model | changes, "data": {}, "train": {"seq_len": 64, "global_batch": 1, "steps": 1, "precision": "fp32"}}))
    write()
    assert convert("from-megatron", folder.parent, tmp_path / "ckpt", "--config", config) == 0
    run, tensors = read_config(tmp_path / "ckpt"), read_tensors(tmp_path / "ckpt")
    ours = build.single_rank_logits(run, tensors, tokens)
    torch.testing.assert_close(ours, theirs[..., :301], rtol=1e-4, atol=1e-5)
    assert tensors["output_layer.weight"].shape == (384, 48) and not tensors["output_layer.weight"][301:].any()

    assert run.data.train == []

    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(b"cits_plugin\nUnknown\n.")      # a pickle of that class
    assert convert("from-megatron", folder.parent, tmp_path / "foreign", "--config", config) == 1
    err = capsys.readouterr().err
    assert ".metadata names its_plugin.Unknown" in err and "Another program or version wrote it" in err and "damaged" not in err
    (folder / ".metadata").write_bytes(metadata)

    write(ffn_hidden_size=80)
    assert convert("from-megatron", folder, tmp_path / "bad", "--config", config) == 1
    assert "the model wants (160, 48)" in capsys.readouterr().err
    assert convert("from-megatron", tmp_path, tmp_path / "bad", "--config", config) == 1
    assert "is no torch_dist checkpoint of Megatron" in capsys.readouterr().err
