"""What an answer is worth: the weighted sum of the parts that run.rewards lists.

    with Scorer(run.rewards) as scorer:                 # raises ConfigError for a part that cannot work
        scores = scorer.score(items)                    # [{"exact": 1.0, "format": 0.0}, ...], one per Item, in order
        scores[0]["model"] = 0.3                        # parts of kind model are the stage's to fill in
        scorer.total(scores[0])                         # the weighted sum, a float

Rules, libraries and functions of the user run in workers (worker.py), which are kept between calls and killed when they hang; programs
run in a sandbox (programs.py). docs/rewards.md tells of every kind. Left out: whitening, clipping and penalties for length (stages).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from engine.rewards.programs import ItemError, Programs, SandboxError
from engine.rewards.rules import Exact
from engine.rewards.worker import Failed, Hung, Worker

JOBS = {"exact": "Exact", "regex": "Regex", "math": "Math", "reasoning_gym": "ReasoningGym", "python": "Function"}
READ_BY = {"pattern": ("exact", "regex", "math", "reasoning_gym"), "path": ("python",), "key": ("exact", "math", "code"),
           "memory_mib": ("code",), "workers": ("code",), "allow_unsandboxed": ("code",)}      # option: the kinds that read it
log = logging.getLogger(__name__)


class RewardError(ValueError):
    """A part of the reward gave no number that training could use."""


@dataclass(frozen=True)
class Item:
    """One answer. prompt: as rendered. record: its line of the data. ended: it ended by itself, and not at max_new_tokens."""

    prompt: str
    answer: str
    record: dict = field(default_factory=dict)
    ended: bool = True


class Scorer:
    """Scores answers by the parts that are not of kind model. close() ends what it started."""

    def __init__(self, rewards: Sequence) -> None:
        """rewards: RewardParts of engine/online_sections.py. Raises ConfigError, with every part's mistakes."""
        _refuse(list(_problems(rewards)))
        self.weights = {name_of(part): part.weight for part in rewards}
        self._parts = {name_of(part): _part(part, f"rewards.{i}") for i, part in enumerate(rewards) if part.kind != "model"}
        try:
            _refuse([problem for part in self._parts.values() for problem in part.problems()])
        except BaseException:
            self.close()
            raise

    def score(self, items: Sequence[Item]) -> list[dict[str, float]]:
        """Part name -> reward, for each item. Raises RewardError, naming the part and the item."""
        if not items or not self._parts:
            return [{} for _ in items]
        with ThreadPoolExecutor(len(self._parts), thread_name_prefix="rewards") as threads:      # parts wait for their processes together
            columns = list(threads.map(lambda part: part.score(items), self._parts.values()))
        for name, column in zip(self._parts, columns):
            for k, value in enumerate(column):
                if not math.isfinite(value):
                    raise RewardError(_told(name, f"gave {value} for {_shown(items, k)}; a reward must be a finite number"))
        return [dict(zip(self._parts, row)) for row in zip(*columns)]

    def total(self, scores: Mapping[str, float]) -> float:
        """The weighted sum of one item's parts. Raises RewardError where one is missing or not finite."""
        for name in self.weights:
            if not math.isfinite(scores.get(name, math.nan)):
                raise RewardError(f"reward {name} is {scores.get(name, 'missing')}, expected a finite number")
        return math.fsum(weight * scores[name] for name, weight in self.weights.items())

    def close(self) -> None:
        for part in self._parts.values():
            part.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def name_of(part) -> str:
    """How metrics call a part."""
    return part.name or part.kind


def _part(part, where: str) -> _InProcess | _InWorker | _InSandbox:
    if part.kind == "code":
        return _InSandbox(part, where)
    return _InProcess(part) if part.kind == "exact" and not part.pattern else _InWorker(part, where)


class _InProcess:
    """A part that compares texts, which takes no time."""

    def __init__(self, part) -> None:
        self.name, self._job = name_of(part), Exact(part.key, "")

    def problems(self) -> Iterator[str]:
        yield from ()

    def score(self, items: Sequence[Item]) -> list[float]:
        found: list[float] = []
        try:
            for value, _ in self._job(_rows(items)):
                found.append(value)
        except ValueError as error:
            raise RewardError(_told(self.name, f"failed for {_shown(items, len(found))}: {error}")) from None
        return found

    def close(self) -> None:
        pass


class _InWorker:
    """A part whose job runs in a worker. forgives: an answer that takes too long is worth 0, since libraries were not made for all that
    a model may say; a pattern or a function of the user that hangs is the user's to mend."""

    def __init__(self, part, where: str) -> None:
        self.part, self.name, self.where, self.forgives = part, name_of(part), where, part.kind in ("math", "reasoning_gym")
        self._arguments = {name: getattr(part, name) for name in ("pattern", "path", "key") if part.kind in READ_BY[name]}
        self._worker = self._started()

    def _started(self) -> Worker:
        return Worker(f"engine.rewards.rules:{JOBS[self.part.kind]}", self._arguments)

    def problems(self) -> Iterator[str]:
        try:
            self._worker.wait_until_ready()
        except ValueError as error:
            yield f"{self.where}: {error}"

    def score(self, items: Sequence[Item]) -> list[float]:
        rows, notes = _rows(items), []
        found: list[float] = []
        while len(found) < len(rows):
            try:
                for reply in self._worker.ask(rows[len(found):], self.part.seconds):
                    if isinstance(reply, list):
                        found += reply
                    else:
                        found.append(reply[0])
                        notes += filter(None, [reply[1]])
            except Hung:
                self._restart()
                if not self.forgives:
                    mend = "the function" if self.part.kind == "python" else "the pattern"
                    raise RewardError(_told(self.name, f"took more than {self.part.seconds:g} s for {self._shown(items, len(found))}; mend {mend} or "
                                                       f"raise {self.where}.seconds")) from None
                notes.append(f"no verdict within {self.part.seconds:g} s on {items[len(found)].answer[-80:]!r}")
                found.append(0.0)
            except Failed as error:
                self._restart()
                raise RewardError(_told(self.name, f"failed for {self._shown(items, len(found))}: {error}")) from None
        if notes:
            log.warning(f"reward {self.name}: {len(notes)} of {len(rows)} answers count 0 because they could not be judged; the first: {notes[0]}")
        return found

    def _shown(self, items: Sequence[Item], k: int) -> str:
        return f"{len(items)} answers" if self.part.kind == "python" else _shown(items, k)

    def _restart(self) -> None:
        self._worker.close()
        self._worker = self._started()

    def close(self) -> None:
        self._worker.close()


class _InSandbox:
    """A part of kind code."""

    def __init__(self, part, where: str) -> None:
        self.name, self._part, self._where = name_of(part), part, where

    def problems(self) -> Iterator[str]:
        part = self._part
        try:
            self._programs = Programs(part.key, part.seconds, part.memory_mib, part.workers, part.allow_unsandboxed)
        except ValueError as error:
            yield f"{self._where}: {error}"
        else:
            if not self._programs.sandbox.is_closed:
                log.warning(f"reward {self.name}: programs of the model run without namespaces on this machine, with limits alone")

    def score(self, items: Sequence[Item]) -> list[float]:
        try:
            return self._programs.score(_rows(items))
        except ItemError as error:
            raise RewardError(_told(self.name, f"failed for {_shown(items, error.number)}: {error}")) from None
        except SandboxError as error:
            raise RewardError(_told(self.name, f"could not start a sandbox: {error}")) from None

    def close(self) -> None:
        pass      # nothing lives between calls


def _problems(rewards: Sequence) -> Iterator[str]:
    """What is wrong with the parts as they are written."""
    names = [name_of(part) for part in rewards]
    for i, part in enumerate(rewards):
        where = f"rewards.{i}"
        if names.index(names[i]) < i:
            yield f"{where}: another part is called {names[i]} already; give it a name of its own"
        for option, kinds in READ_BY.items():
            if part.kind not in kinds and getattr(part, option) != type(part).model_fields[option].default:
                yield f"{where}: {option} is read by kind {', '.join(kinds)}, not by {part.kind}; take it out"
        if part.kind == "python" and not re.fullmatch(r"[\w.]+:\w+", part.path):
            yield f"{where}: path={part.path!r} is not of the form package.module:function"
        if part.kind in READ_BY["pattern"]:
            yield from (f"{where}: {problem}" for problem in _pattern_problems(part))


def _pattern_problems(part) -> Iterator[str]:
    if not part.pattern:
        if part.kind == "regex":
            yield "kind regex needs a pattern"
        return
    try:
        groups = re.compile(part.pattern).groups
    except re.error as error:
        yield f"pattern={part.pattern!r} is no regular expression ({error})"
        return
    if part.kind != "regex" and groups < 1:
        yield f"pattern={part.pattern!r} has no group; put round brackets around what was answered"


def _refuse(problems: list[str]) -> None:
    from engine.config import ConfigError      # takes a while, and every worker imports this package

    if problems:
        raise ConfigError(problems)


def _rows(items: Sequence[Item]) -> list[tuple[str, str, dict]]:
    return [(item.prompt, item.answer, item.record) for item in items]


def _told(name: str, what: str) -> str:
    return f"reward {name} {what}"


def _shown(items: Sequence[Item], k: int) -> str:
    return f"answer {k} (prompt {items[k].prompt[-60:]!r}, answer {items[k].answer[:60]!r})"
