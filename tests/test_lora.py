"""Adapters: every layout equals one rank, one rank equals PEFT, the base never changes, checkpoints carry them.

Left out: files in PEFT's format and merging (hf/test_peft.py).
"""

import numpy as np
import pytest
import ranks
from parity_table import LIMIT, SP, STEPS, Case, CountTokens, batches, config, difference
from training import merged

LORA = {"rank": 4, "alpha": 8.0}
DORA = {**LORA, "dora": True}
VOCAB, SEQ, BATCH = 61, 16, 4
LLAMA = {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
         "vocab_size": VOCAB, "qkv_bias": True}
MIXTRAL = {**LLAMA, "family": "mixtral", "qkv_bias": False, "moe": {"num_experts": 4, "top_k": 2, "balance": "none"}}


def build(model, layout, train, world_size, lora, **sections):
    """On a rank: (run, topology, ParallelModel)."""
    from engine.config import validate
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run = config(model, layout, train, world_size)
    run = validate({**run.model_dump(), "lora": lora, **sections}, world_size)
    place = topology.start(run)
    return run, place, ParallelModel(run, place, CountTokens(), "policy")


def train(model, layout, extra, world_size, lora):
    """On a rank: losses, gradient norms and shards after STEPS steps, in which a base weight must not have changed by a bit."""
    from engine.mcore import checkpoint

    run, place, network = build(model, layout, extra, world_size, lora)
    before = checkpoint.local_shards(network)
    losses, norms = [], []
    for step in range(STEPS):
        losses.append(network.forward_backward(batches(run, place.dp_rank, place.dp, step)).loss)
        norms.append(network.step(1e-2, step + 1))
    network.gather_weights()
    after = checkpoint.local_shards(network)
    changed = {key for (key, _, _, old), (_, _, _, new) in zip(before, after) if not old.equal(new)}
    assert changed == {key for key, *_ in after if ".lora." in key}
    return losses, norms, [(key, shape, offset, values.numpy()) for key, shape, offset, values in after if ".lora." in key]


_references = {}


def reference(model, lora):
    key = (model, str(lora))
    if key not in _references:
        _references[key] = ranks.run(1, train, model, {}, {}, 1, lora)
    return _references[key]


ROWS = [
    (Case("dense", 2, dict(tp=2), {}), DORA),
    (Case("dense", 2, dict(tp=2, **SP), {}), LORA),
    (Case("dense", 2, dict(tp=2, **SP), {"recompute": "full"}), DORA),
    (Case("dense", 2, dict(zero1=True, overlap_grad_reduce=True, overlap_param_gather=True), {}), DORA),
    (Case("dense", 2, dict(cp=2), {}), LORA),
    (Case("tied", 2, dict(pp=2), {"recompute": "full"}), LORA),
    (Case("gpt2", 2, dict(tp=2, **SP), {}), {**DORA, "targets": ["k_proj", "o_proj", "up_proj", "down_proj"]}),
    (Case("moe-bias", 2, dict(ep=2), {}), LORA),
    (Case("moe", 2, dict(tp=2, **SP), {}), DORA),
    (Case("moe", 2, dict(tp=2, **SP, etp=1, ep=2, zero1=True), {}), DORA),
    (Case("moe", 2, dict(etp=2), {}), DORA),
    (Case("moe-sinks", 2, dict(tp=2, **SP, etp=1), {}), DORA),
    (Case("latent-moe", 2, dict(tp=2, **SP, etp=1, ep=2), {}), {**LORA, "targets": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
]


@pytest.mark.parametrize("case, lora", ROWS, ids=[f"{case} {'dora' if 'dora' in lora else 'lora'}" for case, lora in ROWS])
def test_every_layout_equals_one_rank(case, lora):
    found = difference(reference(case.model, lora), ranks.run(case.ranks, train, case.model, case.layout, case.train, case.ranks, lora))
    assert max(found) < LIMIT, found


def fresh(lora):
    """On a rank: the loss before training, and the adapters."""
    run, place, network = build("dense", {}, {}, 1, lora)
    found = {name: p.detach().numpy() for name, p in parameters(network).items() if ".lora." in name}
    return network.evaluate(batches(run, 0, 1, 0)).loss, found


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    """kaiming_uniform(a = sqrt(5)) is uniform in +- 1 / sqrt(in)."""
    (plain, _), (lora, drawn), (dora, _) = (ranks.run(1, fresh, lora)[0] for lora in ({}, LORA, DORA))
    assert lora == plain and dora == pytest.approx(plain, rel=1e-6)
    for name, values in drawn.items():
        if name.endswith(".B"):
            assert not values.any()
            continue
        scaled = values * values.shape[1] ** 0.5
        assert 0.97 < np.abs(scaled).max() <= 1 and abs(scaled.std() - 3 ** -0.5) < 0.06
    assert len({values.tobytes() for name, values in drawn.items() if name.endswith(".A")}) == 4 * 7


# --- one rank equals PEFT ----------------------------------------------------------------------------------------------


def small(model, lora, **sections):
    """On a rank: (run, ParallelModel) of one of the models above, every adapter factor non-zero."""
    import torch

    from engine.config import validate
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run = validate({"run": {"dir": "unused", "device": "cpu", "seed": 5}, "model": model, "data": {"train": ["unused"]}, "lora": lora,
                    "train": {"seq_len": SEQ, "global_batch": BATCH, "micro_batch": 2, "steps": 9, "precision": "fp32"},
                    "optim": {"weight_decay": 0.3, "clip_grad": 0.5}, **sections}, 1)
    network = ParallelModel(run, topology.start(run), CountTokens(), "policy")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters(network).items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.05, generator=generator)
            elif name.endswith(".magnitude"):
                parameter.mul_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif name.endswith(".bias"):
                parameter.normal_(0, 0.1, generator=generator)
    return run, network


def parameters(network):
    from engine.mcore.build import bare

    return dict(bare(network.chunks[0]).named_parameters())


def random_batches(run, step):
    import torch

    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
    whole = {"tokens": text[:, :-1], "labels": text[:, 1:], "position_ids": torch.arange(SEQ).repeat(BATCH, 1),
             "loss_mask": (torch.rand((BATCH, SEQ), generator=generator) < 0.7).float()}
    size = run.train.micro_batch
    return whole, [{name: tensor[row:row + size] for name, tensor in whole.items()} for row in range(0, BATCH, size)]


def drop_odd_features(x, p=0.5, training=True, inplace=False):
    """Stands for dropout, whose masks depend on the order of the dims, on both sides."""
    import torch

    return x * (2.0 * (torch.arange(x.size(-1)) % 2 == 0)) if p and training else x


def against_peft(lora, folder, num_steps=4):
    """On a rank: (what, PEFT's name, the engine's, PEFT's) for gradients and adapters of every step, with torch's AdamW beside PEFT."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.hf import llama
    from engine.hf.peft import WEIGHTS, save_adapter

    keep, torch.nn.functional.dropout = torch.nn.functional.dropout, drop_odd_features
    run, network = small(LLAMA, lora)
    plain = {name: value.detach().clone() for name, value in parameters(network).items() if ".lora." not in name}
    theirs = LlamaForCausalLM(LlamaConfig(**llama.hf_config(run.model, SEQ)))
    theirs.load_state_dict(dict(llama.to_hf(run.model, plain)))

    def in_peft_names(tensors, what):
        save_adapter(run.model, run.lora, tensors, f"{folder}/{what}", "base")
        return load_file(f"{folder}/{what}/{WEIGHTS}")

    in_peft_names(parameters(network), "start")
    theirs = PeftModel.from_pretrained(theirs, f"{folder}/start", is_trainable=True).train().double()  # so that the rounding is ours alone
    trained = {name.replace(".default.weight", "").replace("_A", "_A.weight").replace("_B", "_B.weight"): parameter
               for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    matrices, vectors = ([p for p in trained.values() if p.dim() == dim] for dim in (2, 1))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": run.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
                              lr=1e-2, betas=(run.optim.beta1, run.optim.beta2), eps=run.optim.eps)
    compared = []
    for step in range(num_steps):
        whole, pieces = random_batches(run, step)
        logp = theirs(whole["tokens"]).logits.log_softmax(-1).gather(2, whole["labels"][..., None])[..., 0]
        loss = -(logp * whole["loss_mask"]).sum() / whole["loss_mask"].sum()
        adamw.zero_grad()
        loss.backward()
        compared.append(("loss", step, network.forward_backward(pieces).loss, loss.item()))
        gradients = in_peft_names({name: p.main_grad for name, p in parameters(network).items() if ".lora." in name}, "gradients")
        assert gradients.keys() == trained.keys()
        compared += [("gradient", name, gradients[name].numpy(), p.grad.numpy().copy()) for name, p in trained.items()]
        torch.nn.utils.clip_grad_norm_(trained.values(), run.optim.clip_grad)
        adamw.step()
        network.step(1e-2, step + 1)
        ours = in_peft_names(parameters(network), "adapters")
        compared += [("adapter", name, ours[name].numpy(), p.detach().numpy().copy()) for name, p in trained.items()]
    torch.nn.functional.dropout = keep
    return compared


@pytest.mark.parametrize("lora", [
    LORA, {**DORA, "rslora": True}, {**DORA, "dropout": 0.5}, {**LORA, "dropout": 0.5, "targets": ["v_proj", "up_proj", "down_proj"]},
], ids=["lora", "dora rslora", "dora dropout", "some targets dropout"])
def test_one_rank_equals_peft(lora, tmp_path):
    close(ranks.run(1, against_peft, lora, str(tmp_path))[0])


def close(compared):
    for what, name, ours, theirs in compared:
        error, size = np.linalg.norm(np.asarray(ours) - theirs), np.linalg.norm(theirs)
        assert size > 0 and error <= 1e-5 * size, f"{what} {name}: relative difference {error / size:.1e}"


def against_own_experts(lora):
    """On a rank: gradients of a mixture of experts, and those that autograd finds where the merged weights are built from A and B."""
    import torch
    from torch.func import functional_call

    from engine.mcore.build import build_chunk, transformer_config

    run, network = small(MIXTRAL, lora)
    _, pieces = random_batches(run, 0)
    network.forward_backward(pieces)
    factors = {name: p.detach().clone().requires_grad_() for name, p in parameters(network).items() if ".lora." in name}
    plain = run.model_copy(update={"lora": type(run.lora)()})
    chunk = build_chunk(plain, transformer_config(plain, "cpu"), "cpu")
    weights = {name: p.detach().clone() for name, p in parameters(network).items() if ".lora." not in name}
    for stem in {name.split(".lora.")[0] for name in factors}:
        rows = {"linear_fc1": ["gate_proj", "up_proj"], "linear_fc2": ["down_proj"]}[stem.rpartition(".")[2]]
        whole = []
        for part, weight in zip(rows, weights[f"{stem}.weight"].chunk(len(rows))):
            adapter = {kind: factors.get(f"{stem}.lora.{part}.{kind}") for kind in ("A", "B", "magnitude")}
            moved = weight + 2.0 * adapter["B"] @ adapter["A"]      # alpha / rank
            if adapter["magnitude"] is not None:
                moved = moved * (adapter["magnitude"] / moved.detach().norm(dim=1))[:, None]
            whole.append(moved)
        weights[f"{stem}.weight"] = torch.cat(whole)
    total = sum(piece["loss_mask"].sum() for piece in pieces)
    for piece in pieces:
        inputs = (piece["tokens"], piece["position_ids"], None)
        logp = functional_call(chunk, weights, inputs, {"labels": piece["labels"]})
        (-(logp * piece["loss_mask"]).sum() / total).backward(retain_graph=True)
    return [("gradient", name, parameters(network)[name].main_grad.numpy(), p.grad.numpy()) for name, p in factors.items()]


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_adapters_of_experts_have_the_gradients_of_merged_weights(lora):
    compared = ranks.run(1, against_own_experts, {**lora, "targets": ["gate_proj", "up_proj", "down_proj"]})[0]
    assert len(compared) == 2 * 4 * 3 * (3 if "dora" in lora else 2)      # layers, experts, parts
    close(compared)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def steps(model, layout, world_size, lora, root, start, stop):
    """On a rank: losses of steps start to stop - 1, resumed from `root` unless start is 0, saved there at the end."""
    from engine.mcore import checkpoint

    run, place, network = build(model, layout, {}, world_size, lora)
    if start:
        checkpoint.load(network, checkpoint.folder_of(root, start))
    losses = []
    for step in range(start, stop):
        losses.append(network.forward_backward(batches(run, place.dp_rank, place.dp, step)).loss)
        network.step(1e-2, step + 1)
    checkpoint.save(network, root, checkpoint.Position(step=stop))
    return losses


@pytest.mark.parametrize("model, layout", [("dense", dict(tp=2, **SP)), ("moe", dict(tp=2, **SP, etp=1, ep=2, zero1=True))], ids=["dense", "moe"])
def test_a_checkpoint_goes_on_in_another_layout(model, layout, tmp_path):
    lora = {**DORA, "alpha": 32.0}
    whole = ranks.run(1, steps, model, {}, 1, lora, str(tmp_path / "whole"), 0, 4)[0]
    first = ranks.run(2, steps, model, layout, 2, lora, str(tmp_path / "parts"), 0, 2)[0]
    second = ranks.run(1, steps, model, {}, 1, lora, str(tmp_path / "parts"), 2, 4)[0]
    assert np.allclose(first + second, whole, rtol=1e-6, atol=0)
    assert abs(whole[3] - whole[2]) > 1e-3


def base_then_adapters(root):
    """On a rank: a checkpoint of other base weights into a network with fresh adapters; (name, there, what it should be), refusals."""
    import torch

    from engine.mcore import checkpoint

    _, base = small(LLAMA, {})
    with torch.no_grad():
        for parameter in parameters(base).values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    checkpoint.save(base, f"{root}/base", checkpoint.Position())
    _, network = small(LLAMA, DORA)
    fresh = {name: p.detach().clone() for name, p in parameters(network).items()}
    for name, parameter in parameters(network).items():
        if name.endswith(".B"):
            parameter.data.zero_()      # as it is when training starts
    checkpoint.load(network, checkpoint.find(f"{root}/base"), optimizer=False)
    found, wanted = parameters(network), {name: p.detach() for name, p in parameters(base).items()}
    for name, value in fresh.items():
        if name.endswith(".A"):
            wanted[name] = value
        elif name.endswith(".B"):
            wanted[name] = torch.zeros_like(value)
        elif name.endswith("linear_proj.lora.o_proj.magnitude"):
            wanted[name] = parameters(base)[name.replace("lora.o_proj.magnitude", "weight")].detach().norm(dim=1)
        elif name.endswith("linear_fc1.lora.up_proj.magnitude"):
            wanted[name] = parameters(base)[name.replace("lora.up_proj.magnitude", "weight")].detach().norm(dim=1).chunk(2)[1]
    compared = [(name, found[name].detach().numpy(), value.numpy()) for name, value in wanted.items()]
    checkpoint.save(network, f"{root}/adapted", checkpoint.Position())
    refusals = []
    for folder, lora, optimizer in (("base", DORA, True), ("adapted", {}, False), ("adapted", {**DORA, "alpha": 9.0}, True),
                                    ("adapted", {**DORA, "targets": ["q_proj"]}, True)):
        try:
            checkpoint.load(small(LLAMA, lora)[1], checkpoint.find(f"{root}/{folder}"), optimizer=optimizer)
            refusals.append("")
        except checkpoint.CheckpointError as error:
            refusals.append(str(error))
    return compared, refusals


def test_fresh_adapters_take_a_base_checkpoint_and_no_mixed_one_is_loaded(tmp_path):
    compared, refusals = ranks.run(1, base_then_adapters, str(tmp_path))[0]
    assert sum(name.endswith("magnitude") for name, *_ in compared) == 4
    for name, found, wanted in compared:
        assert np.allclose(found, wanted, rtol=1e-6, atol=0), name
    for text, said in zip(("load_optimizer=false", "lora.rank is 0, the checkpoint has 4", "lora.alpha is 9.0", "lora.targets is"), refusals):
        assert text in said, refusals


# --- the rest ----------------------------------------------------------------------------------------------------------


def with_dropout(recompute):
    """On a rank: losses and gradients of one batch with dropout, and the loss without it."""
    run, network = small(LLAMA, {**DORA, "dropout": 0.3}, train={"seq_len": SEQ, "global_batch": BATCH, "steps": 9, "precision": "fp32",
                                                                 "recompute": recompute})
    _, pieces = random_batches(run, 0)
    loss = network.forward_backward(pieces).loss
    gradients = {name: p.main_grad.numpy().copy() for name, p in parameters(network).items() if ".lora." in name}
    return loss, gradients, [network.evaluate(pieces).loss for _ in range(2)]


def test_recomputed_dropout_draws_the_same_masks():
    plain, recomputed = (ranks.run(1, with_dropout, recompute)[0] for recompute in ("none", "full"))
    assert plain[0] == pytest.approx(recomputed[0], rel=1e-6)
    for name, gradient in plain[1].items():
        assert np.allclose(recomputed[1][name], gradient, rtol=1e-4, atol=1e-7), name
    assert plain[2][0] == plain[2][1] and abs(plain[2][0] - plain[0]) > 1e-4


def masks(world_size):
    """On a rank: which numbers each call of dropout kept, for q, k and v, for o, for gate and up, for down."""
    import torch

    from engine.mcore import lora

    _, _, network = build("dense", {"tp": world_size}, {}, world_size, {**LORA, "dropout": 0.5})
    kept, plain = [], torch.nn.functional.dropout

    def record(x, *args, **kwargs):
        out = plain(x, *args, **kwargs)
        kept.append((out != 0).numpy())
        return out

    lora.F.dropout = record
    try:
        network.forward_backward(batches(network.run, 0, 1, 0)[:1])
    finally:
        lora.F.dropout = plain
    return [mask for mask in kept if not mask.all()]


def test_ranks_drop_the_same_of_what_they_share_and_not_of_what_they_split():
    first, second = ranks.run(2, masks, 2)
    assert [mask.shape[-1] for mask in first] == [64, 32, 64, 48] * 4
    for i, (one, other) in enumerate(zip(first, second)):
        assert 0.4 < one.mean() < 0.6
        assert np.array_equal(one, other) == (i % 2 == 0)


def in_bf16(num_steps):
    """On a rank: losses, what changed, dtypes, which parameters of a network with a value head learn, and norms of gradients by layer."""
    from engine.mcore import build, observe

    run, network = small(LLAMA, DORA, train={"seq_len": SEQ, "global_batch": BATCH, "steps": 9, "precision": "bf16", "recompute": "full"})
    before = {name: p.detach().clone() for name, p in parameters(network).items()}
    _, pieces = random_batches(run, 0)
    losses = []
    for step in range(num_steps):
        losses.append(network.forward_backward(pieces).loss)
        network.step(1e-2, step + 1)
    changed = {name for name, p in parameters(network).items() if not p.equal(before[name])}
    valued = build.build_chunk(build.for_role(run, True, "scalar"), network.config, "cpu")
    learning = {name for name, p in build.bare(valued).named_parameters() if p.requires_grad}
    return losses, changed, {str(p.dtype) for p in parameters(network).values()}, learning, observe.layer_norms(network)["grad"]


def test_bf16_learns_adapters_alone_and_a_value_head():
    losses, changed, dtypes, learning, norms = ranks.run(1, in_bf16, 20)[0]
    assert losses[-1] < losses[0] - 0.15 and dtypes == {"torch.bfloat16"}
    assert len(changed) == 2 * 7 * 3 and all(".lora." in name for name in changed)
    assert learning == changed | {"value_head.weight"}
    assert norms["layer_00"] > 0 and norms["embedding"] == norms["output"] == 0


@pytest.mark.parametrize("changes, words", [
    ({"lora": {"rank": 4, "targets": ["q_proj", "lm_head"]}}, "lm_head belongs to the vocabulary"),
    ({"lora": {"rank": 4, "targets": ["qkv"]}}, "qkv is no linear layer of this model (activation swiglu); legal: q_proj, k_proj, v_proj"),
    ({"lora": {"rank": 4, "targets": ["q_proj"]}, "model": {"num_query_groups": 0, "qk_norm": False, "mla": {"kv_lora_rank": 8}}},
     "q_proj is no linear layer of this model, whose latent attention takes no adapters; legal: o_proj, gate_proj, up_proj, down_proj"),
    ({"lora": {"rank": 4, "targets": []}}, "lora.targets is empty"),
    ({"lora": {"rank": 20}}, "lora.rank(20) exceeds the smaller dim of k_proj(16), v_proj(16); set lora.rank to 16 or less"),
    ({"lora": {"rank": 4}, "train": {"backend": "te"}}, "set train.backend=torch"),
    ({"lora": {"rank": 4}, "train": {"fp8": {"recipe": "delayed"}}}, "set train.fp8.recipe=none"),
    ({"lora": {"rank": 4}, "model": {"activation": "gelu"}}, "gate_proj is no linear layer of this model (activation gelu)"),
], ids=["vocabulary", "unknown", "latent", "none", "rank", "te", "fp8", "ungated"])
def test_refusals(changes, words):
    from engine.config import ConfigError, validate

    raw = merged({"run": {"dir": "unused"}, "model": LLAMA, "data": {"train": ["unused"]},
                  "train": {"seq_len": SEQ, "global_batch": BATCH, "steps": 9}}, changes)
    with pytest.raises(ConfigError) as found:
        validate(raw, 1)
    assert words in str(found.value)
