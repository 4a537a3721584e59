"""preprocess.py at length: input formats, Megatron's bytes, the fast path, resuming, the report, origins."""

import base64
import bz2
import gzip
import json
import os
import pickle
import signal
import sysconfig
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools import fast, preprocess, reader, train_tokenizer, work
from data_tools.origins import Origins
from data_tools.tokenizer import load_tokenizer

TEXTS = ["one", "naïve café — 東京 🚅", "line\nbreak\r\n\ttab  ", "x" * 3000, "def f(n):\n    return n + 1", "مرحبا بالعالم", "fin"]


def run(*inputs, prefix, tokenizer="bytes", options=()):
    return preprocess.main(["--input", *map(str, inputs), "--output-prefix", str(prefix), "--tokenizer", tokenizer, "--quiet", *options])


def write_jsonl(path, records):
    lines = "".join(json.dumps(record if isinstance(record, dict) else {"text": record}) + "\n" for record in records)
    path.write_text(lines, encoding="utf-8")
    return path


def corpus_bytes(prefix, key="text"):
    return [Path(f"{prefix}_{key}_document.{kind}").read_bytes() for kind in ("bin", "idx")]


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture(scope="session")
def specs(tmp_path_factory):
    """A small tokenizer of each kind, by name."""
    folder = tmp_path_factory.mktemp("tokenizers")
    sources = sorted(map(str, Path(preprocess.__file__).parent.glob("*.py")))
    assert train_tokenizer.main(["--input", *sources, "--vocab-size", "700", "--output", str(folder / "bpe")]) == 0
    spm = ["--input", *sources, "--kind", "sentencepiece", "--vocab-size", "700", "--output", str(folder / "spm")]
    assert train_tokenizer.main(spm) == 0
    ranks = [bytes([i]) for i in range(256)]
    ranks += [b"th", b" th", b"the", b" the", b"\n\n", b"  ", b"    ", b"in", b"er"]
    (folder / "small.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))
    content = json.loads((folder / "bpe" / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (folder / "nfc.json").write_text(json.dumps(content))
    return {
        "hf": f"hf:{folder}/bpe", "nfc": f"hf:{folder}/nfc.json", "sentencepiece": f"sentencepiece:{folder}/spm/tokenizer.model", "tiktoken": f"tiktoken:{folder}/small.tiktoken",
        "bytes": "bytes",
    }  # fmt: skip


# --- input


def jsonl(folder):
    return write_jsonl(folder / "a.jsonl", TEXTS)


def gz(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(folder).read_bytes()))
    return folder / "a.jsonl.gz"


def zst(folder):
    halves = jsonl(folder).read_bytes()
    frames = [zstandard.ZstdCompressor().compress(part) for part in (halves[:1000], halves[1000:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    return folder / "a.jsonl.zst"


def parquet(folder):
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


def text_folder(folder):
    (folder / "tree" / "b").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / "tree" / ("b/" if i > 3 else "") / f"{i}.txt").write_bytes(text.encode())
    (folder / "tree" / ".hidden.txt").write_text("no")
    (folder / "tree" / "picture.png").write_text("no")
    return folder / "tree"


def several_globs(folder):
    write_jsonl(folder / "x1.jsonl", TEXTS[:2])
    (folder / "x2.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "tmp.json", TEXTS[2:4]).read_bytes()))
    write_jsonl(folder / "x3.jsonl", TEXTS[4:])
    return folder / "x*"


@pytest.mark.parametrize("make", [jsonl, gz, zst, parquet, text_folder, several_globs])
@pytest.mark.parametrize("block_bytes", [1 << 20, 7])
def test_every_format_gives_the_same_corpus(tmp_path, make, block_bytes, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", block_bytes)
    assert run(make(tmp_path), prefix=tmp_path / "out") == 0
    tokens, _ = corpus_bytes(tmp_path / "out")
    assert np.frombuffer(tokens, np.uint16).tobytes() == np.frombuffer("".join(TEXTS).encode(), np.uint8).astype(np.uint16).tobytes()
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("make", [jsonl, gz, zst, parquet, text_folder, several_globs])
def test_reading_goes_on_from_every_block(tmp_path, make, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 50)
    paths = reader.expand([str(make(tmp_path))])

    def documents(start):
        blocks = list(reader.read_blocks(paths, columns=["text"], start=start))
        parsed = [(block.path, *reader.parse_block(block, ["text"])) for block in blocks]
        return blocks, [(path, line, text) for path, lines, texts, _ in parsed for line, text in zip(lines, texts[0])]

    blocks, whole = documents(reader.Position())
    assert [text for _, _, text in whole] == TEXTS and len(blocks) > 3
    assert sum(block.num_bytes for block in blocks) == sum(os.stat(path).st_size for path in paths)
    done = 0
    for block in blocks:
        done += len(reader.parse_block(block, ["text"])[0])
        assert documents(block.next)[1] == whole[done:]


def test_chunks_keep_raw_lines_and_turn_rows_into_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n  \nnot json\n{"text": "b"}')
    first, last = reader.read_chunks([str(tmp_path / "a.jsonl")])
    assert (first.is_json, first.line_numbers, first.lines) == (True, [1, 4], [b'{"text": "a"}', b"not json"])
    assert (last.line_numbers, last.lines) == ([5], [b'{"text": "b"}'])
    texts, problems = reader.parse(first, "text")
    assert texts == [(1, "a")] and [problem.line for problem in problems] == [4]
    rows = [text for chunk in reader.read_chunks([str(parquet(tmp_path))]) for text in reader.parse(chunk, "text")[0]]
    assert rows == list(enumerate(TEXTS, start=1))


def test_mistakes_in_input_are_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "none").mkdir()
    whole = zst(tmp_path).read_bytes()
    (tmp_path / "cut.jsonl.zst").write_bytes(whole[:-3])
    (tmp_path / "bad.jsonl.zst").write_bytes(b"plain")
    (tmp_path / "bad.parquet").write_bytes(b"plain")
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"x"))
    numbers = tmp_path / "n.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), numbers)
    cases = [
        (["*.nothing"], 2, "*.nothing: no file matches"),
        (["none"], 2, "the folder holds no documents"),
        (["a.bz2"], 2, "cannot tell the format by its name"),
        (["missing.jsonl"], 1, "missing.jsonl: no such file"),
        (["cut.jsonl.zst"], 1, "cut.jsonl.zst: the compressed file is damaged or cut short"),
        (["bad.jsonl.zst"], 1, "bad.jsonl.zst: the compressed file is damaged"),
        (["bad.parquet"], 1, "bad.parquet: not a Parquet file"),
        ([str(parquet(tmp_path)), "--json-key", "body"], 1, "no column 'body' among 'id', 'text'"),
        (["n.parquet"], 1, "n.parquet:1: 'text' is a int, expected a string"),
        (["a.jsonl", "x.txt", "--json-key", "a", "b"], 2, "is a text file, which has no keys"),
    ]
    (tmp_path / "x.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    before = files_in(tmp_path)
    for inputs, code, words in cases:
        assert preprocess.main(["--output-prefix", "out", "--tokenizer", "bytes", "--input", *inputs]) == code, inputs
        assert words in capsys.readouterr().err
    assert files_in(tmp_path) == before
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert run("a.jsonl.zst", prefix="out") == 1
    assert "needs zstandard: pip install" in capsys.readouterr().err


def test_null_rows_are_reported(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet")
    assert run(tmp_path / "empty.parquet", tmp_path / "a.parquet", prefix=tmp_path / "out", options=["--on-error", "skip"]) == 0
    report = [json.loads(line) for line in (tmp_path / "out_report.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"], entry["kept"]) for entry in report] == [
        (2, "'text' is a NoneType, expected a string", False), (3, "empty document", True),
    ]  # fmt: skip


def no_utf8_parquet(path):
    """Three rows, the second of which is no UTF-8: Parquet does not check texts, and its readers do."""
    rows = [b"one", b"x\xffy", b"two"]
    bounds = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, *map(pyarrow.py_buffer, (bounds.tobytes(), b"".join(rows)))])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    return path


@pytest.mark.parametrize("workers", ["1", "2"])
def test_rows_that_are_no_utf8_are_reported(tmp_path, capsys, workers):
    source = no_utf8_parquet(tmp_path / "a.parquet")
    assert run(source, prefix=tmp_path / "out", options=["--workers", workers]) == 1
    assert f"{source}:2: not UTF-8: byte 0xff at offset 1" in capsys.readouterr().err
    assert run(source, prefix=tmp_path / "out", options=["--workers", workers, "--on-error", "skip"]) == 0
    assert corpus_bytes(tmp_path / "out")[0] == np.frombuffer(b"onetwo", np.uint8).astype(np.uint16).tobytes()
    assert json.loads((tmp_path / "out_report.jsonl").read_text())["line"] == 2


def test_what_the_tools_write_about_a_folder_is_no_document_of_it(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", ["one", ""])
    assert run(tmp_path, prefix=tmp_path / "out") == 0
    first = corpus_bytes(tmp_path / "out")
    assert {"out_report.jsonl", "out_text_document.manifest.json"} <= set(files_in(tmp_path))
    assert run(tmp_path, prefix=tmp_path / "out") == 0
    assert corpus_bytes(tmp_path / "out") == first
    assert "5 files of other kinds were left out, the first" in capsys.readouterr().err
    assert reader.expand([str(tmp_path / "*.manifest.json")]) == [str(tmp_path / "out_text_document.manifest.json")]


# --- Megatron's bytes


def megatron_bytes(megatron, prefix, rows, eod, vocab_size):
    """What Megatron's tool does with the ids of each document: an own loop over its builder."""
    import torch

    dtype = megatron.indexed.DType.optimal_dtype(vocab_size)
    builder = megatron.indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in rows:
        ids = list(ids) + ([eod] if eod is not None and ids else [])
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return [Path(f"{prefix}.{kind}").read_bytes() for kind in ("bin", "idx")]


@pytest.mark.parametrize("kind", ["hf", "sentencepiece", "tiktoken", "bytes"])
@pytest.mark.parametrize("eod", [True, False])
def test_output_is_megatrons_byte_for_byte(tmp_path, specs, kind, eod, megatron, monkeypatch):
    texts = [text for text in TEXTS for text in (text, "")]
    records = [{"a": text, "b": other} for text, other in zip(texts, reversed(texts))]
    monkeypatch.setattr(reader, "CHUNK_BYTES", 100)
    options = ["--json-key", "a", "b"] + (["--append-eod"] if eod else [])
    assert run(write_jsonl(tmp_path / "x.jsonl", records), prefix=tmp_path / "out", tokenizer=specs[kind], options=options) == 0
    tokenizer = load_tokenizer(specs[kind])
    for key in "ab":
        rows = [tokenizer.encode(record[key]) for record in records]
        theirs = megatron_bytes(megatron, tmp_path / f"m{key}", rows, tokenizer.eod_id if eod else None, tokenizer.vocab_size)
        assert corpus_bytes(tmp_path / "out", key) == theirs
        opened = megatron.indexed.IndexedDataset(str(tmp_path / f"out_{key}_document"))
        assert len(opened) == sum(map(bool, rows)) and opened.document_indices.size == len(rows) + 1


def test_great_vocabularies_take_int32(tmp_path, megatron):
    vocab = {f"w{i}": i for i in range(70000)}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert run(write_jsonl(tmp_path / "a.jsonl", ["w1 w69999"]), prefix=tmp_path / "out", tokenizer=f"hf:{tmp_path}/tokenizer.json") == 0
    assert corpus_bytes(tmp_path / "out") == megatron_bytes(megatron, tmp_path / "m", [[1, 69999]], None, 70000)


# --- the fast path


def difficult_texts():
    random = np.random.default_rng(0)
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [(folder / name).read_text() for name in ("heapq.py", "textwrap.py", "html/entities.py", "this.py")]
    ranges = [(32, 127), (0, 256), (0x300, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x2000, 0x2070), (0x3000, 0x3100)]
    ranges += [(0x4E00, 0x4F00), (0xAC00, 0xAD00), (0x1F300, 0x1F700)]
    for low, high in ranges * 30:
        texts.append("".join(map(chr, random.integers(low, high, size=random.integers(1, 80)))))
    texts += ["".join(chr(c) for c in random.integers(1, 0x110000, size=40) if not 0xD800 <= c < 0xE000) for _ in range(100)]
    names = ["<|endoftext|>", "<s>", "</s>", "<unk>", "<0x0A>"]
    return texts + [f"{a}{name}{b}" for name in names for a, b in (("", ""), ("x", "y"), ("x ", " y"), ("<", ">"), ("＜", "\u0338"))]


@pytest.mark.parametrize("kind", ["hf", "nfc", "sentencepiece", "tiktoken"])
@pytest.mark.parametrize("is_long", [True, False])
def test_the_fast_path_gives_the_references_bytes(tmp_path, specs, kind, is_long, capsys):
    texts = difficult_texts()
    texts = ["".join(texts[i::7]) for i in range(7)] if is_long else texts[4:]  # one by one, and many in a call
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    for choice in ("auto", "off"):
        assert run(source, prefix=tmp_path / choice, tokenizer=specs[kind], options=["--append-eod", "--fast", choice]) == 0
    assert capsys.readouterr().err == "", "the fast path was left"
    assert corpus_bytes(tmp_path / "auto") == corpus_bytes(tmp_path / "off")


class Wrong:
    """A fast tokenizer that is wrong about one character, and one by one or in a call alike."""

    def __init__(self, right, character):
        self.right, self.character = right, character

    def encode(self, text):
        return self.right.encode(text.replace(self.character, "?"))

    def encode_batch(self, texts, parallel):
        return self.right.encode_batch([text.replace(self.character, "?") for text in texts], parallel=parallel)


@pytest.mark.parametrize("character, word", [("é", "no fast path"), ("Ж", "fast path left")])
def test_a_difference_ends_the_fast_path(tmp_path, specs, character, word, capsys, monkeypatch):
    open_right = fast._open
    monkeypatch.setattr(fast, "_open", lambda *a: (Wrong(open_right(*a)[0], character), open_right(*a)[1]))
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(work, "PIECE_BYTES", 1)  # pieces of the fast path exist when the difference is found
    texts = ["plain text of a document"] * 200 + ["Ж"] + ["more"] * 50
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    assert run(source, prefix=tmp_path / "out", tokenizer=specs["hf"]) == 0
    err = capsys.readouterr().err
    assert word in err and "differ on" in err and len(err.splitlines()) == 1
    assert run(source, prefix=tmp_path / "off", tokenizer=specs["hf"], options=["--fast", "off"]) == 0
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "off")


SENTENCEPIECE_OPTIONS = [
    {}, {"add_dummy_prefix": False}, {"byte_fallback": False}, {"normalization_rule_name": "nmt_nfkc"}, {"model_type": "unigram"},
    {"user_defined_symbols": ["x\n"]},
]  # fmt: skip


@pytest.mark.parametrize("options", SENTENCEPIECE_OPTIONS, ids=["plain", "no prefix", "no bytes", "nfkc", "unigram", "symbol with a line break"])
def test_sentencepiece_rows_are_those_of_whole_texts(tmp_path, options):
    import sentencepiece

    plain = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    lines = iter(Path(work.__file__).read_text().splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(tmp_path / "m"), vocab_size=500, hard_vocab_limit=False, minloglevel=2, **plain | options)
    tokenizer = load_tokenizer(f"sentencepiece:{tmp_path}/m.model")
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(list("ab x\n\n\r é東 "), size=size)) for size in (1, 299, 300, 301, 2000)] + [Path(work.__file__).read_text(), "\n" * 700]
    assert (tokenizer._num_prefix_ids is None) == (not {"add_dummy_prefix"} >= set(options))
    for text, row in zip(texts, tokenizer.encode_rows(texts), strict=True):
        assert row.tolist() == tokenizer.encode(text)


def test_names_that_are_found_after_normalisation_have_no_fast_path(tmp_path, specs, capsys):
    content = json.loads(Path(specs["nfc"][3:]).read_text())
    content["added_tokens"][0]["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert run(write_jsonl(tmp_path / "a.jsonl", TEXTS), prefix=tmp_path / "out", tokenizer=f"hf:{tmp_path}/tokenizer.json") == 0
    assert capsys.readouterr().err == "no fast path: gigatoken refused: names of added tokens are looked for after normalisation\n"


def test_why_the_fast_path_was_left_comes_back_from_a_worker():
    assert str(pickle.loads(pickle.dumps(fast.NoFastPath("because")))) == "because"


# --- resuming


@pytest.fixture
def no_fsync(monkeypatch):
    """fsync guards against the machine's end, which no test here brings about."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def crash(monkeypatch, name, at):
    """Makes the process end as by kill -9 when the at-th call of os.<name> comes."""
    calls, original = [0], getattr(os, name)

    def counted(*arguments):
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments) if name != "fsync" else None  # only the machine's end would lose what is not synced

    monkeypatch.setattr(os, name, counted)


def in_a_child(body):
    """Runs body in a forked process; its exit code, or -9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = body()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_killed_run_goes_on_wherever_it_was_killed(tmp_path, specs, no_fsync, monkeypatch, capfd):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 300)
    monkeypatch.setattr(work, "PIECE_BYTES", 1)
    texts = [text * 3 for text in TEXTS if len(text) < 100] * 4
    sources = [write_jsonl(tmp_path / "a.jsonl", texts), gz(tmp_path), parquet(tmp_path)]
    write_jsonl(tmp_path / "a.jsonl", texts + ["", "last"])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("malformed\n")
    options = ["--append-eod", "--keep-offsets", "--on-error", "skip"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(*sources, prefix=whole, tokenizer=specs["hf"], options=options) == 0
    outputs = ["_text_document.bin", "_text_document.idx", "_text_document.origins", "_report.jsonl"]
    num_kills, at = 0, 1
    for name in ("fsync", "replace"):
        for at in range(1, 100, 11 if name == "fsync" else 3):
            with monkeypatch.context() as patch:
                crash(patch, name, at)
                code = in_a_child(lambda: run(*sources, prefix=resumed, tokenizer=specs["hf"], options=options))
            assert code in (0, -signal.SIGKILL)
            num_kills += code != 0
            if code == 0:
                break
            idx = Path(f"{resumed}_text_document.idx")
            assert not idx.exists() or idx.read_bytes() == Path(f"{whole}_text_document.idx").read_bytes()
        assert run(*sources, prefix=resumed, tokenizer=specs["hf"], options=options) == 0
        for output in outputs:
            assert Path(f"{resumed}{output}").read_bytes() == Path(f"{whole}{output}").read_bytes(), output
            Path(f"{resumed}{output}").unlink()
        assert not Path(f"{resumed}.unfinished").exists()
    assert num_kills > 4 and "going on after" in capfd.readouterr().err


def interrupted(sources, prefix, monkeypatch, options=(), after=5):
    """A run that Ctrl-C ends after some blocks."""
    append, calls = work.Work.append, [0]

    def counted(self, encoded):
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        append(self, encoded)

    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "append", counted)
        return run(*sources, prefix=prefix, options=options)


def test_interrupted_runs_say_how_to_go_on_and_anew_after_a_change(tmp_path, no_fsync, monkeypatch, capsys):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 20)
    monkeypatch.setattr(work, "PIECE_BYTES", 1)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(30)])
    changes = [
        ("going on after 5 documents", lambda: None, []),
        ("starting anew", lambda: None, ["--append-eod"]),
        ("starting anew", lambda: os.utime(source, ns=(1, 1)), []),
        ("starting anew", lambda: source.write_text(source.read_text().replace("document", "Document")), []),
    ]
    for words, change, options in changes:
        assert interrupted([source], tmp_path / "out", monkeypatch) == 1
        assert "the same command goes on" in capsys.readouterr().err
        assert not (tmp_path / "out_text_document.bin").exists()
        change()
        assert run(source, prefix=tmp_path / "out", options=options) == 0
        assert words in capsys.readouterr().err
        assert run(source, prefix=tmp_path / "fresh", options=options) == 0
        assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "fresh")
        (tmp_path / "out_text_document.bin").unlink()


def test_a_stop_late_in_the_input_can_go_on_with_skip(tmp_path, no_fsync, monkeypatch, capsys):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 20)
    monkeypatch.setattr(work, "PIECE_BYTES", 1)
    source = write_jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(5)])
    source.write_text(source.read_text() + "malformed\n")
    assert run(source, prefix=tmp_path / "out") == 1
    assert "1 malformed documents, the first at" in capsys.readouterr().err
    assert run(source, prefix=tmp_path / "out", options=["--on-error", "skip"]) == 0
    assert "going on after 5 documents" in capsys.readouterr().err
    assert files_in(tmp_path) == [
        "a.jsonl", "out_report.jsonl", "out_text_document.bin", "out_text_document.idx", "out_text_document.manifest.json", "out_text_document.origins",
    ]  # fmt: skip


def test_one_output_is_written_by_one_run(tmp_path, capsys):
    held = work.Work(str(tmp_path / "out"), ("text",), np.dtype(np.uint16), False, {})
    assert run(write_jsonl(tmp_path / "a.jsonl", TEXTS), prefix=tmp_path / "out") == 1
    assert "out.unfinished is in use by another run" in capsys.readouterr().err
    held.remove()


# --- nothing lost

GOOD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).map(lambda text: (json.dumps({"text": text}).encode(), text))
BAD = st.sampled_from([b"{", b"[1]", b'{"body": 1}', b'{"text": null}', b'\xff', b'{"text": "\\ud800"}', b'{"text": "a" "b"}', b"nul"])
BLANK = st.sampled_from([b"", b"  ", b"\t\r"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.one_of(GOOD, BAD, BLANK), min_size=1, max_size=12), block_bytes=st.integers(1, 60), ends=st.booleans())
def test_every_document_is_written_or_reported(tmp_path, no_fsync, monkeypatch, capsys, lines, block_bytes, ends):
    monkeypatch.setattr(reader, "CHUNK_BYTES", block_bytes)
    raw = [line[0] if isinstance(line, tuple) else line for line in lines] + [b'{"text": "always one"}']
    texts = {n: line[1] for n, line in enumerate(lines, start=1) if isinstance(line, tuple)} | {len(raw): "always one"}
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(raw) + b"\n" * ends)
    assert run(tmp_path / "a.jsonl", prefix=tmp_path / "out", options=["--on-error", "skip"]) == 0
    tokens, index = corpus_bytes(tmp_path / "out")
    assert np.frombuffer(tokens, np.uint16).astype(np.uint8).tobytes() == "".join(texts.values()).encode()
    num_documents = int.from_bytes(index[26:34], "little") - 1
    report = tmp_path / "out_report.jsonl"
    entries = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    malformed = [entry["line"] for entry in entries if not entry["kept"]]
    num_in = sum(bool(line.strip()) for line in raw)
    assert num_documents == len(texts) and num_documents + len(malformed) == num_in
    assert malformed == [n for n, line in enumerate(raw, start=1) if line.strip() and n not in texts]
    assert [entry["line"] for entry in entries if entry["kept"]] == [n for n, text in texts.items() if not text]
    assert f"{num_in} documents in: {num_documents} written" in capsys.readouterr().out


# --- origins


@pytest.mark.parametrize("kind", ["hf", "sentencepiece", "tiktoken", "bytes"])
@pytest.mark.parametrize("choice", ["auto", "off"])
def test_every_token_leads_back_to_its_characters(tmp_path, specs, kind, choice, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 2000)
    texts = {"a": ["", *TEXTS, "x <|endoftext|> y"], "b": difficult_texts()[3:60]}
    sources = [write_jsonl(tmp_path / f"{name}.jsonl", [text for text in column]) for name, column in texts.items()]
    options = ["--append-eod", "--keep-offsets", "--fast", choice]
    assert run(*sources, prefix=tmp_path / "out", tokenizer=specs[kind], options=options) == 0
    origins, tokenizer = Origins.open(tmp_path / "out_text_document"), load_tokenizer(specs[kind])
    expected = [(str(source), line, text) for source, column in zip(sources, texts.values()) for line, text in enumerate(column, start=1) if text]
    assert len(origins) == len(expected)
    for i, (path, line, text) in enumerate(expected):
        assert origins.document(i) == (path, line)
        ids, starts = tokenizer.encode(text), origins.starts(i).tolist()
        assert len(starts) == len(ids) + 1 and starts[0] == 0 and starts[-1] == len(text)
        assert origins.token(i, len(ids)) == (path, line, len(text))
        assert starts == sorted(starts)
        if text.isascii() and kind != "sentencepiece":
            assert [text[begin:end] for begin, end in zip(starts, starts[1:])] == [tokenizer.decode([token]) for token in ids]
        elif kind != "sentencepiece":
            # The bytes of the tokens up to any one hold whole the characters before its start, and no more than the one it begins in.
            pieces = np.cumsum([0] + [tokenizer.byte_lengths[token] for token in ids])
            before = np.cumsum([0] + [len(character.encode()) for character in text])
            assert all(before[start] <= piece < before[start + 1] for start, piece in zip(starts[:-1], pieces))


def test_positions_of_characters_in_sentencepiece(tmp_path, specs):
    text = "the brown 東 fox"
    assert run(write_jsonl(tmp_path / "a.jsonl", [text]), prefix=tmp_path / "out", tokenizer=specs["sentencepiece"], options=["--keep-offsets"]) == 0
    tokenizer, origins = load_tokenizer(specs["sentencepiece"]), Origins.open(tmp_path / "out_text_document")
    found = [(start, tokenizer.decode([token])) for start, token in zip(origins.starts(0).tolist(), tokenizer.encode(text), strict=True)]
    assert "".join(piece for _, piece in found if piece.isascii()) == text.replace("東", "").replace(" ", "")
    assert [start for start, piece in found if not piece.isascii()] == [text.index("東")] * 3  # its three bytes
    for start, piece in found:
        assert not piece.isascii() or text[start:].lstrip(" ").startswith(piece)


def test_an_added_token_that_swallows_spaces_keeps_positions_right(tmp_path, specs):
    content = json.loads(Path(specs["hf"][3:], "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 700, "content": "<mask>", "lstrip": True, "rstrip": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "one   <mask>  東 two"
    spec = f"hf:{tmp_path}/tokenizer.json"
    assert run(write_jsonl(tmp_path / "a.jsonl", [text]), prefix=tmp_path / "out", tokenizer=spec, options=["--keep-offsets"]) == 0
    ids, starts = load_tokenizer(spec).encode(text), Origins.open(tmp_path / "out_text_document").starts(0).tolist()
    after = starts[ids.index(700) + 1]
    assert text[after:].startswith("東") and text[starts[ids.index(700)] :].lstrip().startswith("<mask>")


def test_manifests_name_inputs_outputs_and_counts(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"a": "one", "b": "two words"}])
    assert run(source, prefix=tmp_path / "out", options=["--json-key", "a", "b"]) == 0
    for key in "ab":
        manifest = json.loads((tmp_path / f"out_{key}_document.manifest.json").read_text())
        assert [entry["path"] for entry in manifest["inputs"]] == ["a.jsonl"]
        assert {entry["path"] for entry in manifest["outputs"]} == {f"out_{key}_document.{kind}" for kind in ("bin", "idx", "origins")}
        assert manifest["counts"]["documents"] == 1
