"""Pairs of rows that begin alike, computed as one row: the common beginning once, then both ends.

    narrow = merge(batch, width)          # [2n, s] rows -> [n, width]: trunk | end of row 2i | end of row 2i + 1 | padding
    output = unfold(output, narrow)       # [n, width] -> [2n, s], as if every row had been computed by itself

Two answers to one prompt are such rows: preference pairs spend a third of their tokens, or more, on computing the same prompt twice.
Positions restart at the second end, and the mask (masks.document_mask with has_trunk) lets each end see the trunk and itself. The trunk
stops one token before the first difference, since what follows that token differs. A stage never notices: it gives and gets [2n, s].
Left out: groups of more than two rows, and what looks at places instead of positions (see `is_possible`).
"""

import torch

from engine.rope import BY_LENGTH

WORTH = 0.9  # of the places; above it a mask instead of plain causal attention costs more than is saved


def is_possible(run, on_te: bool) -> bool:
    """Does the network treat tokens by position and document alone? Routers that balance over tokens, dropout, noise, windows and RoPE
    that depends on the length would see another batch."""
    model = run.model
    return not (on_te or model.moe.num_experts or model.sliding_window or model.hidden_dropout or model.attention_dropout or run.lora.dropout
                or run.tune.neftune_alpha or model.rope_scaling.kind in BY_LENGTH)


def _lengths(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [n] each: tokens of the trunk, of row 2i and of row 2i + 1. `ends` [2n] is the place of each row's last token."""
    first, second = batch["tokens"][0::2], batch["tokens"][1::2]
    lengths = batch["ends"] + 1
    common = torch.minimum((first == second).long().cumprod(1).sum(1), torch.minimum(lengths[0::2], lengths[1::2]))
    return (common - 1).clamp(min=0), lengths[0::2], lengths[1::2]


def width(batch: dict) -> int:
    """Places of the longest merged row."""
    trunk, first, second = _lengths(batch)
    return int((first + second - trunk).max())


def merge(batch: dict, width: int) -> dict:
    """tokens, labels, position_ids, loss_mask [n, width]; segment_ids int32: 0 trunk, 1 and 2 the ends, 3 padding; unfold int64
    [2n, s, 1]: where each place of the batch went; of: the batch itself."""
    trunk, first, second = (x[:, None] for x in _lengths(batch))
    num_rows, seq_len = batch["tokens"].shape
    place = torch.arange(width).expand(num_rows // 2, width)
    is_second = place >= first
    source = torch.where(is_second, place - first + trunk, place).clamp(max=seq_len - 1)
    is_padding = place >= first + second - trunk
    merged = {}
    for name in ("tokens", "labels", "position_ids", "loss_mask"):
        rows = batch[name]
        taken = torch.where(is_second, rows[1::2].gather(1, source), rows[0::2].gather(1, source))
        merged[name] = taken.masked_fill(is_padding, 0)
    segments = (place >= trunk).int() + is_second.int() + is_padding.int()
    here = torch.arange(seq_len).expand(num_rows // 2, seq_len)
    behind = torch.where(here < trunk, here, first - trunk + here)
    unfold = torch.stack([here, behind], 1).reshape(num_rows, seq_len).clamp(max=width - 1)
    return {**merged, "segment_ids": segments.int(), "unfold": unfold[..., None], "of": batch}


def unfold(output: torch.Tensor, merged: dict) -> torch.Tensor:
    """[n, width] -> [2n, s]. Differentiable: what two rows took from one place flows back there."""
    return output.repeat_interleave(2, 0).gather(1, merged["unfold"][..., 0])
