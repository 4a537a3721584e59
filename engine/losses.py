"""Pure maths of the losses that stages share, in the letters of the papers.

    l = sequence_logps(logp, mask)                  # [2n]: log pi(y | x) of each row
    D = difference(l - l_ref)                       # [n]: one number per pair
    loss = dpo(D, beta)                             # [n]: one loss per pair; the stage sums, the engine divides

Pairs are adjacent rows: row 2i is the chosen answer y_w, row 2i + 1 the rejected one y_l. Every function keeps one number per
pair (kto: per row), so that the caller decides what to divide by. No configuration, no ranks, no reduction over a batch.
Left out: length-normalised DPO, EXO, NCA, APO and other variants nobody here has asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# --- from tokens to rows and pairs ------------------------------------------------------------------------------------


def sequence_logps(logp: Tensor, mask: Tensor) -> Tensor:
    """l = sum over the answer's tokens of log p: [b, s], [b, s] -> [b]."""
    # contiguous: the order of summation follows the strides, and equal log-probabilities must have equal sums
    return (logp * mask).contiguous().sum(1)


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected rows: [2n] -> [n], [n]."""
    return x[0::2], x[1::2]


def difference(x: Tensor) -> Tensor:
    """Chosen minus rejected: [2n] -> [n]. Of log-ratios l - l_ref it is D, what the reward of DPO's implicit reward model differs
    by, in units of 1 / beta."""
    chosen, rejected = pairs(x)
    return chosen - rejected


def rewards(output: Tensor, ends: Tensor) -> Tensor:
    """The reward of each row, which is the scalar head's value on its last real token: [b, s], int64 [b] -> [b]."""
    return output.gather(1, ends[:, None]).squeeze(1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation on either side of -ln 2 (Maechler 2012, accurately computing log(1 - exp(-a))).

    0, to which a sure model's log-probability rounds, counts as the number next to it, without gradient.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    # The branch not taken is computed at a harmless place, since its infinite gradient times 0 would be NaN.
    is_small = x > -0.6931471805599453
    near = torch.where(is_small, x, -0.5)
    far = torch.where(is_small, -1.0, x)
    return torch.where(is_small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


# --- reward model -----------------------------------------------------------------------------------------------------


def bradley_terry(r_c: Tensor, r_r: Tensor, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_r - margin) + center * (r_c + r_r)^2, [n] each.

    The margin is Llama 2's (arXiv 2307.09288, section 3.2.2), the second term keeps rewards around 0 (arXiv 2312.09244).
    """
    loss = -F.logsigmoid(r_c - r_r - margin)
    return loss + center * (r_c + r_r) ** 2 if center else loss


# --- with a reference: D and u are made of l - l_ref ------------------------------------------------------------------


def dpo(D: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta D), [n] (arXiv 2305.18290, equation 7)."""
    return -F.logsigmoid(beta * D)


def cdpo(D: Tensor, beta: float, epsilon: float) -> Tensor:
    """DPO with a share epsilon of labels taken to be flipped, [n] (Mitchell 2023, a note on DPO with noisy preferences, equation 3)."""
    return (1 - epsilon) * dpo(D, beta) + epsilon * dpo(-D, beta)


def robust(D: Tensor, beta: float, epsilon: float) -> Tensor:
    """DPO whose expectation over flipped labels is the loss without flips, [n] (arXiv 2403.00409, equation 12)."""
    return ((1 - epsilon) * dpo(D, beta) - epsilon * dpo(-D, beta)) / (1 - 2 * epsilon)


def hinge(D: Tensor, beta: float) -> Tensor:
    """max(0, 1 - beta D), [n] (SLiC, arXiv 2305.10425, on the log-ratios as in arXiv 2309.06657)."""
    return torch.relu(1 - beta * D)


def ipo_sum(D: Tensor, beta: float) -> Tensor:
    """(D - 1 / (2 beta))^2 of summed log-ratios, [n] (arXiv 2310.12036, equation 17, where beta is tau)."""
    return (D - 1 / (2 * beta)) ** 2


def ipo_mean(u: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """The same of log-ratios per token; u, lengths [2n] -> [n]. The paper's authors told TRL that this is what they ran; beta means
    another strength here than in ipo_sum."""
    return ipo_sum(difference(u / lengths), beta)


def kto(u: Tensor, is_desirable: Tensor, z: Tensor, beta: float, lambda_d: float, lambda_u: float) -> Tensor:
    """lambda_d (1 - sigmoid(beta (u - z))) for desirable rows, lambda_u (1 - sigmoid(beta (z - u))) for the others, [b].

    u: log-ratio of each row [b]; is_desirable: bool [b]; z: the reference point, without gradient, broadcast to [b]: the mean
    log-ratio of mismatched pairs over the global batch, not below 0 (arXiv 2402.01306, equations 7 and 8).
    """
    # 1 - sigmoid(x) = sigmoid(-x), which does not cancel for large x
    return torch.where(is_desirable, lambda_d * torch.sigmoid(-beta * (u - z)), lambda_u * torch.sigmoid(-beta * (z - u)))


# --- without a reference ----------------------------------------------------------------------------------------------


def simpo(l: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:  # noqa: E741
    """-log sigmoid(beta (l_w / |y_w| - l_l / |y_l|) - gamma); l, lengths [2n] -> [n] (arXiv 2405.14734, equation 6)."""
    return -F.logsigmoid(beta * difference(l / lengths) - gamma)


def orpo(l: Tensor, lengths: Tensor, nll: Tensor, beta: float) -> Tensor:  # noqa: E741
    """nll - beta * log sigmoid(log of the odds ratio), odds = p / (1 - p) with p = exp(l / |y|); l, lengths [2n], nll [n] -> [n]
    (arXiv 2403.07691, equations 4, 6 and 7; beta is lambda there).

    nll: each pair's part of the mean -log p of the chosen tokens.
    """
    chosen, rejected = pairs(l / lengths)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return nll - beta * F.logsigmoid(log_odds)


# --- two things named RPO ---------------------------------------------------------------------------------------------


def rpo_nll(D: Tensor, nll: Tensor, beta: float, alpha: float) -> Tensor:
    """DPO plus alpha times the chosen answer's nll, [n] each (arXiv 2404.19733, equation 1; Llama 3 takes alpha 0.2)."""
    return dpo(D, beta) + alpha * nll


def rpo_squared(D: Tensor, scores: Tensor, beta: float, eta: float) -> Tensor:
    """(beta D - eta scores)^2; scores: annotated reward of chosen minus rejected, [n] each (reward-aware preference optimisation,
    arXiv 2406.11704 section 3.3.2 and 2502.00203)."""
    return (beta * D - eta * scores) ** 2


def rpo_backward_kl(D: Tensor, scores: Tensor, beta: float, eta: float) -> Tensor:
    """KL of the annotated from the implicit preference: KL(Bernoulli(sigmoid(eta scores)) || Bernoulli(sigmoid(beta D))), [n]
    (arXiv 2406.11704 section 3.3.2, which calls this direction backward)."""
    return _bernoulli_kl(eta * scores, beta * D)


def rpo_forward_kl(D: Tensor, scores: Tensor, beta: float, eta: float) -> Tensor:
    """The other direction: KL(Bernoulli(sigmoid(beta D)) || Bernoulli(sigmoid(eta scores))), [n]."""
    return _bernoulli_kl(beta * D, eta * scores)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(a)) || Bernoulli(sigmoid(b)))."""
    return (torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b)) + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b)))
