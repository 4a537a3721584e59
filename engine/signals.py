"""The signals that a rank understands: SIGTERM and SIGUSR1 ask it to save and leave, SIGUSR2 to say where it is.

    with Signals() as signals:          # in the main thread, before anything heavy is imported
        ...
        signals.received                # the number of the one that came, 0 for none

A signal is only noted; engine/faults.py asks for it after every step, so that all ranks save at the same one. Further ones change nothing,
also while a checkpoint is being written. When the launcher that started this rank dies in whatever way, the kernel sends SIGTERM (Linux), so no
rank stays behind; a process that nobody launched as a rank may outlive the shell it was typed into. Left out: SIGINT, which ends a run at once,
and signals that cannot be caught.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys

LEAVE = (signal.SIGTERM, signal.SIGUSR1)
STACKS = signal.SIGUSR2
STDERR = 2  # a number, because sys.stderr need not be a file


class Signals:
    """Notes a signal of LEAVE. On leaving the context the handlers are those of before."""

    received = 0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in LEAVE}
        self._before[STACKS] = signal.signal(STACKS, lambda number, frame: faulthandler.dump_traceback(STDERR))
        if "RANK" in os.environ or "SLURM_PROCID" in os.environ:
            end_with_parent()
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.received = self.received or number


@contextlib.contextmanager
def stacks_into(file_number: int):
    """Meanwhile SIGUSR2 writes the stacks of all threads into a file, also while the main thread waits in C++, and after that to stderr."""
    faulthandler.register(STACKS, file=file_number, chain=signal.getsignal(STACKS) not in (signal.SIG_DFL, None))
    try:
        yield
    finally:
        faulthandler.unregister(STACKS)


def end_with_parent() -> None:
    """Be sent SIGTERM when the process that started this one dies. Nothing where the kernel cannot do that."""
    if sys.platform.startswith("linux"):
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
