"""The output layer and the loss in one: -log p(label) from hidden states, vocabulary split over tp, rows in chunks.

    nll = linear_cross_entropy(hidden, weight, labels, num_real, tp_group)                             # [tokens], fp32
    nll, H = linear_cross_entropy(hidden, weight, labels, num_real, tp_group, with_entropy=True)       # and the entropy of each distribution

The logits of a chunk of rows are used while they are still in cache: forward keeps them (once, in the model's precision) and
the log-sum-exp; backward turns them into their own gradient in place. Plain log_softmax would hold them three times and read them
from memory at every turn. Maths, with p = softmax(z): nll = lse(z) - z[label], d nll / d z = p - onehot(label);
H = -sum p log p, d H / d z = -p (log p + H).
A softcap (Gemma) makes z = softcap * tanh(h W^T / softcap) / temperature; its derivative follows from z itself, d z / d (h W^T) =
(1 - (z * temperature / softcap)^2) / temperature.
Left out: recomputing the logits in the backward pass instead of keeping them.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # logits at a time: what a core's cache holds; what fills a GPU


class OutputLayer(ColumnParallelLinear):
    """megatron's output layer that, given labels, returns their loss instead of logits.

    It stays a module with a forward: megatron's DDP waits for gathered parameters when a module is called.
    """

    softcap = 0.0  # of the logits; 0 caps nothing

    def forward(self, input_, weight=None, runtime_gather_output=None, labels=None, num_real=0, is_greedy=False, asked=None,
                with_entropy=False, temperature=1.0):
        """input_ [s, b, h], labels [b, s] -> log p(label) [b, s], fp32, or with is_greedy (without gradients) 1 where no token is more
        probable than the label, else 0; with_entropy: [b, s, 2], log p(label) and the entropy of the distribution it is drawn from, in nats;
        without labels logits, as megatron's.

        asked: int64 places in [s, b] that are wanted, counted through b first; all others get 0 and cost nothing.
        temperature: of the distribution of labels; without a softcap the caller divides the hidden states by it, which is the same.
        """
        if labels is None:
            logits, bias = super().forward(input_, weight, runtime_gather_output)
            return (self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits), bias
        assert self.softcap or temperature == 1.0
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        flat, targets = hidden.reshape(-1, hidden.size(-1)), labels.t().reshape(-1)
        if asked is not None:
            flat, targets = flat.index_select(0, asked), targets.index_select(0, asked)
        compute = is_most_probable if is_greedy else log_probability_and_entropy if with_entropy else linear_log_probability
        cap = {} if is_greedy else {"cap": (self.softcap, temperature)}  # which tells no two logits apart
        found = compute(flat, self.weight if weight is None else weight, targets, num_real, self.tp_group, **cap)
        if asked is not None:
            found = found.new_zeros(labels.numel(), *found.shape[1:]).index_copy(0, asked, found)
        return found.view(hidden.size(0), hidden.size(1), *found.shape[1:]).transpose(0, 1)


def linear_cross_entropy(hidden, weight, labels, num_real: int, tp_group=None, with_entropy: bool = False, cap=(0.0, 1.0)):
    """-log softmax(hidden @ weight^T)[label] over the first num_real ids of the whole vocabulary.

    hidden [tokens, h]; weight [ids of this tp rank, h], ranks holding consecutive ids; labels int64 [tokens]. Returns fp32 [tokens];
    with_entropy: a pair, that and the entropy of each softmax, in nats. cap: (softcap, temperature), no cap where the first is 0.
    The gradient of hidden is this rank's share: the caller sums it over tp.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, num_real, tp_group, torch.is_grad_enabled(), with_entropy, cap)


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
    for rows in _chunks(hidden.size(0), weight):
        z = (hidden[rows] @ weight.t())[:, :max(first_padding, 1)]
        top[rows] = z.amax(1).float() if first_padding else float("-inf")
        picked[rows] = z.gather(1, local[rows, None].clamp(max=z.size(1) - 1))[:, 0].float()
    picked = picked.where(is_own, float("-inf"))
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
        dist.all_reduce(picked, op=dist.ReduceOp.MAX, group=tp_group)
    return (picked >= top).float()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, num_real, tp_group, has_backward, with_entropy, cap):
        tp = tp_group.size() if tp_group is not None else 1
        local, is_own, first_padding = _place(weight, labels, num_real, tp_group)
        chunks = list(_chunks(hidden.size(0), weight))
        # Without a backward pass one chunk's logits are enough, written over and over where they are in cache.
        num_kept = hidden.size(0) if has_backward else min(chunks[0].stop, hidden.size(0)) if chunks else 0
        logits = hidden.new_empty(num_kept, weight.size(0))
        lse, picked = (torch.empty(hidden.size(0), dtype=torch.float32, device=hidden.device) for _ in range(2))
        entropy = torch.empty_like(lse) if with_entropy else None
        for rows in chunks:
            h = hidden[rows]
            z = torch.mm(h, weight.t(), out=logits[rows] if has_backward else logits[:len(h)])
            if cap[0]:
                z.div_(cap[0]).tanh_().mul_(cap[0] / cap[1])
            z[:, first_padding:] = float("-inf")
            picked[rows] = z.gather(1, local[rows, None])[:, 0].float()
            top = z.amax(1, keepdim=True).clamp_min(torch.finfo(z.dtype).min)  # a rank of nothing but padding has no finite logit
            top = top.float()
            below = z.float() - top
            e = below.exp() if with_entropy else below.exp_()
            total = e.sum(1)
            lse[rows] = total.log() + top[:, 0]
            if with_entropy:
                total = total.clamp(min=1)  # which it is but on a rank of nothing but padding, where the entropy becomes 0
                entropy[rows] = total.log() - torch.linalg.vecdot(e[:, :first_padding], below[:, :first_padding]) / total
        picked = picked.where(is_own, 0)
        if tp > 1:
            parts = [torch.empty_like(lse) for _ in range(tp)]
            dist.all_gather(parts, lse, group=tp_group)
            own_lse, lse = lse, torch.stack(parts).logsumexp(0)
            dist.all_reduce(picked, group=tp_group)
            if with_entropy:  # chain rule: which rank the token is on, and then which of its tokens
                share = (own_lse - lse).exp()
                entropy = torch.special.entr(share) + share * entropy
                dist.all_reduce(entropy, group=tp_group)
        ctx.save_for_backward(hidden, weight, local, is_own, lse, entropy)
        ctx.logits, ctx.first_padding, ctx.cap = logits, first_padding, cap
        return (lse - picked, entropy) if with_entropy else lse - picked

    @staticmethod
    def backward(ctx, grad, grad_entropy=None):
        hidden, weight, local, is_own, lse, entropy = ctx.saved_tensors
        logits, ctx.logits = ctx.logits, None
        grad_hidden = torch.empty_like(hidden)
        own = torch.where(is_own, grad, 0.0)
        for rows in _chunks(len(logits), weight):
            z = logits[rows]
            slope = _slope(z, ctx.first_padding, *ctx.cap) if ctx.cap[0] else None
            logp = z.float().sub_(lse[rows, None])  # in fp32 this is z itself
            if grad_entropy is None:
                p = logp.exp_().mul_(grad[rows, None])
            else:  # p grad - p (log p + H) grad_entropy
                by_entropy = grad_entropy[rows, None]
                p = logp.exp().mul_(logp.mul_(-by_entropy).add_(grad[rows, None] - entropy[rows, None] * by_entropy))
                p[:, ctx.first_padding:] = 0  # 0 times an infinite log p
            p.scatter_add_(1, local[rows, None], -own[rows, None])
            if slope is not None:
                p.mul_(slope)
            if p is not z:
                z.copy_(p)
            torch.mm(z, weight, out=grad_hidden[rows])
        return grad_hidden, logits.t() @ hidden if ctx.needs_input_grad[1] else None, None, None, None, None, None, None


def _slope(z, first_padding: int, softcap: float, temperature: float):
    """d z / d (h W^T) of capped logits z, fp32; 0 on the padding of the vocabulary."""
    slope = (z.float() * (temperature / softcap)).square_().neg_().add_(1).div_(temperature)
    slope[:, first_padding:] = 0
    return slope


def _place(weight, labels, num_real: int, tp_group):
    """Of this tp rank's share of the vocabulary: each label's row, whether it is here, and where the padding begins."""
    rank, num_ids = tp_group.rank() if tp_group is not None else 0, weight.size(0)
    local = labels - rank * num_ids
    is_own = (local >= 0) & (local < num_ids)
    return local.clamp(0, num_ids - 1), is_own, min(max(num_real - rank * num_ids, 0), num_ids)


def _chunks(num_rows: int, weight):
    """Slices of the rows whose logits, in the dtype of `weight`, are as many as should be held at a time."""
    rows = max(1, _CHUNK_BYTES[weight.device.type] // (weight.size(0) * weight.element_size()))
    for first in range(0, num_rows, rows):
        yield slice(first, first + rows)
