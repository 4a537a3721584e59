"""How batches reach the network: buffers that are used again, reading ahead, one rank that reads for others, copies to a device.

Left out: the loader's arithmetic (test_loader.py), gathering (test_gather.py), CUDA streams (no GPU here), DALI (tests/extras).
"""

import contextlib
import gc
import threading
import types

import numpy as np
import pytest
import ranks
import torch
from chats import colour_chats, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import EOD, SEQ, merged

from engine.config import ConfigError
from engine.data import feed as moving
from engine.data.blend import Blend
from engine.data.buffers import Pool
from engine.data.loader import Elsewhere, Loader, Prefetcher, outline
from engine.data.pretraining import GPTSamples
from engine.data.text import NextToken

# --- buffers ------------------------------------------------------------------------------------------------------------


def numbers(pool, value):
    field = pool.block({"a": ((3, 4), torch.int64), "b": ((5,), torch.float32)}).fields["a"]
    return field.fill_(value)


@pytest.mark.parametrize("kind", ["plain", "shared"])
@pytest.mark.parametrize("kept", ["whole", "row", "numpy", "autograd"])
def test_a_buffer_is_not_used_again_while_anything_looks_at_it(kind, kept):
    pool = Pool(kind)
    field = numbers(pool, 7)
    weight = torch.ones(4, dtype=torch.float32, requires_grad=True)
    keep = {"whole": lambda: field, "row": lambda: field.view(-1)[5:6].view(1, 1), "numpy": lambda: field[1:].numpy(),
            "autograd": lambda: (field.view(torch.float64) * weight).sum()}[kept]()
    address = field.data_ptr()
    del field
    others = [numbers(pool, value) for value in range(10)]
    assert address not in [other.data_ptr() for other in others]
    if kept == "autograd":
        keep.backward()
        assert torch.equal(weight.grad, torch.full((3, 4), 7).view(torch.float64).sum(0).float())
    else:
        assert (np.asarray(keep) == 7).all()
    del keep
    assert numbers(pool, 0).data_ptr() == address and pool.num_made == 11


def test_tensors_of_a_block_do_not_overlap_and_are_aligned():
    pool = Pool()
    shapes = {"a": ((3,), torch.bool), "b": ((2, 5), torch.int64), "c": ((0, 4), torch.float32), "d": ((7,), torch.int32)}
    block = pool.block(shapes)
    for value, field in enumerate(block.fields.values()):
        field.fill_(value)
    assert {name: (tuple(f.shape), f.dtype) for name, f in block.fields.items()} == shapes
    assert all((field == torch.tensor(value).to(field.dtype)).all() for value, field in enumerate(block.fields.values()))
    assert all(field.data_ptr() % 64 == 0 for field in block.fields.values() if field.numel())


def test_a_buffer_that_became_too_small_is_replaced_not_kept():
    pool = Pool()
    for size in (10, 1000, 100000):
        pool.block({"a": ((size,), torch.int64)})
    assert pool.num_made == 3 and [owner.size for owner, _ in pool._free] == [800000]


# --- reading ahead ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """A blend of two corpora with an EOD about every fourth token, samples of 16."""
    from engine.data.indexed import IndexedCorpus, IndexedWriter

    sources = []
    for seed in (0, 1):
        prefix = tmp_path_factory.mktemp("blend") / "corpus"
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(60):
                writer.add_document(np.random.default_rng([seed, writer.num_documents]).integers(0, 11, size=23))
        sources.append(GPTSamples(IndexedCorpus(prefix), np.arange(60), None, 16, 1, "train"))
    return Blend(sources, [0.7, 0.3], 100)


def by_hand(samples, first, micro_batch, dp_rank, dp, num):
    """tokens, labels and segments of micro-batches, without a loader."""
    for m in range(num):
        text = samples.gather(first + (m * dp + dp_rank) * micro_batch + np.arange(micro_batch))
        is_eod = text[:, :-1] == 7
        yield text[:, :-1], text[:, 1:], np.cumsum(is_eod, 1) - is_eod


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_way_of_reading_changes_a_batch(samples, data):
    """Depth, threads, kind of buffer, ranks and the sample it resumes at; while the caller keeps some of the batches, for ever or for a while."""
    micro_batch, dp = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    dp_rank, first, num = data.draw(st.integers(0, dp - 1)), data.draw(st.integers(0, 20)), data.draw(st.integers(1, 3))
    dataset = NextToken(samples, 7, reset_at_eod=True, vocab_size=11, num_threads=data.draw(st.integers(1, 3)))
    loader = Loader(dataset, micro_batch, dp_rank, dp, pool=Pool(data.draw(st.sampled_from(["plain", "shared"]))))
    size = micro_batch * dp * num
    starts = range(first, 100 - size, size)
    kept = []
    with Prefetcher(loader, ((start, size) for start in starts), depth=data.draw(st.integers(1, 4))) as batches:
        for start, found in zip(starts, batches, strict=True):
            kept.append((start, found))
            for _ in range(data.draw(st.integers(0, 2)) if kept else 0):  # let go of any, so that buffers come back in any order
                if kept:
                    kept.pop(data.draw(st.integers(0, len(kept) - 1)))
            for at, batch in kept:
                expected = by_hand(samples, at, micro_batch, dp_rank, dp, num)
                for one, (tokens, labels, segments) in zip(batch, expected, strict=True):
                    assert np.array_equal(one["tokens"], tokens) and np.array_equal(one["labels"], labels)
                    assert np.array_equal(one["segment_ids"], segments) and (one["loss_mask"] == 1).all()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_loop_that_lets_go_uses_few_buffers(samples, depth):
    loader = Loader(NextToken(samples), 2, 0, 1)
    addresses = set()
    with Prefetcher(loader, ((4 * k, 4) for k in range(25)), depth) as batches:
        for found in batches:
            addresses.add(found[0]["tokens"].data_ptr())
            del found
    assert len(addresses) <= loader.pool.num_made <= depth + 1


def test_it_reads_as_far_ahead_as_it_may(samples):
    reads, reached = [], {k: threading.Event() for k in range(25)}

    class Spy(Loader):
        def batches(self, first_sample, global_batch):
            reads.append(first_sample // 4)
            reached[first_sample // 4].set()
            return super().batches(first_sample, global_batch)

    with Prefetcher(Spy(NextToken(samples), 2, 0, 1), ((4 * k, 4) for k in range(25)), depth=3) as batches:
        assert reached[2].wait(30) and not reached[3].wait(0.05)  # three before anything is taken
        next(batches)
        assert reached[3].wait(30) and not reached[4].wait(0.05)
    assert reads == [0, 1, 2, 3]


def test_what_has_been_read_is_handed_on_in_the_reading_thread(samples):
    seen = []
    note = lambda found: seen.append((threading.current_thread().name, found))  # noqa: E731
    with Prefetcher(Loader(NextToken(samples), 2, 0, 1), [(0, 4), (4, 4)], 2, note) as batches:
        taken = list(batches)
    assert [name for name, _ in seen] == ["prefetch"] * 2 and all(found is one for (_, found), one in zip(seen, taken))


def test_batches_made_in_python_are_copied_only_where_somebody_else_reads_them():
    class Made:
        rows_per_sample, made = 1, {"tokens": torch.arange(24).view(4, 6), "row": torch.arange(4)}

        def __len__(self):
            return 4

        def batch(self, wanted):
            return {name: tensor[wanted] for name, tensor in self.made.items()} if len(wanted) < 4 else self.made

        def longest(self, wanted):
            return 6

    plain, shared = (Loader(Made(), 4, 0, 1, pool=Pool(kind)).batches(0, 4)[0] for kind in ("plain", "shared"))
    assert plain["tokens"].data_ptr() == Made.made["tokens"].data_ptr() != shared["tokens"].data_ptr()
    assert all(torch.equal(shared[name], tensor) for name, tensor in Made.made.items())


def test_outlines_know_sizes_and_nothing_else(samples):
    import pickle

    dataset = NextToken(samples, 7, reset_at_eod=True)
    text = pickle.loads(pickle.dumps(outline(dataset)))
    assert len(text) == 100 and text.shapes(3) == dataset.shapes(3) and text.masks_follow_from_text and len(pickle.dumps(text)) < 1000
    assert outline(type("Pairs", (), {"rows_per_sample": 2, "__len__": lambda self: 9})()) == Elsewhere(9, 2)


# --- one rank reads -----------------------------------------------------------------------------------------------------


def trained(raw, world_size):
    """On a rank: training lines; samples this rank read itself; whether a .bin was ever mapped here; what it says of itself at the end."""
    from engine import train as loop
    from engine.config import validate
    from engine.log import read_metrics

    notes, mapped = [], []
    honest, note = Loader.batches, loop.RunLog.note

    def batches(self, *where):
        found = honest(self, *where)
        with open("/proc/self/maps") as maps:
            mapped.append(any(line.rstrip().endswith(".bin") for line in maps))
        return found

    Loader.batches, loop.RunLog.note = batches, lambda self, text: (notes.append(text), note(self, text))[1]
    before = threading.active_count()
    try:
        gc.collect()
        loop.train(validate(raw, world_size))
    finally:
        Loader.batches, loop.RunLog.note = honest, note
    lines = [(line["step"], line["loss"], line["grad_norm"], line["consumed_samples"]) for line in read_metrics(raw["run"]["dir"])]
    valid = [line["valid_loss"] for line in read_metrics(raw["run"]["dir"], "held_out")]
    told = [text for text in notes if text.startswith("data: ")]
    num_read, num_bytes = [int(word) for text in told for word in text.split() if word.isdigit()] or (None, None)
    return types.SimpleNamespace(lines=lines, valid=valid, mapped=any(mapped), num_read=num_read, num_bytes=num_bytes,
                                 left=threading.active_count() - before)


PLAIN = {"data": {"reset_at_eod": False}}
LAYOUTS = {
    "tp2 sp shared": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}, {"buffer": "shared", "prefetch": 3}),
    "pp2 one by one": (2, {"parallel": {"pp": 2}}, {"prefetch": 0}),
    "cp2": (2, {"parallel": {"cp": 2}}, {}),
    "dp2": (2, {}, {}),
    "tp2 dp2 pieces": (4, {"parallel": {"tp": 2}}, {"threads": 2}),
    "pp4": (4, {"parallel": {"pp": 4}, "model": {"num_layers": 4}}, {}),
    "pp4 plain": (4, {"parallel": {"pp": 4}, "model": {"num_layers": 4}, **PLAIN}, {"buffer": "shared"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_rank_of_a_replica_reads_and_all_train_as_if_each_had(raw_run, name):
    num_ranks, layout, options = LAYOUTS[name]
    raw = merged(raw_run, layout, {"train": {"eval_every": 4}})
    every = ranks.run(num_ranks, trained, raw, num_ranks)
    elsewhere = {"run": {"dir": raw["run"]["dir"] + "-first"}, "data": {"read_on": "first_rank", **options}}
    first = ranks.run(num_ranks, trained, merged(raw, elsewhere), num_ranks)
    assert len(every[0].lines) == 6 and first[0].lines == every[0].lines and first[0].valid == every[0].valid and len(every[0].valid) == 2
    assert [one.mapped for one in every] == [True] * num_ranks and [one.num_read for one in every] == [None] * num_ranks
    assert [one.left for one in first] == [one.left for one in every]  # no thread stays behind

    dp = num_ranks // np.prod(list(layout.get("parallel", {}).values()))  # True counts as 1
    num_samples, num_bytes = (6 * 4 + 2 * 4) // dp, (6 * 4 + 2 * 4) // dp * (SEQ + 1) * 8
    if dp == num_ranks:
        assert [(one.mapped, one.num_read) for one in first] == [(True, None)] * num_ranks
        return
    is_reader = [rank in ((0, 2) if "dp2" in name else (0,)) for rank in range(num_ranks)]
    assert [one.mapped for one in first] == is_reader
    assert [one.num_read for one in first] == [num_samples * reads for reads in is_reader]
    needs_text = [not (name == "pp4 plain" and rank in (1, 2)) for rank in range(num_ranks)]
    assert [one.num_bytes for one in first] == [num_bytes * (not reads and needs) for reads, needs in zip(is_reader, needs_text)]


def test_a_run_that_stops_and_goes_on_reads_what_an_unbroken_one_does(raw_run):
    """The second half is read elsewhere, further ahead and by more threads; the first ends before all that was read ahead was used."""
    two = {"parallel": {"tp": 2}, "train": {"eval_samples": 0}}
    unbroken = ranks.run(2, trained, merged(raw_run, two), 2)[0].lines
    broken = merged(raw_run, two, {"run": {"dir": raw_run["run"]["dir"] + "-broken"}})
    first = {"data": {"read_on": "first_rank", "prefetch": 2}}
    ranks.run(2, trained, merged(broken, first, {"train": {"max_minutes": 1e-9}}), 2)
    second = {"data": {"read_on": "first_rank", "prefetch": 9, "threads": 3, "buffer": "shared"}}
    assert ranks.run(2, trained, merged(broken, second), 2)[0].lines == unbroken and len(unbroken) == 6


def test_conversations_are_read_by_one_rank_too(raw_run, tmp_path):
    """Whole batches, made in Python and cut to their longest row, go to the ranks in the middle as well."""
    files = [write_jsonl(tmp_path / f"{name}.jsonl", colour_chats(24, seed)) for name, seed in (("train", 0), ("valid", 1))]
    raw = merged(raw_run, {"stage": "sft", "parallel": {"pp": 2}, "chat": {"template": "tags", "workers": 1, "pack": False},
                           "train": {"seq_len": 128, "steps": 3}, "schedule": {"kind": "constant", "warmup_steps": 0}})
    raw["data"] = {"train": [files[0]], "valid": {"held_out": [files[1]]}, "tokenizer": "bytes"}
    every = ranks.run(2, trained, raw, 2)
    first = ranks.run(2, trained, merged(raw, {"run": {"dir": raw["run"]["dir"] + "-first"}, "data": {"read_on": "first_rank"}}), 2)
    assert len(every[0].lines) == 3 and first[0].lines == every[0].lines and first[0].valid == every[0].valid and len(every[0].valid) == 1
    assert [one.num_read for one in first] == [16, 0] and first[0].num_bytes == 0 < first[1].num_bytes


def refused(raw, world_size):
    """On a rank: the error that training ends in."""
    try:
        trained(raw, world_size)
    except ValueError as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("change, found", [
    ({"model": {"vocab_size": 50}, "data": {"eod_id": EOD}}, "is outside the vocabulary of 50"),
    ({"model": {"vocab_size": 50}, "data": {"prefetch": 0, "buffer": "shared"}}, "is outside the vocabulary of 50"),
    ({"data": {"train": ["/nowhere/corpus"]}}, "/nowhere/corpus.idx"),
    ({"stage": "examples.own_stage.focal:Focal"}, "stage=examples.own_stage.focal:Focal looks at its data on every rank"),
], ids=["while reading ahead", "while reading", "while opening", "of a stage that needs its data"])
def test_an_error_of_the_reader_is_raised_on_every_rank(raw_run, change, found):
    raw = merged(raw_run, {"parallel": {"tp": 2}, "data": {"read_on": "first_rank"}, "train": {"eval_samples": 0}}, change)
    one, two = ranks.run(2, refused, raw, 2)
    assert one == two and one[0] == ("ConfigError" if "stage" in change else "DataError") and found in one[1]


def test_other_errors_keep_what_they_say():
    from engine.data.replica import _outcome, _raised

    def fail(error):
        raise error

    assert _outcome(lambda: 5) == (5, None)
    mistakes = _raised(*_outcome(lambda: fail(ConfigError(["a", "b"])))[1])
    assert isinstance(mistakes, ConfigError) and mistakes.problems == ["a", "b"]
    ours = _raised(*_outcome(lambda: fail(KeyError("lost")))[1])
    assert type(ours) is RuntimeError and "KeyError: 'lost'" in str(ours) and "test_feed.py" in str(ours)


def test_shared_memory_is_refused_between_machines():
    from engine.data.replica import _refuse_several_machines

    _refuse_several_machines([[0, 1], [2, 3]], ["a", "a", "b", "b"])
    with pytest.raises(ConfigError, match=r"ranks of replica 1 are on several; set data.buffer=auto"):
        _refuse_several_machines([[0, 1], [2, 3]], ["a", "a", "b", "a"])


# --- to the device ------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands for copies to a device: notes what was started, and gives copies."""

    def __init__(self):
        self.started, self.asked = {}, []

    def start(self, micro_batches):
        assert threading.current_thread().name == "prefetch"
        self.started |= {id(tensor): (tensor, tensor.clone()) for batch in micro_batches for tensor in batch.values()}

    def of(self, tensor):
        tensor, copy = self.started.get(id(tensor), (None, tensor.clone()))
        self.asked.append(tensor is not None)
        return copy


def trained_on_copies(raw, world_size):
    """On a rank: training lines, how many tensors were copied ahead, how many of those the network asked for."""
    honest, recorder = moving.open_copies, Recorder()
    moving.open_copies = lambda run, device: recorder
    try:
        return trained(raw, world_size).lines, len(recorder.started), sum(recorder.asked)
    finally:
        moving.open_copies = honest


def test_the_network_is_fed_with_the_copies(raw_run):
    raw = merged(raw_run, {"train": {"eval_samples": 0}})
    plain = ranks.run(1, trained, raw, 1)[0].lines
    lines, started, asked = ranks.run(1, trained_on_copies, merged(raw, {"run": {"dir": raw["run"]["dir"] + "-copies"}}), 1)[0]
    assert lines == plain and started == asked == 6 * 4 * 5  # tokens, labels, loss_mask, position_ids and segment_ids of every micro-batch


@pytest.fixture
def cuda(monkeypatch):
    """Stands for torch.cuda; work on its stream is done when `is_done` is set, and copies land on the meta device."""
    fake = types.SimpleNamespace(is_done=False, log=[])

    class Event:
        def record(self, stream):
            fake.log.append(("record", stream))

        def query(self):
            return fake.is_done

    training = types.SimpleNamespace(wait_event=lambda event: fake.log.append(("wait", event)))
    for name, value in {"current_device": lambda: 0, "Stream": lambda device: "side", "Event": Event, "current_stream": lambda device: training,
                        "stream": lambda stream: contextlib.nullcontext(), "device": lambda device: contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: fake.log.append(("keep", stream)))
    fake.training, fake.copies = training, moving.SideStream()
    fake.copies._device = torch.device("meta")
    return fake


def test_a_buffer_outlives_the_copy_that_reads_it(cuda):
    pool = Pool()
    batch = {"tokens": numbers(pool, 1)}
    address = batch["tokens"].data_ptr()
    cuda.copies.start([batch])
    del batch
    later = numbers(pool, 2)
    cuda.copies.start([{"tokens": later}])
    assert address not in (later.data_ptr(), numbers(pool, 3).data_ptr())  # nobody but the copy needs it any more, and that is under way
    cuda.is_done = True
    cuda.copies.start([])
    assert address in [field.data_ptr() for field in [numbers(pool, value) for value in range(2)]]


def test_the_training_stream_waits_for_a_copy_and_its_memory_is_kept(cuda):
    batch = {"tokens": torch.ones(2, 3), "row": torch.arange(2)}
    cuda.copies.start([batch])
    assert cuda.log == [("record", "side")]
    copy = cuda.copies.of(batch["tokens"])
    assert copy.device.type == "meta" and copy.shape == (2, 3) and cuda.copies.of(batch["tokens"]) is copy
    assert [what for what, _ in cuda.log[1:]] == ["wait", "keep"] * 2 and cuda.log[2] == ("keep", cuda.training)
    assert cuda.copies.of(torch.ones(4)).device.type == "meta" and len(cuda.log) == 5  # not started: copied when it is asked for


def waits(raw):
    """On a rank: what a Feed says it has waited, by a clock that only reading moves."""
    from engine import batches
    from engine.config import validate
    from engine.mcore.checkpoint import Position

    clock = types.SimpleNamespace(now=0.0)
    loader = types.SimpleNamespace(batches=lambda first, size: setattr(clock, "now", clock.now + 1.5) or [first])
    honest, batches.time = batches.time, types.SimpleNamespace(perf_counter=lambda: clock.now)
    try:
        with batches.Feed(validate(merged(raw, {"data": {"prefetch": 0}})), loader, Position(), False) as feed:
            taken = next(feed), next(feed)
            clock.now += 100  # the step itself
            first = feed.waited()
            return taken, first, feed.waited(), (next(feed), feed.waited())
    finally:
        batches.time = honest


def test_the_wait_for_data_is_what_the_loop_waits(raw_run):
    assert ranks.run(1, waits, raw_run)[0] == (([0], [4]), 3.0, 0.0, ([8], 1.5))


def test_what_a_machine_does_not_have_is_refused(monkeypatch):
    run = types.SimpleNamespace(data=types.SimpleNamespace(feed="dali", buffer="pinned"))
    monkeypatch.setattr(moving.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="data.feed=dali needs NVIDIA DALI, which is not installed; pip install .*nvidia-dali-cuda130"):
        moving.open_copies(run, "cpu")
    with pytest.raises(ConfigError, match="data.buffer=pinned is memory that a GPU copies from, but this run is on cpu"):
        moving.buffer_kind(run, "cpu")
    for buffer, device, kind in (("auto", "cpu", "plain"), ("auto", "cuda", "pinned"), ("plain", "cuda", "plain"), ("shared", "cpu", "shared")):
        run.data.buffer, run.data.feed = buffer, "auto"
        assert moving.buffer_kind(run, device) == kind
    assert moving.open_copies(run, "cpu") is None
