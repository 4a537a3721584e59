"""A function over many items in several processes, results in the order of the items.

In: items that can be pickled, and a function made once per process by make(*arguments), since loading a tokenizer or a table
costs more than an item. Out: an iterator of results. Few items are in memory at a time. With one worker all happens here.
Left out: threads; restarting a worker that was killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from engine.data.indexed import DataError

_function: Callable | None = None  # one per worker process


def map_in_order(make: Callable, arguments: tuple, items: Iterable, workers: int) -> Iterator:
    """make(*arguments)(item) for every item, in order. Raises DataError when a worker is killed, and what the function raises."""
    if workers == 1:
        yield from map(make(*arguments), items)
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    # spawn: a forked child would inherit libraries' thread pools in an unknown state.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (make, arguments))
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_call, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(f"one of {workers} worker processes was killed, most often for memory; use fewer with --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(make: Callable, arguments: tuple) -> None:
    global _function
    _function = make(*arguments)


def _call(item: object) -> object:
    return _function(item)
