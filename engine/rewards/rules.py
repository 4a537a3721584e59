"""Rules that judge answers, each the job of a worker (worker.py): called with items it yields rewards.

An item is (prompt, answer, record). `Exact`, `Regex`, `Math` and `ReasoningGym` yield one (reward, note) per item, `Function` one list
for all. A note says what a library could not do with an answer, which is then worth 0. A ValueError is a mistake in the data or in the
configuration. Left out: programs (programs.py) and reward models (the stages).
"""

from __future__ import annotations

import importlib
import logging
import re
import unicodedata
from collections.abc import Iterator

from engine.data.sandbox import limit_memory

LIBRARY_MIB = 2048      # what a library may take for an answer such as 9**9**9
Items = list[tuple[str, str, dict]]


class Exact:
    """1.0 when answer and record[key] are the same text but for case, white space and Unicode forms (NFKC); pattern: see extracted."""

    def __init__(self, key: str, pattern: str) -> None:
        self.key, self.pattern = key, _compiled(pattern)

    def __call__(self, items: Items) -> Iterator[tuple[float, str]]:
        for _, answer, record in items:
            wanted = reference(record, self.key)
            found = extracted(answer, self.pattern)
            yield float(found is not None and normalised(found) == normalised(wanted)), ""


class Regex:
    """1.0 where the pattern is found in the answer."""

    def __init__(self, pattern: str) -> None:
        self.pattern = _compiled(pattern)

    def __call__(self, items: Items) -> Iterator[tuple[float, str]]:
        for _, answer, _ in items:
            yield float(self.pattern.search(answer) is not None), ""


class Math:
    """1.0 when math-verify finds the answer equal to record[key], as an expression and not as text.

    record[key], and with a pattern what it extracts, are expressions as a whole; without a pattern math-verify looks for one in the answer.
    """

    def __init__(self, key: str, pattern: str) -> None:
        try:
            import math_verify
        except ImportError:
            raise ValueError("kind math needs math-verify, which is not installed; pip install 'trireme-lm[rl]'") from None
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)      # it warns of each answer; time limits are the worker's
        self.library, self.key, self.pattern = math_verify, key, _compiled(pattern)
        limit_memory(LIBRARY_MIB)

    def __call__(self, items: Items) -> Iterator[tuple[float, str]]:
        for _, answer, record in items:
            text = reference(record, self.key)
            wanted = self._expression(text)
            if not any(map(_is_mathematics, wanted)):
                raise ValueError(f"math-verify reads no expression in {self.key} {text[:80]!r}; mend the data, or use kind exact")
            yield self._score(wanted, answer)

    def _score(self, wanted: list, answer: str) -> tuple[float, str]:
        found = extracted(answer, self.pattern)
        if found is None:
            return 0.0, ""
        try:
            parsed = self._expression(found) if self.pattern else self._parsed(found)
            return float(self.library.verify(wanted, parsed, timeout_seconds=None)), ""
        except Exception as error:
            return 0.0, f"math-verify failed on {found[-80:]!r}: {type(error).__name__}: {error}"

    def _expression(self, text: str) -> list:
        """What all of the text says; without marks math-verify would read only a number of 2x+3."""
        forms = [text] if "$" in text or "\\boxed" in text else [f"\\boxed{{{text}}}", f"${text}$"]
        parsed = [self._parsed(form) for form in forms]
        return next((found for found in parsed if any(map(_is_mathematics, found))), parsed[0])

    def _parsed(self, text: str) -> list:
        """What math-verify reads, as expressions and as text."""
        return self.library.parse(text, parsing_timeout=None)


def _is_mathematics(found) -> bool:
    return not isinstance(found, str)


class ReasoningGym:
    """The score that reasoning-gym's dataset gives: record["reasoning_gym"] is {"dataset": name, "entry": its item}.

    What counts is what the pattern extracts, or stands in the last <answer> tags, or the whole answer.
    """

    def __init__(self, pattern: str) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.utils import extract_answer
        except ImportError:
            raise ValueError("kind reasoning_gym needs reasoning-gym, which is not installed; pip install 'trireme-lm[rl]'") from None
        self.library, self.extract_answer, self.pattern = reasoning_gym, extract_answer, _compiled(pattern)
        self.judges = {}
        limit_memory(LIBRARY_MIB)

    def __call__(self, items: Items) -> Iterator[tuple[float, str]]:
        for _, answer, record in items:
            judge, entry = self._judge(record)
            try:
                yield float(judge(self._said(answer), entry)), ""
            except Exception as error:
                self._check_entry(judge, entry)
                yield 0.0, f"reasoning-gym failed on {answer[-80:]!r}: {type(error).__name__}: {error}"

    def _said(self, answer: str) -> str | None:
        if self.pattern:
            return extracted(answer, self.pattern)
        tagged = self.extract_answer(answer)
        return answer.strip() if tagged is None else tagged

    def _judge(self, record: dict):
        made = record.get("reasoning_gym")
        if not isinstance(made, dict) or not isinstance(made.get("dataset"), str) or not isinstance(made.get("entry"), dict):
            raise ValueError('reasoning_gym is not {"dataset": name, "entry": {"question": ..., "answer": ..., "metadata": ...}}')
        name = made["dataset"]
        if name not in self.judges:
            try:
                self.judges[name] = self.library.get_score_answer_fn(name)
            except ValueError:
                raise ValueError(f"reasoning-gym has no dataset {name!r}") from None
        return self.judges[name], made["entry"]

    def _check_entry(self, judge, entry: dict) -> None:
        """A scorer that fails on its own answer too has a broken entry, and not a strange answer, before it."""
        try:
            judge(entry["answer"], entry)
        except Exception as error:
            raise ValueError(f"reasoning-gym cannot score the entry's own answer ({type(error).__name__}: {error}); write entry as the "
                             "library made it") from None


class Function:
    """A function of the user, f(prompts, answers, records) -> rewards, one number per answer; named package.module:function."""

    def __init__(self, path: str) -> None:
        self.path = path
        module, _, name = path.partition(":")
        try:
            self.function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise ValueError(f"path={path}: no module {error.name} in the working folder or on PYTHONPATH") from None
        except AttributeError:
            raise ValueError(f"path={path}: {module} has no {name}") from None
        if not callable(self.function):
            raise ValueError(f"path={path} is a {type(self.function).__name__}, not a function")

    def __call__(self, items: Items) -> Iterator[list[float]]:
        prompts, answers, records = map(list, zip(*items))
        found = self.function(prompts, answers, records)
        if not hasattr(found, "__len__") or len(found) != len(items):
            what = f"{len(found)} rewards" if hasattr(found, "__len__") else f"a {type(found).__name__}"
            raise ValueError(f"{self.path} returned {what} for {len(items)} answers; return a list with one number for each")
        yield [self._number(value, k) for k, value in enumerate(found)]

    def _number(self, value, number: int) -> float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{self.path} returned {value!r} for answer {number}, expected a number") from None


# --- texts ------------------------------------------------------------------------------------------------------------


def reference(record: dict, key: str) -> str:
    """What record[key] says is right. Raises ValueError."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{key} is {value!r}, expected a text or a number")
    return str(value)


def extracted(answer: str, pattern: re.Pattern | None) -> str | None:
    """Group 1 of the pattern's last match, None where there is none; without a pattern the answer."""
    if pattern is None:
        return answer
    found = None
    for match in pattern.finditer(answer):
        found = match.group(1)
    return found


def normalised(text: str) -> str:
    """Without differences of case, white space and Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _compiled(pattern: str) -> re.Pattern | None:
    return re.compile(pattern) if pattern else None
