"""The torch layer backend against formulas written out: attention, its masks, rotary embedding, gates, norms, output layer with loss.

Left out: how these parts work together over ranks, which the parity table shows.
"""

import math
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.nn.functional as F

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


def test_swiglu():
    from engine.mcore.ops_torch import SwiGLU

    x = random(3, 2, 10).requires_grad_()
    gate, up = x[..., :5], x[..., 5:]
    swiglu = SwiGLU(None)
    assert same(swiglu(x), gate / (1 + torch.exp(-gate)) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))
    assert torch.autograd.gradcheck(swiglu, (random(10, 3).t().requires_grad_(),))


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


# --- the output layer with its loss ------------------------------------------------------------------------------------

TOKENS, WIDTH, IDS = 10, 12, 64


def loss_case(num_real, dtype=torch.float32):
    """hidden [tokens, h], weight [ids, h], labels below num_real, weights of the tokens' losses; padding rows are not zero."""
    hidden, weight = random(TOKENS, WIDTH, dtype=torch.float32), random(IDS, WIDTH, dtype=torch.float32, seed=1)
    labels = torch.randint(0, num_real, (TOKENS,), generator=torch.Generator().manual_seed(2))
    labels[:2] = torch.tensor([0, num_real - 1])
    return hidden.to(dtype), weight.to(dtype), labels, random(TOKENS, dtype=torch.float32, seed=3)


def plain_loss(hidden, weight, labels, cotangent, num_real):
    """(nll, grad of hidden, grad of weight) by F.cross_entropy over the real vocabulary, in fp64."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    nll = F.cross_entropy(hidden @ weight[:num_real].t(), labels, reduction="none")
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), cotangent.double())


def our_loss(hidden, weight, labels, cotangent, num_real, tp_group=None):
    from engine.mcore.linear_ce import linear_cross_entropy

    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    nll = linear_cross_entropy(hidden, weight, labels, num_real, tp_group)
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight), cotangent)


@pytest.mark.parametrize("num_real", [IDS, 50, 2])
@pytest.mark.parametrize("rows", [100, 10, 3, 1], ids="{} rows a chunk".format)
def test_linear_cross_entropy(monkeypatch, num_real, rows):
    from engine.mcore import linear_ce

    monkeypatch.setitem(linear_ce._CHUNK_BYTES, "cpu", rows * IDS * 4)
    case = loss_case(num_real)
    for ours, theirs in zip(our_loss(*case, num_real), plain_loss(*case, num_real)):
        assert same(ours, theirs, rtol=1e-6)
    assert not our_loss(*case, num_real)[2][num_real:].any()      # padding learns nothing


def test_linear_cross_entropy_of_large_logits():
    """exp() of these logits is infinite in fp32; what remains is the rounding of the logits themselves."""
    hidden, weight, labels, cotangent = loss_case(IDS)
    case = hidden * 100, weight, labels, cotangent
    largest_logit = (case[0] @ weight.t()).abs().max()
    assert largest_logit.exp().isinf()
    for ours, theirs in zip(our_loss(*case, IDS), plain_loss(*case, IDS)):
        assert same(ours, theirs, rtol=2 * torch.finfo(torch.float32).eps * largest_logit)


def test_linear_cross_entropy_in_bf16():
    """The loss is fp32; it differs from the loss of the same bf16 numbers by the rounding of the logits to bf16."""
    case = loss_case(50, torch.bfloat16)
    (nll, *grads), (plain, *plain_grads) = our_loss(*case, 50), plain_loss(*case, 50)
    eps = torch.finfo(torch.bfloat16).eps
    largest_logit = (case[0].double() @ case[1].double().t()).abs().max()
    assert nll.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert (nll - plain).abs().max() < 2 * eps * largest_logit
    for ours, theirs in zip(grads, plain_grads):
        assert (ours - theirs).norm() < 2 * eps * theirs.norm()


def loss_on_rank(num_real):
    """Each rank holds consecutive ids; returns what our_loss does for them."""
    import torch.distributed as dist

    hidden, weight, labels, cotangent = loss_case(num_real)
    own = weight.chunk(dist.get_world_size())[dist.get_rank()]
    return [tensor.numpy() for tensor in our_loss(hidden, own, labels, cotangent, num_real, dist.group.WORLD)]


@pytest.mark.parametrize("num_real", [IDS, 50, IDS // 2, 20], ids=["no padding", "some", "one rank is padding", "more than a rank"])
def test_linear_cross_entropy_over_tp(num_real):
    nll, grad_hidden, grad_weight = plain_loss(*loss_case(num_real), num_real)
    first, second = ([torch.from_numpy(x) for x in result] for result in ranks.run(2, loss_on_rank, num_real))
    assert torch.equal(first[0], second[0]) and same(first[0], nll, rtol=1e-6)
    assert same(first[1] + second[1], grad_hidden, rtol=1e-6)
    assert same(torch.cat([first[2], second[2]]), grad_weight, rtol=1e-6)


# --- and with the entropy -----------------------------------------------------------------------------------------------


def entropy_case(num_real, dtype=torch.float32):
    """As loss_case, and a weight per token for each of log p(label) and entropy: [tokens, 2]."""
    hidden, weight, labels, _ = loss_case(num_real, dtype)
    return hidden, weight, labels, random(TOKENS, 2, dtype=torch.float32, seed=4)


def plain_entropy(hidden, weight, labels, cotangent, num_real):
    """([tokens, 2], grad of hidden, grad of weight) by log_softmax over the real vocabulary, in fp64."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logp = (hidden @ weight[:num_real].t()).log_softmax(1)
    both = torch.stack([logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)], 1)
    return both.detach(), *torch.autograd.grad(both, (hidden, weight), cotangent.double())


def our_entropy(hidden, weight, labels, cotangent, num_real, tp_group=None):
    from engine.mcore.linear_ce import log_probability_and_entropy

    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    both = log_probability_and_entropy(hidden, weight, labels, num_real, tp_group)
    return both.detach(), *torch.autograd.grad(both, (hidden, weight), cotangent)


@pytest.mark.parametrize("num_real", [IDS, 50, 2])
@pytest.mark.parametrize("rows", [100, 3], ids="{} rows a chunk".format)
def test_entropy(monkeypatch, num_real, rows):
    from engine.mcore import linear_ce

    monkeypatch.setitem(linear_ce._CHUNK_BYTES, "cpu", rows * IDS * 4)
    case = entropy_case(num_real)
    for ours, theirs in zip(our_entropy(*case, num_real), plain_entropy(*case, num_real)):
        assert same(ours, theirs, rtol=1e-6)
    assert not our_entropy(*case, num_real)[2][num_real:].any()


@pytest.mark.parametrize("column", [0, 1], ids=["log p", "entropy"])
def test_each_gradient_alone(column):
    *case, cotangent = entropy_case(50)
    cotangent[:, 1 - column] = 0
    for ours, theirs in zip(our_entropy(*case, cotangent, 50), plain_entropy(*case, cotangent, 50)):
        assert same(ours, theirs, rtol=2e-6)  # fp32 beside fp64; how products are summed depends on the processor


def test_entropy_changes_no_bit_of_the_log_probability():
    """It is scored without and trained with it, and the first ratio is 1."""
    from engine.mcore.linear_ce import linear_log_probability, log_probability_and_entropy

    hidden, weight, labels, _ = entropy_case(50)
    both = log_probability_and_entropy(hidden.clone().requires_grad_(), weight, labels, 50)
    assert torch.equal(both[:, 0], linear_log_probability(hidden, weight, labels, 50))


def test_entropy_of_large_logits():
    """Sure of one token, or of two alike: 0 and ln 2, where log-sum-exp and mean logit are both near 3000 and fp32 has steps of 2e-4."""
    from engine.mcore.linear_ce import log_probability_and_entropy

    weight = torch.zeros(IDS, 2)
    weight[3, 0] = weight[4, 1] = 1.0
    hidden = torch.tensor([[3000.0, 0], [3000, 3000]]).requires_grad_()
    entropy = log_probability_and_entropy(hidden, weight, torch.tensor([3, 3]), IDS)[:, 1]
    torch.testing.assert_close(entropy, torch.tensor([0, math.log(2)]), rtol=1e-6, atol=0)
    assert torch.autograd.grad(entropy.sum(), hidden)[0].abs().max() < torch.finfo(torch.float32).eps * 3000  # 0 but for such a step


def test_entropy_in_bf16():
    case = entropy_case(50, torch.bfloat16)
    (both, *grads), (plain, *plain_grads) = our_entropy(*case, 50), plain_entropy(*case, 50)
    eps = torch.finfo(torch.bfloat16).eps
    largest_logit = (case[0].double() @ case[1].double().t()).abs().max()
    assert both.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert (both - plain).abs().max() < 2 * eps * largest_logit
    for ours, theirs in zip(grads, plain_grads):
        assert (ours - theirs).norm() < 4 * eps * theirs.norm()


def entropy_on_rank(num_real):
    import torch.distributed as dist

    hidden, weight, labels, cotangent = entropy_case(num_real)
    own = weight.chunk(dist.get_world_size())[dist.get_rank()]
    return [tensor.numpy() for tensor in our_entropy(hidden, own, labels, cotangent, num_real, dist.group.WORLD)]


@pytest.mark.parametrize("num_real", [IDS, 50, IDS // 2, 20], ids=["no padding", "some", "one rank is padding", "more than a rank"])
def test_entropy_over_tp(num_real):
    both, grad_hidden, grad_weight = plain_entropy(*entropy_case(num_real), num_real)
    first, second = ([torch.from_numpy(x) for x in result] for result in ranks.run(2, entropy_on_rank, num_real))
    assert torch.equal(first[0], second[0]) and same(first[0], both, rtol=1e-6)
    assert same(first[1] + second[1], grad_hidden, rtol=1e-6)
    assert same(torch.cat([first[2], second[2]]), grad_weight, rtol=1e-6)


def test_output_layer_gives_both_at_the_places_asked():
    from engine.mcore.linear_ce import OutputLayer

    hidden, weight, labels, _ = entropy_case(50)
    labels = labels.view(2, 5)                                        # [b, s]; hidden [s, b, h]
    layer = SimpleNamespace(softcap=0.0, sequence_parallel=False, weight=weight, tp_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    asked = torch.tensor([0, 3, 4, 9])                                # of [s, b]: places (0, 0), (1, 1), (2, 0), (4, 1)
    found = OutputLayer.forward(layer, hidden.view(5, 2, WIDTH), labels=labels, num_real=50, asked=asked, with_entropy=True)
    both = plain_entropy(hidden, weight, labels.t().reshape(-1), torch.ones(TOKENS, 2), 50)[0].view(5, 2, 2).transpose(0, 1)
    wanted = torch.zeros(2, 5, 1)
    for s, b in ((0, 0), (1, 1), (2, 0), (4, 1)):
        wanted[b, s] = 1
    assert found.shape == (2, 5, 2) and same(found, both * wanted, rtol=1e-6)
