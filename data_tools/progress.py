"""How far a tool is: a bar on a terminal, one line every so many seconds in a log, on stderr either way.

  with Progress("filter", total_bytes=size) as progress:
      progress.add(num_bytes=len(chunk), num_documents=12, num_tokens=3456)

Counts enter by add() and leave as MB/s, documents/s, tokens/s and the time left, which follows from the bytes when their total
is known. What is never counted is not shown. add() costs under a microsecond, so it may be called for every document.
Left out: several bars at once; the counts that a tool reports at its end are its own.
"""

from __future__ import annotations

import sys
import time

SECONDS_BETWEEN_LINES = 10.0  # in a log
SECONDS_BETWEEN_FRAMES = 0.2  # on a terminal


class Progress:
    """Counts work and shows it. total_bytes None: how much there will be is unknown. quiet: counts, and shows nothing."""

    def __init__(self, what: str, total_bytes: int | None, quiet: bool = False) -> None:
        self.what, self.total_bytes, self.quiet = what, total_bytes, quiet
        self.num_bytes = self.num_documents = self.num_tokens = 0
        self._bar = self._task = None

    def __enter__(self) -> Progress:
        self._is_terminal = sys.stderr.isatty()
        self._interval = SECONDS_BETWEEN_FRAMES if self._is_terminal else SECONDS_BETWEEN_LINES
        self._start = time.perf_counter()
        # Infinity rather than a flag: add() then has one comparison for all cases.
        self._next_show = float("inf") if self.quiet else self._start + self._interval
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show(time.perf_counter())
            self._bar.stop()

    def add(self, num_bytes: int = 0, num_documents: int = 0, num_tokens: int = 0) -> None:
        """Counts what has been done since the last call, and shows all of it when it is time."""
        self.num_bytes += num_bytes
        self.num_documents += num_documents
        self.num_tokens += num_tokens
        now = time.perf_counter()
        if now >= self._next_show:
            self._show(now)
            self._next_show = now + self._interval

    def line(self, seconds: float) -> str:
        """What has been done in `seconds`, and how fast."""
        parts = []
        if self.num_bytes:
            total = f" of {self.total_bytes / 1e6:,.1f}" if self.total_bytes else ""
            rate = self.num_bytes / seconds
            parts.append(f"{self.num_bytes / 1e6:,.1f}{total} MB, " + (f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:,.1f} MB/s"))
        for count, name in ((self.num_documents, "documents"), (self.num_tokens, "tokens")):
            if count:
                parts.append(f"{count:,} {name}, {count / seconds:,.0f}/s")
        if self.total_bytes and self.num_bytes:
            parts.append(f"{_clock(seconds * max(0, self.total_bytes - self.num_bytes) / self.num_bytes)} left")
        return "; ".join(parts) or "starting"

    def _show(self, now: float) -> None:
        text = self.line(max(now - self._start, 1e-9))
        if not self._is_terminal:
            print(f"{self.what}: {text}", file=sys.stderr, flush=True)
            return
        if self._bar is None:  # a tool that ends before the first frame never pays for importing rich
            self._bar, self._task = _start_bar(self.what, self.total_bytes)
        self._bar.update(self._task, completed=min(self.num_bytes, self.total_bytes or 0), shown=text)


def _start_bar(what: str, total_bytes: int | None):
    from rich.console import Console
    from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[shown]}", markup=False), TimeElapsedColumn())
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task(what, total=total_bytes, shown="")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
