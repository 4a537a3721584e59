"""Which n-grams of evaluation items occur in a text, and where.

In: evaluation files. Out: an index that finds, for a block of texts, every run of n words that some item holds. Words are compared
as in data_tools/words.py: lower case, without punctuation. The index is a sorted array of hashes behind a table of bits, so that a
text without an overlap costs little more than its hashes. Items of fewer than n words cannot be found and are listed as short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_tools.reader import expand, parse_block, read_blocks
from data_tools.words import ngrams, split_words
from engine.data.indexed import DataError

TABLE_BITS = 24  # 16 MiB of bytes: for a million n-grams one lookup in seventeen is in vain


@dataclass(frozen=True)
class Item:
    """One evaluation item: where it stands, and how many words and n-grams it has."""

    path: str
    line: int
    num_words: int
    num_ngrams: int


@dataclass(frozen=True)
class Overlap:
    """One text's n-grams that are in the index: their numbers, and the characters [begin, end) that each takes in the text."""

    grams: np.ndarray  # int64 [num_hits]
    begins: np.ndarray  # int64 [num_hits], ascending
    ends: np.ndarray


@dataclass(frozen=True)
class Index:
    """Distinct n-grams of the items in order of their hashes; those of item i are gram_numbers[offsets[i] : offsets[i + 1]]."""

    n: int
    items: list[Item]
    hashes: np.ndarray  # uint64 [num_grams], ascending
    gram_numbers: np.ndarray  # int64
    offsets: np.ndarray  # int64 [num_items + 1]
    is_ignored: np.ndarray  # bool [num_grams]
    table: np.ndarray = field(repr=False)  # bool [2^TABLE_BITS]

    def find(self, texts: Sequence[str]) -> list[Overlap | None]:
        """Of every text its overlap, None when there is none."""
        words = split_words(texts)
        hashes, first, offsets = ngrams(words, self.n, short=False)
        maybe = np.flatnonzero(self.table[hashes >> np.uint64(64 - TABLE_BITS)])
        found: list[Overlap | None] = [None] * len(texts)
        if maybe.size == 0:
            return found
        numbers = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), self.hashes.size - 1)
        is_hit = (self.hashes[numbers] == hashes[maybe]) & ~self.is_ignored[numbers]
        maybe, numbers = maybe[is_hit], numbers[is_hit]
        owners = np.searchsorted(offsets, maybe, side="right") - 1
        for text in np.unique(owners).tolist():
            mine = owners == text
            begin = first[maybe[mine]]
            found[text] = Overlap(numbers[mine], words.starts[begin], words.ends[begin + self.n - 1])
        return found

    def owners(self) -> tuple[np.ndarray, np.ndarray]:
        """(items, offsets [num_grams + 1]): the items that hold gram g are items[offsets[g] : offsets[g + 1]]."""
        item_of = np.repeat(np.arange(len(self.items)), np.diff(self.offsets))
        order = np.argsort(self.gram_numbers, kind="stable")
        return item_of[order], np.searchsorted(self.gram_numbers[order], np.arange(self.hashes.size + 1))


def read_index(inputs: Sequence[str], keys: Sequence[str], n: int) -> Index:
    """The index of evaluation files; an item is the texts of all keys, one after the other. Raises DataError at a malformed item."""
    items, parts = [], []
    for block in read_blocks(expand(inputs), "auto", keys):
        lines, columns, problems = parse_block(block, keys)
        if problems:
            raise DataError(f"evaluation item {problems[0]}; an item that is not read cannot be searched for: mend it, or choose --evaluation-keys")
        words = split_words(["\n".join(texts) for texts in zip(*columns)])
        hashes, _, offsets = ngrams(words, n, short=False)
        parts += [np.unique(hashes[a:b]) for a, b in zip(offsets[:-1], offsets[1:])]
        num_words = np.diff(words.offsets).tolist()
        items += [Item(block.path, line, count, part.size) for line, count, part in zip(lines, num_words, parts[len(items) :])]
    if not any(item.num_ngrams for item in items):
        raise DataError(f"none of {len(items)} evaluation items has {n} words, so there is nothing to search for; lower --ngram or check --evaluation-keys")
    joined = np.concatenate(parts)
    hashes, numbers = np.unique(joined, return_inverse=True)
    offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])])
    table = np.zeros(1 << TABLE_BITS, bool)
    table[hashes >> np.uint64(64 - TABLE_BITS)] = True
    return Index(n, items, hashes, numbers, offsets, np.zeros(hashes.size, bool), table)


def cut(text: str, overlap: Overlap, window: int, min_characters: int) -> list[str]:
    """What is left of a text without its overlaps and `window` characters on both sides, in pieces of at least min_characters.

    A cut is widened to the next white space, so that no word is cut in two.
    """
    pieces, position = [], 0
    for begin, end in zip(overlap.begins.tolist(), overlap.ends.tolist()):
        begin, end = max(0, begin - window), min(len(text), end + window)
        while begin > 0 and not text[begin - 1].isspace():
            begin -= 1
        while end < len(text) and not text[end].isspace():
            end += 1
        if begin > position:
            pieces.append(text[position:begin])
        position = max(position, end)
    pieces.append(text[position:])
    return [piece for piece in map(str.strip, pieces) if len(piece) >= max(1, min_characters)]
