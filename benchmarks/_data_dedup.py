"""Near-duplicates among documents in a file of JSON lines, end to end: read, shingle, hash, find, write what stays; beside datasketch.

The documents are pieces of Python's standard library of 60 to 400 words; every fifth is a copy of an earlier one in which up to a tenth of the
words was replaced. Both take 5-grams of words, 128 permutations, 16 bands of 8 rows, test candidates by their signatures at 0.8 and keep the
first of each connected component; one process, one thread each. The true components come from comparing all documents that share a 5-gram.
"""

import json
import random
import re
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from _data_rows import Row, interleaved, optional, row, speed

QUICK = 500
N, NUM_PERM, BANDS, ROWS, THRESHOLD = 5, 128, 16, 8, 0.8
WORD = re.compile(r"[^\W_]+")  # what data_tools/words.py takes for a word, in ASCII text


def rows(rounds: int, quick: bool) -> Iterator[Row]:
    num_documents = QUICK if quick else 20_000
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = documents(num_documents)
        source = folder / "documents.jsonl"
        source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
        peer = optional("datasketch", lambda: datasketch(source, folder / "theirs.jsonl"))
        turns = interleaved({"datasketch": peer, "ours": lambda: ours(source, folder / "ours.jsonl")}, rounds)
        truth = kept_in_truth(texts)
        notes = [f"{name} keeps {len(turn.answer):,}, {agreement(turn.answer, truth)}" for name, turn in turns.items()]
        ends = turns["ours"].median()
        note = f"{num_documents / ends:,.0f} documents/s, {source.stat().st_size / 1e6 / ends:.1f} MB/s; {len(truth):,} are to be kept: {'; '.join(notes)}"
        yield row(f"dedup, {num_documents:,} documents", turns, speed(turns), ">= 10x", note=note)


def agreement(kept: list[int], truth: set[int]) -> str:
    return f"{len(truth.symmetric_difference(kept))} differ"


def documents(count: int) -> list[str]:
    """`count` texts, the same at every call on one Python."""
    draw = random.Random(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    pool = " ".join(path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))).encode("ascii", "ignore").decode().split()
    texts: list[list[str]] = []
    at = 0
    for i in range(count):
        if i % 5 == 4:
            words = list(draw.choice(texts))
            for _ in range(int(len(words) * draw.choice((0, 0.005, 0.01, 0.02, 0.05, 0.1)))):
                words[draw.randrange(len(words))] = draw.choice(pool)
        else:
            size = draw.randrange(60, 400)
            words = pool[at : at + size] if at + size <= len(pool) else draw.choices(pool, k=size)  # when all has been used, at random
            at += size
        texts.append(words)
    return [" ".join(words) for words in texts]


def shingles(text: str) -> set[str]:
    words = WORD.findall(text.lower())
    return {" ".join(words[i : i + N]) for i in range(max(1, len(words) - N + 1))}


def ours(source: Path, output: Path) -> list[int]:
    from data_tools import dedup

    with redirect_stdout(StringIO()):
        code = dedup.main(["--input", str(source), "--output", str(output), "--threshold", str(THRESHOLD), "--bands", str(BANDS), "--quiet"])
    assert code == 0
    return numbers(output)


def datasketch(source: Path, output: Path):
    from datasketch import MinHash, MinHashLSH

    def step() -> list[int]:
        lines = source.read_bytes().splitlines()
        lsh = MinHashLSH(num_perm=NUM_PERM, params=(BANDS, ROWS))
        # bulk draws the permutations once, not for every document
        tokens = ([shingle.encode() for shingle in shingles(json.loads(line)["text"])] for line in lines)
        signatures, first = MinHash.bulk(tokens, num_perm=NUM_PERM), list(range(len(lines)))
        for i, signature in enumerate(signatures):
            for j in lsh.query(signature):
                if signature.jaccard(signatures[j]) >= THRESHOLD:
                    join(first, i, j)
            lsh.insert(i, signature, check_duplication=False)
        with open(output, "wb") as file:
            file.writelines(lines[i] + b"\n" for i in range(len(lines)) if root(first, i) == i)
        return numbers(output)

    return step


def root(first: list[int], i: int) -> int:
    while first[i] != i:
        first[i] = first[first[i]]
        i = first[i]
    return i


def join(first: list[int], i: int, j: int) -> None:
    low, high = sorted((root(first, i), root(first, j)))
    first[high] = low


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def kept_in_truth(texts: list[str]) -> set[int]:
    """The first documents of the components of pairs whose true similarity is at least THRESHOLD."""
    sets = [shingles(text) for text in texts]
    holders, first = defaultdict(list), list(range(len(texts)))
    for i, mine in enumerate(sets):
        shared = Counter(j for shingle in mine for j in holders[shingle])
        for j, count in shared.items():
            if count / (len(mine) + len(sets[j]) - count) >= THRESHOLD:
                join(first, i, j)
        for shingle in mine:
            holders[shingle].append(i)
    return {i for i in range(len(texts)) if root(first, i) == i}
