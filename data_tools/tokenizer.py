"""One small interface over four kinds of tokenizer, chosen by a string.

  hf:DIR-or-tokenizer.json   a Hugging Face fast tokenizer (the `tokenizers` library; transformers is not imported)
  sentencepiece:FILE         a SentencePiece model
  tiktoken:FILE              a tiktoken rank file; the pattern and the EOD id follow from the number of ranks
  bytes                      UTF-8 bytes as ids 0-255, EOD 256; needs no file

Text goes in, plain lists of ids come out, or, for whole corpora, arrays (encode_rows). No begin or end tokens are added: the
caller appends eod_id where it wants it.
Left out: chat templates, tokenizers that need Python code from a model folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Protocol

import numpy as np

from data_tools.cli import UsageError
from engine.data.indexed import DataError

SPECS = "hf:DIR-or-tokenizer.json | sentencepiece:FILE | tiktoken:FILE | bytes"


class Tokenizer(Protocol):
    """vocab_size: one more than the greatest id. eod_id: the end-of-document id, None when the tokenizer names none.

    byte_lengths: int64 [vocab_size], the bytes of text that each id stands for, where a text is its tokens' bytes laid end to end;
    None for tokenizers that change a text before they cut it.
    """

    vocab_size: int
    eod_id: int | None
    byte_lengths: np.ndarray | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_rows(self, texts: list[str]) -> list[Sequence[int] | np.ndarray]:
        """encode_batch in whatever sequences of integers cost least."""

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and the character at which each begins."""

    def decode(self, ids: Sequence[int]) -> str: ...


def files_of(spec: str) -> list[Path]:
    """The files that decide what a tokenizer does."""
    path = Path(spec.partition(":")[2])
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    return [file for file in ([path / name for name in names] if path.is_dir() else [path]) if file.is_file()]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer a spec names. Raises UsageError for an unknown kind, DataError for a file that is missing or of another kind."""
    kind, _, path = spec.partition(":")
    if kind == "bytes" and not path:
        return ByteTokenizer()
    loaders = {"hf": HFTokenizer, "sentencepiece": SentencePieceTokenizer, "tiktoken": TiktokenTokenizer}
    if kind not in loaders or not path:
        raise UsageError(f"tokenizer {spec!r} is not one of {SPECS}")
    if not Path(path).exists():
        raise DataError(f"tokenizer {spec!r}: {path} does not exist; check the path")
    return loaders[kind](path)


def starts_from_bytes(text: str, byte_lengths: np.ndarray) -> np.ndarray:
    """int64 [tokens]: the character in which each token begins, from the bytes of each token; they sum to the text's bytes."""
    starts = np.cumsum(byte_lengths) - byte_lengths
    if text.isascii():
        return starts
    is_first_byte = (np.frombuffer(text.encode("utf-8"), dtype=np.uint8) & 0xC0) != 0x80
    return np.cumsum(is_first_byte)[starts] - 1


def decode_marked(tokenizer: Tokenizer, ids: Sequence[int], marks: Mapping[int, str]) -> str:
    """The text of ids, some of which stand for marks that the tokenizer may not know, such as those of data.fim: their names are shown.

    Raises DataError for other ids that it does not know.
    """
    unknown = {i: name for i, name in marks.items() if i >= tokenizer.vocab_size}
    greatest = max((i for i in ids if i not in unknown), default=-1)
    if greatest >= tokenizer.vocab_size:
        raise DataError(f"id {greatest} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}; the corpus was written with another tokenizer")
    return "".join(name * len(run) if name else tokenizer.decode(run) for name, run in ((n, list(r)) for n, r in groupby(ids, unknown.get)))


def fim_marks(run) -> dict[int, str]:
    """id -> name of the marks that a run's data.fim puts into its text."""
    fim = run.data.fim
    return {fim.prefix_id: "<prefix>", fim.middle_id: "<middle>", fim.suffix_id: "<suffix>"} if fim.rate else {}


class ByteTokenizer:
    """UTF-8 bytes; decoding replaces what is no UTF-8."""

    vocab_size = 257
    eod_id = 256
    byte_lengths = np.ones(257, dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_rows(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        return self.encode(text), starts_from_bytes(text, np.ones(len(text.encode("utf-8")), dtype=np.int64)).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(b"<eod>" if i == self.eod_id else bytes([i]) for i in ids).decode("utf-8", errors="replace")


class HFTokenizer:
    """A tokenizer.json, alone or in a folder whose tokenizer_config.json names the end token."""

    # Without a config: the end-of-document tokens of families in use, most specific first.
    END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<eos>", "</s>")

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise DataError(f"tokenizer hf:{path}: the folder has no tokenizer.json; for a SentencePiece model use sentencepiece:FILE")
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer hf:{path}: {file} is no tokenizer.json ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eod_id = self._find_eod(file.parent)

    @cached_property
    def byte_lengths(self) -> np.ndarray | None:
        """Byte-level BPE writes each byte as one character of a token. Added tokens stand for themselves."""
        settings = json.loads(self._tokenizer.to_str())
        stages = [settings[stage] or {} for stage in ("pre_tokenizer", "decoder")]
        stages = [step for stage in stages for step in stage.get("pretokenizers", stage.get("decoders", [stage]))]
        byte_levels = [step for step in stages if step.get("type") == "ByteLevel"]
        if self._has_normalizer or len(byte_levels) != 2 or any(step.get("type") not in ("ByteLevel", "Split", "Digits") for step in stages):
            return None
        if byte_levels[0].get("add_prefix_space") or settings["model"]["type"] != "BPE":
            return None
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[i] = len(token)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = len(token.content.encode("utf-8"))
        return lengths

    def _find_eod(self, folder: Path) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (folder / name).exists():
                token = _config(folder / name).get("eos_token")
                token = token.get("content") if isinstance(token, dict) else token
                if token is not None and self._tokenizer.token_to_id(token) is not None:
                    return self._tokenizer.token_to_id(token)
        found = [self._tokenizer.token_to_id(token) for token in self.END_TOKENS]
        return next((token for token in found if token is not None), None)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    encode_rows = encode_batch

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]

    @property
    def _has_normalizer(self) -> bool:
        return str(self._tokenizer.normalizer) not in ("None", "Sequence(normalizers=[])")

    @property
    def names_follow_normalizer(self) -> bool:
        """Whether the names of added tokens are found in a text only after it was normalised."""
        return self._has_normalizer and any(token.normalized for token in self._tokenizer.get_added_tokens_decoder().values())

    def added_tokens(self) -> list[str]:
        """Names, such as that of the end token, which are cut out of a text before anything else."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _config(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); fetch the tokenizer again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds a JSON {type(values).__name__}, expected an object; fetch the tokenizer again")
    return values


class SentencePieceTokenizer:
    """A SentencePiece model; the EOD is its eos piece."""

    byte_lengths = None

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError) as error:
            raise DataError(f"tokenizer sentencepiece:{path}: not a SentencePiece model ({error})") from None
        self.vocab_size = self._processor.vocab_size()
        self.eod_id = self._processor.eos_id() if self._processor.eos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    @cached_property
    def _num_prefix_ids(self) -> int | None:
        """Ids before that of the line break in the ids of a lone one, where cutting texts there changes no id; None elsewhere.

        Nothing merges across a line break when no piece holds one, it is written as a byte, and normalisation neither turns it into
        anything nor looks across it.
        """
        try:
            from sentencepiece.sentencepiece_model_pb2 import ModelProto
        except ImportError:  # it needs protobuf
            return None
        model = ModelProto.FromString(self._processor.serialized_model_proto())
        is_bpe, normalizer = model.trainer_spec.model_type == model.trainer_spec.BPE, model.normalizer_spec
        if not is_bpe or normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or model.trainer_spec.treat_whitespace_as_suffix:
            return None
        alone = self.encode("\n")
        if any("\n" in piece.piece for piece in model.pieces) or not self._processor.is_byte(alone[-1]):
            return None
        return len(alone) - 1

    def encode_rows(self, texts: list[str]) -> list[np.ndarray]:
        if self._num_prefix_ids is None:
            return self._processor.encode(texts, return_type="numpy", num_threads=1)
        # The library's time grows faster than a text's length: cut at line breaks it takes two thirds.
        parts = [_cut_at_lines(text) for text in texts]
        rows = iter(self._processor.encode(list(chain.from_iterable(parts)), return_type="numpy", num_threads=1))
        return [np.concatenate([next(rows), *(next(rows)[self._num_prefix_ids :] for _ in own[1:])]) for own in parts]

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        mapping = self._processor.encode_as_offset_mapping(text)
        return list(mapping["ids"]), [begin for begin, _ in mapping["offsets"]]

    @property
    def has_unused_pieces(self) -> bool:
        """Whether the model was told to leave pieces out."""
        return any(map(self._processor.is_unused, range(self.vocab_size)))

    def odd_pieces(self) -> list[str]:
        """Pieces that no text turns into: unknown, control and the names of bytes."""
        model = self._processor
        odd = (model.is_unknown, model.is_control, model.is_byte)
        return [model.id_to_piece(i) for i in range(self.vocab_size) if any(test(i) for test in odd)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))


def _cut_at_lines(text: str, min_characters: int = 300) -> list[str]:
    """Parts of a text, all but the first of which begin with a line break."""
    parts, begin = [], 0
    while (end := text.find("\n", begin + min_characters)) >= 0:
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


# Split patterns as published with each vocabulary: a rank file does not carry its own.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
LLAMA3_PATTERN = _WORDS + r"\s*[\r\n]+|\s+(?!\S)|\s+"
CL100K_PATTERN = _WORDS + r"\s++$|\s*[\r\n]+|\s+(?!\S)|\s+"  # tiktoken since 0.7 keeps trailing white space together
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# number of ranks: (pattern, EOD token, its id, vocabulary size with all special tokens)
TIKTOKEN_FAMILIES = {
    50256: (GPT2_PATTERN, "<|endoftext|>", 50256, 50257),  # gpt2, r50k_base
    50280: (GPT2_PATTERN, "<|endoftext|>", 50256, 50281),  # p50k_base
    100256: (CL100K_PATTERN, "<|endoftext|>", 100257, 100277),  # cl100k_base
    199998: (O200K_PATTERN, "<|endoftext|>", 199999, 200019),  # o200k_base
    128000: (LLAMA3_PATTERN, "<|end_of_text|>", 128001, 128256),  # Llama 3
}


class TiktokenTokenizer:
    """A rank file of a known family; any other number of ranks takes cl100k's pattern and the next free id as EOD."""

    def __init__(self, path: str) -> None:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        try:
            ranks = load_tiktoken_bpe(path)
        except (ValueError, OSError) as error:
            raise DataError(f"tokenizer tiktoken:{path}: not a rank file, which has a base64 token and a rank per line ({error})") from None
        if not ranks:
            raise DataError(f"tokenizer tiktoken:{path}: the rank file is empty; fetch it again")
        following = max(ranks.values()) + 1
        default = (CL100K_PATTERN, "<|endoftext|>", following, following + 1)
        pattern, token, self.eod_id, self.vocab_size = TIKTOKEN_FAMILIES.get(len(ranks), default)
        self.pattern = pattern
        self.byte_lengths = np.zeros(self.vocab_size, dtype=np.int64)
        self.byte_lengths[list(ranks.values())] = list(map(len, ranks))
        self._encoding = tiktoken.Encoding(Path(path).name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={token: self.eod_id})

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def encode_rows(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encoding.encode_to_numpy(text, disallowed_special=(), allowed_special=set()) for text in texts]

    def encode_starts(self, text: str) -> tuple[list[int], list[int]]:
        ids = self.encode(text)
        return ids, starts_from_bytes(text, self.byte_lengths[ids]).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self._encoding.decode(list(ids), errors="replace")
