"""Files of preferences to tokens and masks on disk: pairs of answers to one prompt, or single answers with a label.

    found = preferences(run, ["pairs.jsonl"], paired=True)     # on every rank: rank 0 makes the cache, the others wait for it
    found.tokens, found.masks                                  # IndexedCorpus: pair i is sequences 2i (chosen) and 2i + 1 (rejected)

A line of a file (.jsonl, perhaps .gz) is an object of one of these forms; a text stands for one message of the user or the assistant:
    {"prompt": "..." or messages, "chosen": "..." or messages, "rejected": "..." or messages, "margin": 1.5}
    {"chosen": messages, "rejected": messages}                 what both begin with is the prompt
    {"prompt": "..." or messages, "completion": "..." or messages, "label": true}       for kto, which also takes pairs as two answers
`chosen_score` and `rejected_score` (or `score_chosen`, `score_rejected`) annotate rewards; `tools` is as in conversations.
Only what the assistant says after the prompt counts in the loss, and a row ends with the last token that counts, which is the one that
ends the turn: there a reward is read, as it would be where a sampled answer stops. What is too long is treated as chat.too_long says, both
answers of a pair alike, and counted. Rendering, tokenizing and the cache are those of conversations.py.
Left out: more than two answers to a prompt, and drawing samples (pairs.py).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from engine.data.chat import Template
from engine.data.conversations import (as_messages, build_once, cache_folder, conversation, digests, encoded_lines, has_specials, parsed,
                                       specials_pattern, tokenizer_digest)
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter, optimal_dtype

VERSION = 1      # of what a cache folder holds; a new one makes every cache anew
SCORES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))
log = logging.getLogger(__name__)


@dataclass
class Report:
    """What became of the pairs (kto: the answers) of some files."""

    files: list[str] = field(default_factory=list)
    what: str = "pairs"
    """pairs or answers: what the numbers below count."""
    read: int = 0
    kept: int = 0
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
    """Of those, left out because cutting would leave no prompt, no answer, or two equal ones."""
    special_tokens_in_text: int = 0
    """Lines whose messages themselves hold text that the tokenizer reads as a special token."""

    def __str__(self) -> str:
        return (f"{self.read} {self.what} in {', '.join(self.files)}: {self.kept} kept, {self.tokens} tokens, {self.trained_tokens} of them "
                "in the loss")


@dataclass(frozen=True)
class Preferences:
    """An opened cache. Rows: sequence i of tokens and masks (uint8); a pair is two neighbouring rows, chosen first."""

    folder: Path
    tokens: IndexedCorpus
    masks: IndexedCorpus
    prompts: np.ndarray
    """int32 [rows]: tokens before the first that counts."""
    margins: np.ndarray
    """float32 [pairs, 2]: `margin`, and score of chosen minus rejected; NaN where a line says neither. Empty when not paired."""
    is_desirable: np.ndarray
    """bool [rows]: the label; of a pair, the chosen one."""
    report: Report


def preferences(run, paths: Sequence[str], paired: bool = True) -> Preferences:
    """The cache of these files under data.cache_dir (empty: run.dir/index_cache), made first where it is missing.

    Called on every rank; rank 0 of the run makes it. Raises DataError, on every rank, for files, lines and templates that are amiss.
    """
    chat, seq_len = run.chat, run.train.seq_len
    template = Template.load(chat.template, run.data.tokenizer)
    key = {"class": "preferences", "version": VERSION, "files": digests(paths), "template": dict(template.sources), "paired": paired,
           "tokenizer": tokenizer_digest(run.data.tokenizer), "train_on": chat.train_on, "too_long": chat.too_long, "seq_len": seq_len}

    def build(folder: Path, beat: Callable[[], None]) -> None:
        report = Report(files=[str(path) for path in paths], what="pairs" if paired else "answers")
        job = {"template": chat.template, "tokenizer": run.data.tokenizer, "train_on": chat.train_on, "paired": paired}
        columns = {"prompts": [], "margins": [], "is_desirable": []}
        writers = IndexedWriter(folder / "tokens", optimal_dtype(template.tokenizer.vocab_size)), IndexedWriter(folder / "masks", np.uint8)
        with writers[0], writers[1]:
            for where, value in encoded_lines(run, paths, "engine.data.preference:Encoder", job, template.name):
                beat()
                report.special_tokens_in_text += value["has_specials"]
                for rows in [value["rows"]] if paired else [[row] for row in value["rows"]]:
                    rows = _fitted(rows, where, seq_len, chat.too_long, report)
                    for row in rows:
                        writers[0].add_document(np.array(row["ids"]))
                        writers[1].add_document(np.array(row["mask"], dtype=np.uint8))
                        columns["prompts"].append(row["mask"].index(1))
                        columns["is_desirable"].append(row["label"])
                    columns["margins"] += [value["margins"]] if rows and paired else []
            _refuse_nothing(report, seq_len)
        np.save(folder / "prompts.npy", np.array(columns["prompts"], dtype=np.int32))
        np.save(folder / "is_desirable.npy", np.array(columns["is_desirable"], dtype=bool))
        np.save(folder / "margins.npy", np.array(columns["margins"], dtype=np.float32).reshape(-1, 2))      # None becomes NaN
        (folder / "report.json").write_text(json.dumps(asdict(report), indent=1))
        _tell(report, chat.too_long)

    folder = build_once(cache_folder(run, key), build, run.run.timeout_minutes)
    report = Report(**json.loads((folder / "report.json").read_text()))
    columns = {name: np.load(folder / f"{name}.npy") for name in ("prompts", "margins", "is_desirable")}
    return Preferences(folder, IndexedCorpus(folder / "tokens"), IndexedCorpus(folder / "masks"), report=report, **columns)


# --- one line of a file -----------------------------------------------------------------------------------------------


class Encoder:
    """The job of a worker: a line of a file -> {"rows": [{"ids", "mask", "label"}], "margins", "has_specials"}. Raises DataError."""

    def __init__(self, template: str, tokenizer: str, train_on: str, paired: bool) -> None:
        self.template, self.train_on, self.paired = Template.load(template, tokenizer), train_on, paired
        self.specials = specials_pattern(self.template.tokenizer.specials)

    def __call__(self, line: str) -> dict:
        record = parsed(line)
        prompt, answers = answers_of(record, self.paired)
        talks = [(label, *conversation({"messages": _untrained(prompt) + answer, "tools": record.get("tools")})) for label, answer in answers]
        rows = [{"label": label, **self._row(messages, tools, len(prompt))} for label, messages, tools in talks]
        if len(rows) == 2 and rows[0]["ids"] == rows[1]["ids"]:
            raise DataError("chosen and rejected are the same answer, which prefers nothing; leave the line out")
        is_special = any(has_specials(messages, self.specials) for _, messages, _ in talks)
        return {"rows": rows, "margins": margins_of(record) if self.paired else None, "has_specials": is_special}

    def _row(self, messages: list, tools: list | None, num_prompt: int) -> dict:
        if not any(isinstance(message, dict) and message.get("role") == "assistant" for message in messages[num_prompt:]):
            raise DataError("an answer holds no message of role assistant after the prompt; leave the line out, or end its answers with one")
        encoded = self.template.encode(messages, tools, self.train_on)
        if not any(encoded.mask):
            raise DataError("an answer has every turn of the assistant switched off, so there is nothing to compare; leave the line out")
        end = len(encoded.mask) - encoded.mask[::-1].index(True)
        return {"ids": encoded.ids[:end], "mask": [int(counts) for counts in encoded.mask[:end]]}


def answers_of(record: dict, paired: bool) -> tuple[list, list[tuple[bool, list]]]:
    """(messages of the prompt, [(is it preferred, messages of the answer)]) of a record. Raises DataError."""
    if {"chosen", "rejected"} <= record.keys():
        chosen, rejected = (as_messages(record[name], "assistant") for name in ("chosen", "rejected"))
        prompt = as_messages(record["prompt"], "user") if "prompt" in record else _common(chosen, rejected)
        return _nonempty(prompt), [(True, _after(prompt, chosen)), (False, _after(prompt, rejected))]
    if not paired and {"prompt", "completion", "label"} <= record.keys():
        if not isinstance(record["label"], bool):
            raise DataError(f"label is {record['label']!r}, expected true or false")
        return _nonempty(as_messages(record["prompt"], "user")), [(record["label"], as_messages(record["completion"], "assistant"))]
    forms = "chosen and rejected, perhaps with prompt" + ("" if paired else ", or prompt, completion and label")
    hint = "; single answers with a label are for dpo.loss=kto" if paired and "label" in record else ""
    raise DataError(f"no preference among the keys {', '.join(map(repr, record)) or '(none)'}; expected {forms}{hint}")


def margins_of(record: dict) -> list[float | None]:
    """[margin, score of chosen minus score of rejected], None where the record does not say. Raises DataError."""
    scores = [None, None]
    for names in SCORES:
        if any(name in record for name in names):
            scores = [_number(record, name) for name in names]
            if None in scores:
                raise DataError(f"only one of {' and '.join(names)} is given; give both")
    return [_number(record, "margin"), None if None in scores else scores[0] - scores[1]]


def _number(record: dict, name: str) -> float | None:
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
        raise DataError(f"{name} is {value!r}, expected a number")
    return value


def _common(one: list, other: list) -> list:
    """The messages with which both begin."""
    count = next((k for k, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))
    return one[:count]


def _nonempty(prompt: list) -> list:
    if not prompt:
        raise DataError("there is no prompt: give it as prompt, or begin chosen and rejected with the same messages")
    return prompt


def _after(prompt: list, answer: list) -> list:
    """The answer without the prompt that it may repeat."""
    return answer[len(prompt):] if answer[:len(prompt)] == prompt else answer


def _untrained(prompt: list) -> list:
    """The prompt with its turns of the assistant switched off."""
    return [{**message, "weight": 0} if isinstance(message, dict) and message.get("role") == "assistant" else message for message in prompt]


# --- lengths ----------------------------------------------------------------------------------------------------------


def _fitted(rows: list[dict], where: str, seq_len: int, policy: str, report: Report) -> list[dict]:
    """The rows of one pair (or one answer) at most seq_len tokens long, none when it is left out; counted in the report."""
    report.read += 1
    length = max(len(row["ids"]) for row in rows)
    if length > seq_len:
        report.too_long += 1
        if policy == "refuse":
            raise DataError(f"{where}: {length} tokens, but train.seq_len is {seq_len}; raise it, or let chat.too_long drop or truncate")
        rows = [] if policy == "drop" else _cut(rows, length - seq_len, seq_len, policy)
        name = "dropped" if policy == "drop" else "truncated" if rows else "truncated_to_nothing"
        setattr(report, name, getattr(report, name) + 1)
    report.kept += bool(rows)
    report.tokens += sum(len(row["ids"]) for row in rows)
    report.trained_tokens += sum(sum(row["mask"]) for row in rows)
    return rows


def _cut(rows: list[dict], excess: int, seq_len: int, policy: str) -> list[dict]:
    """All rows without their first `excess` tokens, or without what exceeds seq_len; none when a prompt or an answer would be gone."""
    if policy == "truncate_left" and excess >= min(row["mask"].index(1) for row in rows):
        return []      # the first token that counts needs one before it
    kept = slice(excess, None) if policy == "truncate_left" else slice(0, seq_len)
    rows = [{**row, "ids": row["ids"][kept], "mask": row["mask"][kept]} for row in rows]
    is_same = len(rows) == 2 and rows[0]["ids"] == rows[1]["ids"]
    return [] if is_same or not all(any(row["mask"]) for row in rows) else rows


def _refuse_nothing(report: Report, seq_len: int) -> None:
    if report.kept == 0:
        raise DataError(f"{', '.join(report.files)}: nothing is left of {report.read} {report.what}: {report.too_long} exceed "
                        f"train.seq_len({seq_len}); raise train.seq_len, set chat.too_long=truncate_left, or give other data")


def _tell(report: Report, policy: str) -> None:
    log.info(str(report))
    if report.too_long:
        log.warning(f"{report.too_long} of {report.read} {report.what} exceed train.seq_len; chat.too_long={policy}: {report.dropped} dropped, "
                    f"{report.truncated} truncated, {report.truncated_to_nothing} left out because no prompt or no answer would remain")
    if report.special_tokens_in_text:
        log.warning(f"{report.special_tokens_in_text} lines hold text of special tokens, such as an end of turn, in their messages; it became "
                    "those tokens")
