"""The output layer's product and the loss in one: -log p(label) from hidden states, vocabulary split over tp, rows in chunks.

    nll = linear_cross_entropy(hidden, weight, labels, num_real, tp_group)                             # [tokens], fp32
    nll, H = linear_cross_entropy(hidden, weight, labels, num_real, tp_group, with_entropy=True)       # and the entropy of each distribution
    nll = linear_cross_entropy(hidden, weight, labels, num_real, tp_group, proportions=mask)           # gradients known up to a factor

Maths, with z = hidden W^T and p = softmax(z): nll = lse(z) - z[label], d nll / d z = p - onehot(label); H = -sum p log p,
d H / d z = -p (log p + H). A softcap (Gemma) makes z = softcap * tanh(h W^T / softcap) / temperature; its derivative follows from z itself,
d z / d (h W^T) = (1 - (z * temperature / softcap)^2) / temperature.

Two ways, of equal work; plain log_softmax would hold the logits three times and read them from memory at every turn:
- logits kept once, in the model's precision, with the log-sum-exp; backward turns them into their own gradient in place.
- where the loss is a weighted sum of nll with weights known beforehand up to one factor (`proportions`: a loss mask), and tokens are more
  than a block, forward makes the gradients of hidden states and weight block by block and keeps no logits at all; backward multiplies by
  the factor (as in arXiv 2410.10989, sec. 3.2, which takes all weights to be alike). A block is long enough for its product with the hidden
  states, which is added to the gradient of the weight in fp32, to cost no more than one long product.
"""

import torch
import torch.distributed as dist
from megatron.core.jit import jit_fuser  # torch.compile on a GPU, nothing on a CPU, where a chunk stays in cache

from engine.loss_memory import BLOCK_BYTES, CHUNK_BYTES, is_early, rows_in

_PRODUCT_ROWS = {"cpu": 128, "cuda": 1}         # of one product at least: fewer would read all the weight for little work
_ROUNDED = {"cpu": 1 << 18, "cuda": 1 << 24}    # numbers rounded at a time


def linear_cross_entropy(hidden, weight, labels, num_real: int, tp_group=None, with_entropy: bool = False, cap=(0.0, 1.0), proportions=None):
    """-log softmax(hidden @ weight^T)[label] over the first num_real ids of the whole vocabulary.

    hidden [tokens, h]; weight [ids of this tp rank, h], ranks holding consecutive ids; labels int64 [tokens]. Returns fp32 [tokens];
    with_entropy: a pair, that and the entropy of each softmax, in nats. cap: (softcap, temperature), no cap where the first is 0.
    proportions: fp32 [tokens], to which the gradient of what is returned will be proportional; the backward pass refuses any other.
    The gradient of hidden is this rank's share: the caller sums it over tp.
    """
    assert not (with_entropy and proportions is not None)
    has_backward = torch.is_grad_enabled()
    sizes = *hidden.shape, weight.size(0), hidden.element_size(), hidden.device.type
    if proportions is not None and has_backward and is_early(*sizes, weight.requires_grad):
        return _GradientsInForward.apply(hidden, weight, labels, num_real, tp_group, cap, proportions)
    return _LogitsKept.apply(hidden, weight, labels, num_real, tp_group, has_backward, with_entropy, cap, proportions)


def linear_log_probability(*args, **kwargs) -> torch.Tensor:
    """log p(label) fp32 [tokens], of linear_cross_entropy's arguments."""
    return -linear_cross_entropy(*args, **kwargs)


def log_probability_and_entropy(*args, **kwargs) -> torch.Tensor:
    """log p(label) and the entropy, fp32 [tokens, 2], of linear_cross_entropy's arguments."""
    nll, entropy = linear_cross_entropy(*args, with_entropy=True, **kwargs)
    return torch.stack([-nll, entropy], 1)


@torch.no_grad()
def is_most_probable(hidden, weight, labels, num_real: int, tp_group=None) -> torch.Tensor:
    """1.0 where no token has a greater logit than the label, else 0.0; fp32 [tokens]. Arguments as linear_cross_entropy's."""
    local, is_own, first_padding = _place(weight, labels, num_real, tp_group)
    top, picked = (torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device) for _ in range(2))
    for rows in _products(hidden.size(0), weight):
        z = (hidden[rows] @ weight.t())[:, :max(first_padding, 1)]
        top[rows] = z.amax(1).float() if first_padding else float("-inf")
        picked[rows] = z.gather(1, local[rows, None].clamp(max=z.size(1) - 1))[:, 0].float()
    picked = picked.where(is_own, float("-inf"))
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
        dist.all_reduce(picked, op=dist.ReduceOp.MAX, group=tp_group)
    return (picked >= top).float()


class _LogitsKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, num_real, tp_group, has_backward, with_entropy, cap, proportions):
        local, is_own, first_padding = _place(weight, labels, num_real, tp_group)
        # Without a backward pass one chunk's logits are enough, written over and over where they are in cache.
        num_kept = hidden.size(0) if has_backward else min(_product_rows(weight), hidden.size(0))
        logits = hidden.new_empty(num_kept, weight.size(0))
        nll, lse, entropy = _normalize(logits, hidden, weight, local, is_own, first_padding, tp_group, cap, with_entropy)
        ctx.save_for_backward(hidden, weight, local, is_own, lse, entropy, proportions)
        ctx.logits, ctx.first_padding, ctx.cap = logits, first_padding, cap
        return (nll, entropy) if with_entropy else nll

    @staticmethod
    def backward(ctx, grad, grad_entropy=None):
        hidden, weight, local, is_own, lse, entropy, proportions = ctx.saved_tensors
        if proportions is not None and len(proportions):
            _factor(grad, proportions)  # what would be wrong with more tokens is refused with few
        logits, ctx.logits = ctx.logits, None
        grad_hidden = torch.empty_like(hidden)
        _differentiate(logits, grad_hidden, weight, local, is_own, lse, grad, ctx.first_padding, ctx.cap, entropy, grad_entropy)
        return grad_hidden, logits.t() @ hidden if ctx.needs_input_grad[1] else None, *[None] * 7


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, num_real, tp_group, cap, proportions):
        local, is_own, first_padding = _place(weight, labels, num_real, tp_group)
        nll, grad_hidden = hidden.new_empty(hidden.size(0), dtype=torch.float32), torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        num_rows = _rows(weight, BLOCK_BYTES)
        logits = hidden.new_empty(num_rows, weight.size(0))
        for first in range(0, hidden.size(0), num_rows):
            rows = slice(first, first + num_rows)
            h = hidden[rows]
            z = logits[:len(h)]
            nll[rows], lse, _ = _normalize(z, h, weight, local[rows], is_own[rows], first_padding, tp_group, cap)
            _differentiate(z, grad_hidden[rows], weight, local[rows], is_own[rows], lse, proportions[rows], first_padding, cap)
            if grad_weight is not None:
                _add_product(grad_weight, z.t(), h)
        ctx.save_for_backward(proportions)
        ctx.made = grad_hidden, grad_weight
        return nll

    @staticmethod
    def backward(ctx, grad):
        (proportions,), (grad_hidden, grad_weight), ctx.made = ctx.saved_tensors, ctx.made, None
        factor = _factor(grad, proportions)
        if grad_weight is not None:
            grad_weight = _times(grad_weight, factor, grad_hidden.dtype)
        return grad_hidden.mul_(factor), grad_weight, None, None, None, None, None


def _factor(grad, proportions):
    """grad / proportions, one number (fp32 scalar); 0 where all proportions are; nan where a gradient is not finite: the step guard, which
    skips such an update and names its samples, is to see it. Raises RuntimeError where finite gradients are not one number times the
    proportions; on a GPU without waiting for it, which ends the process."""
    is_finite = grad.isfinite().all()
    largest = proportions.abs().argmax().view(1)
    of_largest = proportions.index_select(0, largest)
    factor = torch.where(of_largest == 0, 0.0, grad.index_select(0, largest) / of_largest).squeeze(0)
    expected = proportions * factor
    is_so = ((grad - expected).abs() <= 1e-4 * (of_largest * factor).abs()).all() | ~is_finite
    message = "the loss of this stage is not what its `proportions` say: its gradient is not proportional to them (engine/stage.py)"
    if grad.is_cuda:
        torch._assert_async(is_so, message)
    elif not is_so:
        raise RuntimeError(message)
    return torch.where(is_finite, factor, float("nan"))


def _times(gradient, factor, dtype):
    """gradient * factor, fp32, rounded to dtype; where that is narrower within the same memory, so that two of them never are there."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    wide, count = gradient.view(-1), _ROUNDED[gradient.device.type]
    narrow = wide.view(dtype)[:wide.numel()]
    for first in range(0, wide.numel(), count):  # what is written lies before what is still to be read
        narrow[first:first + count] = (wide[first:first + count] * factor).to(dtype)
    return narrow.view_as(gradient)


def _add_product(total, a, b) -> None:
    """total += a @ b, total fp32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # no product on a CPU gives another dtype
        for rows in _chunks(slice(0, len(total)), b.t()):
            total[rows] += a[rows] @ b


def _normalize(logits, hidden, weight, local, is_own, first_padding: int, tp_group, cap, with_entropy: bool = False):
    """(nll, log-sum-exp, entropy or None), fp32 [tokens]. The logits, capped and -inf where the vocabulary is padded, are left in `logits`,
    chunk over chunk where it holds fewer rows than there are."""
    num_rows = hidden.size(0)
    lse, picked = (torch.empty(num_rows, dtype=torch.float32, device=hidden.device) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    for product in _products(num_rows, weight):
        h = hidden[product]
        z = torch.mm(h, weight.t(), out=logits[product] if len(logits) == num_rows else logits[:len(h)])
        for rows in _chunks(product, weight):
            chunk = z[rows.start - product.start:rows.stop - product.start]
            lse[rows], picked[rows], of_rows = _sums(chunk, local[rows], first_padding, *cap, with_entropy)
            if with_entropy:
                entropy[rows] = of_rows
    picked = picked.where(is_own, 0)
    if tp_group is not None and tp_group.size() > 1:
        parts = [torch.empty_like(lse) for _ in range(tp_group.size())]
        dist.all_gather(parts, lse, group=tp_group)
        own_lse, lse = lse, torch.stack(parts).logsumexp(0)
        dist.all_reduce(picked, group=tp_group)
        if with_entropy:  # chain rule: which rank the token is on, and then which of its tokens
            share = (own_lse - lse).exp()
            entropy = torch.special.entr(share) + share * entropy
            dist.all_reduce(entropy, group=tp_group)
    return lse - picked, lse, entropy


def _differentiate(logits, grad_hidden, weight, local, is_own, lse, grad, first_padding: int, cap, entropy=None, grad_entropy=None) -> None:
    """Turns logits into the gradient of h W^T, in place, and writes that of the hidden states. grad: of each nll, fp32 [tokens]."""
    own = torch.where(is_own, grad, 0.0)
    for product in _products(len(logits), weight):
        for rows in _chunks(product, weight):
            of_entropy = (None, None) if grad_entropy is None else (entropy[rows], grad_entropy[rows])
            _to_gradient(logits[rows], local[rows], lse[rows], grad[rows], own[rows], first_padding, *cap, *of_entropy)
        torch.mm(logits[product], weight, out=grad_hidden[product])


@jit_fuser
def _sums(z, local, first_padding: int, softcap: float, temperature: float, with_entropy: bool):
    """Of a chunk of products h W^T: (log-sum-exp, logit of the label, entropy or None), fp32 [rows]. z becomes the logits."""
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap / temperature)
    if first_padding < z.size(1):
        z[:, first_padding:] = float("-inf")
    picked = z.gather(1, local[:, None])[:, 0].float()
    top = z.amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # a rank of nothing but padding has no finite logit
    top = top.float()
    below = z.float() - top
    e = below.exp() if with_entropy else below.exp_()
    total = e.sum(1)
    lse = total.log() + top[:, 0]
    if not with_entropy:
        return lse, picked, None
    total = total.clamp(min=1)  # which it is but on a rank of nothing but padding, where the entropy becomes 0
    return lse, picked, total.log() - torch.linalg.vecdot(e[:, :first_padding], below[:, :first_padding]) / total


@jit_fuser
def _to_gradient(z, local, lse, grad, own, first_padding: int, softcap: float, temperature: float, entropy=None, grad_entropy=None) -> None:
    """z, the logits of a chunk, becomes the gradient of h W^T. own: grad, but 0 where the label is on another tp rank."""
    rows = lse[:, None], grad[:, None], *(of[:, None] for of in (entropy, grad_entropy) if of is not None)
    at_label = z.gather(1, local[:, None])
    slope, slope_at_label = (_slope(of, softcap, temperature) if softcap else None for of in (z, at_label))
    # p - 1 is taken in fp32 and then rounded: near 1, p itself would become 1. Apart from all else, which so is one pass over z.
    at_label = _of_probability(at_label, *rows) - own[:, None]
    gradient = _of_probability(z, *rows)
    if softcap:
        at_label, gradient = at_label * slope_at_label, gradient.mul_(slope)
    if gradient is not z:
        z.copy_(gradient)
    z.scatter_(1, local[:, None], at_label.to(z.dtype))
    if first_padding < z.size(1):
        z[:, first_padding:] = 0  # not 0 times infinite


def _of_probability(z, lse, grad, entropy=None, grad_entropy=None):
    """p grad - p (log p + H) grad_entropy, fp32; of z in fp32 in its place."""
    logp = z.float().sub_(lse)  # in fp32 this is z itself
    if entropy is None:
        return logp.exp_().mul_(grad)
    return logp.exp().mul_(logp.mul_(-grad_entropy).add_(grad - entropy * grad_entropy))


def _slope(z, softcap: float, temperature: float):
    """d z / d (h W^T) of capped logits z, fp32."""
    return (z.float() * (temperature / softcap)).square_().neg_().add_(1).div_(temperature)


def _place(weight, labels, num_real: int, tp_group):
    """Of this tp rank's share of the vocabulary: each label's row, whether it is here, and where the padding begins."""
    rank, num_ids = tp_group.rank() if tp_group is not None else 0, weight.size(0)
    local = labels - rank * num_ids
    is_own = (local >= 0) & (local < num_ids)
    return local.clamp(0, num_ids - 1), is_own, min(max(num_real - rank * num_ids, 0), num_ids)


def _rows(weight, limit: dict[str, int]) -> int:
    return rows_in(limit, weight.device.type, weight.size(0), weight.element_size())


def _product_rows(weight) -> int:
    """Rows of one product: a chunk's, or what makes it worth while."""
    return max(_rows(weight, CHUNK_BYTES), _PRODUCT_ROWS[weight.device.type])


def _products(num_rows: int, weight):
    """Slices of the rows of each product with the weight."""
    return _parts(slice(0, num_rows), _product_rows(weight))


def _chunks(rows: slice, weight):
    """Slices of these rows whose logits should be worked on at a time."""
    return _parts(rows, _rows(weight, CHUNK_BYTES))


def _parts(rows: slice, size: int):
    return (slice(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size))
