"""What few models have, against formulas written out in fp64: capped logits and sinks in attention, a capped loss, norms around zero.

Left out: how these parts work together, under layouts and in drawing answers (hf/test_families.py, test_generate.py), where transformers says
what is right.
"""

import math

import pytest
import ranks
import torch
from test_linear_ce import IDS, loss_case
from test_torch_backend import DOCUMENTS, may_see, random, same

HEADS, KV_HEADS, D, E = 4, 2, 6, 5


def by_hand(q, k, v, visible, softcap, sinks):
    """One head and one query at a time; visible [b, queries, keys], sinks [heads] or None."""
    out = []
    for head in range(q.size(1)):
        kv = head // (q.size(1) // k.size(1))
        z = q[:, head] @ k[:, kv].transpose(1, 2) / math.sqrt(q.size(3))
        z = (softcap * torch.tanh(z / softcap) if softcap else z).masked_fill(~visible, float("-inf"))
        total = z.exp().sum(-1, keepdim=True) + (sinks[head].exp() if sinks is not None else 0)
        out.append(z.exp() / total @ v[:, kv])
    return torch.stack(out, 1)


@pytest.mark.parametrize("softcap, has_sinks", [(2.0, False), (0.0, True), (1.5, True)], ids=["cap", "sinks", "both"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_attention_written_out(softcap, has_sinks, documents):
    from engine.mcore import masks
    from engine.mcore.attention_torch import attend

    s = 11
    inputs = [random(2, heads, s, width, seed=i).requires_grad_() for i, (heads, width) in enumerate([(HEADS, D), (KV_HEADS, D), (KV_HEADS, E)])]
    sinks = random(HEADS, seed=5).requires_grad_() if has_sinks else None
    mask = masks.document_mask(torch.tensor(documents), s, 0, 1, "cpu") if documents else None
    ours = attend(*inputs, mask, mask is None, 1 / math.sqrt(D), softcap, sinks)
    theirs = by_hand(*inputs, may_see(s, s, 0, documents), softcap, sinks)
    assert same(ours, theirs)
    learning, cotangent = inputs + ([sinks] if has_sinks else []), random(*ours.shape, seed=9)
    for mine, reference in zip(torch.autograd.grad(ours, learning, cotangent), torch.autograd.grad(theirs, learning, cotangent)):
        assert same(mine, reference)


def capped(hidden, weight, labels, cotangent, num_real, cap):
    """[tokens, 2] log p and entropy, and the gradients, of softmax(softcap * tanh(h W^T / softcap) / temperature), in fp64."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    softcap, temperature = cap
    logp = (softcap * torch.tanh(hidden @ weight[:num_real].t() / softcap) / temperature).log_softmax(1)
    both = torch.stack([logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)], 1)
    return both.detach(), *torch.autograd.grad(both, (hidden, weight), cotangent.double())


def our_capped(hidden, weight, labels, cotangent, num_real, cap, tp_group=None):
    from engine.mcore.linear_ce import log_probability_and_entropy

    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    both = log_probability_and_entropy(hidden, weight, labels, num_real, tp_group, cap=cap)
    return both.detach(), *torch.autograd.grad(both, (hidden, weight), cotangent)


def case(num_real):
    hidden, weight, labels, _ = loss_case(num_real)
    return hidden * 3, weight, labels, random(len(labels), 2, dtype=torch.float32, seed=4)


@pytest.mark.parametrize("num_real", [IDS, 50])
@pytest.mark.parametrize("cap", [(2.0, 1.0), (3.0, 0.7)], ids=["cap", "cap and temperature"])
def test_a_capped_loss(monkeypatch, num_real, cap):
    from engine.mcore import linear_ce

    monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", 7 * IDS * 4)  # several chunks
    monkeypatch.setitem(linear_ce._PRODUCT_ROWS, "cpu", 1)
    for ours, theirs in zip(our_capped(*case(num_real), num_real, cap), capped(*case(num_real), num_real, cap)):
        assert same(ours, theirs, rtol=3e-6)
    plain = linear_ce.linear_log_probability(*case(num_real)[:3], num_real, cap=cap)
    assert same(plain, capped(*case(num_real), num_real, cap)[0][:, 0], rtol=3e-6)


def capped_on_rank(num_real, cap):
    import torch.distributed as dist

    hidden, weight, labels, cotangent = case(num_real)
    own = weight.chunk(dist.get_world_size())[dist.get_rank()]
    return [tensor.numpy() for tensor in our_capped(hidden, own, labels, cotangent, num_real, cap, dist.group.WORLD)]


def test_a_capped_loss_over_tp():
    """The second rank holds padding too, whose capped logits must not enter."""
    num_real, cap = IDS // 2 + 3, (2.0, 0.7)
    both, grad_hidden, grad_weight = capped(*case(num_real), num_real, cap)
    first, second = ([torch.from_numpy(x) for x in result] for result in ranks.run(2, capped_on_rank, num_real, cap))
    assert same(first[0], both, rtol=3e-6)
    assert same(first[1] + second[1], grad_hidden, rtol=3e-6)
    assert same(torch.cat([first[2], second[2]])[:num_real], grad_weight[:num_real], rtol=3e-6)


def test_a_norm_around_zero():
    from engine.mcore.ops_torch import ZeroCentredRMSNorm

    norm = ZeroCentredRMSNorm(12, eps=1e-3)
    norm.weight.data = random(12, dtype=torch.float32, seed=1)
    x = random(5, 3, 12, dtype=torch.float32, seed=2).requires_grad_()
    x64, w64 = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    theirs = x64 / (x64.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (1 + w64)
    cotangent = random(5, 3, 12, dtype=torch.float32, seed=3)
    assert same(norm(x), theirs, rtol=1e-6)
    for mine, reference in zip(torch.autograd.grad(norm(x), (x, norm.weight), cotangent), torch.autograd.grad(theirs, (x64, w64), cotangent.double())):
        assert same(mine, reference, rtol=1e-6)


def test_in_bf16_what_is_added_to_one_is_not_rounded_away():
    from engine.mcore.ops_torch import ZeroCentredRMSNorm

    norm = ZeroCentredRMSNorm(4, eps=1e-6).bfloat16()
    norm.weight.data = torch.full((4,), 1e-3).bfloat16()
    large = torch.full((1, 4), 1000.0)  # whose norm is 1
    assert norm(large)[0, 0] > 1  # 1 + 1e-3 is 1 in bf16


@pytest.mark.parametrize("fields, backend", [({}, "te"), ({"attention_sinks": True}, "te"), ({"attention_softcap": 5.0}, "torch")],
                         ids=["plain", "sinks", "caps"])
def test_auto_takes_torch_layers_for_what_they_alone_have(monkeypatch, fields, backend):
    from engine.config import validate
    from engine.mcore import build

    monkeypatch.setattr(build, "te_problem", "")
    run = validate({"run": {"dir": "x"}, "data": {"train": ["x"]}, "train": {"seq_len": 8, "global_batch": 1, "steps": 1},
                    "model": dict(family="llama", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=9) | fields})
    assert build.backend_of(run, "cuda") == backend
