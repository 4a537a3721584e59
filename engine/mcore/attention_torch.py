"""Attention written out, for what scaled_dot_product_attention has no argument for: capped logits (Gemma 2, arXiv 2408.00118, section 2) and
learned sinks (gpt-oss, arXiv 2508.10925, section 2.2).

    attend(q, k, v, mask, is_causal, scale, softcap=50.0, sinks=sinks, dropout=0.0)      # [b, heads, queries, d of v]

    z = softcap * tanh(scale * q k^T / softcap)            p = softmax([z, sink of the head]) without its last column
All logits are held at once, [b, heads, queries, keys] in fp32; spec_torch.Attention takes SDPA for every other model.
Left out: a kernel that works in blocks (torch's flex_attention has none on a CPU with gradients).
"""

import torch
import torch.nn.functional as F


def attend(q, k, v, mask, is_causal: bool, scale: float, softcap: float = 0.0, sinks=None, dropout: float = 0.0) -> torch.Tensor:
    """q [b, heads, queries, d], k [b, kv_heads, keys, d], v [b, kv_heads, keys, e] -> [b, heads, queries, e].

    mask: bool, True where a query may look, [queries, keys] or [b or 1, 1, queries, keys]; is_causal stands for one where it is None.
    softcap 0 caps nothing. sinks: a logit per head, [heads], or None.
    """
    groups = k.size(1)
    z = (q.unflatten(1, (groups, -1)) @ k.unsqueeze(2).transpose(-1, -2)) * scale  # [b, groups, heads of a group, queries, keys]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    if mask is None and is_causal:
        mask = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).tril()
    if mask is not None:
        z = z.masked_fill(~(mask.unsqueeze(1) if mask.dim() == 4 else mask), float("-inf"))
    if sinks is not None:
        z = torch.cat([z, sinks.to(z.dtype).view(groups, -1, 1, 1).expand(*z.shape[:-1], 1)], dim=-1)
    p = z.softmax(-1)[..., :k.size(2)].to(v.dtype)
    return (F.dropout(p, dropout) @ v.unsqueeze(2)).flatten(1, 2)
