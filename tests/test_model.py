"""One network: initial weights, loss and gradients against transformers, optimizer steps against torch's AdamW, precisions, experts.

Left out: layouts (test_parity.py), the layers' own maths (test_torch_backend.py) and the loop around it (test_loop.py).
"""

import math

import numpy as np
import pytest
import ranks
from parity_table import CountTokens
from training import merged, on_ranks

VOCAB, SEQ, BATCH, EOD = 61, 32, 4, 7
RAW = {
    "run": {"dir": "unused", "device": "cpu", "seed": 5},
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
              "num_query_groups": 2, "vocab_size": VOCAB},
    "data": {"train": ["unused"]},
    "train": {"seq_len": SEQ, "global_batch": BATCH, "micro_batch": 2, "steps": 100, "precision": "fp32"},
}
GPT2 = {"model": {"family": "gpt2", "num_query_groups": 0, "max_position": SEQ}}
MOE = {"model": {"family": "mixtral", "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}}}


class Watched(CountTokens):
    """Keeps the per-token losses of the last global batch, 0 where there is none."""

    def __init__(self):
        self.nll = []

    def loss(self, role, output, batch):
        self.nll.append(-output.detach() * batch["loss_mask"])
        return super().loss(role, output, batch)


def build(raw, world_size=1):
    """On a rank: (run, stage, ParallelModel)."""
    from engine.config import validate
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel

    run, stage = validate(raw, world_size), Watched()
    return run, stage, ParallelModel(run, topology.start(run), stage, "policy")


def batches(run, step=0, documents=False):
    """The micro-batches of one global batch, with a ragged loss mask; documents: each row is cut in two at another place."""
    import torch

    generator = torch.Generator().manual_seed(step)
    text = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=generator)
    text[:, 1::2] = text[:, :-1:2]      # something to learn: every second token repeats the one before it
    whole = {
        "tokens": text[:, :-1],
        "labels": text[:, 1:],
        "loss_mask": (torch.rand((BATCH, SEQ), generator=generator) < 0.7).float(),
        "position_ids": torch.arange(SEQ).repeat(BATCH, 1),
    }
    if documents:
        cuts = torch.tensor([[5], [16], [31], [20]])
        second = torch.arange(SEQ) >= cuts
        whole["segment_ids"] = second.int()
        whole["position_ids"] -= second * cuts
    size = run.train.micro_batch
    return [{name: tensor[row:row + size] for name, tensor in whole.items()} for row in range(0, BATCH, size)]


def weights(model) -> dict:
    from engine.mcore.build import bare

    return {name: parameter.detach().clone() for name, parameter in bare(model.chunks[0]).named_parameters()}


def gradients(model) -> dict:
    from engine.mcore.build import bare

    return {name: parameter.main_grad.clone() for name, parameter in bare(model.chunks[0]).named_parameters()}


def as_numpy(tensors: dict) -> dict:
    return {name: tensor.float().numpy() for name, tensor in tensors.items()}


def relative(ours, theirs) -> float:
    """|difference| / |theirs|, in L2."""
    return float(np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-12))


def train_steps(raw, num_steps, lr=1e-2, same_batch=False):
    """On a rank: (losses, gradient norms, weights afterwards)."""
    run, _, model = build(raw)
    losses, norms = [], []
    for step in range(num_steps):
        losses.append(model.forward_backward(batches(run, 0 if same_batch else step)).loss)
        norms.append(model.step(lr))
    return losses, norms, as_numpy(weights(model))


def run_steps(*args):
    return ranks.run(1, train_steps, *args)[0]


# --- initial weights ---------------------------------------------------------------------------------------------------


def test_initial_weights_follow_the_seed():
    first, again, other = (run_steps(merged(RAW, {"run": {"seed": seed}}), 0)[2] for seed in (5, 5, 6))
    for name in first:
        assert np.array_equal(first[name], again[name])
        if "norm" in name:
            assert (first[name] == 1).all() and (other[name] == 1).all()
        else:
            assert abs(np.corrcoef(first[name].ravel(), other[name].ravel())[0, 1]) < 0.1, name
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            assert first[name].std() == pytest.approx(0.02 / math.sqrt(2 * 2) if residual else 0.02, rel=0.1)
    layers = [first[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1)]
    assert abs(np.corrcoef(layers[0].ravel(), layers[1].ravel())[0, 1]) < 0.1


def test_padding_of_the_vocabulary_changes_nothing():
    """Losses, gradient norms and real rows agree; rows of padding never move."""
    (losses, norms, plain), (padded_losses, padded_norms, padded) = (
        # AdamW's epsilon as in tests/parity_table.py: rounding, which differs between processors, must not become a full step.
        run_steps(merged(RAW, {"model": {"vocab_pad_multiple": multiple}, "optim": {"eps": 1e-5}}), 4) for multiple in (1, 128))
    assert np.allclose(losses, padded_losses, rtol=1e-6, atol=0) and np.allclose(norms, padded_norms, rtol=1e-6, atol=0)
    for name, tensor in plain.items():
        assert relative(padded[name][:len(tensor)], tensor) < 1e-5, name
    initial = run_steps(merged(RAW, {"optim": {"weight_decay": 0.0}}), 0)[2]["output_layer.weight"]
    assert padded["output_layer.weight"].shape == (128, 32)
    decayed = np.float32(1) - np.float32(1e-2 * 0.1)      # weight decay is all that padding feels
    assert np.allclose(padded["output_layer.weight"][VOCAB:], initial[VOCAB:] * decayed**4, rtol=1e-5, atol=0)


# --- an independent implementation -------------------------------------------------------------------------------------


def against_transformers(change, documents):
    """On a rank: pairs of (ours, theirs) for the per-token losses, the loss and every gradient."""
    import torch
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from engine.hf import llama

    run, stage, model = build(merged(RAW, change))
    network = LlamaForCausalLM(LlamaConfig(**llama.hf_config(run.model, SEQ), attn_implementation="eager"))
    network.load_state_dict(dict(llama.to_hf(run.model, weights(model))), strict=not run.model.tie_embeddings)
    micro_batches = batches(run, documents=documents)
    result = model.forward_backward(micro_batches)
    whole = {name: torch.cat([batch[name] for batch in micro_batches]) for name in micro_batches[0]}
    nll = torch.zeros(BATCH, SEQ)
    for row in range(BATCH):
        segments = whole["segment_ids"][row] if documents else torch.zeros(SEQ)
        for segment in segments.unique():      # each document alone, as if there were nothing else
            own = segments == segment
            logits = network(whole["tokens"][row, own][None]).logits[0]
            nll[row, own] = F.cross_entropy(logits, whole["labels"][row, own], reduction="none")
    loss = (nll * whole["loss_mask"]).sum() / whole["loss_mask"].sum()
    loss.backward()
    theirs = dict(llama.from_hf(run.model, {name: parameter.grad for name, parameter in network.named_parameters()}))
    ours = gradients(model)
    assert ours.keys() == theirs.keys()
    return [("nll", torch.cat(stage.nll).numpy(), (nll * whole["loss_mask"]).detach().numpy()), ("loss", np.array(result.loss), np.array(loss.item()))] + [
        (name, ours[name].numpy(), theirs[name].numpy()) for name in ours]


@pytest.mark.parametrize("documents", [False, True], ids=["whole", "two documents a row"])
@pytest.mark.parametrize("change", [{}, {"model": {"tie_embeddings": True, "rope_theta": 500.0, "head_dim": 10}}], ids=["plain", "tied"])
def test_loss_and_gradients_equal_transformers(change, documents):
    compared = ranks.run(1, against_transformers, change, documents)[0]
    assert len(compared) > 10
    for name, ours, theirs in compared:
        assert relative(ours, theirs) < 1e-5, name


# --- the optimizer -----------------------------------------------------------------------------------------------------


def against_adamw(raw, num_steps=3):
    """On a rank: the same gradients through torch.optim.AdamW; (name, ours, theirs) after each step, and the norms."""
    import torch

    run, _, model = build(raw)
    reference = {name: torch.nn.Parameter(value) for name, value in weights(model).items()}
    decayed = [p for name, p in reference.items() if not name.endswith("bias") and "norm" not in name]
    kept = [p for name, p in reference.items() if name.endswith("bias") or "norm" in name]
    optim = run.optim
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": optim.weight_decay}, {"params": kept, "weight_decay": 0.0}],
                              betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=False)
    compared, norms = [], []
    for step in range(num_steps):
        model.forward_backward(batches(run, step))
        for name, gradient in gradients(model).items():
            reference[name].grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), optim.clip_grad) if optim.clip_grad else None
        lr = 1e-2 / (step + 1)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        norms.append((model.step(lr), norm and float(norm)))
        compared += [(name, value.numpy(), reference[name].detach().clone().numpy()) for name, value in weights(model).items()]
    return compared, norms


@pytest.mark.parametrize("change", [{}, GPT2, {"optim": {"clip_grad": 0.0}}, {"optim": {"clip_grad": 1e9, "weight_decay": 0.0}}],
                         ids=["llama", "gpt2 has biases", "no clipping", "clipping that never bites"])
def test_steps_equal_adamw(change):
    """Weight decay on matrices and embeddings, none on norms and biases; the norm is that before clipping."""
    optim = {"optim": {"weight_decay": 0.3, "clip_grad": 0.5, "beta1": 0.8, "beta2": 0.9}}
    compared, norms = ranks.run(1, against_adamw, merged(RAW, optim, change))[0]
    for name, ours, theirs in compared:
        assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-7), f"{name} differs by {np.abs(ours - theirs).max():.1e}"
    for ours, theirs in norms:
        assert theirs is None or ours == pytest.approx(theirs, rel=1e-6)


# --- precisions --------------------------------------------------------------------------------------------------------


def in_bf16(raw, num_steps):
    import torch

    run, _, model = build(raw)
    losses = []
    for _ in range(num_steps):
        losses.append(model.forward_backward(batches(run)).loss)
        model.step(1e-2)
    masters = [m for part in model.optimizer.chained_optimizers for group in part.optimizer.param_groups for m in group["params"]]
    halves = [p for chunk in model.chunks for p in chunk.parameters()]
    assert {p.dtype for p in halves} == {torch.bfloat16} and {m.dtype for m in masters} == {torch.float32}
    rounded = sorted(float(m.to(torch.bfloat16).double().sum()) for m in masters)
    assert rounded == sorted(float(p.double().sum()) for p in halves)
    assert any((m != m.to(torch.bfloat16).float()).any() for m in masters)
    return losses


def test_bf16_trains_with_fp32_masters():
    losses = ranks.run(1, in_bf16, merged(RAW, {"train": {"precision": "bf16"}}), 30)[0]
    reference = run_steps(RAW, 30, 1e-2, True)[0]
    assert losses[-1] < losses[0] - 1
    assert np.allclose(losses[:5], reference[:5], rtol=2e-2)      # 2^-7 is bf16's rounding


def in_fp16(raw, num_steps, world_size=1):
    """On a rank: (loss scale before, gradient norm or None, weights unchanged bit by bit, loss) for every step."""
    run, _, model = build(raw, world_size)
    place, seen = model.topology, []
    for _ in range(num_steps):
        scale, before = model.loss_scale, weights(model)
        loss = model.forward_backward(batches(run)[place.dp_rank::place.dp]).loss
        norm = model.step(1e-3)
        seen.append((scale, norm, all(value.equal(before[name]) for name, value in weights(model).items()), loss))
    return seen


@pytest.mark.parametrize("change", [{}, MOE], ids=["dense", "moe"])
def test_fp16_skips_halves_and_recovers(change):
    """megatron's rule: the second overflow and each one after it halve the scale; a window of good steps doubles it."""
    window, start = 4, 2.0**24
    optim = {"train": {"precision": "fp16"}, "optim": {"initial_loss_scale": start, "loss_scale_window": window}}
    seen = ranks.run(1, in_fp16, merged(RAW, optim, change), 30)[0]
    assert seen[0][1] is None and seen[-1][3] < seen[0][3] - 0.2
    scale, good, patience = start, 0, 2
    for actual, norm, unchanged, loss in seen:
        assert actual == scale and unchanged == (norm is None) and math.isfinite(loss)
        if norm is None:
            good, patience = 0, patience - 1
            scale = scale / 2 if patience <= 0 else scale
        else:
            good += 1
            if good == window:
                scale, good, patience = scale * 2, 0, 2
    assert sum(norm is not None for _, norm, _, _ in seen) > 10


@pytest.mark.parametrize("change", [{"ep": 2}, {"ep": 2, "zero1": True}, {"pp": 2}], ids=" ".join)
def test_fp16_has_one_loss_scale(change):
    """Experts that are split over ranks have an optimizer of their own, but no scale of their own."""
    optim = {"train": {"precision": "fp16"}, "optim": {"initial_loss_scale": 2.0**22, "loss_scale_window": 2}}
    one = ranks.run(1, in_fp16, merged(RAW, MOE, optim), 12)[0]
    for seen in ranks.run(2, in_fp16, merged(RAW, MOE, optim, {"parallel": change}), 12, 2):
        for (scale, norm, unchanged, loss), (scale_one, norm_one, unchanged_one, loss_one) in zip(seen, one):
            assert (scale, unchanged) == (scale_one, unchanged_one)
            assert loss == pytest.approx(loss_one, rel=1e-4) and norm == (norm_one and pytest.approx(norm_one, rel=1e-4))


def test_a_constant_loss_scale_stays():
    seen = ranks.run(1, in_fp16, merged(RAW, {"train": {"precision": "fp16"}, "optim": {"loss_scale": 512.0}}), 3)[0]
    assert [scale for scale, *_ in seen] == [512.0] * 3 and all(norm is not None for _, norm, *_ in seen)


def test_compiled_layers_give_the_same_losses():
    plain, compiled = (run_steps(merged(RAW, {"train": {"compile": flag}}), 3) for flag in (False, True))
    assert np.allclose(plain[0], compiled[0], rtol=1e-5, atol=0) and np.allclose(plain[1], compiled[1], rtol=1e-5, atol=0)


# --- mixtures of experts -----------------------------------------------------------------------------------------------


def moe(**changes):
    return merged(RAW, MOE, {"model": {"moe": changes}})


def test_capacity_drops_tokens():
    """Tokens above the capacity are dropped; padding experts to it changes no number; room for every token drops nothing."""
    free, dropping, padded, roomy = (run_steps(moe(**change), 6, 1e-2, True)[0] for change in (
        {}, {"capacity_factor": 0.6}, {"capacity_factor": 0.6, "pad_to_capacity": True}, {"capacity_factor": 2.0, "pad_to_capacity": True}))
    assert dropping[-1] < dropping[0] - 0.2
    assert abs(dropping[0] - free[0]) > 1e-5
    assert np.allclose(dropping, padded, rtol=1e-5, atol=0) and np.allclose(free, roomy, rtol=1e-5, atol=0)


LOGGED = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss", "global_aux_loss": "global_load_balancing_loss"}


@pytest.mark.parametrize("change", [
    *({"balance": kind} for kind in LOGGED),
    {"balance": "sinkhorn", "top_k": 1},
    {"balance": "aux_free", "score": "sigmoid"},
    {"balance": "none"},
    {"balance": "aux_loss", "shared_expert_ffn_hidden_size": 16, "softmax_after_top_k": False, "scaling_factor": 2.0},
], ids=lambda change: " ".join(f"{k}={v}" for k, v in change.items()))
def test_every_balance_trains_and_logs_its_loss(raw_run, change):
    run = merged(raw_run, MOE, {"model": {"moe": {**change, "z_loss_coeff": 1e-3}}, "train": {"steps": 24, "eval_samples": 0}})
    lines = on_ranks(1, run)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    names = {LOGGED[change["balance"]]} if change["balance"] in LOGGED else set()
    assert all(line["moe"].keys() == names | {"z_loss"} for line in lines)
    for name in names:
        assert 0.9 < lines[0]["moe"][name] < 1.5      # 1 is perfect balance, num_experts is one expert for all
    assert 0 < lines[0]["moe"]["z_loss"] < 10


def routed(raw):
    """On a rank: per router, what went in, its weight, and which experts each token got; the logged losses; biases before and after."""
    from engine.mcore import observe
    from engine.mcore.build import bare

    run, _, model = build(raw)
    routers = [layer.mlp.router for layer in bare(model.chunks[0]).decoder.layers]
    seen = [[] for _ in routers]
    for router, calls in zip(routers, seen):
        router.register_forward_hook(lambda module, args, out, calls=calls: calls.append((args[0].detach().clone(), out[1].clone())))
    biases = [None if r.expert_bias is None else r.expert_bias.clone() for r in routers]
    model.forward_backward(batches(run))
    calls = [[(x.reshape(-1, x.size(-1)).double().numpy(), chosen.numpy()) for x, chosen in calls] for calls in seen]
    moved = [None if b is None else (r.expert_bias - b).numpy() for r, b in zip(routers, biases)]
    return calls, [router.weight.detach().double().numpy() for router in routers], observe.moe_losses(model), moved


def test_logged_router_losses_equal_their_formulas():
    """z-loss: mean of logsumexp(x)^2 (ST-MoE, eq. 5). Balance: experts * sum of share of choices * mean probability (Switch, eq. 4)."""
    calls, router_weights, logged, _ = ranks.run(1, routed, moe(z_loss_coeff=1e-2, aux_loss_coeff=0.1))[0]
    z_losses, balances = [], []
    for per_router, weight in zip(calls, router_weights):
        for x, chosen in per_router:
            powers = np.exp(x @ weight.T)
            z_losses.append(np.mean(np.log(powers.sum(1)) ** 2))
            balances.append(4 * np.sum(chosen.mean(0) / 2 * (powers / powers.sum(1, keepdims=True)).mean(0)))
    assert len(z_losses) == 2 * 2      # layers, micro-batches
    assert logged["z_loss"] == pytest.approx(np.mean(z_losses), rel=1e-5)
    assert logged["load_balancing_loss"] == pytest.approx(np.mean(balances), rel=1e-5)


def test_aux_free_biases_move_by_the_rate_towards_balance():
    """Busy experts down, idle ones up, by the tokens of the whole global batch (arXiv 2408.15664, algorithm 1)."""
    calls, _, _, moved = ranks.run(1, routed, moe(balance="aux_free", score="sigmoid", bias_update_rate=0.25))[0]
    for per_router, move in zip(calls, moved):
        tokens = sum(chosen.sum(0) for _, chosen in per_router)
        assert np.array_equal(move, 0.25 * np.sign(tokens.mean() - tokens))
        assert (move != 0).any()
