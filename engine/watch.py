"""A thread in every rank that notices when nothing goes on: all ranks' stacks, who did not come, status.json, exit code 1.

    with Watch(seconds, folder, place, log) as watch:
        watch.beat()         # a step, a validation batch or a save is done; from the first beat on the thread looks
        watch.rest()         # what follows may take as long as it wants

A collective that waits for a rank waits in C++ and can neither be asked nor be ended from Python, so the process is. Before that each rank writes
its stacks, and where it stands into folder/hung_00001.json; from these files each knows which ranks stand elsewhere, and which do not answer
because they are stopped or gone. All of it takes less than twice `seconds`. Where Python itself is stuck (a C function that keeps the
interpreter's lock, a file system that does not answer), faulthandler's own thread ends the process without that report.
Left out: a hang before the second step, which run.timeout_minutes ends, and a single rank that is slow.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path

from engine.signals import STDERR

ERROR = 1  # as in engine/cli.py
POLL, ANSWER, LAST = 1 / 10, 1 / 2, 7 / 4  # of `seconds`: between two looks; for the others' answers; until faulthandler ends the process


class Watch:
    """seconds: 0 watches nothing. folder: shared by the ranks. place: rank and world_size of this process. log: a RunLog."""

    def __init__(self, seconds: float, folder: Path, place, log):
        self.seconds, self.folder, self.place, self.log = seconds, folder, place, log
        self._last: float | None = None  # time of the last beat
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._own.unlink(missing_ok=True)
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._closed.set()
        if self.seconds:
            self._thread.join()  # for ever, where it is about to end the process: the error here is then that another rank has gone

    def beat(self) -> None:
        self._last = time.monotonic()

    def rest(self) -> None:
        self._last = None

    def _work(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(POLL * self.seconds):
            last, now = self._last, time.monotonic()
            late, looked = now - looked - POLL * self.seconds, now
            if last is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            faulthandler.dump_traceback_later(LAST * self.seconds, exit=True, file=STDERR)
            if late > POLL * self.seconds and self._last == last:
                self._last = last + late  # this whole process was stopped, and with it the others perhaps
            elif now - last > self.seconds:
                self._end(now - last)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, seconds: float) -> None:
        try:
            where = _where()
            for file in (STDERR, self.log.file_number):
                os.write(file, f"rank {self.place.rank}: nothing was done for {seconds:.0f} s; all threads:\n".encode())
                faulthandler.dump_traceback(file)
            self._own.write_text(json.dumps(where))
            answers = {self.place.rank: where}
            self._hear(answers, time.monotonic() + ANSWER * self.seconds)
            reason = f"nothing was done for {seconds:.0f} s (faults.hang_seconds={self.seconds:g}): {self._told(answers)}"
            if self.place.rank == min(answers):
                self.log.abandon(reason)
                print(f"error: {reason}; the stacks are in {self.folder}", file=sys.stderr, flush=True)
        finally:  # whatever a full disk may say
            os._exit(ERROR)

    @property
    def _own(self) -> Path:
        return self._file(self.place.rank)

    def _file(self, rank: int) -> Path:
        return self.folder / f"hung_{rank:05d}.json"

    def _hear(self, answers: dict[int, str], deadline: float) -> None:
        """Add where each rank stands that says so in time."""
        while len(answers) < self.place.world_size and time.monotonic() < deadline:
            for rank in set(range(self.place.world_size)) - answers.keys():
                try:
                    answers[rank] = json.loads(self._file(rank).read_text())
                except (OSError, ValueError):
                    pass  # not there, or not whole yet
            time.sleep(min(0.1, POLL * self.seconds))

    def _told(self, answers: dict[int, str]) -> str:
        together = defaultdict(list)
        for rank, where in sorted(answers.items()):
            together[where].append(rank)
        said = [f"{_ranks(ranks)} in {where}" for where, ranks in sorted(together.items(), key=lambda pair: len(pair[1]))]
        missing = sorted(set(range(self.place.world_size)) - answers.keys())
        return "; ".join(([f"{_ranks(missing)} did not answer (stopped, gone, or without this folder)"] if missing else []) + said)


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _where() -> str:
    """Where the main thread stands: its innermost call, and the innermost in this project."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
    root = str(Path(__file__).parent)
    own = next((frame for frame in reversed(stack) if frame.filename.startswith(root)), stack[-1])
    told = f"{os.path.relpath(own.filename, Path(root).parent)}:{own.lineno} {own.name}"
    return told if own is stack[-1] else f"{stack[-1].name}, called from {told}"
