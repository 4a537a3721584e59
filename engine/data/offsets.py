"""Tokenizers that also say where in the text each token begins, and that read special tokens written in the text.

    tokenizer = load_offsets("hf:work/tokenizer")
    ids, starts = tokenizer.encode("<|im_start|>user\\nhi<|im_end|>\\n")      # starts[k]: the character at which token k begins

The specs are those of data_tools/tokenizer.py, and so are the ids, but for special tokens: text such as <|im_end|> or </s> becomes
the one id that the tokenizer has for it, as inference sees it. Nothing is added before or after.
A token that holds part of a character (byte-level tokens of an emoji) begins at that character.
Left out: tokenizers without a way to say where a piece begins.
"""

from __future__ import annotations

import json
import re
from itertools import repeat
from pathlib import Path
from typing import Protocol

from data_tools.tokenizer import load_tokenizer
from engine.data.indexed import DataError

PROBE = ("The quick brown fox jumps over 13 lazy dogs; def f(x): return {x: 3.14159}\n\t<b>Grüße, 你好, мир, नमस्ते, 🙂</b> unbelievably "
         "internationalisation WWW_42 ~!@#$%^&*")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class OffsetTokenizer(Protocol):
    """vocab_size: one more than the greatest id. eos: text of the end-of-document token, "" when there is none.

    specials: text -> id of what encode reads as one token wherever it stands. variables: bos_token, eos_token and kin, for templates.
    """

    vocab_size: int
    eos: str
    specials: dict[str, int]
    variables: dict[str, str]

    def encode(self, text: str) -> tuple[list[int], list[int]]: ...


def load_offsets(spec: str) -> OffsetTokenizer:
    """The tokenizer a spec names. Raises UsageError for an unknown kind, DataError for what is missing or cannot tell offsets."""
    plain = load_tokenizer(spec)      # refuses kinds that are not in KINDS
    return KINDS[spec.partition(":")[0]](plain, spec)


def same_tokenizer(one: str, other: str) -> bool:
    """Do two specs mean the same tokens? Told by the size of the vocabulary, the special tokens and the ids of a text in several scripts."""
    if one == other:
        return True
    first, second = load_offsets(one), load_offsets(other)
    return (first.vocab_size, first.specials, first.encode(PROBE)[0]) == (second.vocab_size, second.specials, second.encode(PROBE)[0])


class _HF:
    def __init__(self, plain, spec: str) -> None:
        self._tokenizer = plain._tokenizer
        # It would only add tokens, and cut the leading space out of the offsets of byte-level tokens.
        self._tokenizer.post_processor = None
        self.vocab_size = plain.vocab_size
        self.specials = {token.content: number for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.variables = _named_tokens(Path(spec.partition(":")[2]))
        if plain.eod_id is not None:
            self.variables.setdefault("eos_token", self._tokenizer.id_to_token(plain.eod_id))
        self.eos = self.variables.get("eos_token", "")

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]


def _named_tokens(path: Path) -> dict[str, str]:
    """bos_token and kin as tokenizer_config.json or special_tokens_map.json beside the tokenizer name them."""
    folder, found = path if path.is_dir() else path.parent, {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        values = read_json(folder / name)
        for key in NAMED_TOKENS:
            value = values.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def read_json(path: Path) -> dict:
    """The object in a file; empty when there is no such file. Raises DataError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); fetch the tokenizer again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a JSON {type(values).__name__}, expected an object; fetch the tokenizer again")
    return values


class _Split:
    """Special tokens are cut out of the text first; the rest is encoded piece by piece."""

    def __init__(self, specials: dict[str, int]) -> None:
        self.specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        self._cuts = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if specials else re.compile("((?!))")

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        ids, starts, begin = [], [], 0
        for k, part in enumerate(self._cuts.split(text)):
            if k % 2:      # re.split puts what the group matched at odd places
                ids.append(self.specials[part])
                starts.append(begin)
            elif part:
                part_ids, part_starts = self._encode_plain(part)
                ids += part_ids
                starts += [begin + start for start in part_starts]
            begin += len(part)
        return ids, starts


class _Bytes(_Split):
    eos = "<eod>"

    def __init__(self, plain, spec: str) -> None:
        super().__init__({self.eos: plain.eod_id})
        self.vocab_size, self.variables = plain.vocab_size, {"eos_token": self.eos}

    def _encode_plain(self, text: str) -> tuple[list[int], list[int]]:
        starts = [k for k, character in enumerate(text) for _ in repeat(None, len(character.encode("utf-8")))]
        return list(text.encode("utf-8")), starts


class _SentencePiece(_Split):
    def __init__(self, plain, spec: str) -> None:
        processor = self._processor = plain._processor
        if not hasattr(processor, "encode_as_offset_mapping"):
            raise DataError(f"tokenizer {spec!r}: this sentencepiece cannot say where pieces begin; pip install -U sentencepiece")
        super().__init__({processor.id_to_piece(i): i for i in range(processor.vocab_size()) if processor.is_control(i)})
        self.vocab_size = plain.vocab_size
        numbers = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id(), "pad_token": processor.pad_id()}
        self.variables = {name: processor.id_to_piece(number) for name, number in numbers.items() if number >= 0}
        self.eos = self.variables.get("eos_token", "")

    def _encode_plain(self, text: str) -> tuple[list[int], list[int]]:
        mapping = self._processor.encode_as_offset_mapping(text)
        return list(mapping["ids"]), [begin for begin, _ in mapping["offsets"]]


class _Tiktoken:
    def __init__(self, plain, spec: str) -> None:
        self._encoding = plain._encoding
        self.vocab_size = plain.vocab_size
        self.specials = dict(self._encoding._special_tokens)
        self.eos = next((text for text, number in self.specials.items() if number == plain.eod_id), "")
        self.variables = {"eos_token": self.eos} if self.eos else {}

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        ids = self._encoding.encode(text, allowed_special="all")
        return ids, self._encoding.decode_with_offsets(ids)[1]


KINDS = {"hf": _HF, "bytes": _Bytes, "sentencepiece": _SentencePiece, "tiktoken": _Tiktoken}
