"""Where a step goes: a trace of some steps, ranges for nsys, and a summary in text. Off unless profile.first_step says when.

    with profiling.opened(run, place, position.step, log.note) as profile:    # on every rank; those of profile.ranks record
        profile.step(number)                          # at the start of each step, counted from 1

    @profiling.phase("optimizer")                     # a function whose time is told by this name; costs a look at one variable when off
    def step(self, ...): ...

    RUN/profile/rank_00000.trace.json.gz              for ui.perfetto.dev or chrome://tracing
    RUN/profile/rank_00000.txt                        the summary: phases, kinds of work, the operations that take most
    RUN/profile/rank_00000.memory.pickle              with profile.memory on a GPU, for pytorch.org/memory_viz

profile.kind=nsys writes nothing: it marks phases and operations as NVTX ranges and opens the capture range of
`nsys profile --capture-range=cudaProfilerApi` around the same steps.
Left out: averages over ranks; a slow rank is seen by comparing two summaries.
"""

import contextlib
import time
from collections import Counter
from functools import wraps
from pathlib import Path

from engine.config import ConfigError
from engine.schedule import planned_steps

# Kinds of work by parts of the names of kernels and operations; the first that fits counts.
KINDS = {
    "communication": ("nccl", "gloo:", "c10d::", "record_param_comms", "all_reduce", "all_gather", "reduce_scatter", "all_to_all"),
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax_warp"),
    "matrix products": ("gemm", "addmm", "aten::mm", "aten::bmm", "nvjet", "cutlass", "xmma", "cublas", "mkldnn_linear", "grouped_mm"),
    "optimizer": ("adam", "multi_tensor", "_foreach_", "optimizer.step"),
    "copies": ("memcpy", "memset", "copy_", "aten::_to_copy", "aten::cat", "aten::contiguous", "aten::clone"),
}
OTHER = "other operations"
NUM_OPERATIONS = 25  # rows of the summary

_current = None  # the Profile that is recording in this process


def phase(name: str):
    """A decorator: while steps are profiled, the time inside is told under this name."""

    def marked(act):
        @wraps(act)
        def timed(*args, **kwargs):
            if _current is None:
                return act(*args, **kwargs)
            with _current.range(name):
                return act(*args, **kwargs)

        return timed

    return marked


def opened(run, place, done: int, say):
    """What profiles this rank: a context manager with a method step. done: steps before this start; say: hears where they hold those to be profiled.
    Raises ConfigError for nsys without a GPU."""
    if run.profile.kind == "nsys" and run.profile.first_step and place.device != "cuda":
        raise ConfigError([f"profile.kind=nsys marks the work of a GPU, but this run is on {place.device}; set profile.kind=torch"])
    if 0 < run.profile.first_step <= done < planned_steps(run.train):
        say(f"profile.first_step={run.profile.first_step} is among the {done} steps before this start, so nothing is profiled; "
            f"set it to {done + 1} or more")
    if not run.profile.first_step or place.rank not in run.profile.ranks:
        return Profile(None, None)
    return (Nsys if run.profile.kind == "nsys" else Torch)(run, place)


class Profile:
    """Profiles nothing."""

    def __init__(self, run, place):
        self.run, self.place, self.num_steps, self.started, self.phases = run, place, 0, 0.0, Counter()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if _current is self:
            self._end()

    def step(self, number: int) -> None:
        """Step `number` begins: recording begins or ends, or neither."""
        if self.run is None:
            return
        first, count = self.run.profile.first_step, self.run.profile.num_steps
        if _current is self:
            self.num_steps += 1
            if self.num_steps == count:
                self._end()
        elif number == first:
            self._begin()

    @contextlib.contextmanager
    def range(self, name: str):
        """Marks what happens inside."""
        import torch

        started = time.perf_counter()
        with torch.profiler.record_function(name):
            yield
        self.phases[name] += time.perf_counter() - started

    def _begin(self) -> None:
        global _current
        _current, self.started = self, time.perf_counter()

    def _end(self) -> float:
        """Seconds that were recorded."""
        global _current
        _current = None
        return time.perf_counter() - self.started


class Nsys(Profile):
    """Ranges for NVIDIA Nsight Systems."""

    def range(self, name: str):
        import torch

        return torch.cuda.nvtx.range(name)

    def _begin(self) -> None:
        import torch

        super()._begin()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        self._marks = torch.autograd.profiler.emit_nvtx()
        self._marks.__enter__()

    def _end(self) -> float:
        import torch

        torch.cuda.synchronize()
        self._marks.__exit__(None, None, None)
        torch.cuda.profiler.stop()
        return super()._end()


class Torch(Profile):
    """A trace by torch's profiler, and the summary of it."""

    def _begin(self) -> None:
        import torch

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.place.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize()
            if self.run.profile.memory:
                torch.cuda.memory._record_memory_history()
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=self.run.profile.memory)
        self._profiler.start()
        super()._begin()

    def _end(self) -> float:
        import torch

        if self.place.device == "cuda":
            torch.cuda.synchronize()
        seconds = super()._end()
        self._profiler.stop()
        folder = Path(self.run.run.dir) / "profile"
        folder.mkdir(exist_ok=True)
        stem = f"rank_{self.place.rank:05d}"
        self._profiler.export_chrome_trace(str(folder / f"{stem}.trace.json.gz"))
        if self.run.profile.memory and self.place.device == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"{stem}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        # A run that ended inside its last profiled step has recorded that one as well.
        steps = max(self.num_steps, 1)
        (folder / f"{stem}.txt").write_text(summary(self._profiler.key_averages(), self._busy(), self.phases, seconds, steps, self.place.device,
                                                    f"rank {self.place.rank}, steps {self.run.profile.first_step} to {self.run.profile.first_step + steps - 1}"))
        return seconds

    def _busy(self) -> float:
        """Seconds in which the GPU computed or sent at all; 0 on a CPU."""
        from torch.autograd import DeviceType

        spans = sorted((event.time_range.start, event.time_range.end) for event in self._profiler.events()
                       if event.device_type == DeviceType.CUDA and not event.is_user_annotation)      # a phase's mark spans what is idle in it too
        return union(spans) / 1e6


def union(spans) -> float:
    """The length of the union of intervals, which come in the order of their starts."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def kind_of(name: str) -> str:
    """The kind of work that an operation or a kernel does."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHER)


def summary(averages, busy: float, phases: dict[str, float], seconds: float, num_steps: int, device: str, title: str) -> str:
    """The text of a summary. averages: torch's key_averages(); busy: seconds in which a GPU worked; seconds: of all the steps together."""
    averages = [event for event in averages if event.key not in phases and not event.is_user_annotation and not event.key.startswith("ProfilerStep")]
    # Of a GPU the kernels: the operations that start them carry their time once more.
    operations = [(event.key, _self_seconds(event, device), event.count) for event in averages if event.device_type.name == device.upper()]
    operations = sorted((entry for entry in operations if entry[1] > 0), key=lambda entry: -entry[1])
    kinds = Counter()
    for name, own, _ in operations:
        kinds[kind_of(name)] += own
    rest, called = (seconds - busy, "idle") if device == "cuda" else (seconds - sum(kinds.values()), "Python, and waiting for other ranks")
    kinds[called] = max(rest, 0.0)
    lines = [f"{title}: {1000 * seconds / num_steps:.1f} ms per step", "", f"{'phase':44}{'ms per step':>12}{'share':>9}"]
    lines += [_row(name, spent, seconds, num_steps) for name, spent in sorted(phases.items(), key=lambda item: -item[1])]
    lines += ["", f"{'work of the ' + ('GPU' if device == 'cuda' else 'CPU'):44}{'ms per step':>12}{'share':>9}"]
    lines += [_row(kind, spent, seconds, num_steps) for kind, spent in kinds.most_common()]
    lines += ["", f"{'kernel' if device == 'cuda' else 'operation, without those it calls':44}{'ms per step':>12}{'share':>9}{'calls':>9}"]
    lines += [_row(name, own, seconds, num_steps) + f"{count / num_steps:9.0f}" for name, own, count in operations[:NUM_OPERATIONS]]
    kept = sorted(((event.key, _kept(event, device)) for event in averages), key=lambda entry: -entry[1])
    if kept and kept[0][1] > 0:
        lines += ["", f"{'operation, without those it calls':44}{'MiB kept':>12}"]
        lines += [f"{_short(name):44}{size / 2**20 / num_steps:12.1f}" for name, size in kept[:NUM_OPERATIONS] if size > 0]
    return "\n".join(lines) + "\n"


def _row(name: str, spent: float, seconds: float, num_steps: int) -> str:
    return f"{_short(name):44}{1000 * spent / num_steps:12.2f}{100 * spent / seconds:8.1f}%"


def _short(name: str) -> str:
    return name if len(name) < 44 else name[:40] + "..."


def _self_seconds(event, device: str) -> float:
    return (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total) / 1e6


def _kept(event, device: str) -> float:
    """Bytes allocated and not freed by the operation itself."""
    return event.self_device_memory_usage if device == "cuda" else event.self_cpu_memory_usage
