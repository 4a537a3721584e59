"""The output layer with its loss against log_softmax in fp64: logits kept, and gradients made in the forward pass; and training in both ways.

Left out: softcaps (test_special_attention.py).
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import parity_table
import pytest
import ranks
import torch
import torch.nn.functional as F
from test_torch_backend import random, same

sys.path[:0] = [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parent / "gpu")]

import gpu  # noqa: E402
from _peak import peak_bytes  # noqa: E402

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


def early_loss(hidden, weight, labels, cotangent, num_real, tp_group=None, factor=1.0, learns_weight=True):
    """As our_loss, `cotangent` told beforehand but for the factor."""
    from engine.mcore.linear_ce import linear_cross_entropy

    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(learns_weight)
    nll = linear_cross_entropy(hidden, weight, labels, num_real, tp_group, proportions=cotangent / factor)
    assert type(nll.grad_fn).__name__ == "_GradientsInForwardBackward"
    return nll.detach(), *torch.autograd.grad(nll, (hidden, weight) if learns_weight else hidden, cotangent)


KINDS = {"loss": (loss_case, our_loss, plain_loss), "entropy": (entropy_case, our_entropy, plain_entropy)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_real", [IDS, 50, 2])
@pytest.mark.parametrize("rows", [100, 10, 3, 1], ids="{} rows a chunk".format)
def test_chunks(monkeypatch, kind, num_real, rows):
    from engine.mcore import linear_ce

    monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", rows * IDS * 4)
    monkeypatch.setitem(linear_ce._PRODUCT_ROWS, "cpu", 4)
    make, ours, plain = KINDS[kind]
    case = make(num_real)
    found = ours(*case, num_real)
    for mine, theirs in zip(found, plain(*case, num_real)):
        assert same(mine, theirs, rtol=1e-6)
    assert not found[2][num_real:].any()      # padding learns nothing


@pytest.mark.parametrize("kind, limit", [("loss", 2), ("entropy", 4)])
def test_in_bf16(kind, limit):
    """What is found is fp32; it differs from that of the same bf16 numbers by the rounding of the logits to bf16."""
    make, ours, plain = KINDS[kind]
    case = make(50, torch.bfloat16)
    (found, *grads), (exact, *exact_grads) = ours(*case, 50), plain(*case, 50)
    eps = torch.finfo(torch.bfloat16).eps
    largest_logit = (case[0].double() @ case[1].double().t()).abs().max()
    assert found.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert (found - exact).abs().max() < 2 * eps * largest_logit
    for mine, theirs in zip(grads, exact_grads):
        assert (mine - theirs).norm() < limit * eps * theirs.norm()


def on_rank(kind, num_real):
    """Each rank holds consecutive ids; returns what is found of them. early: in blocks of 3 rows, told of a third of the gradient."""
    import torch.distributed as dist

    from engine.mcore import linear_ce

    make, ours, _ = KINDS.get(kind, KINDS["loss"])
    hidden, weight, labels, cotangent = make(num_real)
    own = weight.chunk(dist.get_world_size())[dist.get_rank()]
    if kind != "early":
        return [tensor.numpy() for tensor in ours(hidden, own, labels, cotangent, num_real, dist.group.WORLD)]
    usual, linear_ce.BLOCK_BYTES["cpu"] = linear_ce.BLOCK_BYTES["cpu"], 3 * len(own) * 4
    try:
        return [tensor.numpy() for tensor in early_loss(hidden, own, labels, cotangent, num_real, dist.group.WORLD, factor=3.0)]
    finally:
        linear_ce.BLOCK_BYTES["cpu"] = usual


@pytest.mark.parametrize("kind", [*KINDS, "early"])
@pytest.mark.parametrize("num_real", [IDS, 50, IDS // 2, 20], ids=["no padding", "some", "one rank is padding", "more than a rank"])
def test_over_tp(kind, num_real):
    make, _, plain = KINDS.get(kind, KINDS["loss"])
    exact, grad_hidden, grad_weight = plain(*make(num_real), num_real)
    first, second = ([torch.from_numpy(x) for x in result] for result in ranks.run(2, on_rank, kind, num_real))
    assert torch.equal(first[0], second[0]) and same(first[0], exact, rtol=1e-6)
    assert same(first[1] + second[1], grad_hidden, rtol=1e-6)
    assert same(torch.cat([first[2], second[2]]), grad_weight, rtol=1e-6)


def test_large_logits():
    """exp() of these logits is infinite in fp32; what remains is the rounding of the logits themselves."""
    hidden, weight, labels, cotangent = loss_case(IDS)
    case = hidden * 100, weight, labels, cotangent
    largest_logit = (case[0] @ weight.t()).abs().max()
    assert largest_logit.exp().isinf()
    for ours, theirs in zip(our_loss(*case, IDS), plain_loss(*case, IDS)):
        assert same(ours, theirs, rtol=2 * torch.finfo(torch.float32).eps * largest_logit)


# --- and with the entropy -----------------------------------------------------------------------------------------------


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


def test_output_layer_gives_both_at_the_places_asked():
    from engine.mcore.output_layer import OutputLayer

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


# --- gradients made in the forward pass ---------------------------------------------------------------------------------


@pytest.fixture
def blocks(monkeypatch):
    """Sets the rows of a block, and of a chunk in it, where products are of 3 rows at least."""
    def of(rows, chunk=2, itemsize=4):
        from engine.mcore import linear_ce

        monkeypatch.setitem(linear_ce.BLOCK_BYTES, "cpu", rows * IDS * itemsize)
        monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", chunk * IDS * itemsize)
        monkeypatch.setitem(linear_ce._PRODUCT_ROWS, "cpu", 3)

    return of


@pytest.mark.parametrize("num_real", [IDS, 50, 2])
@pytest.mark.parametrize("rows, chunk", [(9, 4), (3, 3), (3, 100), (1, 1)])
def test_gradients_made_in_the_forward_pass(blocks, num_real, rows, chunk):
    blocks(rows, chunk)
    case = loss_case(num_real)
    for factor in (1.0, -0.03):
        for ours, theirs in zip(early_loss(*case, num_real, factor=factor), plain_loss(*case, num_real)):
            assert same(ours, theirs, rtol=1e-6)
    assert not early_loss(*case, num_real)[2][num_real:].any()


def test_gradients_made_in_the_forward_pass_in_bf16(blocks):
    """Nearly as near to fp64 as those of kept logits: sums over the 64 blocks are fp32 (a CPU rounds the product of each)."""
    blocks(4, itemsize=2)
    hidden, weight = (random(rows, WIDTH, dtype=torch.float32, seed=rows).bfloat16() for rows in (256, IDS))
    case = hidden.abs(), weight, torch.arange(256) % 50, torch.ones(256)
    ours, kept, plain = (loss(*case, 50) for loss in (early_loss, our_loss, plain_loss))
    assert [g.dtype for g in ours[1:]] == [torch.bfloat16] * 2
    for mine, other, theirs in zip(ours[1:], kept[1:], plain[1:]):
        assert (mine - theirs).norm() < 1.5 * (other - theirs).norm() < 1.5 * torch.finfo(torch.bfloat16).eps * theirs.norm()


def test_narrow_numbers_are_written_over_wide_ones_that_were_read():
    from engine.mcore.linear_ce import _ROUNDED, _times

    wide = random(9, _ROUNDED["cpu"] // 2 + 5, dtype=torch.float32)
    expected = (wide * 0.37).bfloat16()
    assert torch.equal(_times(wide, torch.tensor(0.37), torch.bfloat16), expected)


def test_a_weight_that_does_not_learn(blocks):
    blocks(3)
    case = loss_case(50)
    for ours, theirs in zip(early_loss(*case, 50, learns_weight=False), plain_loss(*case, 50)):
        assert same(ours, theirs, rtol=1e-6)


def test_nothing_to_learn_from(blocks):
    blocks(3)
    *case, cotangent = loss_case(50)
    nll, *grads = early_loss(*case, 0 * cotangent, 50)
    assert same(nll, plain_loss(*case, cotangent, 50)[0], rtol=1e-6) and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("rows", [3, 100], ids=["made in the forward pass", "logits kept"])
def test_another_loss_than_was_told_is_refused(blocks, rows, place):
    from engine.mcore.linear_ce import linear_cross_entropy

    blocks(rows)
    hidden, weight, labels, cotangent = loss_case(50)
    nll = linear_cross_entropy(hidden.requires_grad_(), weight, labels, 50, proportions=cotangent)
    cotangent = cotangent.clone()
    cotangent[place] += 1e-3 * cotangent.abs().max()
    with pytest.raises(RuntimeError, match="not proportional to them"):
        nll.backward(cotangent)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["largest", "smallest"])
@pytest.mark.parametrize("rows", [3, 100], ids=["made in the forward pass", "logits kept"])
def test_a_loss_that_is_not_finite_is_not_a_lie(blocks, rows, place, bad):
    """It is for the step guard to skip, which finds it in the gradients of the weights."""
    from engine.mcore.linear_ce import linear_cross_entropy

    blocks(rows)
    hidden, weight, labels, cotangent = loss_case(50)
    nll = linear_cross_entropy(hidden, weight.requires_grad_(), labels, 50, proportions=cotangent)
    cotangent = cotangent.clone()
    cotangent[cotangent.abs().argmax() if place == "largest" else cotangent.abs().argmin()] = bad
    nll.backward(cotangent)
    assert not weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory(monkeypatch, dtype):
    """At most a quarter of F.linear with F.cross_entropy in fp32, where tokens are twice the width, as 8,192 and 4,096."""
    from engine.mcore import linear_ce

    tokens, width, ids = 512, 256, 8192
    monkeypatch.setitem(linear_ce.BLOCK_BYTES, "cpu", 32 * ids * dtype.itemsize)  # a sixteenth, as 512 MB are not more than of 8,192 x 128k
    monkeypatch.setitem(linear_ce.CHUNK_BYTES, "cpu", 4 * ids * dtype.itemsize)
    hidden, weight = (random(*shape, dtype=torch.float32).to(dtype).requires_grad_() for shape in ((tokens, width), (ids, width)))
    labels, mask = torch.randint(0, ids, (tokens,)), torch.ones(tokens)

    def plain():
        F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum").backward()

    def ours():
        linear_ce.linear_cross_entropy(hidden, weight, labels, ids, proportions=mask).sum().backward()

    found = {}
    for act in (plain, ours):
        act()                                     # what is made once
        hidden.grad = weight.grad = None
        found[act], _ = peak_bytes(act)
        hidden.grad = weight.grad = None
    assert found[plain] > 3 * 4 * tokens * ids    # three times the logits, in fp32: the measure works
    assert found[ours] <= 0.25 * found[plain], f"{found[ours]:,} of {found[plain]:,}"


def test_logits_are_kept_where_that_is_less():
    """Of few tokens with a wide model a gradient in fp32 is more than logits and a gradient in bf16."""
    from engine.loss_memory import is_early

    ids = 131072
    assert is_early(8192, 4096, ids, 2, "cuda") and is_early(4096, 8192, ids, 2, "cuda", learns=False) and is_early(4096, 8192, ids, 4, "cuda")
    assert not is_early(4096, 8192, ids, 2, "cuda")      # 1.1 + 2.1 GB, and 4.3
    assert not is_early(2048, 1024, ids, 2, "cuda")      # one block: the same


def test_what_a_gpu_compiles():
    """Both parts of a chunk's work become one graph each, with the same numbers; a GPU's kernels are made of these graphs."""
    from engine.mcore import linear_ce

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    for dtype in (torch.float32, torch.bfloat16):
        for cap in ((0.0, 1.0), (2.0, 0.7)):
            for with_entropy in (False, True):
                products = random(TOKENS, IDS, dtype=torch.float32).to(dtype)
                labels, grads = loss_case(50)[2], random(2, TOKENS, dtype=torch.float32, seed=5)
                found = []
                for wrap in (lambda f: f, compiled):
                    z = products.clone()
                    lse, picked, entropy = wrap(linear_ce._sums)(z, labels, 50, *cap, with_entropy)
                    logits = z.clone()
                    of_entropy = (entropy, grads[1]) if with_entropy else ()
                    wrap(linear_ce._to_gradient)(z, labels, lse, grads[0], grads[0], 50, *cap, *of_entropy)
                    found.append((lse, picked, logits, z, *([entropy] if with_entropy else [])))
                for eager, graph in zip(*found):
                    assert torch.equal(eager.isfinite(), graph.isfinite())
                    torch.testing.assert_close(eager.nan_to_num(neginf=0), graph.nan_to_num(neginf=0), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_what_a_gpu_is_asked_holds_on_a_cpu():
    for case, errors in gpu.loss_errors("cpu").items():
        assert max(errors) < (1e-2 if "bfloat16" in case else 1e-6), case


# --- training -----------------------------------------------------------------------------------------------------------


def trained_in_blocks(*args):
    """On a rank: parity_table.train with blocks of 16 tokens' logits, and how many losses were made so."""
    from engine.mcore import linear_ce

    used, usual, make = [], linear_ce.BLOCK_BYTES["cpu"], linear_ce._GradientsInForward.apply
    linear_ce.BLOCK_BYTES["cpu"] = 16 * parity_table.VOCAB * 4
    linear_ce._GradientsInForward.apply = lambda *args: used.append(1) or make(*args)
    try:
        return *parity_table.train(*args), len(used)
    finally:
        linear_ce.BLOCK_BYTES["cpu"] = usual
        del linear_ce._GradientsInForward.apply


SP = dict(sequence_parallel=True)
ROWS = [
    parity_table.case("dense", 1),
    parity_table.case("tied", 2, tp=2, **SP),
    parity_table.case("gemma", 2, tp=2, **SP, recompute="selective"),
    parity_table.case("dense", 2, cp=2, micro_batch=2),
    parity_table.case("tied-mtp", 2, pp=2, pp_layers=[3, 1]),
    parity_table.case("latent-moe-mtp", 2, cp=2),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_training_without_logits_equals_one_rank_with_them(row):
    *_, with_logits = parity_table.reference(row.model)
    results = ranks.run(row.ranks, trained_in_blocks, row.model, row.layout, row.train, row.ranks)
    found = parity_table.difference(parity_table.reference(row.model), [result[:3] for result in results])
    assert max(found) < parity_table.LIMIT
    micro_batches = parity_table.BATCH // row.train.get("micro_batch", 1) * parity_table.STEPS
    assert results[-1][3] == micro_batches * (2 if "mtp" in row.model else 1)
