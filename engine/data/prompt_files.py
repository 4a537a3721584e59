"""Files of prompts to tokens and records on disk, made once and read by every rank.

    found = prompts(run, ["prompts.jsonl"])     # on every rank: rank 0 makes the cache, the others wait for it
    found.tokens, found.record(i)               # IndexedCorpus: prompt i is sequence i; the line it comes from

A line of a file (.jsonl, perhaps .gz) is an object with "prompt" (a text stands for one message of the user) or with messages as in
conversations.py, the last of them not the assistant's; all its other fields are kept for the rewards. Prompts are rendered by the chat
template, with what begins the assistant's turn. They may be train.seq_len - rollout.max_new_tokens tokens long; what is longer is treated
as chat.too_long says, and counted. Rendering, tokenizing and the cache are those of conversations.py. Left out: prompts without a
template, and drawing samples (prompts.py).
"""

from __future__ import annotations

import json
import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data_tools.tokenizer import load_tokenizer
from engine.config import ConfigError
from engine.data.chat import Template
from engine.data.conversations import (as_messages, build_once, cache_folder, conversation, digests, encoded_lines, has_specials, parsed,
                                       specials_pattern, tokenizer_digest)
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter, optimal_dtype
from engine.data.sandbox import Pool

VERSION = 1      # of what a cache folder holds; a new one makes every cache anew
READS_KEY = ("exact", "math", "code")      # kinds of rewards that compare with a field of the line, RewardPart.key
log = logging.getLogger(__name__)


@dataclass
class Report:
    """What became of the prompts of some files."""

    files: list[str] = field(default_factory=list)
    read: int = 0
    kept: int = 0
    tokens: int = 0
    """In what is kept."""
    too_long: int = 0
    """Longer than train.seq_len - rollout.max_new_tokens."""
    truncated: int = 0
    """Of those, cut and kept; the others were dropped."""
    special_tokens_in_text: int = 0
    """Lines whose messages themselves hold text that the tokenizer reads as a special token."""

    def __str__(self) -> str:
        return f"{self.read} prompts in {', '.join(self.files)}: {self.kept} kept, {self.tokens} tokens"


class Source:
    """An opened cache: sequence i of tokens is prompt i, record(i) its line."""

    def __init__(self, folder: Path) -> None:
        self.tokens = IndexedCorpus(folder / "tokens")
        self.report = Report(**json.loads((folder / "report.json").read_text()))
        self._folder, self._ends = folder, np.load(folder / "ends.npy")

    def __len__(self) -> int:
        return len(self._ends)

    def record(self, i: int) -> dict:
        return json.loads(self._lines[self._ends[i - 1] if i else 0:self._ends[i]])

    @cached_property
    def _lines(self) -> mmap.mmap:
        with open(self._folder / "records.jsonl", "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def prompts(run, paths: Sequence[str]) -> Source:
    """The cache of these files under data.cache_dir (empty: run.dir/index_cache), made first where it is missing.

    Called on every rank; rank 0 of the run makes it. Raises DataError, on every rank, for files, lines and templates that are amiss,
    ConfigError where no place is left for a prompt.
    """
    chat, limit = run.chat, longest_prompt(run)
    template = Template.load(chat.template, run.data.tokenizer)
    needed = needed_keys(run.rewards)
    key = {"class": "prompts", "version": VERSION, "files": digests(paths), "template": dict(template.sources), "needed": needed,
           "tokenizer": tokenizer_digest(run.data.tokenizer), "too_long": chat.too_long, "limit": limit}

    def build(folder: Path, beat: Callable[[], None]) -> None:
        report, ends = Report(files=[str(path) for path in paths]), []
        job = {"template": chat.template, "tokenizer": run.data.tokenizer, "needed": needed}
        writer = IndexedWriter(folder / "tokens", optimal_dtype(template.tokenizer.vocab_size))
        with writer, open(folder / "records.jsonl", "wb") as records:
            for where, value in encoded_lines(run, paths, "engine.data.prompt_files:Encoder", job, template.name):
                beat()
                ids = _fitted(value["ids"], where, run, report)
                report.special_tokens_in_text += value["has_specials"]
                if ids:
                    writer.add_document(np.array(ids))
                    records.write(value["line"].encode() + b"\n")
                    ends.append(records.tell())
            _refuse_nothing(report, run)
        np.save(folder / "ends.npy", np.array(ends, dtype=np.int64))
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=1))
        _tell(report, run)

    return Source(build_once(cache_folder(run, key), build, run.run.timeout_minutes))


def longest_prompt(run) -> int:
    """Tokens that a prompt may have. Raises ConfigError when there is place for none."""
    limit = run.train.seq_len - run.rollout.max_new_tokens
    if limit < 1:
        raise ConfigError([f"rollout.max_new_tokens({run.rollout.max_new_tokens}) leaves no place for a prompt in train.seq_len"
                           f"({run.train.seq_len}); raise train.seq_len or draw shorter answers"])
    return limit


def needed_keys(rewards: Sequence) -> dict[str, str]:
    """Field of a line -> the reward part that compares with it."""
    needed = {part.key: part.name or part.kind for part in rewards if part.kind in READS_KEY}
    return needed | {"reasoning_gym": part.name or part.kind for part in rewards if part.kind == "reasoning_gym"}


# --- one line of a file -----------------------------------------------------------------------------------------------


class Encoder:
    """The job of a worker: a line of a file -> {"ids", "line", "has_specials"}. Raises DataError."""

    def __init__(self, template: str, tokenizer: str, needed: dict[str, str]) -> None:
        self.template, self.needed = Template.load(template, tokenizer), needed
        self.specials = specials_pattern(self.template.tokenizer.specials)

    def __call__(self, line: str) -> dict:
        record = parsed(line)
        messages, tools = prompt_of(record)
        for key, name in self.needed.items():
            if record.get(key) is None:
                raise DataError(f"no {key!r} among the keys {', '.join(map(repr, record))}, but reward {name} needs it; add it, or name the field "
                                "in the part's key")
        return {"ids": self.template.prompt(messages, tools), "line": line, "has_specials": has_specials(messages, self.specials)}


def prompt_of(record: dict) -> tuple[list, list | None]:
    """(messages that end with what is to be answered, tools) of a record. Raises DataError."""
    if "prompt" in record:
        record = {"messages": as_messages(record["prompt"], "user"), "tools": record.get("tools")}
    elif not {"messages", "conversations"} & record.keys():
        raise DataError(f"no prompt among the keys {', '.join(map(repr, record)) or '(none)'}; expected prompt, messages or conversations")
    messages, tools = conversation(record)
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        raise DataError("the last message is the assistant's, so nothing is left to answer; take it out, and keep it in another field where a "
                        "reward compares with it")
    return messages, tools


# --- lengths ----------------------------------------------------------------------------------------------------------


def _fitted(ids: list[int], where: str, run, report: Report) -> list[int]:
    """At most longest_prompt tokens, none when the prompt is left out; counted in the report."""
    limit, policy = longest_prompt(run), run.chat.too_long
    report.read += 1
    if len(ids) > limit:
        report.too_long += 1
        room = f"train.seq_len({run.train.seq_len}) - rollout.max_new_tokens({run.rollout.max_new_tokens}) = {limit}"
        if policy == "refuse":
            raise DataError(f"{where}: a prompt of {len(ids)} tokens, but {room}; raise train.seq_len, draw shorter answers, or let chat.too_long "
                            "drop or truncate_left")
        if policy == "truncate_right":
            raise DataError(f"{where}: a prompt of {len(ids)} tokens, but {room}, and chat.too_long=truncate_right would cut off what begins the "
                            "answer; let it drop or truncate_left")
        report.truncated += policy == "truncate_left"
        ids = ids[-limit:] if policy == "truncate_left" else []
    report.kept += bool(ids)
    report.tokens += len(ids)
    return ids


def _refuse_nothing(report: Report, run) -> None:
    if report.kept == 0:
        raise DataError(f"{', '.join(report.files)}: nothing is left of {report.read} prompts: {report.too_long} exceed train.seq_len"
                        f"({run.train.seq_len}) - rollout.max_new_tokens({run.rollout.max_new_tokens}); raise train.seq_len, set "
                        "chat.too_long=truncate_left, or give other data")


def _tell(report: Report, run) -> None:
    log.info(str(report))
    if report.too_long:
        log.warning(f"{report.too_long} of {report.read} prompts exceed train.seq_len({run.train.seq_len}) - rollout.max_new_tokens"
                    f"({run.rollout.max_new_tokens}); chat.too_long={run.chat.too_long}: {report.too_long - report.truncated} dropped, "
                    f"{report.truncated} truncated")
    if report.special_tokens_in_text:
        log.warning(f"{report.special_tokens_in_text} lines hold text of special tokens, such as an end of turn, in their messages; it became "
                    "those tokens")


# --- where answers end ------------------------------------------------------------------------------------------------


class EndOfTurn:
    """The job of a worker: what an assistant says -> ids of the first special token that the template writes behind it, if any."""

    def __init__(self, template: str, tokenizer: str) -> None:
        self.template = Template.load(template, tokenizer)

    def __call__(self, said: str) -> list[int]:
        template, messages = self.template, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        text = template._render(template._compiled(template._kind(None)), messages, None)
        pattern = specials_pattern(template.tokenizer.specials)
        found = pattern and pattern.search(text[text.rfind(said) + len(said):])
        return [template.tokenizer.specials[found.group()]] if found and said in text else []


def stop_tokens(run) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end of document, and what the chat template ends the assistant's turn with.

    Called on every rank; rank 0 of the run asks the template. Raises DataError for a template that fails, or when there are none.
    """
    chat, spec = run.chat, run.data.tokenizer
    template = Template.load(chat.template, spec)
    key = {"class": "stop_tokens", "version": VERSION, "template": dict(template.sources), "tokenizer": tokenizer_digest(spec)}

    def build(folder: Path, _: Callable[[], None]) -> None:
        job = {"template": chat.template, "tokenizer": spec}
        with Pool("engine.data.prompt_files:EndOfTurn", job, 1, chat.template_seconds, chat.template_mib, template.name) as pool:
            (answer,), = pool.map([["Hello"]])
        if answer.error:
            raise DataError(answer.error)
        (folder / "ids.json").write_text(json.dumps(answer.value))

    folder = build_once(cache_folder(run, key), build, run.run.timeout_minutes)
    end_of_document = load_tokenizer(spec).eod_id
    found = {*json.loads((folder / "ids.json").read_text()), *([] if end_of_document is None else [end_of_document])}
    if not found:
        raise DataError(f"{spec} names no end of document and {template.name} ends turns with no special token, so no answer would end by itself; "
                        "set eos_token in its tokenizer_config.json")
    return tuple(sorted(found))


def decoder(run) -> Callable[[Sequence[int]], str]:
    """Token ids -> their text, special tokens included."""
    return load_tokenizer(run.data.tokenizer).decode
