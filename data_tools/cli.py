"""What the command-line tools share: how they end.

A tool is an argparse parser and a body that takes the parsed arguments. Exit codes: 0 done, 1 error, 2 usage. Mistakes a
user can make end in one line on stderr, never in a traceback. Imports nothing heavy: --help must come at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence


class UsageError(ValueError):
    """The command line itself is wrong: exit code 2."""


def run_tool(parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None) -> int:
    """Parses argv (None: the process's), runs body, returns the exit code."""
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # argparse has printed help (0) or the mistake (2)
        return int(end.code or 0)
    try:
        from engine.data.indexed import DataError
    except ImportError as error:
        return _report(parser, f"{error}; install the package first: pip install -e . --no-build-isolation", 1)
    try:
        body(args)
        sys.stdout.flush()
    except UsageError as error:
        return _report(parser, str(error), 2)
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _has_lost_its_reader():
            return 128 + signal.SIGPIPE
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        return _report(parser, f"{error}{'; make room where the output goes, then give the same command again' if is_full else ''}", 1)
    except KeyboardInterrupt:
        return _report(parser, "interrupted; no output was written", 1)
    return 0


def _has_lost_its_reader() -> bool:
    """Has what reads standard output (head) had enough? It is then led nowhere, so that Python's own flush at exit says nothing."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _report(parser: argparse.ArgumentParser, text: str, code: int) -> int:
    print(f"{parser.prog}: error: {text}", file=sys.stderr)
    return code
