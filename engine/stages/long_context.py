"""Long-context extension: train on ever longer texts, and go on only while short ones have not suffered.

    stage: long_context
    checkpoint: {load: runs/base}
    data: {train: [books], valid: {held_out: [held_out]}}
    long_context:
      ladder:
        - {seq_len: 16384, tokens: 1000000000, global_batch: 256, rope_theta: 2000000}
        - {seq_len: 65536, tokens: 1000000000, global_batch: 64, rope_theta: 8000000}
      needle_threshold: 0.95

The loss is that of pretraining. Each rung is a run of its own (ladder.py) that starts from the rung before. After a rung two things
are measured and must hold, as in Llama 3 (arXiv 2407.21783 section 3.4.2): the validation loss at short_seq_len may exceed that of
the loaded model by short_tolerance at most, and needle_threshold of the needles (engine/data/needle.py) are found at the new length.
Measurements lie in RUN/ladder.json; a rerun goes past finished rungs and judges them anew by what was measured. Without a ladder
the run itself is the only rung. Left out: benchmark scores, and choosing the corpora.
"""

import json
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine import schedule
from engine.config import ConfigError
from engine.data import needle, text
from engine.data.loader import Loader
from engine.data.needle import Retrieval
from engine.run_folder import find
from engine.stages import loaded
from engine.stages.ladder import cache_dir, rungs, unsplit
from engine.stages.pretrain import Pretrain


class LadderStopped(ValueError):
    """A gate did not open; the message names the measurement, its limit and the cure. The rung's checkpoint is kept."""


@dataclass(frozen=True)
class Verdict:
    """Did every gate open, and one sentence for each that did not."""

    passed: bool
    sentences: list[str]


class LongContext(Pretrain):
    def configure(self, run):
        """Raises ConfigError without checkpoint.load."""
        loaded.required(run)
        return run

    def runs(self, run, trainer):
        """The rungs that are not done. Raises LadderStopped at one that is done but whose gates are closed now."""
        self.climb = Climb(run, trainer.place, partial(text.datasets, goes_on=False))
        self.climb.measure_baseline(lambda wanted: trainer.frozen(run=wanted))
        for rung in rungs(run):
            if self.climb.is_done(rung):
                continue
            yield rung
            if not is_trained(rung):
                return  # train.max_minutes ended it; the next start goes on there

    def finish(self, run, model):
        """What was measured on this rung: short_loss, short_baseline, needle_retrieval, needle_by_depth (percent of the length -> share).

        Raises LadderStopped where a gate does not open and long_context.on_failure is stop; warn goes to the log.
        """
        return self.climb.measure(run, model) if is_trained(run) else {}


def is_trained(rung) -> bool:
    """Does the rung's folder hold the checkpoint of its last step?"""
    folder = find(rung.run.dir)
    return folder is not None and loaded.position(folder)["step"] >= schedule.planned_steps(rung.train)


class Climb:
    """The measurements of one ladder, kept in RUN/ladder.json. run: the whole ladder's. place: rank, dp_rank and dp of this rank.
    datasets: as of engine.stage.Stage."""

    def __init__(self, run, place, datasets):
        self.run, self.place, self.datasets = run, place, datasets
        self.notes = Notes(Path(run.run.dir) / "ladder.json")

    def measure_baseline(self, open_model) -> None:
        """Measure the loaded model at the short length, unless that was done before. Collective.

        open_model(run): a Model without gradients that holds the weights of run.checkpoint.load.
        Raises ConfigError for a checkpoint that cannot be read, and where its length does not split over this layout.
        """
        run = self.run
        key = {"checkpoint": run.checkpoint.load, **_short_key(run)}
        found = self.notes.read("baseline", key)
        if found is None:
            written = loaded.config(loaded.folder(run))
            length = run.long_context.short_seq_len or written.train.seq_len
            if problems := list(unsplit(run, length)):
                raise ConfigError(problems)
            model = open_model(baseline_run(run, written, length))
            found = {"short_seq_len": length, "short_loss": self._short_loss(model, length)}
            self.notes.write("baseline", key, found, self.place)
        self.short_seq_len, self.baseline = found["short_seq_len"], found["short_loss"]

    def is_done(self, rung) -> bool:
        """True where this rung was trained to its end and measured as the configuration asks; its gates are judged once more."""
        measured = self.notes.read(_name(rung), self._key(rung))
        if measured is None or not is_trained(rung):
            return False
        self._judge(rung, measured)
        return True

    def measure(self, rung, model) -> dict:
        """Measure a trained rung and judge it. Collective."""
        measured = {"short_loss": self._short_loss(model, self.short_seq_len)}
        if self.run.long_context.needle_samples:
            found = self._needles(rung, model)
            measured |= {"needle_retrieval": found.overall, "needle_by_depth": {str(depth): share for depth, share in found.by_depth.items()}}
        self.notes.write(_name(rung), self._key(rung), measured, self.place)
        self._judge(rung, measured)
        return {**measured, "short_baseline": self.baseline}

    def _short_loss(self, model, seq_len: int) -> float:
        """Mean loss in nats per token over train.eval_samples rows of every validation set, the same rows on every rung."""
        run, total, count = self.run, 0.0, 0.0
        _, valid = self.datasets(_at_length(run, seq_len), 1, _num_short(run))
        for dataset in valid.values():
            loader = Loader(dataset, run.train.micro_batch, self.place.dp_rank, self.place.dp)
            for first in range(0, _num_short(run), run.train.global_batch):
                more, tokens = model.evaluate(loader.batches(first, run.train.global_batch)).sums["loss"]
                total, count = total + more, count + tokens
        return total / count

    def _needles(self, rung, model) -> Retrieval:
        """Needles at the rung's length, in the first validation set."""
        run = _at_length(self.run, rung.train.seq_len)
        _, valid = self.datasets(run, 1, 1)
        haystack = next(iter(valid.values()))
        return needle.retrieval(model, needle.from_run(run, haystack), rung.train.micro_batch, self.place.dp_rank, self.place.dp)

    def _judge(self, rung, measured: dict) -> None:
        verdict = gate(rung, measured["short_loss"], self.baseline, measured.get("needle_retrieval"))
        if verdict.passed:
            return
        text = f"{_name(rung)}: " + "; ".join(verdict.sentences)
        if self.run.long_context.on_failure == "stop":
            raise LadderStopped(text)
        logging.getLogger(__name__).warning("%s (long_context.on_failure=warn: going on)", text)

    def _key(self, rung) -> dict:
        wanted = self.run.long_context
        return {**_short_key(self.run), "steps": schedule.planned_steps(rung.train), "model": rung.model.model_dump(mode="json"),
                "needle": [wanted.needle_samples, wanted.needle_depths, wanted.needle_tokens, self.run.data.tokenizer]}


def gate(run, short: float, baseline: float, needle_share: float | None) -> Verdict:
    """Judge a rung. short, baseline: validation losses in nats; needle_share: found needles, None where none were asked."""
    wanted, sentences = run.long_context, []
    limit = baseline * (1 + wanted.short_tolerance)
    if not short <= limit:  # so that NaN fails too
        sentences.append(f"the short-context loss is {short:.4f}, above {limit:.4f} (the loaded model's {baseline:.4f} and "
                         f"long_context.short_tolerance={wanted.short_tolerance:g}); train this rung on more tokens or with short texts "
                         "among them, lower its lr, or raise the tolerance")
    if needle_share is not None and not needle_share >= wanted.needle_threshold:
        sentences.append(f"{needle_share:.1%} of the needles are found at {run.train.seq_len} tokens, fewer than "
                         f"long_context.needle_threshold={wanted.needle_threshold:g}; train this rung on more tokens, raise its rope_theta, "
                         "or lower the threshold")
    return Verdict(not sentences, sentences)


def baseline_run(run, written, seq_len: int):
    """The run whose network is the loaded checkpoint's own, RoPE included. written: the RunConfig of that checkpoint."""
    rope = {name: getattr(written.model, name) for name in ("rope_theta", "rope_scaling", "max_position")}
    return _at_length(run, seq_len).model_copy(update={"model": run.model.model_copy(update=rope)})


class Notes:
    """Measurements in a JSON file, each with the settings it was taken under; other settings mean that it was not taken."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, name: str, key: dict) -> dict | None:
        """What was measured under the same settings. A missing or damaged file holds nothing."""
        entry = self._all().get(name)
        return entry["measured"] if entry is not None and entry["settings"] == _as_json(key) else None

    def write(self, name: str, key: dict, measured: dict, place) -> None:
        """On rank 0 only; the file changes as a whole."""
        if place.rank:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self._all(), name: {"settings": key, "measured": measured}}, indent=1))
        os.replace(temporary, self.path)

    def _all(self) -> dict:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}


def _name(rung) -> str:
    return Path(rung.run.dir).name


def _as_json(value):
    return json.loads(json.dumps(value))


def _short_key(run) -> dict:
    """What the short-context loss depends on, beside the weights."""
    return {"short_seq_len": run.long_context.short_seq_len, "samples": _num_short(run), "seed": run.run.seed,
            "valid": run.data.valid, "split": [run.data.split, run.data.train if run.data.split else []]}


def _num_short(run) -> int:
    """train.eval_samples in whole global batches."""
    return -(-run.train.eval_samples // run.train.global_batch) * run.train.global_batch


def _at_length(run, seq_len: int):
    """The whole ladder's run with rows of seq_len tokens, for its validation sets alone."""
    return run.model_copy(update={
        "train": run.train.model_copy(update={"seq_len": seq_len}),
        "data": run.data.model_copy(update={"cache_dir": cache_dir(run), "phases": [], "replay": [], "one_epoch": False}),
        "checkpoint": run.checkpoint.model_copy(update={"load_optimizer": False}),
    })
