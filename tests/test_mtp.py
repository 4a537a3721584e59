"""Multi-token prediction: the loss by the paper's formulas, what it counts, layers that are kept without learning, checkpoints.

That every layout trains them like one rank is shown by the rows of tests/parity_table.py, conversion by tests/hf/test_mtp_modules.py; what is
refused stands in tests/test_config.py.
"""

import json
from pathlib import Path

import numpy as np
import parity_table
import pytest
import ranks
import torch
import torch.nn.functional as F
from training import MOE, merged, on_ranks

from engine.mcore import mtp

MTP = {"model": {"mtp": {"num_layers": 1}}}
MODEL = {**parity_table.DENSE, "mtp": dict(num_layers=2, loss_weight=0.7)}


# --- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_documents", [True, False])
def test_targets_against_a_loop(has_documents):
    run = parity_table.config("dense", {}, {"micro_batch": 8}, 1)
    (batch,) = parity_table.batches(run, 0, 1, 0)
    if not has_documents:
        del batch["segment_ids"]
    found = {name: rows.chunk(3) for name, rows in mtp.targets(batch, 3).items()}
    for k in range(1, 4):
        for b in range(8):
            for i in range(parity_table.SEQ):
                counts = i + k < parity_table.SEQ and (not has_documents or batch["segment_ids"][b, i] == batch["segment_ids"][b, i + k])
                assert found["further_mask"][k - 1][b, i] == (batch["loss_mask"][b, i + k] if counts else 0)
                if counts:
                    assert found["further_tokens"][k - 1][b, i] == batch["tokens"][b, i + k]
                    assert found["further_labels"][k - 1][b, i] == batch["labels"][b, i + k]


def rms(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x):
    """RoPE of [b, s, heads, d], the token at place i by i / 10000^(2j / d)."""
    half = x.size(-1) // 2
    angles = torch.outer(torch.arange(x.size(1)), 10000.0 ** -(torch.arange(half) / half)).to(x.dtype)[:, None]
    a, b = x.split(half, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def plain_layer(w, x, visible, model):
    """A Llama layer with norms of queries and keys, written out: x [b, s, h]."""
    heads, groups, d = model.num_attention_heads, model.kv_heads, model.head_size
    fused = (rms(x, w["input_layernorm.weight"]) @ w["self_attention.linear_qkv.weight"].T).unflatten(-1, (groups, -1, d))
    q, k, v = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    q, k = turned(rms(q, w["self_attention.q_layernorm.weight"])), turned(rms(k, w["self_attention.k_layernorm.weight"]))
    k, v = (t.repeat_interleave(heads // groups, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / d ** 0.5
    weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
    x = x + torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) @ w["self_attention.linear_proj.weight"].T
    gate, up = (rms(x, w["pre_mlp_layernorm.weight"]) @ w["mlp.linear_fc1.weight"].T).chunk(2, -1)
    return x + (F.silu(gate) * up) @ w["mlp.linear_fc2.weight"].T


def plain_loss(w, hidden, batch, model):
    """Equations 21 to 25 of arXiv 2412.19437 without its weight: (sum, count) of -log p of the tokens that count. hidden: h^0 [b, s, h]."""
    b, s = batch["tokens"].shape
    documents, nll, count = batch["segment_ids"], 0.0, 0
    visible = (documents[:, :, None] == documents[:, None, :]) & torch.ones(s, s, dtype=torch.bool).tril()
    for k in range(1, model.mtp.num_layers + 1):
        own = {name.removeprefix(f"mtp.layers.{k - 1}."): value for name, value in w.items() if name.startswith(f"mtp.layers.{k - 1}.")}
        layer = {name.removeprefix("transformer_layer."): value for name, value in own.items()}
        ahead = torch.cat([batch["tokens"][:, k:], batch["tokens"][:, :k]], 1)  # what comes round counts nowhere
        embedded = w["embedding.word_embeddings.weight"][ahead]
        both = torch.cat([rms(embedded, own["enorm.weight"]), rms(hidden, own["hnorm.weight"])], -1)
        hidden = rms(plain_layer(layer, both @ own["eh_proj.weight"].T, visible, model), own["final_layernorm.weight"])
        logp = (hidden @ w["output_layer.weight"][:model.vocab_size].T).log_softmax(-1)
        for row in range(b):
            for i in range(s - k):
                if documents[row, i] == documents[row, i + k] and batch["loss_mask"][row, i + k]:
                    nll, count = nll - logp[row, i, batch["labels"][row, i + k]], count + 1
    return nll, count


def loss_and_gradients(model):
    """On a rank: (mtp_loss, main and further gradients by name) of one global batch in micro-batches of 2, and the same written out."""
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    parity_table.MODELS["here"] = model
    run = parity_table.config("here", {}, {"micro_batch": 2}, 1)
    network = ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy")
    chunk, states = network.chunks[0].module, []
    chunk.decoder.register_forward_hook(lambda module, inputs, output: states.append(output.detach().transpose(0, 1)))
    result = network.forward_backward(parity_table.batches(run, 0, 1, 0))
    ours = {name: p.main_grad.clone() for name, p in chunk.named_parameters() if name.startswith("mtp.")}

    (whole,) = parity_table.batches(parity_table.config("here", {}, {"micro_batch": 8}, 1), 0, 1, 0)
    w = {name: p.detach().double().requires_grad_() for name, p in chunk.named_parameters()}
    nll, count = plain_loss(w, torch.cat(states).double(), whole, run.model)
    (run.model.mtp.loss_weight * nll / count).backward()
    apart = {name: float((gradient - w[name].grad).norm() / w[name].grad.norm()) for name, gradient in ours.items()}
    return result.metrics["mtp_loss"], float(nll / count), apart


def test_the_loss_and_its_gradients_by_the_papers_formulas():
    """Two depths, documents, a ragged mask, four micro-batches. No gradient but this loss's reaches these layers, so its weight and what it is
    divided by show too."""
    ((ours, plain, apart),) = ranks.run(1, loss_and_gradients, MODEL)
    assert ours == pytest.approx(plain, rel=1e-6)
    assert len(apart) == 24 and max(apart.values()) < 1e-5, apart


# --- layers that are kept ------------------------------------------------------------------------------------------------


def trained(model, layout, num_ranks):
    parity_table.MODELS["here"] = model
    return parity_table.train("here", layout, {}, num_ranks)


def initial(model):
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel

    parity_table.MODELS["here"] = model
    run = parity_table.config("here", {}, {}, 1)
    network = ParallelModel(run, topology.start(run), parity_table.CountTokens(), "policy")
    return [], [], [(key, shape, offset, values.numpy()) for key, shape, offset, values in checkpoint.local_shards(network)]


def test_without_a_loss_they_stay_as_they_are_and_nothing_else_notices():
    """In the layout that would notice an embedding without a gradient on the last pp rank."""
    kept = {**MODEL, "mtp": dict(num_layers=2, loss_weight=0.0)}
    layout = {"pp": 2, "zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    found, plain = (ranks.run(2, trained, model, layout, 2) for model in (kept, parity_table.DENSE))
    assert [rank[:2] for rank in found] == [rank[:2] for rank in plain]
    weights, without, start = parity_table.assemble(found), parity_table.assemble(plain), parity_table.assemble(ranks.run(1, initial, kept))
    further = {name for name in weights if name.startswith("mtp.")}
    assert further == weights.keys() - without.keys() and len(further) == 24
    assert all(np.array_equal(weights[name], start[name] if name in further else without[name]) for name in weights)


# --- checkpoints -----------------------------------------------------------------------------------------------------------


def numbers(lines):
    return [[line[key] for key in ("loss", "grad_norm", "mtp_loss")] for line in lines]


def test_checkpoints_resume_in_the_same_layout_and_in_others(raw_run, tmp_path):
    """pp=2 stopped and resumed is the unbroken run, bit for bit; the same checkpoint goes on under tp and cp within 1e-5."""
    change = merged(MTP, {"model": {"moe": MOE}, "schedule": {"decay_steps": 6}})
    unbroken = merged(raw_run, change, {"run": {"dir": str(tmp_path / "unbroken")}, "parallel": {"pp": 2}})
    moving = merged(raw_run, change, {"run": {"dir": str(tmp_path / "moving")}})
    expected = numbers(on_ranks(2, unbroken))
    for steps, layout in ((2, {"pp": 2}), (4, {"pp": 2}), (5, {"tp": 2, "sequence_parallel": True}), (6, {"cp": 2, "ep": 2, "zero1": True})):
        found = numbers(on_ranks(2, merged(moving, {"train": {"steps": steps}, "parallel": layout})))
        assert len(found) == steps
        if "pp" in layout:
            assert found == expected[:steps]
    assert np.allclose(found, expected, rtol=1e-5, atol=0)
    validation = [json.loads(line) for line in (tmp_path / "unbroken" / "metrics.jsonl").read_text().splitlines() if "valid" in line]
    assert validation and all(line["mtp_loss"] > 0 for line in validation)


def score(folder):
    """On a rank: log-probabilities from a checkpoint by a network that learns and by one that does not."""
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    run = checkpoint.read_config(folder)
    place, found = topology.start(run), []
    (batch,) = parity_table.batches(parity_table.config("dense", {}, {"micro_batch": 8}, 1), 0, 1, 0)
    batch = {name: t[:2, :16] % 50 if name in ("tokens", "labels") else t[:2, :16] for name, t in batch.items() if t.dim() == 2}
    for role in (Role(), Role(train=False), Role(train=False, head="scalar")):
        model = ParallelModel(run, place, parity_table.CountTokens(), "policy", role)
        checkpoint.load(model, checkpoint.find(folder), optimizer=False)
        found.append((model.run.model.mtp.num_layers, model.score([batch])[0].numpy()))
    return found


def test_a_checkpoint_gets_such_layers_and_never_loses_them_unasked(raw_run, tmp_path):
    first = {"load": raw_run["run"]["dir"], "load_optimizer": False}
    on_ranks(1, merged(raw_run, {"model": {"moe": MOE}}))
    more = merged(raw_run, MTP, {"model": {"moe": MOE}, "run": {"dir": str(tmp_path / "more")}, "checkpoint": first})
    with pytest.raises(ranks.RankError, match="has 0 layers for further tokens and this run has model.mtp.num_layers=1, so the optimizer's state"):
        on_ranks(1, merged(more, {"checkpoint": {"load_optimizer": True}}))
    lines = on_ranks(1, more)
    assert lines[-1]["mtp_loss"] < lines[0]["mtp_loss"]
    fewer = merged(raw_run, {"model": {"moe": MOE}, "run": {"dir": str(tmp_path / "fewer")}, "checkpoint": {**first, "load": str(tmp_path / "more")}})
    with pytest.raises(ranks.RankError, match="has 1 layers for further tokens, but model.mtp.num_layers is 0; set it to 1"):
        on_ranks(1, fewer)
    (learns, frozen, scalar), = ranks.run(1, score, str(Path(more["run"]["dir"])))
    assert (learns[0], frozen[0], scalar[0]) == (1, 0, 0) and np.array_equal(learns[1], frozen[1])
