"""What a person at the terminal sees, written by a thread of its own: a terminal that takes nothing, or has gone, must not hold up a supervisor.

    console = Console()
    console.say(STDERR, text)
    console.close()               # gives the terminal a moment for the rest

Nothing is lost that is not in the logs too: what the terminal is too slow for is left out, and a line says so.
"""

import contextlib
import os
import queue
import threading

STDOUT, STDERR = 1, 2  # written without Python's buffers, whose locks a blocked thread would hold when the process ends
MOST_WAITING = 10_000  # texts
CLOSE_SECONDS = 1.0


class Console:
    def __init__(self):
        self._waiting: queue.Queue = queue.Queue(MOST_WAITING)
        self._num_left_out = 0
        self._thread = threading.Thread(target=self._work, name="console", daemon=True)
        self._thread.start()

    def say(self, stream: int, text: str) -> None:
        """stream: STDOUT or STDERR. Never waits."""
        try:
            self._waiting.put_nowait((stream, text))
        except queue.Full:
            self._num_left_out += 1

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_SECONDS)
        self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            stream, text = item
            if self._num_left_out:
                text, self._num_left_out = f"(output left out {self._num_left_out} times; all of it is in the logs)\n{text}", 0
            data = text.encode(errors="replace")
            with contextlib.suppress(OSError):
                while data:
                    data = data[os.write(stream, data):]
