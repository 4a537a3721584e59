"""What a run has read of each source: in metrics.jsonl, in every checkpoint, and checked when the run goes on.

    ledger = Ledger(dataset)
    ledger.check(*history(run))                              # where a run goes on: before anything else is done
    ledger.begin(position.consumed_samples, *history(run))
    record |= ledger.record(consumed_samples)      # {"sources": {"web": {"samples": 700, "tokens": 22400, "epochs": 0.35}, ...}}
    state |= ledger.state(consumed_samples)        # what a checkpoint keeps, for `history` to find

Which sample is of which source follows from the configuration and the sample's number (blend.py, mixture.py), so counting is cheap and
a configuration can be asked what it would have read up to a checkpoint. Where that is not what the checkpoint says has been
read, going on would read some samples again and others never: the same run is refused, and a run that another one's checkpoint
starts is told, and goes on from what was read.
Left out: datasets other than text (their `samples` do not say where they come from); their ledger is empty.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.data.blend import Blend, count_sources
from engine.data.indexed import DataError
from engine.data.orders import Chained, order_of, sources_of
from engine.run_folder import find

log = logging.getLogger(__name__)
MANY = 5  # sources that one message names


def names_of(samples) -> list[str]:
    """The prefix of each source."""
    return [str(source.corpus.prefix) for source in sources_of(samples)]


def source_numbers(samples, sample_numbers: np.ndarray) -> np.ndarray:
    """The number of the source of each sample, int64 [n]."""
    numbers = np.asarray(sample_numbers, dtype=np.int64)
    return samples.dataset_index[numbers].astype(np.int64) if _is_mixed(samples) else np.zeros_like(numbers)


def _is_mixed(samples) -> bool:
    return isinstance(samples, Blend) and not isinstance(samples, Chained)


def history(run) -> tuple[dict | None, bool]:
    """What the checkpoint that a run goes on from says was read (None: nothing, or it is a new run), and is that checkpoint its own?

    Raises DataError where it cannot be read.
    """
    own, load = find(Path(run.run.dir) / "checkpoints"), run.checkpoint
    folder = own or (find(load.load) if load.load and load.load_optimizer and load.load_position else None)
    path = folder and folder / "stage.json"
    if not path or not path.is_file():
        return None, True
    try:
        return json.loads(path.read_text()).get("ledger"), folder == own
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove its folder to go on from an earlier checkpoint") from None


class Ledger:
    """Counts of one training set. Sources of one name are counted together."""

    def __init__(self, dataset) -> None:
        self.samples = getattr(dataset, "samples", None)
        self.sources = sources_of(self.samples)
        self.names = names_of(self.samples)
        self.seq_len = self.sources[0].seq_len if self.sources else 0
        self._counted, self._counts = 0, np.zeros(len(self.sources), dtype=np.int64)
        self._before: dict[str, tuple[int, int]] = {}      # samples and tokens that this run's own order does not account for

    def counts(self, upto: int) -> np.ndarray:
        """Samples of each source among the first `upto`, int64 [sources]; what is new since the last call is counted."""
        if upto < self._counted:
            self._counted, self._counts = 0, np.zeros_like(self._counts)
        if _is_mixed(self.samples):
            self._counts = self._counts + count_sources(self.samples.dataset_index[self._counted:upto], len(self.sources))
        else:
            self._counts = self._counts + (upto - self._counted)
        self._counted = upto
        return self._counts

    def read(self, consumed: int) -> dict[str, tuple[int, int]]:
        """Name -> samples and tokens read by a run that stands at `consumed` samples."""
        found = dict(self._before)
        for name, count in zip(self.names, self.counts(consumed).tolist()):
            samples, tokens = found.get(name, (0, 0))
            found[name] = (samples + count, tokens + count * self.seq_len)
        return found

    def record(self, consumed: int) -> dict:
        """What belongs in a line of metrics.jsonl: nothing for a dataset that has no sources."""
        size = {name: source.tokens_per_epoch for name, source in zip(self.names, self.sources)}
        found = {name: {"samples": samples, "tokens": tokens} | ({"epochs": tokens / size[name]} if name in size else {})
                 for name, (samples, tokens) in self.read(consumed).items() if samples}
        return {"sources": found} if self.sources else {}

    def state(self, consumed: int) -> dict:
        """What a checkpoint must hold, as JSON."""
        if not self.sources:
            return {}
        read = {name: {"samples": samples, "tokens": tokens} for name, (samples, tokens) in self.read(consumed).items()}
        orders = {name: order for name, order in self._orders().items() if read[name]["samples"]}
        return {"ledger": {"consumed_samples": consumed, "read": read, "before": self._before, "orders": orders}}

    def check(self, saved: Mapping, is_same_run: bool) -> None:
        """Would this configuration have read what `saved` (of `history`) says was read? Warns of what it cannot go on with as if never stopped.

        Raises DataError where is_same_run and the counts are others.
        """
        consumed = saved["consumed_samples"]
        if not self._reaches(consumed):
            return
        then, now = _claims(saved, is_same_run), self._now(consumed)
        if self._agrees(then, saved):
            self._tell_other_orders(saved["orders"])
            return
        text = _difference(then, now, consumed)
        if is_same_run:
            raise DataError(f"{text}. Going on would read some samples again and others never. Keep data.train and the phases as they were up to "
                            "here and let the mixture change from now on with data.phases, or start a new run from this one's weights: another run.dir, "
                            "checkpoint.load, and checkpoint.load_position=false")
        log.warning("%s. The run goes on in the order of its own mixture, from sample %d, and its ledger with what was read", text, consumed)

    def begin(self, consumed: int, saved: Mapping | None, is_same_run: bool) -> None:
        """Stand at `consumed` samples, of which `saved` says what they were; `check` has passed."""
        if saved is None or saved["consumed_samples"] != consumed or not self._reaches(consumed):
            return
        if is_same_run:
            self._before = {name: tuple(pair) for name, pair in saved["before"].items()}
        elif not self._agrees(then := _claims(saved, is_same_run), saved):
            now = self._now(consumed)
            self._before = {name: tuple(a - b for a, b in zip(then.get(name, (0, 0)), now.get(name, (0, 0)))) for name in {*then, *now}}

    def _reaches(self, consumed: int) -> bool:
        """False for a run that is over before that, for which no order was made so far."""
        return bool(self.sources) and consumed <= len(self.samples)

    def _now(self, consumed: int) -> dict[str, tuple[int, int]]:
        """What this configuration alone would have read."""
        return {name: pair for name, pair in self.read(consumed).items() if pair[0]}

    def _agrees(self, then: Mapping, saved: Mapping) -> bool:
        """The same counts of the same names, or of corpora that differ in nothing but their names: they were moved."""
        now, ours = self._now(saved["consumed_samples"]), self._orders()
        kind = lambda read, orders: sorted((pair, orders[name]["tokens"] if name in orders else 0) for name, pair in read.items())  # noqa: E731
        return then == now or not then.keys() & now.keys() and kind(then, saved["orders"]) == kind(now, ours)

    def _orders(self) -> dict[str, dict]:
        """Name -> what the order of its samples follows from."""
        return {name: order_of(source) for name, source in zip(self.names, self.sources)}

    def _tell_other_orders(self, orders: Mapping) -> None:
        ours = self._orders()
        begin = lambda order: (order["tokens"], order["seq_len"], order["pieces"][0])  # noqa: E731
        changed = [name for name, order in ours.items() if name in orders and begin(orders[name]) != begin(order)]
        if changed:
            log.warning("samples of %s come in another order than before the checkpoint, so some will be read again before others are read at all: "
                        "the corpus, run.seed or train.seq_len is another one; keep them, and give new text a prefix of its own", ", ".join(changed[:MANY]))


def _claims(saved: Mapping, is_same_run: bool) -> dict[str, tuple[int, int]]:
    """Name -> samples and tokens read, where they are not 0: of its own run without what it took over from the run it began with."""
    before = saved["before"] if is_same_run else {}
    found = {name: (entry["samples"] - before.get(name, (0, 0))[0], entry["tokens"] - before.get(name, (0, 0))[1]) for name, entry in saved["read"].items()}
    return {name: pair for name, pair in found.items() if any(pair)}


def _difference(then: Mapping, now: Mapping, consumed: int) -> str:
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    said = [f"{name}: {then.get(name, (0,))[0]} read, {now.get(name, (0,))[0]} by this configuration"
            + (f" ({then[name][1]} and {now[name][1]} tokens)" if name in then and name in now and then[name][0] == now[name][0] else "")
            for name in differing[:MANY]]
    more = f"; and {len(differing) - MANY} more" if len(differing) > MANY else ""
    return f"this configuration's mixture is not what the first {consumed} samples were read from ({'; '.join(said)}{more})"
