"""Rows that begin alike, computed as one: the common beginning once, then every row's end.

    narrow = merge(batch, width, 2)       # [2n, s] rows -> [n, width]: trunk | end of row 2i | end of row 2i + 1 | padding
    output = unfold(output, narrow)       # [n, width] -> [2n, s], as if every row had been computed by itself

Answers to one prompt are such rows: preference pairs spend a third of their tokens, or more, on computing the same prompt twice, and groups of
eight short answers most of them. Positions restart at every end, and the mask (masks.document_mask with has_trunk) lets each end see the
trunk and itself. The trunk stops one token before the first difference, since what follows that token differs. A stage never notices: it
gives and gets all rows.
Left out: what looks at places instead of positions (see `is_possible`).
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


def _places(batch: dict, alike: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [n] tokens of the trunk, [n, alike] place at which each row's own end begins, and [n] tokens of all.

    Of every `alike` neighbouring rows; `ends` [alike * n] is the place of each row's last token.
    """
    tokens, lengths = batch["tokens"].unflatten(0, (-1, alike)), (batch["ends"] + 1).view(-1, alike)
    common = (tokens == tokens[:, :1]).all(1).long().cumprod(1).sum(1)
    trunk = (torch.minimum(common, lengths.amin(1)) - 1).clamp(min=0)
    behind = trunk[:, None] + (lengths - trunk[:, None]).cumsum(1)
    return trunk, behind - (lengths - trunk[:, None]), behind[:, -1]


def width(batch: dict, alike: int) -> int:
    """Places of the longest merged row."""
    return int(_places(batch, alike)[2].max())


def merge(batch: dict, width: int, alike: int) -> dict:
    """tokens, labels, position_ids, loss_mask [n, width]; segment_ids int32: 0 trunk, 1 to `alike` the ends, then padding; unfold int64
    [alike * n, s]: where each place of the batch went; of: the batch itself."""
    trunk, starts, total = _places(batch, alike)
    num_rows, seq_len = batch["tokens"].shape
    n = num_rows // alike
    place = torch.arange(width).expand(n, width)
    owner = torch.searchsorted(starts[:, 1:].contiguous(), place.contiguous(), right=True)  # whose end a place is in; the trunk is row 0's
    source = torch.where(owner > 0, place - starts.gather(1, owner) + trunk[:, None], place).clamp(max=seq_len - 1)
    is_padding = place >= total[:, None]
    merged = {name: batch[name].reshape(n, -1).gather(1, owner * seq_len + source).masked_fill(is_padding, 0)
              for name in ("tokens", "labels", "position_ids", "loss_mask")}
    segments = torch.where(is_padding, alike + 1, torch.where(place < trunk[:, None], 0, owner + 1))
    here, trunk = torch.arange(seq_len), trunk[:, None, None]
    unfold = torch.where(here < trunk, here, starts[:, :, None] + here - trunk).view(num_rows, seq_len)
    return {**merged, "segment_ids": segments.int(), "unfold": unfold.clamp(max=width - 1)[..., None], "of": batch}


def unfold(output: torch.Tensor, merged: dict) -> torch.Tensor:
    """[n, width] or [n, width, 2] -> the same for all rows, [alike * n, s]. Differentiable: what rows took from one place flows back there."""
    where = merged["unfold"][..., 0]
    whole = output.repeat_interleave(len(where) // len(output), 0)
    return whole.gather(1, where if output.dim() == 2 else where[..., None].expand(*where.shape, output.size(2)))
