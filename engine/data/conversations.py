"""Files of conversations to tokens and masks on disk, made once and read by every rank.

    found = conversations(run, ["chat.jsonl"])      # on every rank: rank 0 makes the cache, the others wait for it
    found.tokens, found.masks                       # IndexedCorpus: conversation i is sequence i of both; masks are 0 or 1
    found.report                                    # counts, as in report.json of the cache folder

A line of a file (.jsonl, perhaps .gz) is an object of one of three forms:
    {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}], "system": "..."}
    {"prompt": "...", "completion": "..."}          also "response"; either may be a list of messages
Rendering and tokenizing run in workers with limits (sandbox.py). The first conversation that cannot be used stops everything and is named
by file and line; what is too long is treated as chat.too_long says, and counted. The cache is keyed by the content of the files, the
template, the tokenizer and the options, and holds at most train.seq_len + 1 tokens of a conversation.
Left out: other formats than JSON lines, and mixing (pack.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from data_tools.reader import Chunk, read_chunks
from engine.config import ConfigError
from engine.data.chat import Template, extended_tokenizer
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter, optimal_dtype
from engine.data.offsets import load_offsets
from engine.data.sandbox import MAX_WORKERS, Pool, WorkerDied

VERSION = 1      # of what a cache folder holds; a new one makes every cache anew
LINES_PER_CHUNK = 128
HEARTBEAT_SECONDS = 5.0
OLD_FAILURE_SECONDS = 10.0      # rank 0 removes the failure of an earlier run as it begins, which may be later than here
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "chatgpt": "assistant",
            "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant"}
log = logging.getLogger(__name__)


@dataclass
class Report:
    """What became of the conversations of some files."""

    files: list[str] = field(default_factory=list)
    conversations: int = 0
    """Read."""
    kept: int = 0
    """Written to the cache."""
    tokens: int = 0
    """In what is kept."""
    trained_tokens: int = 0
    """Of those, the ones that count in the loss."""
    too_long: int = 0
    """Longer than train.seq_len."""
    dropped: int = 0
    """Of those, left out by chat.too_long=drop."""
    truncated: int = 0
    """Of those, cut and kept."""
    truncated_to_nothing: int = 0
    """Of those, left out because what remained had nothing to learn."""
    untrained: int = 0
    """Left out because every turn of the assistant is switched off."""
    special_tokens_in_text: int = 0
    """Whose messages themselves hold text that the tokenizer reads as a special token."""
    cut_turns: int = 0
    """Turns whose first word hangs on a token that begins in the header, and so is not trained."""

    def __str__(self) -> str:
        return (f"{self.conversations} conversations in {', '.join(self.files)}: {self.kept} kept, {self.tokens} tokens, "
                f"{self.trained_tokens} of them trained")


@dataclass(frozen=True)
class Conversations:
    """An opened cache; sequence i of tokens and of masks (uint8) is conversation i."""

    tokens: IndexedCorpus
    masks: IndexedCorpus
    report: Report


def conversations(run, paths: Sequence[str]) -> Conversations:
    """The cache of these files under data.cache_dir (empty: run.dir/index_cache), made first where it is missing.

    Called on every rank; rank 0 of the run makes it. Raises DataError, on every rank, for files, conversations and templates that are amiss.
    """
    chat, seq_len = run.chat, run.train.seq_len
    template = Template.load(chat.template, run.data.tokenizer)
    key = {"class": "conversations", "version": VERSION, "files": digests(paths), "template": dict(template.sources),
           "tokenizer": tokenizer_digest(run.data.tokenizer), "train_on": chat.train_on, "too_long": chat.too_long, "seq_len": seq_len}

    def build(folder: Path, beat: Callable[[], None]) -> None:
        report = Report(files=[str(path) for path in paths])
        job = {"template": chat.template, "tokenizer": run.data.tokenizer, "train_on": chat.train_on}
        writers = IndexedWriter(folder / "tokens", optimal_dtype(template.tokenizer.vocab_size)), IndexedWriter(folder / "masks", np.uint8)
        with writers[0], writers[1]:
            for where, value in encoded_lines(run, paths, "engine.data.conversations:Encoder", job, template.name):
                beat()
                ids, mask = _fitted(value, where, seq_len, chat.too_long, report)
                if ids:
                    writers[0].add_document(np.array(ids))
                    writers[1].add_document(np.array(mask, dtype=np.uint8))
            _refuse_nothing(report, seq_len)
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=1))
        _tell(report, chat.too_long)

    folder = build_once(cache_folder(run, key), build, run.run.timeout_minutes)
    report = Report(**json.loads((folder / "report.json").read_text()))
    return Conversations(IndexedCorpus(folder / "tokens"), IndexedCorpus(folder / "masks"), report)


def configured(run):
    """What every stage that reads conversations needs of a run: a tokenizer with chat.add_tokens, written to run.dir/tokenizer, a
    vocabulary that holds it, and a data position and schedule that begin afresh. Raises ConfigError."""
    if not run.data.tokenizer:
        raise ConfigError([f"stage={run.stage} turns conversations into tokens, but data.tokenizer is empty; name the model's tokenizer"])
    if run.data.split:
        raise ConfigError([f"stage={run.stage}: data.split={run.data.split!r} cuts plain text; name the validation files in data.valid"])
    spec = extended_tokenizer(run.data.tokenizer, run.chat.add_tokens, Path(run.run.dir) / "tokenizer") if run.chat.add_tokens else run.data.tokenizer
    size = load_offsets(spec).vocab_size
    changes = {"data": run.data.model_copy(update={"tokenizer": spec}), "checkpoint": run.checkpoint.model_copy(update={"load_position": False})}
    if size > run.model.vocab_size:
        log.info(f"model.vocab_size raised from {run.model.vocab_size} to the tokenizer's {size}")
        changes["model"] = run.model.model_copy(update={"vocab_size": size})
    return run.model_copy(update=changes)


# --- one line of a file -----------------------------------------------------------------------------------------------


class Encoder:
    """The job of a worker: a line of a file -> {"ids", "mask", "num_cut", "has_specials"}. Raises DataError (ValueError for what is no JSON)."""

    def __init__(self, template: str, tokenizer: str, train_on: str) -> None:
        self.template, self.train_on = Template.load(template, tokenizer), train_on
        self.specials = specials_pattern(self.template.tokenizer.specials)

    def __call__(self, line: str) -> dict:
        messages, tools = conversation(parsed(line))
        encoded = self.template.encode(messages, tools, self.train_on)
        return {"ids": encoded.ids, "mask": [int(trained) for trained in encoded.mask], "num_cut": encoded.num_cut,
                "has_specials": has_specials(messages, self.specials)}


def parsed(line: str) -> dict:
    """The object of a line. Raises DataError."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise DataError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(record, dict):
        raise DataError(f"a JSON {type(record).__name__}, expected an object with messages")
    return record


def conversation(record: dict) -> tuple[list, list | None]:
    """(messages, tools) of a record in any of the three forms. Raises DataError."""
    tools = record.get("tools") or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise DataError("tools is a string that holds no JSON; write a list of function descriptions") from None
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"tools is a {type(tools).__name__}, expected a list of function descriptions")
    for answer in ("completion", "response"):
        if "prompt" in record and answer in record:
            return [*as_messages(record["prompt"], "user"), *as_messages(record[answer], "assistant")], tools
    if "messages" in record:
        return record["messages"], tools
    if "conversations" in record:
        first = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        return first + _shared(record["conversations"]), tools
    raise DataError(f"no conversation among the keys {', '.join(map(repr, record)) or '(none)'}; expected messages, conversations, or prompt with "
                    "completion or response")


def as_messages(value, role: str) -> list:
    """A string as one message of this role; a list of messages as it is."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value if isinstance(value, list) else [value]


def _shared(turns) -> list[dict]:
    """ShareGPT's turns as messages."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("conversations is not a list of objects with from and value")
    if all("role" in turn for turn in turns):
        return turns
    messages = []
    for number, turn in enumerate(turns, start=1):
        speaker = turn.get("from")
        if speaker not in SPEAKERS:
            raise DataError(f"message {number} is from {speaker!r}, expected one of {', '.join(SPEAKERS)}")
        rest = {key: turn[key] for key in ("weight", "train") if key in turn}
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _shared_calls(turn.get("value"), number), **rest})
        else:
            messages.append({"role": SPEAKERS[speaker], "content": turn.get("value"), **rest})
    return messages


def _shared_calls(value, number: int) -> list:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        raise DataError(f"message {number} is a function_call whose value is not JSON: {value[:80]!r}") from None
    return calls if isinstance(calls, list) else [calls]


def specials_pattern(specials) -> re.Pattern | None:
    """What finds any special token in a text; None when there is none to find."""
    return re.compile("|".join(map(re.escape, specials))) if specials else None


def has_specials(messages: list, pattern: re.Pattern | None) -> bool:
    """Does the text of a message hold what the tokenizer reads as a special token?"""
    return pattern is not None and any(pattern.search(str(message.get("content") or "")) for message in messages)


def _fitted(value: dict, where: str, seq_len: int, policy: str, report: Report) -> tuple[list[int], list[int]]:
    """(ids, mask) of at most seq_len + 1 tokens, empty when there is nothing to learn from it; counted in the report."""
    ids, mask = value["ids"], value["mask"]
    report.conversations += 1
    report.special_tokens_in_text += value["has_specials"]
    report.cut_turns += value["num_cut"]
    if not any(mask[1:]):      # the first token follows nothing
        report.untrained += 1
        return [], []
    if len(ids) > seq_len + 1:
        report.too_long += 1
        if policy == "refuse":
            raise DataError(f"{where}: {len(ids)} tokens, but train.seq_len({seq_len}) holds {seq_len + 1}; raise it, or let chat.too_long drop "
                            "or truncate")
        kept = {"drop": slice(0, 0), "truncate_right": slice(0, seq_len + 1), "truncate_left": slice(len(ids) - seq_len - 1, None)}[policy]
        ids, mask = ids[kept], mask[kept]
        name = "dropped" if policy == "drop" else "truncated" if any(mask[1:]) else "truncated_to_nothing"
        setattr(report, name, getattr(report, name) + 1)
        if name != "truncated":
            return [], []
    report.kept += 1
    report.tokens += len(ids)
    report.trained_tokens += sum(mask[1:])
    return ids, mask


def _refuse_nothing(report: Report, seq_len: int) -> None:
    if report.kept == 0:
        raise DataError(f"{', '.join(report.files)}: nothing is left of {report.conversations} conversations: {report.too_long} exceed "
                        f"train.seq_len({seq_len}), {report.untrained} have every turn of the assistant switched off; raise train.seq_len, set "
                        "chat.too_long=truncate_left, or give other data")


def _tell(report: Report, policy: str) -> None:
    log.info(str(report))
    if report.too_long:
        log.warning(f"{report.too_long} of {report.conversations} conversations exceed train.seq_len; chat.too_long={policy}: "
                    f"{report.dropped} dropped, {report.truncated} truncated, "
                    f"{report.truncated_to_nothing} left out because nothing to learn remained")
    if report.untrained:
        log.warning(f"{report.untrained} of {report.conversations} conversations left out: every turn of the assistant is switched off")
    if report.special_tokens_in_text:
        log.warning(f"{report.special_tokens_in_text} of {report.conversations} conversations hold text of special tokens, such as an end of turn, "
                    "in their messages; it became those tokens")
    if report.cut_turns:
        log.warning(f"{report.cut_turns} turns begin with a token that begins in the header before them, so their first word is not trained; end the "
                    "header of chat.template with a line break or a special token")


# --- many lines, in workers -------------------------------------------------------------------------------------------


def encoded_lines(run, paths: Sequence[str], job: str, arguments: dict, what: str) -> Iterator[tuple[str, object]]:
    """("FILE:LINE", what the job makes of that line) for every line of the files, in order; what: the template's name, for errors.

    Raises DataError at the first line that the job refuses, naming it, and when a worker is stopped.
    """
    chat, sent = run.chat, deque()
    paths = [str(path) for path in paths]

    def chunks() -> Iterator[list[str]]:
        for chunk in _small_chunks(paths):
            sent.append(chunk)
            yield [_line(chunk, k) for k in range(len(chunk.lines))]

    size = sum(_size(path) for path in paths)
    workers = min(chat.workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS), 1 + size // (1 << 20))      # starting one takes half a second
    with Pool(job, arguments, workers, chat.template_seconds, chat.template_mib, what) as pool:
        answers_of_chunks = pool.map(chunks())
        while True:
            try:
                answers = next(answers_of_chunks, None)
            except WorkerDied as error:
                raise DataError(f"{sent[0].path}:{sent[0].line_numbers[error.item]}: {error}") from None
            if answers is None:
                return
            chunk = sent.popleft()
            for number, answer in zip(chunk.line_numbers, answers):
                where = f"{chunk.path}:{number}"
                if answer.error:
                    raise DataError(f"{where}: {answer.error}")
                yield where, answer.value


def _small_chunks(paths: Sequence[str]) -> Iterator[Chunk]:
    for chunk in read_chunks(paths, "jsonl"):
        for k in range(0, len(chunk.lines), LINES_PER_CHUNK):
            part = slice(k, k + LINES_PER_CHUNK)
            yield Chunk(chunk.path, True, chunk.line_numbers[part], chunk.lines[part])


def _line(chunk: Chunk, k: int) -> str:
    try:
        return chunk.lines[k].rstrip().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{chunk.path}:{chunk.line_numbers[k]}: not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}") from None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; data.train and data.valid name files of conversations here (.jsonl)") from None


# --- made once --------------------------------------------------------------------------------------------------------


def cache_folder(run, key: dict) -> Path:
    """Where the cache of this key lies."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Path(run.data.cache_dir or Path(run.run.dir) / "index_cache") / f"{digest}-{key['class']}"


def digests(paths: Sequence[str]) -> list[str]:
    """A digest of the content of each file. Raises DataError for what cannot be read."""
    found = []
    for path in paths:
        _size(str(path))
        with open(path, "rb") as file:
            found.append(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest())
    return found


def tokenizer_digest(spec: str) -> list[str]:
    """A digest of every file that decides what the tokenizer does."""
    kind, _, name = spec.partition(":")
    path = Path(name)
    if kind == "bytes":
        return ["bytes"]
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = [path / n for n in names if (path / n).is_file()] if path.is_dir() else [path]
    return [kind, *digests([str(file) for file in files])]


def build_once(folder: Path, build: Callable[[Path, Callable[[], None]], None], timeout_minutes: float) -> Path:
    """`folder`, made by rank 0 while the others wait; it appears under its name only when complete.

    build(partial, beat) fills an empty folder and calls beat() as it goes. Ranks are told by RANK of the environment and share a file
    system; nothing is communicated otherwise. Raises DataError: what build raises, on every rank; on the others also when rank 0 has
    shown no sign of life for timeout_minutes.
    """
    sign, failure = folder.with_name(f"{folder.name}.building"), folder.with_name(f"{folder.name}.failed")
    if folder.is_dir():
        return folder
    if int(os.environ.get("RANK", "0")) != 0:
        return _wait_for(folder, sign, failure, timeout_minutes)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        failure.unlink(missing_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial-"))
    except OSError as error:
        raise DataError(f"cannot write the cache in {folder.parent}: {error.strerror}; choose a writable data.cache_dir") from None
    try:
        build(partial, _heart(sign))
        os.chmod(partial, 0o755)      # mkdtemp gives 0700, and the cache is shared
        with contextlib.suppress(OSError):      # another run was first with the same content
            partial.rename(folder)
    except DataError as error:
        _replace(failure, str(error))
        raise
    except OSError as error:
        raise DataError(f"cannot write the cache in {folder.parent}: {error.strerror}; make room, or choose another data.cache_dir") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        sign.unlink(missing_ok=True)
    return folder


def _replace(path: Path, text: str) -> None:
    """Write a small file that no reader sees by half."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _heart(sign: Path) -> Callable[[], None]:
    """A function that writes to `sign` now and then: clocks of nodes differ, so waiting ranks look for change, not for age."""
    last, beats = -HEARTBEAT_SECONDS, 0

    def beat() -> None:
        nonlocal last, beats
        if time.monotonic() - last >= HEARTBEAT_SECONDS:
            last, beats = time.monotonic(), beats + 1
            sign.write_text(str(beats))

    beat()
    return beat


def _wait_for(folder: Path, sign: Path, failure: Path, timeout_minutes: float) -> Path:
    old, seen, pause = _last_write(failure), "", 0.02
    begin = since = time.monotonic()
    while not folder.is_dir():
        failed = _last_write(failure)
        if failed and (failed != old or time.monotonic() - begin > OLD_FAILURE_SECONDS):
            raise DataError(failure.read_text())
        with contextlib.suppress(OSError):
            seen, since = (text, time.monotonic()) if (text := sign.read_text()) != seen else (seen, since)
        if time.monotonic() - since > 60 * timeout_minutes:
            raise DataError(f"waited {timeout_minutes:g} minutes for rank 0 to make {folder}; where nodes do not share a file system, make the cache "
                            "on each of them first (a run on one rank) or set data.cache_dir to a shared folder")
        time.sleep(pause)
        pause = min(1.5 * pause, 1.0)
    return folder


def _last_write(path: Path) -> int:
    """When a file was written, in ns; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
