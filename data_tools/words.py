"""Words and word n-grams of many texts at once, as 64-bit hashes in numpy arrays.

In: texts. Out: for every word its hash and its place in its text, and from these the hashes of all runs of n words; equal
words have equal hashes, and the case of letters makes no difference. A word is a run of letters, digits and combining marks;
a character of a script that writes no spaces (Chinese, Japanese, Thai and their neighbours) is a word by itself.

Words of ASCII letters are read eight bytes at a time, others are polynomials in their code points, both for all words of a block
of texts at once, which is several times faster than splitting and hashing in Python. Two different n-grams of a corpus share
a hash with probability of about (number of n-grams)^2 / 2^65. Memory: some 40 bytes for each character of a block, or of a text
if that is longer. Left out: Unicode normalisation (it would move the places).
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
BASE = 0x9E3779B97F4A7C15  # odd: multiplying by it loses no bits
MASK = (1 << 64) - 1
KEPT = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # the first n of eight bytes


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
    rolling = np.zeros(words.hashes.size, np.uint64)
    for k in range(n):  # Horner's rule, at every word: those that run into the next text are left out after
        rolling *= np.uint64(BASE)
        rolling += padded[k : k + rolling.size]
    hashes = rolling[first]
    for i in np.flatnonzero((counts > 0) & (counts < n)) if short else ():
        value = 0
        for word in words.hashes[words.offsets[i] : words.offsets[i + 1]].tolist():
            value = (value * BASE + word) & MASK
        hashes[offsets[i]] = value + int(counts[i]) & MASK
    return mixed(hashes), first, offsets


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
    kind, low, points = _classify(" ".join(texts) + " ")
    previous = np.empty_like(kind)
    previous[0], previous[1:] = SEPARATOR, kind[:-1]
    # A word ends where a run of word characters does, and behind every character that stands alone.
    is_start = (kind == ALONE) | ((kind == IN_WORD) & (previous != IN_WORD))
    is_end = (previous == ALONE) | ((previous == IN_WORD) & (kind != IN_WORD))
    starts, ends = np.flatnonzero(is_start), np.flatnonzero(is_end)
    hashes = _byte_hashes(low, starts, ends - starts)
    if points is not None:
        others = np.flatnonzero(points >= 128)
        wide = np.flatnonzero(np.searchsorted(others, starts) < np.searchsorted(others, ends))
        hashes[wide] = _point_hashes(points, starts[wide], ends[wide] - starts[wide])

    lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
    begins = _offsets(lengths)
    offsets = np.searchsorted(starts, begins)
    shift = np.repeat(begins[:-1], np.diff(offsets))
    return Words(hashes, starts - shift, ends - shift, offsets)


def _classify(text: str) -> tuple[np.ndarray, bytes, np.ndarray | None]:
    """The kind uint8 of every character, its lower case in ASCII (128: it is none), and the code points, None when all are ASCII."""
    kinds, _ = _tables()
    table = bytes(kinds[:128]) + bytes(128)
    # bytes.translate is far faster than indexing an array with an array; the few other characters are set one by one.
    if text.isascii():
        narrow = text.encode("ascii")
        return np.frombuffer(narrow.translate(table), np.uint8), narrow.lower(), None
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    narrow = np.minimum(points, 128).astype(np.uint8).tobytes()
    kind = np.frombuffer(bytearray(narrow.translate(table)), np.uint8)
    others = np.flatnonzero(points >= 128)
    kind[others] = kinds[np.minimum(points[others], TABLE_SIZE)]
    return kind, narrow.lower(), points


def _byte_hashes(low: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The hash of every word from its bytes, which are never zero, so that padding with zeros is no ambiguity."""
    eights = np.ndarray(len(low) + 1, "<u8", low + bytes(8), 0, (1,))  # overlapping: eight bytes from every place on
    hashes = eights[starts] & KEPT[np.minimum(lengths, 8)]
    longer, at = np.flatnonzero(lengths > 8), 8
    while longer.size:
        hashes[longer] = mixed(hashes[longer]) + (eights[starts[longer] + at] & KEPT[np.minimum(lengths[longer] - at, 8)])
        at += 8
        longer = longer[lengths[longer] > at]
    return mixed(hashes)


def _point_hashes(points: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The hash of every word from its code points: the sum of point * BASE^place, modulo 2^64."""
    if starts.size == 0:
        return np.zeros(0, np.uint64)
    _, lower = _tables()
    begins = _offsets(lengths)
    places = np.arange(begins[-1]) - np.repeat(begins[:-1], lengths)
    taken = points[np.repeat(starts, lengths) + places]
    values = np.where(taken < TABLE_SIZE, lower[np.minimum(taken, TABLE_SIZE)], taken)
    powers = np.full(int(lengths.max()), BASE, np.uint64)
    powers[0] = 1
    return mixed(np.add.reduceat(values * np.cumprod(powers)[places], begins[:-1]))


def _offsets(counts: np.ndarray) -> np.ndarray:
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def mixed(values: np.ndarray) -> np.ndarray:
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
