"""The torch layer backend against formulas written out: attention, its masks, rotary embedding, gates, norms.

Left out: how these parts work together over ranks, which the parity table shows; output layer and loss (test_linear_ce.py).
"""

import math
from types import SimpleNamespace

import pytest
import torch

HEADS, KV_HEADS, DIM = 4, 2, 6


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def same(ours, theirs, rtol=1e-10):
    """Equal but for rounding, measured against the largest entry, or against 1e-3 where the truth is that all are zero."""
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() <= rtol * theirs.abs().max().clamp_min(1e-3)


# --- attention ---------------------------------------------------------------------------------------------------------


def build_attention(window=0):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from engine.mcore.spec_torch import Attention

    config = TransformerConfig(num_layers=2, hidden_size=HEADS * DIM, num_attention_heads=HEADS, num_query_groups=KV_HEADS, kv_channels=DIM,
                               attention_dropout=0.0, window_size=(window - 1, 0) if window else None)
    return Attention(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self")


def plain_attention(q, k, v, visible):
    """softmax(q k^T / sqrt(d)) v, one head at a time; visible [b, queries, keys]. q [s, b, heads, d] -> [s, b, heads * d]."""
    heads = []
    for head in range(q.size(2)):
        kv = head // (q.size(2) // k.size(2))
        scores = torch.einsum("qbd,kbd->bqk", q[:, :, head], k[:, :, kv]) / math.sqrt(q.size(3))
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        heads.append(torch.einsum("bqk,kbd->qbd", weights, v[:, :, kv]))
    return torch.cat(heads, dim=2)


def may_see(num_queries, num_keys, window, documents):
    """Who sees whom, entry by entry; the queries are the last ones. documents: a list of ids per sequence, or None."""
    batch = len(documents) if documents else 2
    visible = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)
    for b in range(batch):
        for row in range(num_queries):
            i = num_keys - num_queries + row
            for j in range(num_keys):
                visible[b, row, j] = j <= i and (not window or i - j < window) and (not documents or documents[b][i] == documents[b][j])
    return visible


DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [0] * 10 + [1]]


@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS, 1])
@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["causal", "documents"])
def test_attention_and_its_gradients(kv_heads, window, documents):
    from engine.mcore import masks

    s = 11
    inputs = [random(s, 2, heads, DIM, seed=i).requires_grad_() for i, heads in enumerate((HEADS, kv_heads, kv_heads))]
    mask = masks.document_mask(torch.tensor(documents), s, 0, 1, "cpu") if documents else None
    ours = build_attention(window)(*inputs, mask)
    theirs = plain_attention(*inputs, may_see(s, s, window, documents))
    assert same(ours, theirs)
    cotangent = random(*ours.shape, seed=9)
    for mine, reference in zip(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(theirs, inputs, cotangent)):
        assert same(mine, reference)


@pytest.mark.parametrize("num_queries", [1, 3, 11])
@pytest.mark.parametrize("window", [0, 4])
def test_queries_of_cached_decoding_are_the_last_ones(num_queries, window):
    q, k, v = (random(n, 2, heads, DIM, seed=i) for i, (n, heads) in enumerate(((num_queries, HEADS), (11, KV_HEADS), (11, KV_HEADS))))
    assert same(build_attention(window)(q, k, v, None), plain_attention(q, k, v, may_see(num_queries, 11, window, None)))


def test_only_every_nth_layer_without_window():
    """sliding_window_freq=3: layers 3, 6, ... see everything."""
    from megatron.core.transformer import TransformerConfig

    from engine.mcore.spec_torch import Attention

    config = TransformerConfig(num_layers=6, hidden_size=8, num_attention_heads=1, window_size=(4, 0), window_attn_skip_freq=3)
    assert [Attention(config, layer, None, "self").window for layer in range(1, 7)] == [5, 5, 0, 5, 5, 0]


def test_dropout_of_attention_weights():
    """In training some weights are dropped and the others scaled up, the mean stays; in evaluation nothing is random."""
    from engine.mcore import topology

    topology.start_single()
    attention = build_attention()
    attention.dropout = 0.5
    q, k = random(64, 8, HEADS, DIM), random(64, 8, KV_HEADS, DIM, seed=1)
    ones = torch.ones_like(k)
    dropped = attention(q, k, ones, None)
    assert (dropped != 1).any() and abs(dropped.mean() - 1) < 0.02
    assert same(attention.eval()(q, k, ones, None), torch.ones_like(dropped))


# --- masks and context parallel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_shard_and_unshard_are_inverse(cp):
    from engine.mcore import masks

    s = 16
    batch = {"tokens": torch.arange(3 * s).view(3, s), "weights": random(3, s), "ids": torch.arange(5), "pairs": random(3, 2)}
    parts = [masks.shard(batch, s, rank, cp) for rank in range(cp)]
    for name in ("tokens", "weights"):
        assert all(part[name].shape == (3, s // cp) for part in parts)
        assert torch.equal(masks.unshard(torch.cat([part[name] for part in parts], 1), cp), batch[name])
    assert all(part[name] is batch[name] for part in parts for name in ("ids", "pairs"))      # not per token
    if cp == 2:
        assert parts[0]["tokens"][0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]      # first and last chunk: causal work is even


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("documents", [None, [[0] * 5 + [1] * 11, [0, 1, 2, 3] * 4]], ids=["causal", "documents"])
def test_document_mask_entry_by_entry(cp, documents):
    from engine.mcore import masks

    s = 16
    position = torch.arange(s)[None]
    columns = torch.cat([masks.shard({"tokens": position}, s, rank, cp)["tokens"][0] for rank in range(cp)]).tolist()
    whole = may_see(s, s, 0, documents)
    for rank in range(cp):
        rows = masks.shard({"tokens": position}, s, rank, cp)["tokens"][0].tolist()
        mask = masks.document_mask(torch.tensor(documents) if documents else None, s, rank, cp, "cpu")
        if documents is None and cp == 1:
            assert mask is None      # SDPA's own causal flag is faster
            continue
        assert mask.shape == (2 if documents else 1, 1, s // cp, s)
        for b in range(mask.size(0)):
            for r, i in enumerate(rows):
                assert [bool(whole[b, i, j]) for j in columns] == mask[b, 0, r].tolist()


# --- elementwise operations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotated", [8, 4, 2], ids=["whole head", "half", "quarter"])
def test_rope_turns_pairs(rotated):
    """Pair i (entries i and i + rotated / 2) is a complex number, multiplied by exp(1j * position * frequency_i)."""
    from engine.mcore.ops_torch import apply_rope

    s, half = 5, rotated // 2
    config = SimpleNamespace(rotary_interleaved=False, apply_rope_fusion=False)
    angles = torch.arange(s, dtype=torch.float64)[:, None] * random(half, seed=1)      # [s, half]
    freqs = torch.cat([angles, angles], 1)[:, None, None]
    t = random(s, 2, 3, 8).requires_grad_()
    turned = torch.complex(t[..., :half], t[..., half:rotated]) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    plain = torch.cat([turned.real, turned.imag, t[..., rotated:]], -1)
    ours = apply_rope(t, freqs, config)
    assert same(ours, plain)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, freqs, config), (t,))
    view = random(2, 3, s, 16)[..., ::2].permute(2, 0, 1, 3)      # neither contiguous nor dense
    again = apply_rope(view, freqs, config)
    assert same(again, apply_rope(view.contiguous(), freqs, config))


def swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def geglu(gate, up):
    return gate / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def clamped_swiglu(gate, up):
    gate, up = torch.minimum(gate, torch.tensor(0.75)), torch.minimum(torch.maximum(up, torch.tensor(-0.75)), torch.tensor(0.75))
    return gate / (1 + torch.exp(-1.3 * gate)) * (up + 1)


@pytest.mark.parametrize("formula", [swiglu, geglu, clamped_swiglu])
def test_gate(formula):
    from engine.mcore import gates

    gate = {swiglu: gates.SwiGLU, geglu: gates.GeGLU, clamped_swiglu: lambda config: gates.ClampedSwiGLU(config, alpha=1.3, limit=0.75)}[formula](None)
    x = random(3, 2, 10).requires_grad_()
    assert same(gate(x), formula(x[..., :5], x[..., 5:]))
    with torch.no_grad():
        assert gate(x).equal(gate(x.detach().requires_grad_()))
    assert torch.autograd.gradcheck(gate, (x,))
    assert torch.autograd.gradcheck(gate, (random(10, 3).t().requires_grad_(),))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gate(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_norm_of_heads_whose_gradient_comes_in_another_order():
    """As attention hands it back where nothing lies between it and the norm: [s, b, heads, d] that lies as [b, heads, s, d]."""
    from engine.mcore.ops_torch import RMSNorm

    norm, (x, grad) = RMSNorm(6, eps=1e-5), (random(*shape, dtype=torch.float32) for shape in ((5, 2, 4, 6), (2, 4, 5, 6)))
    x, grad = x.requires_grad_(), grad.permute(2, 0, 1, 3)
    found = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    for ours, theirs in zip(found, torch.autograd.grad(norm(x), (x, norm.weight), grad.contiguous())):
        assert same(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm(kind, dtype):
    """Against the formula in fp64, for the same numbers; statistics are fp32 also where the input is bf16."""
    from engine.mcore.spec_torch import Norm

    norm = Norm(SimpleNamespace(normalization=kind, layernorm_zero_centered_gamma=False, sequence_parallel=False), 7, eps=1e-3).to(dtype)
    for i, parameter in enumerate(norm.parameters()):
        parameter.data = random(7, seed=i + 1).to(dtype)
    assert len(list(norm.parameters())) == (2 if kind == "LayerNorm" else 1)
    inputs = [random(4, 2, 7).to(dtype).requires_grad_(), *norm.parameters()]
    x, weight, *bias = plain_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    centred = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
    plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + sum(bias)
    ours, rtol = norm(inputs[0]), 4 * torch.finfo(dtype).eps
    assert ours.dtype == dtype and same(ours, plain, rtol)
    cotangent = random(4, 2, 7, seed=8).to(dtype)
    for mine, reference in zip(torch.autograd.grad(ours, inputs, cotangent), torch.autograd.grad(plain, plain_inputs, cotangent.double())):
        assert same(mine, reference, rtol)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_marks_its_parameters(kind, sequence_parallel):
    """megatron sums the gradients of marked parameters over tp, where each rank has seen a part of the sequence."""
    from engine.mcore.spec_torch import Norm

    norm = Norm(SimpleNamespace(normalization=kind, layernorm_zero_centered_gamma=False, sequence_parallel=sequence_parallel), 7)
    assert [parameter.sequence_parallel for parameter in norm.parameters()] == [sequence_parallel] * len(list(norm.parameters()))
