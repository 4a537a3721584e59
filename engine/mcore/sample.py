"""From logits to a token: penalty, temperature, top-k, top-p, min-p, and one random number per token.

    tokens, logps = draw(logits, seen, sampling, uniforms(sampling.seed, keys, place))

The random number is a hash of (seed, key of the row, place of the token in its answer), and the token is where it falls in the cumulative
distribution over ids. So a row's answer depends on nothing but its own logits: not on other rows, the batch or the layout.
Left out: beams, and penalties that count how often a token was said.
"""

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seed: int, keys: list[int], place: int) -> np.ndarray:
    """Numbers in [0, 1), fp64 [rows]: 53 bits of splitmix64 (Steele et al., OOPSLA 2014) over seed, key and place, one after the other."""
    state = _mixed(np.array([seed % 2**64], dtype=np.uint64))
    state = _mixed(state ^ np.array([key % 2**64 for key in keys], dtype=np.uint64))
    return (_mixed(state ^ np.uint64(place)) >> np.uint64(11)) * 2.0**-53


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's output for the states x, uint64; sums and products wrap."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(logits, seen, sampling, randoms: np.ndarray):
    """(tokens int64 [b], log p fp32 [b]) as engine/sampling.py defines them.

    logits: fp32 [b, vocab], without padding of the vocabulary. seen: bool [b, vocab], tokens of prompt and answer; None without a repetition
    penalty. randoms: [b] in [0, 1); unused when the temperature is 0.
    """
    is_greedy = sampling.temperature == 0
    plain = logits if is_greedy else logits / sampling.temperature
    penalised = plain if seen is None else _penalised(plain, seen, sampling.repetition_penalty)
    tokens = penalised.argmax(-1) if is_greedy else _drawn(_filtered(penalised, sampling), randoms)
    logps = plain.gather(1, tokens[:, None])[:, 0] - plain.logsumexp(1)
    return tokens, logps


def _penalised(z, seen, penalty: float):
    """Of logits over a temperature as of logits: both factors commute, for a temperature changes no sign."""
    return torch.where(seen, torch.where(z > 0, z / penalty, z * penalty), z)


def _filtered(z, sampling):
    """z [b, vocab] with -inf for what the filters leave out. Of equal logits at an edge all stay."""
    floor = z.new_full((z.size(0), 1), float("-inf"))
    best = None  # the tokens that are left, the most probable first
    if 0 < sampling.top_k < z.size(1):
        best = z.topk(sampling.top_k).values
        floor = best[:, -1:]
    if sampling.top_p < 1:
        best = z.sort(descending=True).values if best is None else best
        before = _cumulative(best.double().softmax(1)).roll(1, 1)
        before[:, 0] = 0.0  # what was reached without this token
        num_kept = (before < sampling.top_p).sum(1, keepdim=True)
        floor = best.gather(1, num_kept - 1)
    if sampling.min_p > 0:
        floor = torch.maximum(floor, z.amax(1, keepdim=True) + np.log(sampling.min_p))
    return z.masked_fill(z < floor, float("-inf"))


def _drawn(z, randoms: np.ndarray):
    """The token of each row at which the cumulative probability passes its random number."""
    cumulative = _cumulative((z.double() - z.amax(1, keepdim=True)).exp_())
    targets = torch.from_numpy(randoms).to(z.device)[:, None] * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return places.clamp(max=z.size(1) - 1)  # only NaN passes nothing; the token's log p tells then


def _cumulative(p):
    """Sums over the first tokens of each row, [b, vocab]."""
    if torch.are_deterministic_algorithms_enabled():
        return p.cpu().cumsum(1).to(p.device)  # on a GPU torch counts it among what is not deterministic, and refuses it
    return p.cumsum(1)
