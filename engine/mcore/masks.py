"""Who sees whom: the context-parallel order of a sequence, and attention masks over documents.

    local = shard(batch, topology)                                       # this cp rank's two chunks of each sequence
    mask = document_mask(segment_ids, cp_rank, cp)                       # bool [b, 1, s / cp, s], or None

A sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r, so that causal work is even (Llama 3,
arXiv 2407.21783 section 3.3.2). Keys gathered over cp arrive rank by rank, so mask columns stand in that order and no key moves.
Left out: packed (thd) sequences, which only the te backend takes.
"""

import torch


def local_positions(seq_len: int, cp_rank: int, cp: int, device=None) -> torch.Tensor:
    """Positions [seq_len / cp] that cp_rank holds, in its order."""
    positions = torch.arange(seq_len, device=device)
    if cp == 1:
        return positions  # any length, also an odd one
    chunks = positions.view(2 * cp, -1)
    return torch.cat([chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]])


def gathered_positions(seq_len: int, cp: int, device=None) -> torch.Tensor:
    """Positions [seq_len] in the order in which an all-gather over cp puts them."""
    return torch.cat([local_positions(seq_len, rank, cp, device) for rank in range(cp)])


def shard(batch: dict, seq_len: int, cp_rank: int, cp: int) -> dict:
    """The batch with every [b, seq_len] tensor cut to this cp rank's positions; the whole batch when cp is 1."""
    if cp == 1:
        return batch
    index = local_positions(seq_len, cp_rank, cp, batch["tokens"].device)
    return {name: t.index_select(1, index) if t.dim() == 2 and t.size(1) == seq_len else t for name, t in batch.items()}


def unshard(gathered: torch.Tensor, cp: int) -> torch.Tensor:
    """[b, seq_len] gathered over cp in rank order -> natural order. Differentiable."""
    order = gathered_positions(gathered.size(1), cp, gathered.device)
    return gathered.index_select(1, torch.argsort(order))


def document_mask(segment_ids: torch.Tensor | None, seq_len: int, cp_rank: int, cp: int, device, has_trunk: bool = False) -> torch.Tensor | None:
    """bool mask, True where a query of this cp rank may look at a key: causal, and within one document if segment_ids is given.

    segment_ids: [b, seq_len] running document number, or None for no documents. has_trunk: document 0 is seen by all others. Returns None when plain causal attention
    says the same, else [b or 1, 1, seq_len / cp, seq_len].
    """
    if segment_ids is None and cp == 1:
        return None
    rows, columns = local_positions(seq_len, cp_rank, cp, device), gathered_positions(seq_len, cp, device)
    mask = (rows[:, None] >= columns[None, :])[None]
    if segment_ids is not None:
        keys = segment_ids[:, None, columns]
        is_visible = segment_ids[:, rows, None] == keys
        mask = mask & (is_visible | (keys == 0) if has_trunk else is_visible)
    return mask[:, None]


def distances(num_queries: int, num_keys: int, cp_group, device) -> torch.Tensor:
    """Query position minus key position [queries, keys], in the order of document_mask."""
    if cp_group is None:
        positions = torch.arange(num_keys, device=device)
        return positions[num_keys - num_queries:, None] - positions[None, :]
    cp, rank = cp_group.size(), cp_group.rank()
    return local_positions(num_keys, rank, cp, device)[:, None] - gathered_positions(num_keys, cp, device)[None, :]
