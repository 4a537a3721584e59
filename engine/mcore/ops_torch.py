"""Elementwise operations of the torch backend in few passes over memory: rotary embedding and RMSNorm (gates.py has gates).

Written as autograd functions because a CPU is limited by memory here: each saves what its backward needs and writes every
result once. Under torch.compile the plain formulas are used instead, which the compiler fuses itself.
Left out: everything that a matrix product dominates.
"""

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb as megatron_rope


def apply_rope(t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None):
    """Stands for megatron's apply_rotary_pos_emb: t [s, b, heads, d] turned by freqs [s, 1, 1, r], r <= d (RoFormer, arXiv 2104.09864),
    the turned dims multiplied by mscale (engine/rope.py).

    The result lies in memory as [b, heads, s, d], which scaled_dot_product_attention reads fastest, and is a view [s, b, heads, d].
    """
    if cu_seqlens is not None or config.rotary_interleaved or config.apply_rope_fusion:
        return megatron_rope(t, freqs, config, cu_seqlens=cu_seqlens, mscale=mscale, cp_group=cp_group)
    half = freqs[..., :freqs.size(-1) // 2]
    cos, sin = (half.cos() * mscale).to(t.dtype), (half.sin() * mscale).to(t.dtype)
    if torch.compiler.is_compiling():
        t1, t2, rest = t.split([half.size(-1), half.size(-1), t.size(-1) - freqs.size(-1)], dim=-1)
        return torch.cat([t1 * cos - t2 * sin, t2 * cos + t1 * sin, rest], dim=-1)
    return _Rope.apply(t, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, cos, sin):
        ctx.save_for_backward(cos, sin)
        s, b, heads, d = t.shape
        return _rotate(t, cos, sin, t.new_empty(b, heads, s, d).permute(2, 0, 1, 3), sign=1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), sign=-1), None, None


def _rotate(t, cos, sin, out, sign: int):
    """Each pair (t1, t2) turned by the angle (sign 1) or back (sign -1), and multiplied by what multiplies cos and sin."""
    r = cos.size(-1)
    t1, t2 = t[..., :r], t[..., r:2 * r]
    torch.mul(t1, cos, out=out[..., :r]).addcmul_(t2, sin, value=-sign)
    torch.mul(t2, cos, out=out[..., r:2 * r]).addcmul_(t1, sin, value=sign)
    if t.size(-1) > 2 * r:
        out[..., 2 * r:] = t[..., 2 * r:]
    return out


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467); statistics in fp32."""

    def forward(self, x):
        if torch.compiler.is_compiling():
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """The same with 1 + weight in the place of weight, added in fp32 (Gemma)."""

    def forward(self, x):
        weight = 1 + self.weight.float()
        if torch.compiler.is_compiling():
            return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)
        return _RMSNorm.apply(x, weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # [..., 1], fp32
        ctx.save_for_backward(x, weight, rstd)
        return torch.mul(x, rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        unit = torch.mul(x, rstd)  # x / rms, fp32
        scaled = torch.mul(grad, weight.float())
        along = torch.linalg.vecdot(scaled, unit).unsqueeze(-1).div_(x.size(-1))
        is_frozen = not ctx.needs_input_grad[1]
        grad_weight = None if is_frozen else torch.mul(grad, unit).flatten(0, -2).sum(0).to(weight.dtype)
        return scaled.addcmul_(unit, along, value=-1).mul_(rstd).to(x.dtype), grad_weight, None
