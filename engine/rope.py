"""RoPE frequencies of every kind of `model.rope_scaling`, and which of their changes a stage may make.

    inv_freq, m = inverse_frequencies(theta, dims, scaling, seq_len)   # fp32 [dims / 2], and what multiplies cos and sin
    sentences = contradictions(written, wanted)                       # RoPE of a checkpoint against that of a run

Pair i of a head's rotated dims d turns by position * f_i, f_i = theta^(-2i/d) (RoFormer, arXiv 2104.09864). A scaling stretches
the slow pairs so that longer texts than the model was trained on stay within angles it knows. L0 is scaling.original_max_position,
F is scaling.factor. Each kind is computed as transformers' modeling_rope_utils.py computes the type of the same name:

    linear    f / F: position interpolation (arXiv 2306.15595)
    ntk       theta * F^(d/(d-2)) in the place of theta: NTK-aware, fixed; transformers has no name for it
    dynamic   the same with F * L/L0 - (F - 1) in the place of F, for L > L0 tokens
    yarn      f where a pair turns often within L0, f / F where seldom, a ramp between them (arXiv 2309.00071)
    longrope  f / short_factor up to L0 tokens, f / long_factor beyond them (arXiv 2402.13753)
    llama3    f, f / F and what lies between, by wavelength (arXiv 2407.21783)

dynamic and longrope depend on the length L in use, which is that of the rows of a micro-batch: transformers takes the longest
position of the batch, which is the same where rows are full or padded to their longest. Left out: `proportional`.
"""

import math

import torch

from engine.config import Model
from engine.stage_sections import RopeScaling

# Which fields of a scaling say something; the others keep their defaults and mean nothing.
FIELDS = {
    "none": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_max_position"),
    "yarn": ("factor", "original_max_position", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
    "longrope": ("factor", "original_max_position", "short_factor", "long_factor", "attention_factor"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
}
BY_LENGTH = ("dynamic", "longrope")  # the kinds whose frequencies depend on the length in use


def inverse_frequencies(theta: float, dims: int, scaling: RopeScaling, seq_len: int) -> tuple[torch.Tensor, float]:
    """(f fp32 [dims / 2] on the CPU, the factor of cos and sin).

    theta: base period. dims: rotated dims of a head, even. seq_len: tokens of the rows in use, for dynamic and longrope.
    """
    if scaling.kind in ("ntk", "dynamic"):
        return _frequencies(ntk_theta(theta, dims, _stretch(scaling, seq_len)), dims), 1.0
    if scaling.kind == "longrope":
        factors = scaling.long_factor if seq_len > scaling.original_max_position else scaling.short_factor
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _periods(theta, dims)), attention_factor(scaling)
    if scaling.kind == "yarn":
        kept, periods = _yarn_kept(theta, dims, scaling), _periods(theta, dims)
        return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept, attention_factor(scaling)
    frequencies = _frequencies(theta, dims)
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    return (_llama3(frequencies, scaling) if scaling.kind == "llama3" else frequencies), 1.0


def local(model: Model) -> Model:
    """The model whose RoPE layers with a sliding window have, where model.rope_local_theta gives them one of their own."""
    return model.model_copy(update={"rope_theta": model.rope_local_theta, "rope_scaling": RopeScaling(), "rope_local_theta": 0.0})


def attention_factor(scaling: RopeScaling) -> float:
    """What multiplies cos and sin, and so the attention logits twice; 1 for all kinds but yarn and longrope.

    yarn: 0.1 ln F + 1 (arXiv 2309.00071, equation 22), or DeepSeek's ratio of two of these. longrope: sqrt(1 + ln F / ln L0)
    (arXiv 2402.13753, section 3.3).
    """
    if scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "longrope":
        return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position)) if scaling.factor > 1 else 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_scale(scaling.factor, scaling.mscale) / _yarn_scale(scaling.factor, scaling.mscale_all_dim)
    return _yarn_scale(scaling.factor, 1.0)


def softmax_scale(model: Model) -> float | None:
    """What attention logits are multiplied by; None where it is 1 / sqrt(head size).

    Latent attention under yarn stretches them too, by the square of the scale of `mscale_all_dim` (DeepSeek-V2, in the place of a
    factor of cos and sin, which turn only a part of a head).
    """
    scaling = model.rope_scaling
    if model.is_latent and scaling.kind == "yarn" and scaling.mscale_all_dim:
        return _yarn_scale(scaling.factor, scaling.mscale_all_dim) ** 2 / math.sqrt(model.head_size)
    return model.query_pre_attn_scalar ** -0.5 if model.query_pre_attn_scalar else None


def ntk_theta(theta: float, dims: int, factor: float) -> float:
    """The base period that stretches the slowest pair by `factor` and leaves the fastest: theta * factor^(d/(d-2))."""
    return theta * factor ** (dims / (dims - 2))


def contradictions(written: Model, wanted: Model) -> list[str]:
    """One sentence for each difference between the RoPE a checkpoint was trained with and the one a run asks for.

    Weights learn one set of frequencies; other ones load without an error and give a worse model. Only stage long_context trains
    them towards new ones. Fields that the kind of scaling does not read may differ.
    """
    if "rope" not in (written.position, wanted.position):
        return []
    pairs = [(f"model.{name}", getattr(written, name), getattr(wanted, name)) for name in ("rope_theta", "rope_local_theta")]
    old, new = written.rope_scaling, wanted.rope_scaling
    if old.kind != new.kind:
        pairs.append(("model.rope_scaling.kind", old.kind, new.kind))
    else:
        pairs += [(f"model.rope_scaling.{name}", getattr(old, name), getattr(new, name)) for name in FIELDS[new.kind]]
    return [f"{name} is {ours}, but the checkpoint was trained with {theirs}; keep {name}={theirs}, or set stage: long_context, "
            "which trains the model for the new value" for name, theirs, ours in pairs if theirs != ours]


def _periods(theta: float, dims: int) -> torch.Tensor:
    """theta^(2i/d), fp32 [dims / 2]."""
    return theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)


def _frequencies(theta: float, dims: int) -> torch.Tensor:
    return 1.0 / _periods(theta, dims)


def _stretch(scaling: RopeScaling, seq_len: int) -> float:
    """How much further the slowest pair has to reach."""
    if scaling.kind == "ntk":
        return scaling.factor
    length = max(seq_len, scaling.original_max_position)
    return scaling.factor * length / scaling.original_max_position - (scaling.factor - 1)


def _yarn_scale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_kept(theta: float, dims: int, scaling: RopeScaling) -> torch.Tensor:
    """How much of each pair's own frequency is kept, fp32 [dims / 2]: 1 for the fast ones, 0 for the slow ones."""

    def dim_that_turns(times: float) -> float:
        """The (fractional) pair that turns this often within the original length."""
        return dims * math.log(scaling.original_max_position / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_that_turns(scaling.beta_fast), dim_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low or 0.001  # a ramp of no width is a step
    return 1 - ((torch.arange(dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    original, low, high = scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    kept = (original / wavelength - low) / (high - low)  # above 1: turns often, kept; below 0: seldom, divided
    between = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(wavelength < original / high, frequencies,
                       torch.where(wavelength > original / low, frequencies / scaling.factor, between))
