"""Keys and values of rows that are decoded together, and the attention of one new token over them.

    rows = Rows(lengths, limit)                           # prompts of any lengths, all ending at one column
    caches = [LayerCache(rows) for _ in attentions]       # spec_torch.Attention.cache
    rows.reading = [[0], [1, 2]]                          # prompts pass, right-padded: attention stays plain and causal, the cache keeps copies
    rows.reading = None                                   # from here on one token per row and pass
    rows.end += 1                                         # once all layers have seen it
    rows.leave([2, 5], caches)                            # the last rows take the places of those that are done

Rows end at the same column (rows.end), so a token of every row is written to one column, and what differs is where a row starts: a mask hides
what lies before it. Room grows as it is needed and rows that are done give theirs up.
Left out: paged memory, and sharing the memory of equal prompts, which are read once but kept for each row.
"""

import torch
import torch.nn.functional as F

GROWTH = 128  # columns, at least


class Rows:
    """Where the rows of a cache lie.

    starts: first column of each row. end: columns in use. limit: columns that will ever be needed. room: columns that there is memory for.
    reading: for each prompt that passes the rows that have it, None while decoding.
    """

    def __init__(self, lengths: list[int], limit: int, device):
        self.end = max(lengths)
        self.starts = [self.end - length for length in lengths]
        self.limit, self.room = limit, min(self.end + GROWTH, limit)
        self.device, self.reading = device, None
        self._see()

    def __len__(self) -> int:
        return len(self.starts)

    def _see(self) -> None:
        """The mask bool [b, 1, 1, limit] over columns, True where a row may look; None where all rows start at one column."""
        self.first, self.mask = min(self.starts, default=0), None
        if self.first != max(self.starts, default=0):
            starts = torch.tensor(self.starts, device=self.device)
            self.mask = (torch.arange(self.limit, device=self.device) >= starts[:, None])[:, None, None]

    def leave(self, done: list[int], caches: list["LayerCache"]) -> list[int]:
        """Take out the rows with these places. Returns, for each place that remains, the place its row had before."""
        num_left = len(self) - len(done)
        holes = [place for place in done if place < num_left]
        movers = [place for place in range(num_left, len(self)) if place not in done]
        order = list(range(num_left))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        for cache in caches:
            cache.move(holes, movers, num_left)
        self.starts = [self.starts[place] for place in order]
        self._see()
        return order


class LayerCache:
    """Keys and values [b, kv_heads, room, d] of one layer, made when the first prompts pass."""

    def __init__(self, rows: Rows):
        self.rows, self.keys, self.values = rows, None, None

    def keep(self, key, value) -> None:
        """Of the prompts that pass, right-padded: key and value [s, b, kv_heads, d], kept for the rows of `rows.reading`."""
        rows = self.rows
        if self.keys is None:
            # Zeros: what a mask hides is multiplied by 0, which leaves nothing of any number but NaN.
            self.keys, self.values = (x.new_zeros(len(rows), x.size(2), rows.room, x.size(3)) for x in (key, value))
        for of, cache in ((key, self.keys), (value, self.values)):
            for i, equal in enumerate(rows.reading):
                start = rows.starts[equal[0]]
                cache[equal, :, start:rows.end] = of[:rows.end - start, i].transpose(0, 1)

    def attend(self, query, key, value, scale: float, window: int, written_out=None):
        """softmax(q k^T * scale) v of one new token per row, which is kept: query [1, b, heads, d], key and value [1, b, kv_heads, d] ->
        [1, b, heads * d]. window: tokens seen, itself included; 0 all. written_out(q, k, v, mask): in the place of SDPA."""
        rows = self.rows
        if rows.end == self.keys.size(2):
            self._grow()
        self.keys[:, :, rows.end] = key[0]
        self.values[:, :, rows.end] = value[0]
        first = max(rows.first, rows.end + 1 - window) if window else rows.first
        seen = slice(first, rows.end + 1)
        mask = None if rows.mask is None else rows.mask[..., seen]
        if written_out is not None:
            return written_out(query[0].unsqueeze(2), self.keys[:, :, seen], self.values[:, :, seen], mask).reshape(1, len(rows), -1)
        # The query heads of a group stand where queries do: they see the same keys, which then need not be repeated.
        q = query[0].unflatten(1, (self.keys.size(1), -1))
        out = F.scaled_dot_product_attention(q, self.keys[:, :, seen], self.values[:, :, seen], attn_mask=mask, scale=scale)
        return out.reshape(1, len(rows), -1)

    def move(self, holes: list[int], movers: list[int], num_left: int) -> None:
        """Copy rows into the places of others and forget the places from num_left on."""
        if holes:
            self.keys[holes], self.values[holes] = self.keys[movers], self.values[movers]
        self.keys, self.values = self.keys[:num_left], self.values[:num_left]

    def _grow(self) -> None:
        """Half as much room again, and no rows but those that are left."""
        rows = self.rows
        rows.room = max(rows.room, min(rows.end + max(GROWTH, rows.end // 2), rows.limit))
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], rows.room, old.size(3))
            new[:, :, :rows.end] = old[:, :, :rows.end]
            setattr(self, name, new)
