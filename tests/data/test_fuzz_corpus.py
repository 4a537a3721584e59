"""Damaged corpora under AddressSanitizer and UndefinedBehaviorSanitizer: csrc/fuzz/fuzz_corpus.cpp is built, run, and its counts are read.

The program itself stops at the first crash, and answers 1 for a read that is neither an error naming file and field, nor the sound corpus,
nor what a plain second reader of the whole damaged files finds. Here stands which damage may make another, consistent corpus at all.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from engine.data.indexed import IndexedWriter

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = ["fuzz/fuzz_corpus.cpp", "corpus.cpp", "gather.cpp", "mapped_file.cpp", "read_file.cpp", "workers.cpp"]
# A token has no second witness, and neither has a border of documents between sequences: other bytes there are another corpus.
UNDETECTABLE = {"random bin", "document entry", "random idx", "border moved everywhere"}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "fuzz_corpus"
    flags = ["-std=c++17", "-O0", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = [path.with_name(f"{Path(source).stem}.o") for source in SOURCES]
    jobs = [subprocess.Popen(["g++", *flags, "-c", CSRC / source, "-o", out]) for source, out in zip(SOURCES, objects)]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    subprocess.run(["g++", *flags, *objects, "-o", path], check=True)
    return path


def write(prefix, dtype, lengths, high, seed=3):
    """Some documents of several sequences, some empty sequences, ids up to `high`."""
    random = np.random.default_rng(seed)
    lengths = list(lengths)
    with IndexedWriter(prefix, dtype) as writer:
        while lengths:
            own, lengths = lengths[: 1 + len(lengths) % 3], lengths[1 + len(lengths) % 3 :]
            writer.add_document(random.integers(1, high, size=sum(own)), own)
    return str(prefix)


def run(program, prefix, folder, num_random, seed=1):
    folder.mkdir()
    done = subprocess.run([program, prefix, folder, str(seed), str(num_random)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = {}
    for line in done.stdout.splitlines():
        kind, outcome, count = *line.rpartition("\t")[0].split(": "), int(line.rpartition("\t")[2])
        counts.setdefault(kind, {})[outcome] = count
    return counts


def check(counts):
    assert {kind for kind, outcomes in counts.items() if "another corpus" in outcomes} <= UNDETECTABLE
    assert counts["sound"] == {"unharmed": 1}


@pytest.mark.parametrize("dtype, high", [(np.uint16, 2**16), (np.int32, 2**31)], ids=["uint16", "int32"])
def test_each_field_each_cut_and_random_damage(program, tmp_path, dtype, high):
    shutil.copy(write(tmp_path / "c", dtype, [3, 0, 20, 7, 7, 1, 40, 0, 5, 12, 9, 2], high) + ".idx", tmp_path / "kept.idx")
    counts = run(program, str(tmp_path / "c"), tmp_path / "work", 4500)
    check(counts)
    num_sequences, num_documents = np.frombuffer((tmp_path / "kept.idx").read_bytes(), dtype="<u8", count=2, offset=18)
    # Nothing of the header, no length, no offset, no cut may pass; of 255 dtype codes none reads the same tokens.
    assert counts["dtype code"] == {"error": 255}
    for kind in ("magic", "version", "sequence count", "document count"):
        assert set(counts[kind]) == {"error"} and counts[kind]["error"] >= 8 * 9, kind
    for kind in ("length", "length swapped", "byte offset", "byte offset swapped", "document entry swapped", "idx cut", "idx longer", "bin cut", "bin longer",
                 "border moved below zero"):
        assert set(counts[kind]) == {"error"}, kind
    assert counts["border moved everywhere"] == {"another corpus": int(num_sequences) - 3}  # all but the two empty ones and the last
    assert sum(counts["random idx"].values()) + sum(counts["random bin"].values()) == 4500
    assert counts["random idx"]["error"] > 3000 and counts["random bin"]["another corpus"] > 20
    assert counts["document entry"]["another corpus"] <= 4 * int(num_documents)


def test_a_code_of_the_same_size_reads_small_ids_alike(program, tmp_path):
    counts = run(program, write(tmp_path / "c", np.int16, [5, 9, 30], 2**15), tmp_path / "work", 0)
    check(counts)
    assert counts["dtype code"] == {"error": 254, "unharmed": 1}  # 3 (int16) and 8 (uint16)


def test_random_damage_over_many_blocks(program, tmp_path):
    lengths = np.random.default_rng(0).integers(0, 12, size=1300)  # blocks are 512 sequences
    counts = run(program, write(tmp_path / "c", np.uint8, lengths, 2**8), tmp_path / "work", 1000)
    check(counts)
    assert counts["random idx"]["error"] > 700
