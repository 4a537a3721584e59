"""dedup.py against plain Python: word n-grams, exact copies, near-copies by their true Jaccard similarity, the order kept."""

import gzip
import json
import os
import random
import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from data_tools import dedup, words as words_module
from data_tools.manifest import read_manifest
from data_tools.minhash import Bands, choose_bands, first_of_cluster
from data_tools.words import ngrams, split_words

LETTERS = "aB9_ é\u0301ß.\n東の😀\U00020000Ⅷ"


def naive_words(text):
    """Runs of letters, digits and combining marks; ideographs and kana alone. Written for LETTERS only."""
    found = []
    for match in re.finditer(r"[東の\U00020000]|[aB9éßⅧ\u0301]+", text):
        found.append((match.group().lower(), match.start(), match.end()))
    return found


def naive_ngrams(text, n, short=True):
    found = [word for word, _, _ in naive_words(text)]
    if short and 0 < len(found) < n:
        return [tuple(found)]
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


@settings(max_examples=60, deadline=None)
@given(strategies.lists(strategies.text(LETTERS, max_size=30), max_size=6), strategies.integers(1, 4), strategies.booleans(), strategies.integers(1, 40))
def test_words_and_ngrams_are_those_of_plain_python(texts, n, short, block):
    before, words_module.BLOCK_CHARACTERS = words_module.BLOCK_CHARACTERS, block
    try:
        words = split_words(texts)
    finally:
        words_module.BLOCK_CHARACTERS = before
    hashes, first, offsets = ngrams(words, n, short)
    names = {}
    for i, text in enumerate(texts):
        span = slice(words.offsets[i], words.offsets[i + 1])
        assert list(zip(words.starts[span].tolist(), words.ends[span].tolist())) == [(a, b) for _, a, b in naive_words(text)]
        expected = naive_ngrams(text, n, short)
        span = slice(offsets[i], offsets[i + 1])
        assert len(hashes[span]) == len(expected)
        assert (first[span] - words.offsets[i]).tolist() == list(range(len(expected)))
        for value, gram in zip(hashes[span].tolist(), expected):
            assert names.setdefault(value, gram) == gram
    assert len(set(names.values())) == len(names)  # equal n-grams, and only those, have equal hashes


def test_words_that_differ_in_one_letter_differ_in_their_hash():
    """Words of every length up to four times the eight bytes that are read at once, and one beyond ASCII."""
    words = ["a" * n for n in range(1, 34)] + ["a" * k + "b" + "a" * (n - k - 1) for n in range(1, 34) for k in range(n)] + ["a" * 9 + "é"]
    hashes = split_words([" ".join(words)]).hashes
    assert len(words) == len(hashes) == len(set(hashes.tolist()))
    assert (split_words([" ".join(words).upper()]).hashes == hashes).all()
    assert (split_words(words + ["東"]).hashes[:-1] == hashes).all()  # whatever else is in the block


def write_jsonl(path, texts, **fields):
    lines = [json.dumps({"n": i, "text": text, **fields}) for i, text in enumerate(texts)]
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def run(*inputs, output, options=()):
    return dedup.main(["--input", *map(str, inputs), "--output", str(output), "--quiet", *options])


def numbers_of(path):
    data = path.read_bytes()
    return [json.loads(line)["n"] for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]


def near_copies(seed=0, count=120):
    """Texts of 60 to 90 random words; a third are copies of earlier ones with up to eight words changed."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = []
    for _ in range(count):
        if texts and draw.random() < 0.35:
            new = draw.choice(texts).split()
            for _ in range(draw.randrange(9)):
                new[draw.randrange(len(new))] = draw.choice(vocabulary)
        else:
            new = draw.choices(vocabulary, k=draw.randrange(60, 90))
        texts.append(" ".join(new))
    return texts


@cache
def grams(text, n):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a, b, n):
    a, b = grams(a, n), grams(b, n)
    return len(a & b) / len(a | b)


def kept_by_hand(texts, threshold, n):
    """The first document of each connected component of pairs at or above the threshold."""
    first = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(texts[i], texts[j], n) >= threshold:
                low, high = sorted((first[i], first[j]))
                first = [low if f == high else f for f in first]
    return [i for i, f in enumerate(first) if i == f]


def test_verified_near_copies_are_those_of_the_true_jaccard_similarity(tmp_path, capsys):
    texts = near_copies()
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    # 64 bands of 2 rows miss a pair of similarity 0.5 once in 10^8, so what is left depends on the exact test alone.
    options = ["--threshold", "0.5", "--ngram", "3", "--bands", "64", "--verify", "exact"]
    assert run(source, output=tmp_path / "o.jsonl", options=options) == 0
    expected = kept_by_hand(texts, 0.5, 3)
    assert numbers_of(tmp_path / "o.jsonl") == expected and len(expected) < 100
    assert f"120 documents in: {len(expected)} written, {120 - len(expected)} duplicates" in capsys.readouterr().out


def test_estimate_agrees_where_the_similarity_is_clear(tmp_path):
    texts = near_copies(1)
    # Bands of two rows make candidates of hundreds of pairs that are not similar; the estimate has to refuse them.
    options = ["--ngram", "3", "--bands", "64", "--duplicates", str(tmp_path / "d.jsonl")]
    assert run(write_jsonl(tmp_path / "a.jsonl", texts), output=tmp_path / "o.jsonl", options=options) == 0
    kept = set(numbers_of(tmp_path / "o.jsonl"))
    assert kept <= set(range(120)) - {i for i in range(120) if any(jaccard(texts[i], texts[j], 3) > 0.97 for j in range(i))}
    assert kept >= {i for i in range(120) if all(jaccard(texts[i], texts[j], 3) < 0.6 for j in range(i))}
    removed = [json.loads(line) for line in (tmp_path / "d.jsonl").read_bytes().splitlines()]
    assert len(removed) + len(kept) == 120
    for entry in removed:
        a, b = entry["line"] - 1, entry["kept_line"] - 1
        assert b in kept and b < a and abs(entry["similarity"] - jaccard(texts[a], texts[b], 3)) < 0.2


def test_result_does_not_depend_on_workers_chunks_or_compression(tmp_path, monkeypatch):
    texts = near_copies(2)
    halves = texts[:60], texts[60:]
    plain = [write_jsonl(tmp_path / f"{i}.jsonl", half) for i, half in enumerate(halves)]
    packed = [write_jsonl(tmp_path / f"{i}.jsonl.gz", half) for i, half in enumerate(halves)]
    assert run(*plain, output=tmp_path / "one.jsonl", options=["--ngram", "3"]) == 0
    monkeypatch.setattr("data_tools.reader.CHUNK_BYTES", 4096)
    assert run(*packed, output=tmp_path / "two.jsonl", options=["--ngram", "3", "--workers", "2"]) == 0
    assert run(*plain, output=tmp_path / "three.jsonl.gz", options=["--ngram", "3"]) == 0
    one = (tmp_path / "one.jsonl").read_bytes()
    assert one == (tmp_path / "two.jsonl").read_bytes() == gzip.decompress((tmp_path / "three.jsonl.gz").read_bytes())
    lines = {line for i in range(2) for line in (tmp_path / f"{i}.jsonl").read_bytes().splitlines()}
    assert set(one.splitlines()) < lines  # whole records, byte for byte


def test_exact_ignores_case_white_space_and_unicode_form_only(tmp_path, capsys):
    texts = ["Café au lait", "cafe\u0301  AU\nlait ", "Cafe au lait", "", "  ", "Café au lait!"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run(source, output=tmp_path / "o.jsonl", options=["--method", "exact", "--duplicates", str(tmp_path / "d.jsonl")]) == 0
    assert numbers_of(tmp_path / "o.jsonl") == [0, 2, 3, 5]
    assert "6 documents in: 4 written, 2 duplicates in 2 clusters (largest 2), 0 malformed" in capsys.readouterr().out
    assert json.loads((tmp_path / "d.jsonl").read_bytes().splitlines()[1]) == {
        "file": source, "line": 5, "kept_file": source, "kept_line": 4, "similarity": 1.0,
    }  # fmt: skip
    manifest = read_manifest(tmp_path / "o.jsonl.manifest.json")
    assert manifest["counts"]["duplicates"] == 2 and [entry["path"] for entry in manifest["outputs"]] == ["o.jsonl", "d.jsonl"]


def test_short_and_wordless_documents(tmp_path):
    """Below n words the whole text counts; what has no words is never a near-copy."""
    texts = ["one two", "One  two!", "one two three", "...", "...", "one"]
    assert run(write_jsonl(tmp_path / "a.jsonl", texts), output=tmp_path / "o.jsonl") == 0
    assert numbers_of(tmp_path / "o.jsonl") == [0, 2, 3, 4, 5]


def test_malformed_documents_are_reported_and_do_not_shift_the_others(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": 0}\n{"text"\n\n{"text": "one", "n": 1}\n{"n": 2}\n{"text": "two", "n": 3}')
    (tmp_path / "b.txt").write_text("two")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    assert run(*inputs, output=tmp_path / "o.jsonl") == 1
    assert "2 malformed documents, the first at" in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.txt"]
    assert run(*inputs, output=tmp_path / "o.jsonl", options=["--on-error", "skip"]) == 0
    assert numbers_of(tmp_path / "o.jsonl") == [0, 3]
    out, err = capsys.readouterr()
    assert "6 documents in: 2 written, 2 duplicates in 2 clusters (largest 2), 2 malformed" in out and "a.jsonl:5: no key 'text'" in err


def test_folders_zst_and_parquet_in_one_run(tmp_path):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n")  # a file without documents
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"n": 0, "text": "one two"}\n{"n": 1, "text": "three"}\n'))
    pyarrow.parquet.write_table(pyarrow.table({"n": [2, 3], "text": ["three", "four"], "extra": [None, 1.5]}), folder / "c.parquet")
    assert run(folder, output=tmp_path / "o.jsonl", options=["--duplicates", str(tmp_path / "d.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_bytes().splitlines()] == [
        {"n": 0, "text": "one two"}, {"n": 1, "text": "three"}, {"n": 3, "text": "four", "extra": 1.5},
    ]  # fmt: skip
    assert json.loads((tmp_path / "d.jsonl").read_bytes()) == {
        "file": f"{folder}/c.parquet", "line": 1, "kept_file": f"{folder}/b.jsonl.zst", "kept_line": 2, "similarity": 1.0,
    }  # fmt: skip


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["x", "x"])
    assert run(source, output=tmp_path / "o.jsonl", options=["--dry-run"]) == 0
    assert "1 duplicates" in capsys.readouterr().out and os.listdir(tmp_path) == ["a.jsonl"]


def test_no_documents_give_an_empty_file(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n")
    assert run(tmp_path / "a.jsonl", output=tmp_path / "o.jsonl") == 0
    assert (tmp_path / "o.jsonl").read_bytes() == b"" and "0 documents in" in capsys.readouterr().out


@pytest.mark.parametrize("options, code, words", [
    (["--threshold", "1.5"], 2, "1.5 is not between 0 and 1"),
    (["--bands", "200"], 2, "at most that many bands"),
    (["--seed", "-1"], 2, "--seed -1"),
    (["--duplicates", "a.jsonl"], 2, "is already the name"),
    (["--output", "o.txt"], 2, "the name must end in one of .jsonl"),
    (["--output", "a.jsonl"], 2, "is already the name"),
    (["--input", "a.jsonl", "a.jsonl"], 2, "names a file twice"),
    (["--input", "none.jsonl"], 1, "none.jsonl"),
], ids=lambda value: str(value))  # fmt: skip
def test_mistakes_of_users(tmp_path, capsys, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert run("a.jsonl", output="o.jsonl", options=options) == code
    assert words in capsys.readouterr().err and os.listdir(tmp_path) == ["a.jsonl"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, capsys, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    firsts = dedup._firsts
    monkeypatch.setattr(dedup, "_firsts", lambda *args: (write_jsonl(tmp_path / "a.jsonl", ["x"]), firsts(*args))[1])
    assert run(source, output=tmp_path / "o.jsonl") == 1
    assert "changed while it was read: line 2 is gone" in capsys.readouterr().err and os.listdir(tmp_path) == ["a.jsonl"]


def test_bands_are_the_longest_that_find_ninety_percent():
    assert choose_bands(0.8, 128) == Bands(16, 8)
    for threshold in (0.05, 0.5, 0.9, 1.0):
        bands = choose_bands(threshold, 128)
        assert bands.num_bands * bands.num_rows <= 128 and bands.recall(threshold) >= 0.9
        assert Bands(128 // (bands.num_rows + 1), bands.num_rows + 1).recall(threshold) < 0.9 or threshold == 1.0
    assert choose_bands(0.8, 100, 30) == Bands(30, 3)


@settings(max_examples=50, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.integers(0, 9), strategies.integers(0, 9)), max_size=12))
def test_clusters_are_connected_components_named_by_their_first(pairs):
    label = list(range(10))
    for a, b in pairs:
        low, high = sorted((label[a], label[b]))
        label = [low if x == high else x for x in label]
    array = np.array(pairs, np.int64).reshape(-1, 2)
    assert first_of_cluster(array, 10).tolist() == label
