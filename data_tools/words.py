"""Words and word n-grams of many texts at once, as 64-bit hashes in numpy arrays.

In: texts. Out: for every word its hash and its place in its text, and from these the hashes of all runs of n words; equal
words have equal hashes, and the case of letters makes no difference. A word is a run of letters, digits and combining marks;
a character of a script that writes no spaces (Chinese, Japanese, Thai and their neighbours) is a word by itself.

The hash of a word is a polynomial in its code points modulo 2^64, so that a cumulative sum over a block of texts gives those of
all words together, several times faster than splitting and hashing in Python. Two different n-grams of one corpus share a hash
with probability of about (number of n-grams)^2 / 2^65. Memory: some 60 bytes for each character of a block, or of a text if that
is longer. Left out: Unicode normalisation (it would move the places).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BLOCK_CHARACTERS = 1 << 18  # a block's arrays then stay near the processor's cache
SEPARATOR, IN_WORD, ALONE = 0, 1, 2
TABLE_SIZE = 0x20000  # characters beyond are ideographs
# Blocks of scripts that put no spaces between words: Thai to Tibetan, Myanmar, Khmer, kana and ideographs, their compatibility forms.
UNSPACED = ((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9F))
BASE = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2^64
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Words:
    """The words of some texts laid end to end; those of text i are [offsets[i], offsets[i + 1])."""

    hashes: np.ndarray  # uint64 [num_words]
    starts: np.ndarray  # int64 [num_words], first character within its text
    ends: np.ndarray  # int64 [num_words], behind its last character
    offsets: np.ndarray  # int64 [num_texts + 1]


def split_words(texts: Sequence[str]) -> Words:
    """The words of all texts."""
    parts = [_split_block(block) for block in _blocks(texts)]
    if not parts:
        return Words(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64))
    if len(parts) == 1:
        return parts[0]
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("hashes", "starts", "ends")]
    return Words(*joined, _offsets(counts))


def ngrams(words: Words, n: int, short: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All runs of n words that lie in one text: (hashes uint64, number of the first word int64, offsets int64 [num_texts + 1]).

    With short, a text of fewer than n words gives one n-gram of all of them; without words it gives none either way.
    """
    counts = np.diff(words.offsets)
    num_grams = np.maximum(counts - n + 1, (counts > 0) if short else 0)
    offsets = _offsets(num_grams)
    # Gram g of text i begins at word offsets_of_words[i] + (g - offsets_of_grams[i]).
    first = np.arange(offsets[-1]) + np.repeat(words.offsets[:-1] - offsets[:-1], num_grams)
    padded = np.concatenate([words.hashes, np.zeros(n, np.uint64)])
    hashes = np.zeros(first.size, np.uint64)
    for k in range(n):  # Horner's rule
        hashes *= np.uint64(BASE)
        hashes += padded[first + k]
    for i in np.flatnonzero((counts > 0) & (counts < n)) if short else ():
        value = 0
        for word in words.hashes[words.offsets[i] : words.offsets[i + 1]].tolist():
            value = (value * BASE + word) & MASK
        hashes[offsets[i]] = value + int(counts[i]) & MASK
    return _mixed(hashes), first, offsets


def _blocks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    begin = size = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield texts[begin : i + 1]
            begin, size = i + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def _split_block(texts: Sequence[str]) -> Words:
    # A space closes each text, so that no word runs into the next one.
    kind, values = _classify(" ".join(texts) + " ")
    previous = np.empty_like(kind)
    previous[0], previous[1:] = SEPARATOR, kind[:-1]
    is_start = (kind == ALONE) | ((kind == IN_WORD) & (previous != IN_WORD))
    # A word ends where a run of word characters does, and behind every character that stands alone.
    is_end = (previous == ALONE) | ((previous == IN_WORD) & (kind != IN_WORD))
    starts, ends = np.flatnonzero(is_start), np.flatnonzero(is_end)

    powers, inverses = _powers(max(1 << 20, 1 << kind.size.bit_length()))
    sums = np.zeros(kind.size + 1, np.uint64)
    np.cumsum(np.multiply(values, powers[: kind.size], out=values), out=sums[1:])
    hashes = _mixed((sums[ends] - sums[starts]) * inverses[starts])

    lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
    begins = _offsets(lengths)
    offsets = np.searchsorted(starts, begins)
    shift = np.repeat(begins[:-1], np.diff(offsets))
    return Words(hashes, starts - shift, ends - shift, offsets)


def _classify(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The kind uint8 and the lower-case code point uint64 of every character."""
    kinds, lower = _tables()
    if text.isascii():
        narrow, others = text.encode("ascii"), None
    else:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        others = np.flatnonzero(points >= 128)
        narrow = np.minimum(points, 128).astype(np.uint8).tobytes()
    # bytes.translate is far faster than indexing an array with an array; the few other characters are set one by one.
    kind = np.frombuffer(bytearray(narrow.translate(bytes(kinds[:128]) + bytes(128))), np.uint8)
    values = np.frombuffer(narrow.lower(), np.uint8).astype(np.uint64)
    if others is not None:
        rare = points[others]
        inside = np.minimum(rare, TABLE_SIZE)
        kind[others] = kinds[inside]
        values[others] = np.where(rare < TABLE_SIZE, lower[inside], rare)
    return kind, values


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection after which every bit depends on all."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For each code point up to TABLE_SIZE: its kind uint8, and the code point of its lower case uint64."""
    import unicodedata

    characters = list(map(chr, range(TABLE_SIZE)))
    kinds = np.fromiter((IN_WORD if c.isalnum() or unicodedata.category(c)[0] == "M" else SEPARATOR for c in characters), np.uint8, TABLE_SIZE)
    for first, last in UNSPACED:
        part = kinds[first : last + 1]
        part[part == IN_WORD] = ALONE
    # A letter whose lower case is several characters stays as it is.
    lower = np.fromiter((ord(low) if len(low := c.lower()) == 1 else ord(c) for c in characters), np.uint64, TABLE_SIZE)
    return np.append(kinds, np.uint8(ALONE)), np.append(lower, np.uint64(0))


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64 for i below count."""
    values = []
    for base in (BASE, pow(BASE, -1, 1 << 64)):
        powers = np.full(count, base, np.uint64)
        powers[0] = 1
        values.append(np.cumprod(powers, dtype=np.uint64))
    return values[0], values[1]
