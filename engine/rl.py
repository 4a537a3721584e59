"""Pure maths of learning from one's own answers, in the letters of the papers.

    r = token_rewards(scores, kl_estimate(logp - ref_logp, "k1"), mask, kl_coef)       # [b, s]
    A, R = gae(r, values, mask, gamma, lam)                                            # [b, s] each
    loss = clipped_policy_loss(logp, old_logp, A, clip_low, clip_high)                 # [b, s]: one number per token
    (loss * token_weights(mask, "tokens")).sum()         # the engine divides by the sum of token_count(mask, "tokens")

A row is a prompt with its answer. mask [b, s] is 1 where the label is a token that the policy drew; masked tokens may lie between such
tokens, where an answer has several turns. Log-probabilities enter multiplied by it: what lies elsewhere means nothing and may overflow.
Nothing here knows of ranks; where a number concerns the global batch, `total` sums a tensor over its replicas (Model.total). Left out: process
rewards, separate lambdas for policy and critic (VAPO), and objectives nobody here has asked for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]

OBJECTIVES = {  # grpo.loss: the advantage and the average that belong to it
    "grpo": ("group", "sequences"),         # arXiv 2402.03300
    "dr_grpo": ("group_mean", "fixed"),     # arXiv 2503.20783
    "dapo": ("group", "tokens"),            # arXiv 2503.14476
    "gspo": ("group", "sequences"),         # arXiv 2507.18071
    "cispo": ("group", "tokens"),           # arXiv 2506.13585
    "reinforce": ("batch", "tokens"),       # REINFORCE++, arXiv 2501.03262, averaged as in OpenRLHF
    "rloo": ("leave_one_out", "sequences"),  # arXiv 2402.14740
}

# --- divergence from another policy -----------------------------------------------------------------------------------


def kl_estimate(D: Tensor, kind: str) -> Tensor:
    """What one token, drawn from p, tells of KL(p || q) in nats; D = log p - log q, any shape -> the same (Schulman 2020, approximating KL).

    k1 = D has the right mean; k2 = D^2 / 2 and k3 = exp(-D) - 1 + D are never negative, and k3 has the right mean too. As a term of a loss
    it is the gradient that counts: on the policy's own tokens k2's is that of KL(p || q), k3's that of KL(q || p), k1's has mean 0. No clamps.
    """
    match kind:
        case "k1":
            return D
        case "k2":
            return D**2 / 2
        case "k3":
            return torch.expm1(-D) + D
    raise ValueError(f"kl={kind} is none of k1, k2, k3")


def updated_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, num_answers: int) -> float:
    """kl_coef after num_answers answers whose mean divergence, summed over the tokens of an answer, was kl (arXiv 1909.08593, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_answers / horizon)


def mismatch(logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far training is from the generation that drew the tokens, [b, s] each: the sums over mask of k1 and k3 of KL(rollout || training),
    to be divided by mask.sum(), and the largest |difference| of log-probabilities, [] each."""
    D = (rollout_logp - logp) * mask
    return {"k1": D.sum(), "k3": kl_estimate(D, "k3").sum(), "max": D.abs().max()}


# --- rewards ----------------------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -kl_coef KL_t, and the answer's score on its last token; scores [b], kl [b, s] -> [b, s], 0 where mask is 0
    (arXiv 2203.02155, section 3.5). A row without a token gets nothing."""
    places = torch.arange(1, mask.size(1) + 1, device=mask.device)
    last = (mask * places).argmax(1, keepdim=True)  # [b, 1]
    score = torch.zeros_like(kl).scatter(1, last, scores[:, None].to(kl.dtype))
    return (score - kl_coef * kl) * mask


def overlong_penalty(lengths: Tensor, max_new_tokens: int, buffer: int, penalty: float) -> Tensor:
    """DAPO's soft punishment, to be added to scores: 0 up to max_new_tokens - buffer tokens, then down to -penalty at max_new_tokens;
    lengths [n] -> [n], fp32 (arXiv 2503.14476, equation 13)."""
    return -penalty * ((lengths.float() - (max_new_tokens - buffer)) / buffer).clamp(0, 1)


# --- advantages -------------------------------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages A and returns R = A + V, [b, s] each, 0 where mask is 0 (arXiv 1506.02438, equation 16).

        delta_t = r_t + gamma V_next - V_t,    A_t = delta_t + gamma lam A_next

    `next` is the next token of mask: the ones between are passed over without discount, as verl and NeMo-RL do. After the last, V = A = 0.
    """
    A = torch.zeros_like(values)
    A_next, V_next = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        is_action = mask[:, t] > 0
        delta = rewards[:, t] + gamma * V_next - values[:, t]
        A_next = torch.where(is_action, delta + gamma * lam * A_next, A_next)
        V_next = torch.where(is_action, values[:, t], V_next)
        A[:, t] = A_next
    return A * mask, (A + values) * mask


def whiten(x: Tensor, mask: Tensor, total: Total, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over mask in the global batch, any shape, 0 where mask is 0; without shift_mean the mean is added again.

    The variance is the unbiased one, divided by count - 1, as in TRL and verl. Two passes and fp64 sums: a mean that is large beside the
    deviation costs no digits.
    """
    wide, weight = x.double(), mask.double()
    count, sum_x = total(torch.stack([weight.sum(), (wide * weight).sum()])).unbind()
    mean = sum_x / count.clamp(min=1)
    centred = (wide - mean) * weight
    var = total((centred**2).sum()) / (count - 1).clamp(min=1)
    whitened = centred * (var + 1e-8).rsqrt()
    return (whitened if shift_mean else whitened + mean * weight).to(x.dtype)


def advantages(kind: str, scores: Tensor, groups: Tensor, total: Total) -> Tensor:
    """One advantage per answer; scores [n], groups int64 [n], equal for the answers to one prompt and all on this replica -> [n].

    group: (R - mean) / (std + 1e-6), std unbiased (arXiv 2402.03300, section 4.1.2). group_mean: R - mean (arXiv 2503.20783). leave_one_out: R minus
    the mean of the group's other answers (arXiv 2402.14740). batch: whitened over the answers of the global batch (arXiv 2501.03262).
    An answer alone in its group has nothing to be compared with: mean 0, std 1.
    """
    if kind == "batch":
        return whiten(scores, torch.ones_like(scores), total)
    _, group, sizes = groups.unique(return_inverse=True, return_counts=True)
    is_alone, n = sizes[group] == 1, sizes[group].double()
    R = scores.double()  # the mean of equal fp32 scores is then exact, and their advantage 0 rather than a rounding error over 1e-6
    deviation = torch.where(is_alone, R, R - _sums(R, group, len(sizes)) / n)
    match kind:
        case "group":
            std = (_sums(deviation**2, group, len(sizes)) / (n - 1).clamp(min=1)).sqrt()
            A = deviation / (torch.where(is_alone, 1.0, std) + 1e-6)
        case "group_mean":
            A = deviation
        case "leave_one_out":
            A = deviation * n / (n - 1).clamp(min=1)
        case _:
            raise ValueError(f"advantage={kind} is none of group, group_mean, leave_one_out, batch")
    return A.to(scores.dtype)


def is_uniform(scores: Tensor, groups: Tensor) -> Tensor:
    """bool [n]: do all answers of this one's group have the same score? Such groups teach nothing, and DAPO draws others."""
    _, group = groups.unique(return_inverse=True)
    lowest, highest = (torch.zeros_like(scores).scatter_reduce(0, group, scores, kind, include_self=False)[group] for kind in ("amin", "amax"))
    return lowest == highest


def _sums(x: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """For each member the sum over its group; [n], int64 [n] -> [n]."""
    return x.new_zeros(num_groups).index_add(0, group, x)[group]


# --- ratios -----------------------------------------------------------------------------------------------------------


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """rho, p of each token now over p when the answer was drawn: [b, s] each."""
    return (logp - old_logp).exp()


def ratio_of(loss: str, logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """The ratio that a key of OBJECTIVES clips: [b, s] each.

    rloo: of the whole answer, the same at each of its tokens. gspo: s = exp(mean over tokens of the log-ratio); the gradient is each token's own,
    by stopgrad(s) p / stopgrad(p) (arXiv 2507.18071, equations 7 and 14). All others: of the token.
    """
    D = logp - old_logp
    match loss:
        case "rloo":
            return (D * mask).sum(1, keepdim=True).exp().expand_as(D)
        case "gspo":
            s = ((D * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)).exp()
            return s.detach() * ratio(logp, logp.detach())
    return ratio(logp, old_logp)


def truncated_weights(logp: Tensor, rollout_logp: Tensor, cap: float) -> Tensor:
    """min(p in training / p in generation, cap) with the weights that drew the answer, to multiply its policy loss; no gradient; [b, s] each
    (truncated importance sampling, Ionides 2008)."""
    return ratio(logp, rollout_logp).clamp(max=cap).detach()


def is_clipped(rho: Tensor, A: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """bool [b, s]: does the clip hold this token's ratio back?"""
    return torch.where(A > 0, rho > 1 + clip_high, (A < 0) & (rho < 1 - clip_low))


# --- losses, one number per token -------------------------------------------------------------------------------------


def clipped_policy_loss(logp: Tensor, old_logp: Tensor, A: Tensor, clip_low: float, clip_high: float, dual_clip: float = 0.0) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), for A < 0 at most -A dual_clip unless that is 0; [b, s] each
    (arXiv 1707.06347, equation 7; the bound: arXiv 1912.09729)."""
    return _clipped(ratio(logp, old_logp), A, clip_low, clip_high, dual_clip)


def policy_loss(loss: str, logp: Tensor, old_logp: Tensor, A: Tensor, mask: Tensor, clip_low: float, clip_high: float,
                dual_clip: float = 0.0) -> Tensor:
    """The loss of a key of OBJECTIVES, without divergence and entropy; A [b, s] or [b, 1], the others [b, s] -> [b, s].

    All but one are the clipped loss of `ratio_of`: grpo, dr_grpo and dapo differ in advantage and average; reinforce, as REINFORCE++ and OpenRLHF
    have it, has the gradient of -A log p where one update follows a rollout; so has rloo, which as in TRL clips whole answers.
    cispo: -stopgrad(clip(rho, 1 - clip_low, 1 + clip_high)) A log p (arXiv 2506.13585, section 3.1), where no token is left out.
    """
    rho = ratio_of(loss, logp, old_logp, mask)
    if loss == "cispo":
        return -rho.detach().clamp(1 - clip_low, 1 + clip_high) * A * logp
    return _clipped(rho, A, clip_low, clip_high, dual_clip)


def _clipped(rho: Tensor, A: Tensor, clip_low: float, clip_high: float, dual_clip: float) -> Tensor:
    loss = torch.max(-A * rho, -A * rho.clamp(1 - clip_low, 1 + clip_high))
    return torch.where(A < 0, torch.min(loss, -A * dual_clip), loss) if dual_clip else loss


def value_loss(V: Tensor, V_old: Tensor, R: Tensor, clip: float = 0.0) -> Tensor:
    """1/2 max((V - R)^2, (V' - R)^2), V' being V held within V_old +- clip; 0 does not hold it; [b, s] each
    (arXiv 2005.12729, section 3)."""
    loss = (V - R) ** 2
    if clip:
        loss = torch.max(loss, (V_old + (V - V_old).clamp(-clip, clip) - R) ** 2)
    return loss / 2


# --- averages ---------------------------------------------------------------------------------------------------------


def token_weights(mask: Tensor, average: str) -> Tensor:
    """What to multiply a loss per token by, [b, s]; the sum of the products, divided by the sum of token_count, is the average.

    sequences: mean over sequences of the mean over their tokens; tokens: mean over all tokens; fixed: sum over tokens, divided by
    sequences * max_new_tokens, where no answer's length weighs (arXiv 2503.20783). Rows without a token are no sequences.
    """
    return mask / mask.sum(1, keepdim=True).clamp(min=1) if average == "sequences" else mask


def token_count(mask: Tensor, average: str, max_new_tokens: int = 1) -> Tensor:
    """What token_weights' sums are to be divided by, []; max_new_tokens is read by fixed alone."""
    num_sequences = (mask > 0).any(1).sum()
    match average:
        case "sequences":
            return num_sequences.float()
        case "tokens":
            return mask.sum()
        case "fixed":
            return num_sequences.float() * max_new_tokens
    raise ValueError(f"average={average} is none of sequences, tokens, fixed")
