"""The fast path: the gigatoken library in the place of a reference tokenizer, and the proof on this corpus that it gives the same ids.

  fast = FastTokenizer("hf:tok", reference)          # raises NoFastPath with the reason where gigatoken does not support it
  flat, lengths = fast.encode(texts)                 # raises NoFastPath where the two differ

Three things make the ids those of the reference. A text that holds the name of a special or added token is tokenised by the
reference: the libraries differ in what such names mean inside text. At the start a list of awkward strings goes through both. And
of every block of the corpus a sample goes through both, with the surroundings of every character that was not seen before.
The first difference ends the fast path, and the caller starts again without it.
Left out: unigram models and SentencePiece without byte fallback, which gigatoken does not have.
"""

from __future__ import annotations

import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.tokenizer import CL100K_PATTERN, GPT2_PATTERN, LLAMA3_PATTERN, O200K_PATTERN, Tokenizer

MAX_CALLS = 256  # so many texts, or texts of so many characters,
MIN_CALL_CHARACTERS = 2000  # go to gigatoken one by one: a call costs 20 us, and the result of many together 0.3 s of imports, once
FIRST_SAMPLE_CHARACTERS = 16000  # are compared at the start,
SAMPLE_SHARE = 0.0015  # and this share from then on, a tenth of the time,
SAMPLE_CHARACTERS = 1500  # in texts or parts of texts of so many
MAX_NEW_CHARACTERS = 20000  # whose surroundings are compared, per process

# White space, contractions, digits, joined scripts, marks, controls and long runs: where tokenizers have been seen to differ.
AWKWARD = [
    " ", "  ", "\n", "\r\n\r\n \t", " a", "a ", "a  \n ", "  a\n\n  b", "\ta\t\tb", "a\u00a0b\u3000c\u2028d\u0085e", "It's they'LL 'sx 'ſ we'Ve'd",
    "1234567890 12 1,234.5", "x\u0301y\u0308 é é", "naïve café — 東京 🚅👩‍👩‍👧", "\x00\x01\x7f", "▁a ▁▁ b", "ﬁ Ａ ½ ² Ⅷ", "مرحبا بالعالم", "नमस्ते", "สวัสดี", "안녕 하세요",
    "if x:\n\n\n        return {'a': [1, 2]}\n", "-----=====_____/////", "a" * 300, " " * 300, "\n" * 100, "=" * 200 + "\n", "<|x|> <a> </a>", "\ufeffx", "😀" * 40,
]  # fmt: skip
TIKTOKEN_SCHEMES = {GPT2_PATTERN: "gpt2", CL100K_PATTERN: "gpt4", O200K_PATTERN: "o200k", LLAMA3_PATTERN: "gpt4"}


class NoFastPath(Exception):
    """The reason why the reference tokenizer is used."""


class FastTokenizer:
    """A gigatoken tokenizer beside the reference it stands for."""

    def __init__(self, spec: str, reference: Tokenizer) -> None:
        self.reference = reference
        self._fast, names = _load(spec, reference)
        self._names = _Names(names)
        self._seen = np.zeros(0x110000, dtype=bool)  # characters whose surroundings were compared
        self._num_new = 0
        self._to_compare = float(FIRST_SAMPLE_CHARACTERS)
        awkward = [text for text in AWKWARD if not self._names.inside([text])]
        self._compare(awkward, self._one_by_one(awkward))

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids laid end to end, int64 [texts] how many each has)."""
        if len(texts) <= MAX_CALLS or sum(map(len, texts)) >= MIN_CALL_CHARACTERS * len(texts):
            rows = self._one_by_one(texts)
            flat, lengths = np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))
        else:
            layout = _guarded(self._fast.encode_batch, texts, parallel=False).layout
            offsets = layout.offsets.data
            flat, lengths = layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)
            rows = np.split(flat, np.cumsum(lengths)[:-1])
        named = self._names.inside(texts)
        self._check(texts, rows, set(named))
        if named:
            for i, row in zip(named, self.reference.encode_rows([texts[i] for i in named])):
                rows[i], lengths[i] = np.asarray(row, dtype=np.uint32), len(row)
            flat = np.concatenate(rows)
        return flat, lengths

    def _one_by_one(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [_guarded(self._fast.encode, text) for text in texts]

    def _check(self, texts: Sequence[str], rows: Sequence[np.ndarray], named: set[int]) -> None:
        """Compares the ids of a few texts, drawn by the contents of the block, and those of the surroundings of new characters.

        Of a long text a part is tokenised again by both.
        """
        self._to_compare += SAMPLE_SHARE * sum(map(len, texts))
        draw = random.Random(f"{len(texts)} {texts[0][:100]}")
        whole, parts = [], self._around_new_characters(texts)
        while self._to_compare > 0:
            i = draw.randrange(len(texts))
            text = texts[i]
            self._to_compare -= min(SAMPLE_CHARACTERS, max(100, len(text)))
            if len(text) > SAMPLE_CHARACTERS:
                begin = draw.randrange(len(text) - SAMPLE_CHARACTERS)
                parts.append(text[begin : begin + SAMPLE_CHARACTERS])
            elif i not in named:
                whole.append(i)
        named_parts = set(self._names.inside(parts))
        parts = [part for i, part in enumerate(parts) if i not in named_parts]
        self._compare([texts[i] for i in whole] + parts, [rows[i] for i in whole] + self._one_by_one(parts))

    def _around_new_characters(self, texts: Sequence[str]) -> list[str]:
        joined = "\n".join(text for text in texts if not text.isascii())
        if not joined or self._num_new >= MAX_NEW_CHARACTERS:
            return []
        codes = np.frombuffer(joined.encode("utf-32-le"), dtype=np.uint32)
        new = np.flatnonzero(~self._seen[codes])
        new = new[np.unique(codes[new], return_index=True)[1]]
        self._seen[codes[new]] = True
        self._num_new += len(new)
        return [joined[max(0, i - 16) : i + 16] for i in new.tolist()]

    def _compare(self, texts: list[str], rows: list[np.ndarray]) -> None:
        if not texts:
            return
        for text, row, expected in zip(texts, rows, self.reference.encode_rows(texts), strict=True):
            if not np.array_equal(row, np.asarray(expected, dtype=np.int64)):
                raise NoFastPath(f"gigatoken and the tokenizer's own library differ on {_shown(text)}")


def _guarded(function, *arguments, **options):
    """A call of gigatoken. Raises NoFastPath for whatever goes wrong in it."""
    try:
        return function(*arguments, **options)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise NoFastPath(f"gigatoken refused: {str(error).partition(chr(10))[0]}") from None


class _Names:
    """Finds texts that hold one of many names, such as <|endoftext|>, at the cost of a few substring searches."""

    def __init__(self, names: Sequence[str]) -> None:
        groups = defaultdict(list)
        for name in filter(None, names):
            groups[name[:2]].append(name)
        self._groups = [(os.path.commonprefix(group), re.compile("|".join(map(re.escape, group)))) for group in groups.values()]

    def inside(self, texts: Sequence[str]) -> list[int]:
        """Which of the texts hold a name."""
        joined = "\x00".join(texts)
        groups = [(prefix, pattern) for prefix, pattern in self._groups if prefix in joined]
        if not groups:
            return []
        return [i for i, text in enumerate(texts) if any(prefix in text and pattern.search(text) for prefix, pattern in groups)]


def _load(spec: str, reference: Tokenizer):
    """(gigatoken tokenizer, names that text must not hold) of a spec."""
    kind, _, path = spec.partition(":")
    if kind == "bytes":
        raise NoFastPath("bytes need none")
    try:
        import gigatoken
    except ImportError:
        raise NoFastPath("gigatoken is not installed: pip install -c constraints.txt gigatoken") from None
    return _guarded(_open, gigatoken, kind, path, reference)


def _open(gigatoken, kind: str, path: str, reference: Tokenizer):
    if kind == "tiktoken":
        return gigatoken.Tokenizer.from_tiktoken(path, TIKTOKEN_SCHEMES[reference.pattern], {}), []
    if kind == "hf":
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        return gigatoken.Tokenizer.from_json(file.read_bytes()), reference.added_tokens()
    if reference.has_unused_pieces:
        raise ValueError("the model has unused pieces")
    fast = gigatoken.Tokenizer.from_sentencepiece(path)
    return fast, [token["content"] for token in fast._hf_config()["added_tokens"]] + reference.odd_pieces()


def _shown(text: str, limit: int = 60) -> str:
    return ascii(text if len(text) <= limit else text[:limit] + "...")
