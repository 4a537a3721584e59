"""Loading samples of 2048 tokens: warm beside megatron-core's GPTDataset, cold beside reads of a mapped file.

Warm: a corpus in the page cache, random samples in batches of 64, one thread, one core; the peer is GPTDataset.__getitem__ on the same files,
samples and order, without masks; both hand out int64 tokens. Cold: a file of 1 GB of which 2,000 random sequences of 2048 uint16 tokens are read
in random order. Before each turn, outside the measured time, the whole file is thrown out of the page cache with posix_fadvise(POSIX_FADV_DONTNEED);
the note says which share of the pages to be read is there nevertheless (preadv2 with RWF_NOWAIT). The peer copies the same sequences out of numpy.memmap one by one; ours gathers them with data.storage=pread in batches of
64, with one thread; "prefetched" announces each batch one ahead, and reads with four threads. Caches below the kernel, of the disk or of the host of
a virtual machine, are not emptied, so the cold figures are theirs as well. Left out: object stores, and several processes.
"""

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _data_rows import Row, interleaved, optional, row, speed

from engine.data.indexed import IndexedCorpus, IndexedWriter
from engine.data.pretraining import GPTSamples

SEED, SEQ_LEN, BATCH = 1234, 2048, 64


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TRIREME_BENCH_DIR")))
    try:
        yield from warm(folder, rounds, quick)
        yield from cold(folder, rounds, quick)
    finally:
        shutil.rmtree(folder)


def warm(folder: Path, rounds: int, quick: bool) -> Iterator[Row]:
    random = np.random.default_rng(0)
    with IndexedWriter(folder / "warm", np.uint16) as writer:
        for length in random.lognormal(6.2, 1.0, 2_000 if quick else 40_000).astype(int) + 1:
            writer.add_document(random.integers(0, 50_000, size=length, dtype=np.uint16))
    corpus = IndexedCorpus(folder / "warm")
    samples = GPTSamples(corpus, np.arange(len(corpus)), None, SEQ_LEN, SEED, "train")
    numbers = random.permutation(len(samples))[:4096]
    batches = [numbers[i : i + BATCH] for i in range(0, numbers.size, BATCH)]
    peer = optional("megatron-core", lambda: gpt_dataset(folder / "warm", len(samples), numbers))
    turns = interleaved({"GPTDataset": peer, "ours": lambda: [samples.gather(batch) for batch in batches]}, rounds)
    own = turns["ours"]
    yield row(f"loader, warm, seq {SEQ_LEN}, {numbers.size} samples", turns, speed(turns), ">= 5x", note=", ".join(
        [f"ours {numbers.size / own.median_cpu():,.0f} samples/s/core"] + [f"peer {numbers.size / t.median_cpu():,.0f}" for name, t in turns.items() if name != "ours"]
        + ([same(turns["GPTDataset"].answer, np.concatenate(own.answer))] if peer else [])))


def gpt_dataset(prefix: Path, num_samples: int, numbers: np.ndarray):
    """Steps through megatron-core's dataset; it answers tokens [s] and labels [s] as int64 tensors."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, eod, pad = 50_000, 0, -1
        unique_identifiers = {"class": "stub"}

    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=SEQ_LEN, tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False, path_to_cache=str(prefix) + "-cache", split="1",
    )
    source = IndexedDataset(str(prefix), mmap=True)
    dataset = GPTDataset(source, str(prefix), np.arange(len(source.sequence_lengths), dtype=np.int32), num_samples, Split.train, config)
    return lambda: [dataset[int(j)] for j in numbers]


def same(theirs: list, ours: np.ndarray) -> str:
    tokens = np.stack([sample["tokens"].numpy() for sample in theirs])
    labels = np.stack([sample["labels"].numpy() for sample in theirs])
    return "same tokens" if np.array_equal(tokens, ours[:, :-1]) and np.array_equal(labels, ours[:, 1:]) else "OTHER TOKENS"


def cold(folder: Path, rounds: int, quick: bool) -> Iterator[Row]:
    num_sequences, num_reads = (4_000, 200) if quick else (262_144, 2_000)
    width = SEQ_LEN + 1
    random = np.random.default_rng(1)
    with IndexedWriter(folder / "cold", np.uint16) as writer:
        piece = random.integers(0, 50_000, size=width * 64, dtype=np.uint16)
        for i in range(0, num_sequences, 64):
            writer.add_document(piece + np.uint16(i % 1000), [width] * 64)
    path = f"{folder}/cold.bin"
    numbers = random.permutation(num_sequences)[:num_reads]
    # A sample index whose sample 2j is sequence j, so that all contestants read the same bytes; those between them are never asked for.
    documents = np.arange(num_sequences, dtype=np.int32)
    starts = np.stack([np.repeat(documents, 2), np.tile(np.array([0, SEQ_LEN], dtype=np.int32), num_sequences)], 1)
    mapped = np.memmap(path, dtype=np.uint16, mode="r")
    read = IndexedCorpus(folder / "cold", "pread")
    batches = [2 * numbers[i : i + BATCH] for i in range(0, num_reads, BATCH)]
    left = []

    def peer():
        return [mapped[j * width : (j + 1) * width].astype(np.int64) for j in numbers.tolist()]

    def one_thread():
        return [read.gather(documents, starts, batch, SEQ_LEN)[0] for batch in batches]

    def prefetched():
        answers = []
        for batch, following in zip(batches, [*batches[1:], None]):
            if following is not None:
                read.announce(documents, starts, following, SEQ_LEN)
            answers.append(read.gather(documents, starts, batch, SEQ_LEN, num_threads=4)[0])
        return answers

    def forget():
        """Mapped pages stay, so the map is told to let go of them first."""
        mapped._mmap.madvise(mmap.MADV_DONTNEED)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left.append(np.mean([is_cached(file.fileno(), j * width * 2) for j in numbers.tolist()]))

    for name, step, goal in (("one thread", one_thread, ">= 2.5x"), ("prefetched", prefetched, ">= 4x")):
        turns = interleaved({"mmap": peer, "ours": step}, rounds, warm_up=False, before=forget)
        is_same = np.array_equal(np.stack(turns["mmap"].answer), np.concatenate(turns["ours"].answer))
        yield row(f"loader, cold, {num_reads} reads of 4 KB in {os.path.getsize(path) / 1e9:.1f} GB, {name}", turns, speed(turns), goal,
                  note=f"mmap {num_reads / turns['mmap'].median():,.0f} reads/s, ours {num_reads / turns['ours'].median():,.0f}, "
                       f"{max(left):.1%} in memory before, "
                       + ("same tokens" if is_same else "OTHER TOKENS"))


def is_cached(descriptor: int, offset: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
