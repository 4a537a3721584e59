"""The saves of a run, one after another, in the background where checkpoint.async_save asks for it; and what older ones may go.

    saver = Saver(run.checkpoint, run.run.timeout_minutes, note)
    saver.save({final: parts, ...}, must=False)
    saver.look()                                       # each step: says what has become of the one underway
    saver.copied()                                     # before a weight changes
    saver.finish()                                     # waits for it

An asynchronous save copies this rank's share into staging memory and lets a thread write it. Buffers are copied at once; what only an optimizer's
step changes is copied behind the next forward and backward pass. Left out: how one folder is written (saving.py).
"""

import itertools
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from engine import run_folder
from engine.mcore.saving import Save, caught, error_of
from engine.mcore.saving_plan import Part, Plan

CLOSING_SECONDS = 60
ALIGNED = 64  # bytes, so that every dtype finds its place in staging memory


class Saver:
    """The saves of one run, one after another. Every rank has one and calls the same methods in the same order.

    settings: section checkpoint. note: hears what was saved and what was not. spared: folders that retention leaves alone.
    A save that fails because of the disk is told, and training goes on, up to settings.failures_allowed times in a row; then, and where
    `must` is set, SaveError is raised on every rank alike.
    """

    def __init__(self, settings, timeout_minutes: float, note: Callable[[str], None], spared: Collection[Path] = ()):
        self.settings, self.timeout_minutes, self.note, self.spared = settings, timeout_minutes, note, spared
        self.num_failed = 0  # saves in a row
        self.staging = Staging() if settings.async_save else None
        self._underway: _Underway | None = None

    def save(self, contents: Mapping[Path, list[Part]], must: bool = False) -> None:
        """Write checkpoints, {iter_ folder: its parts}, in this order. Collective. Returns when they are written or, asynchronously, when
        training may go on; `copied` then has to be called before a weight changes. must: wait, and raise whatever goes wrong."""
        self.finish()
        saves = [Save(final, parts, self.timeout_minutes) for final, parts in contents.items()]
        self._underway = _Underway(saves, self._retire, self.staging)
        if must or self.staging is None:
            self.finish(must)

    def copied(self) -> None:
        """Waits until what is being saved may change: weights, moments, averages."""
        if self._underway:
            self._underway.copied()

    def look(self) -> None:
        """Says what has come of the save underway, when it has ended. Not collective."""
        if self._underway and not self._underway.is_told and self._underway.is_done():
            self._tell(self._underway)

    def finish(self, must: bool = False) -> None:
        """Wait for the save underway. Raises SaveError, on every rank alike, where too many have failed. Collective."""
        if not self._underway:
            return
        underway, self._underway = self._underway, None
        outcomes = underway.wait()
        if not underway.is_told:
            self._tell(underway)
        failed = next((outcome for outcome in outcomes if "failed" in outcome), None)
        self.num_failed = self.num_failed + 1 if failed else 0
        if failed and (must or not failed["is_disk"] or self.num_failed > self.settings.failures_allowed):
            raise error_of(failed)

    def close(self) -> None:
        """Where training ends with an error: let the save underway end if it can. Raises nothing; not collective."""
        if self._underway:
            self._underway.wait(CLOSING_SECONDS)

    def _tell(self, underway: "_Underway") -> None:
        underway.is_told = True
        for save, outcome in zip(underway.saves, underway.wait()):
            self.note(outcome.get("failed") or outcome.get("kept") or f"saved {save.final}")

    def _retire(self, final: Path) -> None:
        """Older checkpoints that may go now, by rank 0: the new one's files are there with their sizes, their hashes are those of the bytes
        that were handed to the disk, and it has answered that it has them."""
        if dist.get_rank() == 0 and not run_folder.problems(final, quick=True):
            gone = run_folder.retire(final.parent, run_folder.step_of(final), self.settings.keep_last, self.settings.keep_every, self.spared)
            for folder in gone:
                shutil.rmtree(run_folder.export_of(folder), ignore_errors=True)


class _Underway:
    """Saves that are being written, in a thread when there is a staging buffer, or at once."""

    def __init__(self, saves: list[Save], after: Callable[[Path], None], staging: "Staging | None"):
        self.saves, self.is_told = saves, False
        self._after, self._outcomes, self._thread, self._is_copied = after, [], None, threading.Event()
        if staging is None:
            self._write()
            return
        copy = staging.take([save.plan for save in saves])
        self._thread = threading.Thread(target=self._write, args=(copy,), name="save", daemon=True)
        self._thread.start()

    def _write(self, copy: Callable[[], None] = lambda: None) -> None:
        try:
            copy()
        finally:
            self._is_copied.set()
        for save in self.saves:
            outcome = caught(save.final, save.write)
            self._outcomes.append(outcome)
            if "failed" in outcome:
                return
        for save in self.saves:
            self._after(save.final)

    def copied(self) -> None:
        self._is_copied.wait()

    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> list[dict]:
        if self._thread:
            self._thread.join(seconds)
        return self._outcomes


class Staging:
    """Host memory, used again for every save, in which tensors wait for the disk while training changes them."""

    def __init__(self):
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, plans: list[Plan]) -> Callable[[], None]:
        """Put copies in the place of the plans' tensors. Returns what makes those of them that may wait: of anything but buffers, which change
        in a forward pass already. To be called by another thread, before weights change."""
        tensors = [(plan, number, tensor) for plan in plans for number, tensor in enumerate(plan.mine) if isinstance(tensor, torch.Tensor)]
        begins = list(itertools.accumulate((-(-tensor.nbytes // ALIGNED) * ALIGNED for _, _, tensor in tensors), initial=0))
        is_cuda = any(tensor.is_cuda for _, _, tensor in tensors)
        if begins[-1] > len(self._memory):
            self._memory = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=is_cuda)
        waiting = []
        for (plan, number, tensor), begin in zip(tensors, begins):
            plan.mine[number] = copy = self._memory[begin:begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            if number in plan.at_once:
                copy.copy_(tensor, non_blocking=True)
            else:
                waiting.append((copy, tensor))
        return _on_stream(waiting) if is_cuda else partial(_copy, waiting)


def _on_stream(waiting: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    """Start the copies beside the main stream's work; what waits for them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for copy, tensor in waiting:
            copy.copy_(tensor, non_blocking=True)
            if tensor.is_cuda:
                tensor.record_stream(stream)  # nobody else may hold it: FP8 parameters are saved as copies in plain precision
    return stream.synchronize


def _copy(waiting: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """By numpy, which needs one thread where torch would take those that are computing."""
    for copy, tensor in waiting:
        if tensor.is_contiguous():
            np.copyto(_bytes(copy), _bytes(tensor))
        else:
            copy.copy_(tensor)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(-1).view(torch.uint8).numpy()
