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
FIRST_SAMPLE_CHARACTERS = 16000  # of the first block
SAMPLE_CHARACTERS = 1500  # of every further block of a megabyte: a tenth of the time
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
        self._is_first = True
        self._compare([text for text in AWKWARD if not self._names.inside([text])])

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids laid end to end, int64 [texts] how many each has)."""
        flat, lengths = self._encode_fast(texts)
        self._sample(texts)
        named = self._names.inside(texts)
        if named:
            rows = np.split(flat, np.cumsum(lengths)[:-1])
            for i, row in zip(named, self.reference.encode_rows([texts[i] for i in named])):
                rows[i], lengths[i] = np.asarray(row, dtype=np.uint32), len(row)
            flat = np.concatenate(rows)
        return flat, lengths

    def _encode_fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if len(texts) <= MAX_CALLS or sum(map(len, texts)) >= MIN_CALL_CHARACTERS * len(texts):
            rows = [self._call(self._fast.encode, text) for text in texts]
            return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))
        layout = self._call(self._fast.encode_batch, texts, parallel=False).layout
        offsets = layout.offsets.data
        return layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)

    def _call(self, function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            raise NoFastPath(f"gigatoken failed: {error}") from None

    def _sample(self, texts: Sequence[str]) -> None:
        """Compares a few texts of a block, drawn by its contents, and the surroundings of new characters."""
        budget = FIRST_SAMPLE_CHARACTERS if self._is_first else SAMPLE_CHARACTERS
        self._is_first = False
        draw = random.Random(f"{len(texts)} {texts[0][:100]}")
        chosen = []
        while budget > 0:
            text = texts[draw.randrange(len(texts))]
            begin = draw.randrange(max(1, len(text) - SAMPLE_CHARACTERS))
            chosen.append(text[begin : begin + SAMPLE_CHARACTERS])
            budget -= max(100, len(chosen[-1]))
        chosen += self._around_new_characters(texts)
        named = set(self._names.inside(chosen))
        self._compare([text for i, text in enumerate(chosen) if i not in named])

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

    def _compare(self, texts: list[str]) -> None:
        if not texts:
            return
        flat, lengths = self._encode_fast(texts)
        ends = np.cumsum(lengths).tolist()
        for text, expected, begin, end in zip(texts, self.reference.encode_rows(texts), [0, *ends], ends):
            if not np.array_equal(flat[begin:end], np.asarray(expected, dtype=np.int64)):
                raise NoFastPath(f"gigatoken and the tokenizer's own library differ on {_shown(text)}")


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
    try:
        if kind == "tiktoken":
            return gigatoken.Tokenizer.from_tiktoken(path, TIKTOKEN_SCHEMES[reference.pattern], {}), []
        if kind == "sentencepiece":
            if reference.has_unused_pieces:
                raise ValueError("the model has unused pieces")
            fast = gigatoken.Tokenizer.from_sentencepiece(path)
            return fast, [token["content"] for token in fast._hf_config()["added_tokens"]] + reference.odd_pieces()
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        fast = gigatoken.Tokenizer.from_json(file.read_bytes())
        return fast, reference.added_tokens()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        raise NoFastPath(f"gigatoken does not support it: {error}") from None


def _shown(text: str, limit: int = 60) -> str:
    return ascii(text if len(text) <= limit else text[:limit] + "...")
