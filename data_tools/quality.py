"""Rules that judge a text: published heuristics, each one number that is measured and compared with a threshold.

In: a text. Out: the first rule that it breaks, with the number. RULES is the whole list in the order in which they are tried;
data_tools/filter.py applies it. Sources: "gopher" is Rae et al. 2021 (arXiv 2112.11446), A.1.1 and table A1; "c4" is Raffel et
al. 2020 (arXiv 1910.10683), section 2.2.

What the papers leave open is decided here: a word is what stands between white space; in the repetition rules it is a run of
letters and digits (data_tools/words.py) and fractions are of the characters of words; lines are counted when they are not blank,
paragraphs are parted by blank lines; a sentence ends at . ! or ? before white space. Left out: classifiers, perplexity.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_tools.words import ngrams, split_words

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "‣", "◦", "⁃", "▪", "●", "■", "-", "*")
ELLIPSES = ("...", "…")
TERMINAL = (".", "!", "?", '"', "”")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)")


class Document:
    """A text and what several rules count in it, each counted once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._repeats: dict[int, tuple | None] = {1: ()}

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def lines(self) -> list[str]:
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """Characters of each word in the sense of the repetition rules."""
        return self._hashed.ends - self._hashed.starts

    def repeats(self, n: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Of all n-grams in order: which distinct one it is, and how often each occurs; None when none occurs twice."""
        if n not in self._repeats:
            # A repeated n-gram holds repeated shorter ones, so most texts are done after the first sizes.
            self._repeats[n] = None if self.repeats(n - 1) is None else _counted(self._grams(n))
        return self._repeats[n]

    @cached_property
    def _hashed(self):
        return split_words([self.text])

    def _grams(self, n: int) -> np.ndarray:
        return ngrams(self._hashed, n, short=False)[0]

    def share_of_words(self, count: float) -> float:
        return count / max(1, len(self.words))

    def share_of_lines(self, count: float) -> float:
        return count / max(1, len(self.lines))


def num_words(document: Document) -> float:
    return len(document.words)


def mean_word(document: Document) -> float:
    return document.share_of_words(sum(map(len, document.words)))


def hash_ratio(document: Document) -> float:
    return document.share_of_words(document.text.count("#"))


def ellipsis_ratio(document: Document) -> float:
    return document.share_of_words(sum(map(document.text.count, ELLIPSES)))


def bullet_lines(document: Document) -> float:
    return document.share_of_lines(sum(line.startswith(BULLETS) for line in document.lines))


def ellipsis_lines(document: Document) -> float:
    return document.share_of_lines(sum(line.endswith(ELLIPSES) for line in document.lines))


def alphabetic_words(document: Document) -> float:
    return document.share_of_words(sum(any(map(str.isalpha, word)) for word in document.words))


def stop_words(document: Document) -> float:
    """How many different ones of the eight there are."""
    return len(STOP_WORDS.intersection(word.strip(".,;:!?\"'()").lower() for word in document.words))


def duplicate_lines(document: Document) -> float:
    return _repeated(document.lines)[0]


def duplicate_line_characters(document: Document) -> float:
    return _repeated(document.lines)[1]


def duplicate_paragraphs(document: Document) -> float:
    return _repeated(document.paragraphs)[0]


def duplicate_paragraph_characters(document: Document) -> float:
    return _repeated(document.paragraphs)[1]


def _repeated(parts: list[str]) -> tuple[float, float]:
    """The share of parts, and of their characters, that repeat an earlier part."""
    counts = Counter(parts)
    characters = sum((count - 1) * len(part) for part, count in counts.items() if count > 1)
    return (len(parts) - len(counts)) / max(1, len(parts)), characters / max(1, sum(map(len, parts)))


def top_ngram(n: int) -> Callable[[Document], float]:
    """The share of characters in the most frequent n-gram, when it occurs twice or more; of several, in that which covers most."""

    def measure(document: Document) -> float:
        repeats = document.repeats(n)
        if repeats is None:
            return 0.0
        which, counts = repeats
        tops = np.flatnonzero(counts == counts.max())[:100]  # where hundreds are equally frequent, none covers much
        return max(_covered(np.flatnonzero(which == top), n, document.word_lengths) for top in tops)

    return measure


def duplicate_ngrams(n: int) -> Callable[[Document], float]:
    """The share of characters that lie in an n-gram which occurs twice or more; none is counted twice."""

    def measure(document: Document) -> float:
        repeats = document.repeats(n)
        if repeats is None:
            return 0.0
        which, counts = repeats
        return _covered(np.flatnonzero(counts[which] > 1), n, document.word_lengths)

    return measure


def _counted(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    return which, counts


def _covered(firsts: np.ndarray, n: int, lengths: np.ndarray) -> float:
    """The share of characters in the words [first, first + n) of any of firsts."""
    is_covered = np.zeros(lengths.size, bool)
    for k in range(n):
        is_covered[firsts + k] = True
    return float(lengths[is_covered].sum() / max(1, lengths.sum()))


def curly_brackets(document: Document) -> float:
    return document.text.count("{") + document.text.count("}")


def lorem_ipsum(document: Document) -> float:
    return document.text.lower().count("lorem ipsum")


def num_sentences(document: Document) -> float:
    return len(SENTENCE_END.findall(document.text))


def num_characters(document: Document) -> float:
    return len(document.text)


@dataclass(frozen=True)
class Rule:
    """Breaks when what is measured lies below (or above) the threshold."""

    name: str
    group: str
    side: str
    threshold: float
    measure: Callable[[Document], float]
    meaning: str

    def breaks(self, value: float) -> bool:
        return value < self.threshold if self.side == "below" else value > self.threshold


INFINITE = float("inf")
RULES = (
    Rule("min_characters", "length", "below", 1, num_characters, "characters"),
    Rule("max_characters", "length", "above", INFINITE, num_characters, "characters"),
    Rule("min_words", "gopher-quality", "below", 50, num_words, "words"),
    Rule("max_words", "gopher-quality", "above", 100_000, num_words, "words"),
    Rule("min_mean_word", "gopher-quality", "below", 3, mean_word, "mean characters of a word"),
    Rule("max_mean_word", "gopher-quality", "above", 10, mean_word, "mean characters of a word"),
    Rule("max_hash_ratio", "gopher-quality", "above", 0.1, hash_ratio, "# signs per word"),
    Rule("max_ellipsis_ratio", "gopher-quality", "above", 0.1, ellipsis_ratio, "ellipses per word"),
    Rule("max_bullet_lines", "gopher-quality", "above", 0.9, bullet_lines, "share of lines that begin with a bullet"),
    Rule("max_ellipsis_lines", "gopher-quality", "above", 0.3, ellipsis_lines, "share of lines that end in an ellipsis"),
    Rule("min_alphabetic_words", "gopher-quality", "below", 0.8, alphabetic_words, "share of words with a letter"),
    Rule("min_stop_words", "gopher-quality", "below", 2, stop_words, "different ones of: the be to of and that have with"),
    Rule("max_duplicate_lines", "gopher-repetition", "above", 0.30, duplicate_lines, "share of lines that repeat one"),
    Rule("max_duplicate_paragraphs", "gopher-repetition", "above", 0.30, duplicate_paragraphs, "share of paragraphs that repeat one"),
    Rule("max_duplicate_line_characters", "gopher-repetition", "above", 0.20, duplicate_line_characters, "share of characters in such lines"),
    Rule("max_duplicate_paragraph_characters", "gopher-repetition", "above", 0.20, duplicate_paragraph_characters, "the same of paragraphs"),
    *(Rule(f"max_top_{n}gram", "gopher-repetition", "above", share, top_ngram(n), f"share of characters in the most frequent {n}-gram")
      for n, share in ((2, 0.20), (3, 0.18), (4, 0.16))),
    *(Rule(f"max_duplicate_{n}grams", "gopher-repetition", "above", share, duplicate_ngrams(n), f"share of characters in repeated {n}-grams")
      for n, share in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))),
    Rule("max_curly_brackets", "c4", "above", 0, curly_brackets, "curly brackets"),
    Rule("max_lorem_ipsum", "c4", "above", 0, lorem_ipsum, "times lorem ipsum"),
    Rule("min_sentences", "c4", "below", 5, num_sentences, "sentences, counted after lines were removed"),
)  # fmt: skip
GROUPS = ("length", "gopher-quality", "gopher-repetition", "c4")


def c4_lines(text: str, min_words: int) -> tuple[str, Counter]:
    """The text without the lines that C4 removes, and how many lines each reason removed; blank lines stay."""
    kept, removed = [], Counter()
    for line in text.split("\n"):
        reason = _line_fault(line.strip(), min_words) if line.strip() else None
        if reason is None:
            kept.append(line)
        else:
            removed[reason] += 1
    return "\n".join(kept).strip("\n") if removed else text, removed


def _line_fault(line: str, min_words: int) -> str | None:
    if not line.endswith(TERMINAL) or line.endswith(ELLIPSES):
        return "no terminal punctuation"
    if len(line.split()) < min_words:
        return f"fewer than {min_words} words"
    low = line.lower()
    if "javascript" in low:
        return "javascript"
    return "policy" if any(policy in low for policy in POLICIES) else None
