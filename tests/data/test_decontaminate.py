"""decontaminate.py against plain Python: which documents share n words with an item, what is cut, what the report says."""

import json
import os
import random

import pytest
from hypothesis import given, settings, strategies

from data_tools import decontaminate
from data_tools.manifest import read_manifest
from data_tools.overlap import Overlap, cut, read_index

WORDS = [f"w{i}" for i in range(400)]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def run(source, evaluation, output, *options):
    return decontaminate.main(["--input", str(source), "--evaluation", str(evaluation), "--output", str(output), "--quiet", *map(str, options)])


def records(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def grams(text, n):
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def training_and_items(seed=0, num_documents=60, num_items=12):
    """Documents of 40 to 80 words; every third holds 5 to 20 words of an item, in other case and punctuation."""
    draw = random.Random(seed)
    items = [" ".join(draw.choices(WORDS, k=draw.randrange(6, 30))) for _ in range(num_items)]
    documents = []
    for i in range(num_documents):
        words = draw.choices(WORDS, k=draw.randrange(40, 80))
        if i % 3 == 0:
            item = draw.choice(items).upper().split()
            begin = draw.randrange(len(item))
            words[20:20] = [word + draw.choice(["", ",", "."]) for word in item[begin : begin + draw.randrange(5, 21)]]
        documents.append(" ".join(words))
    return documents, items


@pytest.mark.parametrize("n", [5, 8, 13])
def test_dropped_documents_and_report_are_those_of_plain_python(tmp_path, capsys, n):
    documents, items = training_and_items()
    source, evaluation = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "e.jsonl", items)
    assert run(source, evaluation, tmp_path / "o.jsonl", "--ngram", n, "--report", tmp_path / "r.jsonl") == 0
    all_grams = {gram for item in items for gram in grams(item, n)}
    dirty = [i for i, text in enumerate(documents) if all_grams & set(grams(text, n))]
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == [i for i in range(60) if i not in dirty]
    assert 3 <= len(dirty) < 25
    for i, line in enumerate(records(tmp_path / "r.jsonl")):
        mine = set(grams(items[i], n))
        holders = [j + 1 for j, text in enumerate(documents) if mine & set(grams(text, n))]
        assert (line["file"], line["line"], line["words"], line["ngrams"]) == (evaluation, i + 1, len(items[i].split()), len(mine))
        assert line["found"] == len(mine & {gram for text in documents for gram in grams(text, n)})
        assert line["documents"] == len(holders) and line["first_documents"] == [f"{source}:{j}" for j in holders[:5]]
    out, err = capsys.readouterr()
    short = sum(len(item.split()) < n for item in items)
    assert f"60 documents in: {60 - len(dirty)} written as they are, 0 cut into 0 pieces, {len(dirty)} dropped, 0 malformed" in out
    assert f"12 items, {sum(bool(line['found']) for line in records(tmp_path / 'r.jsonl'))} found in part" in out and f"{short} too short" in out
    assert (f"is shorter than {n} and cannot be searched for" in err) == bool(short)
    manifest = read_manifest(tmp_path / "o.jsonl.manifest.json")
    assert [entry["path"] for entry in manifest["inputs"]] == ["a.jsonl", "e.jsonl"] and manifest["counts"]["dropped"] == len(dirty)


def naive_cut(text, spans, window, min_characters):
    """Marks characters one by one."""
    gone = [False] * len(text)
    for begin, end in spans:
        begin, end = max(0, begin - window), min(len(text), end + window)
        while begin > 0 and not text[begin - 1].isspace():
            begin -= 1
        while end < len(text) and not text[end].isspace():
            end += 1
        gone[begin:end] = [True] * (end - begin)
    pieces = "".join("\0" if is_gone else character for character, is_gone in zip(text, gone)).split("\0")
    return [piece.strip() for piece in pieces if len(piece.strip()) >= max(1, min_characters)]


@settings(max_examples=100, deadline=None)
@given(
    strategies.text("ab \n", max_size=40),
    strategies.lists(strategies.tuples(strategies.integers(0, 39), strategies.integers(1, 9)), max_size=4),
    strategies.integers(0, 5),
    strategies.integers(0, 4),
)
def test_cut_is_that_of_plain_python(text, spans, window, min_characters):
    import numpy as np

    spans = sorted((begin, min(len(text), begin + size)) for begin, size in spans if begin < len(text))
    begins, ends = np.array([a for a, _ in spans], np.int64), np.array([b for _, b in spans], np.int64)
    assert cut(text, Overlap(begins, begins, ends), window, min_characters) == naive_cut(text, spans, window, min_characters)


def test_cut_keeps_the_rest_as_documents_of_their_own(tmp_path, capsys):
    item = " ".join(WORDS[:13])
    before, after = "Before it stands this. " * 3, "After it stands that. " * 3
    documents = ["clean", f"{before}{item.title()}! {after}", f"{item} end", f"{before}{item} and {item} {after}"]
    source, evaluation = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "e.jsonl", [item])
    assert run(source, evaluation, tmp_path / "o.jsonl", "--mode", "cut", "--window", 0, "--min-piece", 10) == 0
    assert records(tmp_path / "o.jsonl") == [
        {"id": 0, "text": "clean"}, {"id": 1, "text": before.strip()}, {"id": 1, "text": after.strip()},
        {"id": 3, "text": before.strip()}, {"id": 3, "text": after.strip()},
    ]  # fmt: skip
    assert "4 documents in: 1 written as they are, 2 cut into 4 pieces, 1 dropped, 0 malformed" in capsys.readouterr().out
    assert run(source, evaluation, tmp_path / "o.jsonl", "--mode", "cut", "--window", 0, "--min-piece", 1, "--max-pieces", 2) == 0
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == [0, 1, 1, 2]  # the last falls into three
    assert run(source, evaluation, tmp_path / "o.jsonl", "--mode", "cut") == 0
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == [0]  # nothing of 200 characters is left


def test_common_ngrams_are_ignored(tmp_path, capsys):
    common, rare = " ".join(WORDS[:5]), " ".join(WORDS[10:15])
    documents = [common, f"x {common}", f"y {common}", rare]
    source, evaluation = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "e.jsonl", [f"{common} {rare}"])
    assert run(source, evaluation, tmp_path / "o.jsonl", "--ngram", 5, "--max-documents", 2, "--report", tmp_path / "r.jsonl") == 0
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == [0, 1, 2]
    assert "1 of 6 n-grams occur in more than 2 documents" in capsys.readouterr().out
    assert [(line["found"], line["common"]) for line in records(tmp_path / "r.jsonl")] == [(1, 1)]
    assert run(source, evaluation, tmp_path / "o.jsonl", "--ngram", 5, "--max-documents", 3) == 0
    assert records(tmp_path / "o.jsonl") == []


def test_result_does_not_depend_on_workers(tmp_path, monkeypatch):
    documents, items = training_and_items(1)
    source, evaluation = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "e.jsonl", items)
    options = ["--ngram", 5, "--mode", "cut", "--window", 3, "--min-piece", 5, "--max-documents", 3]
    assert run(source, evaluation, tmp_path / "one.jsonl", *options, "--report", tmp_path / "r1.jsonl") == 0
    monkeypatch.setattr("data_tools.reader.CHUNK_BYTES", 4096)
    assert run(source, evaluation, tmp_path / "two.jsonl", *options, "--report", tmp_path / "r2.jsonl", "--workers", 2) == 0
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert (tmp_path / "r1.jsonl").read_bytes() == (tmp_path / "r2.jsonl").read_bytes()


def test_several_keys_make_one_item(tmp_path):
    (tmp_path / "e.jsonl").write_text(json.dumps({"question": "w1 w2 w3", "answer": "w4 w5", "n": 1}) + "\n")
    index = read_index([str(tmp_path / "e.jsonl")], ["question", "answer"], 5)
    assert [item.num_words for item in index.items] == [5] and [hit is not None for hit in index.find(["w1 w2 w3 w4 w5", "w4 w5"])] == [True, False]


def test_dry_run_reports_and_writes_no_documents(tmp_path, capsys):
    documents, items = training_and_items()
    source, evaluation = write_jsonl(tmp_path / "a.jsonl", documents), write_jsonl(tmp_path / "e.jsonl", items)
    assert run(source, evaluation, tmp_path / "o.jsonl", "--ngram", 5, "--dry-run", "--report", tmp_path / "r.jsonl") == 0
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "e.jsonl", "r.jsonl"] and "60 documents in" in capsys.readouterr().out


@pytest.mark.parametrize("options, code, words", [
    (["--ngram", "0"], 2, "0 is not at least 1"),
    (["--ngram", "40"], 1, "none of 1 evaluation items has 40 words"),
    (["--evaluation-keys", "question"], 1, "e.jsonl:1: no key 'question'"),
    (["--window", "-1"], 2, "--window -1 is below 0"),
    (["--report", "e.jsonl"], 2, "already the name"),
    (["--output", "e.jsonl"], 2, "already the name"),
    (["--evaluation", "none.jsonl"], 1, "none.jsonl: no such file"),
    (["--json-key", "body"], 1, "no key 'body'"),
], ids=lambda value: str(value))  # fmt: skip
def test_mistakes_of_users(tmp_path, capsys, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "e.jsonl", [" ".join(WORDS[:20])])
    assert run("a.jsonl", "e.jsonl", "o.jsonl", *options) == code
    assert words in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["a.jsonl", "e.jsonl"]
