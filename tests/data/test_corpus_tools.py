"""merge, split, stats and peek: documents byte for byte, origins carried along, numbers against plain Python, masks as the loss sees them."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from data_tools import merge, peek, preprocess, split, stats
from data_tools.manifest import read_manifest
from data_tools.origins import Origins
from engine.data.indexed import IndexedCorpus, IndexedWriter
from engine.data.pretraining import split_documents


def write_corpus(prefix, documents, dtype=np.uint16):
    """documents: lists of sequences of ids."""
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            writer.add_document([token for ids in sequences for token in ids], [len(ids) for ids in sequences])
    return str(prefix)


def read_corpus(prefix):
    corpus = IndexedCorpus(prefix)
    bounds = np.array(corpus.document_indices).tolist()
    return [[corpus.get(i).tolist() for i in range(a, b)] for a, b in zip(bounds[:-1], bounds[1:])]


def random_documents(seed, count, max_length=12):
    draw = np.random.default_rng(seed)
    return [[draw.integers(0, 1000, size=draw.integers(0, max_length)).tolist() for _ in range(draw.integers(1, 4))] for _ in range(count)]


WAYS = [["--split", "5,3,2"], ["--split", "1,0,1"], ["--parts", "7"], ["--documents", "9"], ["--tokens", "60"]]


@pytest.mark.parametrize("how", WAYS, ids=lambda how: "_".join(how))
def test_split_and_merge_give_the_corpus_back_byte_for_byte(tmp_path, how):
    source = write_corpus(tmp_path / "a", random_documents(0, 50))
    assert split.main([source, "--output-prefix", str(tmp_path / "p"), *how, "--quiet"]) == 0
    names = ["train", "valid", "test"] if how[0] == "--split" else sorted(path.stem[2:] for path in tmp_path.glob("p_*.idx"))
    parts = [str(tmp_path / f"p_{name}") for name in names if (tmp_path / f"p_{name}.idx").exists()]
    assert merge.main(["--input", *parts, "--output-prefix", str(tmp_path / "b"), "--quiet"]) == 0
    for kind in ("bin", "idx"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    contents = [read_corpus(part) for part in parts]
    if how[0] == "--split":
        assert [len(documents) for documents in contents] == [len(r) for r in split_documents(50, how[1]) if r]
    elif how[0] == "--parts":
        tokens = [sum(len(ids) for document in documents for ids in document) for documents in contents]
        assert len(parts) == 7 and max(tokens) - min(tokens) <= 2 * 36
    elif how[0] == "--documents":
        assert [len(documents) for documents in contents] == [9, 9, 9, 9, 9, 5]
    manifest = read_manifest(tmp_path / "b.manifest.json")
    assert manifest["counts"]["documents"] == 50 and all("manifest" in entry for entry in manifest["inputs"])


@settings(max_examples=80, deadline=None)
@given(strategies.lists(strategies.integers(0, 9), min_size=1, max_size=20), strategies.integers(1, 20), strategies.integers(1, 20))
def test_bounds_by_tokens_and_by_parts(lengths, max_tokens, num_parts):
    class Corpus:
        sequence_lengths = np.array(lengths, np.int32)
        document_indices = np.arange(len(lengths) + 1)

        def __len__(self):
            return len(lengths)

    greedy, held = [0], 0
    for i, length in enumerate(lengths):
        if i > greedy[-1] and held + length > max_tokens:
            greedy.append(i)
            held = 0
        held += length
    assert split._bounds_by_tokens(Corpus(), max_tokens) == [*greedy, len(lengths)]
    num_parts = min(num_parts, len(lengths))
    bounds = split._even_bounds(Corpus(), num_parts)
    assert len(bounds) == num_parts + 1 and bounds[0] == 0 and bounds[-1] == len(lengths) and all(a < b for a, b in zip(bounds, bounds[1:]))


def make_texts(tmp_path, name, texts, options=()):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--input", f"{tmp_path}/{name}.jsonl", "--output-prefix", f"{tmp_path}/{name}", "--tokenizer", "bytes", "--append-eod", "--quiet"]
    assert preprocess.main([*arguments, *options]) == 0
    return f"{tmp_path}/{name}_text_document"


def test_origins_follow_their_documents(tmp_path):
    a, b = make_texts(tmp_path, "a", ["one", "twö", "three"], ["--keep-offsets"]), make_texts(tmp_path, "b", ["four", "five"], ["--keep-offsets"])
    assert merge.main(["--input", b, a, "--output-prefix", f"{tmp_path}/m", "--quiet"]) == 0
    assert split.main([f"{tmp_path}/m", "--output-prefix", f"{tmp_path}/s", "--documents", "3", "--quiet"]) == 0
    merged, last = Origins.open(f"{tmp_path}/m"), Origins.open(f"{tmp_path}/s_1")
    assert [merged.document(i)[1] for i in range(5)] == [1, 2, 1, 2, 3] and merged.document(2)[0] == f"{tmp_path}/a.jsonl"
    assert last.document(0) == (f"{tmp_path}/a.jsonl", 2) and last.starts(0).tolist() == Origins.open(a).starts(1).tolist() == [0, 1, 2, 2, 3]
    os.unlink(f"{b}.origins")
    assert merge.main(["--input", b, a, "--output-prefix", f"{tmp_path}/m", "--quiet"]) == 0
    assert Origins.open(f"{tmp_path}/m") is None  # and not that of the corpus that was there before


def test_stats_are_those_of_plain_python(tmp_path, capsys):
    named = {name: random_documents(seed, count, 40) for name, seed, count in (("a", 1, 101), ("b", 2, 30))}
    prefixes = [write_corpus(tmp_path / name, documents) for name, documents in named.items()]
    assert stats.main([*prefixes, "--json", "--quiet", "--histogram", f"{tmp_path}/h.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    for row, documents in zip([*found["corpora"], found["all"]], [*named.values(), named["a"] + named["b"]]):
        lengths = sorted(sum(map(len, sequences)) for sequences in documents)
        assert row["documents"] == len(documents) and row["tokens"] == sum(lengths) and row["sequences"] == sum(map(len, documents))
        assert (row["min"], row["max"], row["mean"]) == (lengths[0], lengths[-1], round(statistics.fmean(lengths), 2))
        assert row["empty"] == lengths.count(0) and row["greatest_id"] == max(t for d in documents for s in d for t in s)
        for percent in (1, 50, 95):
            below = lengths[: -(-len(lengths) * percent // 100)]  # the least that at least so many per cent do not exceed
            assert row[f"p{percent}"] == below[-1]
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob("*.tmp*"))
    assert stats.main([f"{tmp_path}/*.idx", "--quick", "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith("corpus") and "greatest_id" not in lines[0]
    assert lines[3].split()[:2] == ["all", f"{sum(map(len, named['a'] + named['b'])):,}"]


@pytest.mark.parametrize("tool, arguments, code, words", [
    (split, ["a", "--output-prefix", "p"], 2, "one of the arguments"),
    (split, ["a", "--output-prefix", "p", "--parts", "9"], 1, "has only 4 documents"),
    (split, ["a", "--output-prefix", "p", "--split", "x"], 1, "expected one to three numbers"),
    (split, ["none", "--output-prefix", "p", "--parts", "2"], 1, "none.idx"),
    (split, ["x_0", "--output-prefix", "x", "--parts", "2"], 2, "would replace the input"),
    (merge, ["--input", "a", "wide", "--output-prefix", "m"], 1, "wide: tokens are int32, those of a uint16"),
    (stats, ["no*.idx"], 1, "no file matches"),
    (stats, ["a", "--histogram", "h.txt"], 2, "--histogram h.txt"),
    (peek, ["a", "--set", "train.steps=3"], 2, "a is none"),
    (peek, ["a", "--sample", "0", "--seq-len", "4", "--reset-at-eod"], 2, "need --eod-id"),
    (peek, ["run.yaml"], 2, "needs --sample"),
    (peek, ["run.yaml", "--sample", "0"], 2, "run.yaml"),
], ids=lambda value: "_".join(value) if isinstance(value, list) else None)  # fmt: skip
def test_mistakes_of_users(tmp_path, capsys, monkeypatch, tool, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    write_corpus("a", random_documents(0, 4))
    write_corpus("x_0", random_documents(0, 4))
    write_corpus("wide", random_documents(0, 4), np.int32)
    before = sorted(os.listdir())
    assert tool.main(arguments) == code
    assert words in capsys.readouterr().err and sorted(os.listdir()) == before


def test_peek_shows_positions_segments_and_loss(tmp_path, capsys):
    prefix = make_texts(tmp_path, "a", ["abc", "de"])
    arguments = [prefix, "--tokenizer", "bytes", "--sample", "0", "--seq-len", "6", "--reset-at-eod", "--eod-mask-loss"]
    capsys.readouterr()
    assert peek.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    corpus = IndexedCorpus(prefix)
    documents = [int(line.split("document ")[1].split(",")[0]) for line in lines if line.startswith(f"--- {prefix}")]
    ids = [token for d in documents for token in corpus.get(d).tolist()][:7]
    inputs, labels = ids[:6], ids[1:]
    assert f"{sum(i != 256 for i in inputs)} labels count; it begins with: {chr(ids[0])}" in lines[len(documents) + 1]
    # Runs by hand: a label belongs to the segment of its input; a label after EOD has no loss.
    segments = [inputs[:i].count(256) for i in range(6)]
    starts = [max([k + 1 for k in range(i) if inputs[k] == 256], default=0) for i in range(6)]
    shown = [line for line in lines if line.startswith("--- ") and "segment" in line]
    by_hand, begin = [], 0
    for i in range(1, 7):
        if i == 6 or (segments[i], inputs[i] == 256) != (segments[begin], inputs[begin] == 256):
            what = "labels without loss" if inputs[begin] == 256 else "labels that count"
            by_hand.append(f"--- {begin} to {i - 1}, segment {segments[begin]}, positions {begin - starts[begin]} to {i - 1 - starts[i - 1]}: {what}")
            begin = i
    assert shown == by_hand and len(shown) >= 3
    texts = "".join(lines[lines.index(line) + 1] for line in shown).replace("<eod>", "#")
    assert texts == "".join("#" if token == 256 else chr(token) for token in labels)
    assert f"from {tmp_path}/a.jsonl:" in lines[1]
    assert peek.main(arguments[:-1]) == 0  # with all labels in the loss, a run is a document
    shown = [line for line in capsys.readouterr().out.splitlines() if ", segment " in line]
    assert len(shown) == segments[-1] + 1 and all(line.endswith("labels that count") for line in shown)


CONFIG = """
run: {{dir: {folder}/run, device: cpu}}
stage: {stage}
model: {{family: llama, num_layers: 1, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, vocab_size: 384}}
data: {{train: {train}, tokenizer: bytes}}
train: {{seq_len: 8, micro_batch: 1, global_batch: 2, steps: 5, eval_every: 0, precision: fp32, backend: torch}}
optim: {{lr: 0.001}}
"""


def test_a_full_disk_names_the_cure(tmp_path, capsys, monkeypatch):
    corpus = write_corpus(tmp_path / "a", [[[1, 2]]])
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert merge.main(["--input", corpus, "--output-prefix", str(tmp_path / "b")]) == 1
    assert "No space left on device; make room where the output goes, then give the same command again" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_marks_of_filled_middles_are_shown_where_the_tokenizer_knows_none(tmp_path, capsys):
    from data_tools import which

    a = make_texts(tmp_path, "a", ["abcdefghij" * 9] * 3)
    config = tmp_path / "config.yaml"
    fim = "{rate: 1, prefix_id: 300, middle_id: 301, suffix_id: 302}"
    config.write_text(CONFIG.format(folder=tmp_path, stage="pretrain", train=f"[{a}], fim: {fim}"))
    for show in ([peek.main, str(config), "--sample", "1"], [which.main, str(tmp_path), "--step", "1", "--text"]):
        assert show[0](show[1:]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert all(out.count(mark) for mark in ("<prefix>", "<suffix>", "<middle>"))
    write_corpus(a, [[[299] * 90]] * 3)
    assert which.main([str(tmp_path), "--step", "1", "--text"]) == 1
    assert "id 299 is outside the tokenizer's vocabulary of 257" in capsys.readouterr().err


def test_peek_shows_a_sample_of_a_runs_mixture(tmp_path, capsys):
    from engine.config import load_config
    from engine.data.text import datasets

    a, b = make_texts(tmp_path, "a", ["abcdefghij" * 9] * 3), make_texts(tmp_path, "b", ["0123456789" * 9] * 3)
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.format(folder=tmp_path, stage="pretrain", train=f"['0.5', {a}, '0.5', {b}]"))
    train, _ = datasets(load_config(config), 10, 0)
    for number in (0, 1, 9):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)  # what the expected answer has made
        assert peek.main([str(config), "--sample", str(number)]) == 0
        out = capsys.readouterr().out
        labels = "".join("<eod>" if t == 256 else chr(t) for t in train.batch(np.array([number]))["labels"][0].tolist())
        assert f"sample {number} of the 10 that the run asks for, stage pretrain" in out and labels in out
        assert f"--- {(a, b)[train.samples.source_of(number)[0]]}: document" in out
        assert not (tmp_path / "run").exists()  # to look at a run is not to begin it
    assert peek.main([str(config), "--sample", "0", "--set", "train.seq_len=4"]) == 0
    assert "row of 4 tokens" in capsys.readouterr().out
    assert peek.main([str(config), "--sample", "50"]) == 2
    assert peek.main([str(config), "--sample", "0", "--set", "train.seq_lem=4"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["split", "stats", "filter", "dedup", "decontaminate", "provenance"])
def test_tools_run_as_scripts_and_help_is_light(tool, tmp_path):
    root = Path(split.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-X", "importtime", str(root / "data_tools" / f"{tool}.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert shown.returncode == 0 and "usage: " in shown.stdout
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "tokenizers", "rich", "orjson", "pyarrow", "rensa", "scipy", "matplotlib"}
