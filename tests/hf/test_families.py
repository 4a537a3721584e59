"""Every family, the whole way: transformers -> checkpoint -> logits and training under every layout -> transformers -> checkpoint.

Logits of the converted model equal transformers' on one rank and under tp, pp and, with experts, ep. Training it is the same under all
of them. What the last layout saved becomes a folder that transformers reads without a remark and computes the same logits from, and that
folder becomes the same checkpoint again, bit for bit.
"""

import pytest
import ranks
import torch
from families import MODELS, layouts_of, random_network, train_layouts
from parity_table import LIMIT, difference

from engine.config import ConfigError, validate
from engine.hf import FAMILIES
from engine.hf.convert import run_of
from engine.hf.export import export
from engine.hf.load import open_hf
from engine.hf.verify import agreement, prompts, transformers_logits

PROVED = [name for name in MODELS if name not in ("llama_geglu", "llama_attention_bias", "deepseek_v2_lite", "deepseek_v3_tied", "gemma2_untied")]
# The others differ in the name map, or are parts of these.


@pytest.mark.parametrize("name", PROVED)
def test_a_family_goes_all_the_way(tiny, name, tmp_path):
    model, tokens, layouts = tiny(name), prompts(tiny(name).run.model, num_prompts=2, num_tokens=32), layouts_of(name)
    converted, trained = tmp_path / "converted", tmp_path / "trained"
    checkpoints().write_tensors(converted, model.run, model.engine_tensors().items())

    found = ranks.run(2, train_layouts, str(converted), layouts, tokens, str(trained))
    with torch.no_grad():
        theirs = model.network(tokens).logits
    for number, layout in enumerate(layouts):
        if "cp" not in layout:
            agreement(last(found, number).logits, theirs, who=f"{layout or 'one rank'} and transformers")
        away = difference([rank[0].after for rank in found], [rank[number].after for rank in found])
        assert max(away) < LIMIT, f"{layout} trains otherwise than one rank: loss, gradient norm, weights differ by {away}"

    written = checkpoints().read_tensors(trained)
    hf, tensors = open_hf(export(checkpoints().read_config(trained), written, tmp_path / "hf"))
    after = transformers_logits(tmp_path / "hf", tokens)
    agreement(last(found, -1).logits_after, after)
    assert (after - theirs).abs().max() > 1e-3 * theirs.abs().max(), "three steps have changed nothing"

    run = run_of(hf, tensors, tmp_path / "hf", tmp_path / "again")
    again = dict(FAMILIES[run.model.family].from_hf(run.model, tensors))
    assert set(again) == set(written) and all(torch.equal(again[name], written[name]) for name in again)


def test_a_layout_that_splits_a_head_is_refused_by_name(tmp_path):
    network = random_network("qwen3", num_key_value_heads=3)
    network.save_pretrained(tmp_path / "theirs")
    hf, tensors = open_hf(tmp_path / "theirs")
    raw = run_of(hf, tensors, tmp_path / "theirs", tmp_path / "run").model_dump()
    with pytest.raises(ConfigError, match=r"model.num_query_groups\(3\) is not divisible by parallel.tp\(2\); legal tp: 1, 3"):
        validate(raw | {"parallel": {"tp": 2}, "data": {"train": ["x"]}}, 2)


def last(found, number: int):
    """The Trained of the last pp rank under a layout, with logits as a tensor."""
    trained = next(rank[number] for rank in found if rank[number].logits is not None)
    return trained._replace(logits=torch.from_numpy(trained.logits), logits_after=torch.from_numpy(trained.logits_after))


def checkpoints():
    from engine.mcore import topology

    topology.start_single()
    from engine.mcore import checkpoint

    return checkpoint


@pytest.mark.parametrize("name", ["llama_tied", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "olmo2", "deepseek_v3", "gemma2",
                                  "gemma3", "gpt_oss", "gpt2"])
def test_a_reward_model_goes_both_ways(name, tmp_path):
    """AutoModelForSequenceClassification with one label is a scalar head: its number at every token, and every bit on the way back."""
    from engine.mcore.build import single_rank_logits

    network = random_network(name, head="SequenceClassification", num_labels=1)
    network.save_pretrained(tmp_path / "theirs")
    hf, tensors = open_hf(tmp_path / "theirs")
    run = run_of(hf, tensors, tmp_path / "theirs", tmp_path / "run")
    assert run.model.head == "scalar" and run.stage == "reward"
    tokens, ours = prompts(run.model), dict(FAMILIES[run.model.family].from_hf(run.model, tensors))
    values = transformers_logits(tmp_path / "theirs", tokens)
    agreement(single_rank_logits(run, ours, tokens), values, tolerance=1e-5)
    with torch.no_grad():
        assert torch.allclose(network(tokens[:1]).logits, values[:1, -1], atol=1e-5), "not what transformers calls the reward"

    hf, back = open_hf(export(run, ours, tmp_path / "out"))
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert torch.equal(transformers_logits(tmp_path / "out", tokens), values)
