"""The command-line tools: exact tokens out, independence of workers, problems reported, nothing half-written, exit codes."""

import base64
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools import merge, peek, preprocess, train_tokenizer
from data_tools.cli import UsageError
from data_tools.manifest import read_manifest
from data_tools.tokenizer import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, load_tokenizer
from engine.data.indexed import DataError, IndexedCorpus

TOOLS = Path(preprocess.__file__).parent
TEXTS = ["Hello , world ! do n't", "naïve café — 東京 🚅", "tabs\tand\nnewlines\r\n", " leading and trailing  ", "x" * 5000, "def f(n):\n    return n + 1"]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents_of(prefix):
    """The ids of every document; an empty one has no sequence."""
    corpus = IndexedCorpus(prefix)
    bounds = corpus.document_indices.tolist()
    return [[token for i in range(begin, end) for token in corpus.get(i).tolist()] for begin, end in zip(bounds, bounds[1:])]


def run_preprocess(*inputs, prefix, tokenizer="bytes", options=()):
    return preprocess.main(["--input", *map(str, inputs), "--output-prefix", str(prefix), "--tokenizer", tokenizer, *options])


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory):
    """A small BPE tokenizer trained by our tool on this repository's own sources."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sources = [str(path) for path in sorted(TOOLS.glob("*.py"))]
    assert train_tokenizer.main(["--input", *sources, "--vocab-size", "600", "--output", str(folder)]) == 0
    return folder


# --- preprocess


@pytest.mark.parametrize("eod", [False, True])
def test_preprocess_writes_the_bytes_of_every_document(tmp_path, eod):
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert run_preprocess(source, prefix=tmp_path / "out", options=["--append-eod"] if eod else []) == 0
    ending = [256] if eod else []
    assert documents_of(tmp_path / "out_text_document") == [list(text.encode()) + ending for text in TEXTS]
    assert IndexedCorpus(tmp_path / "out_text_document").dtype == np.uint16


def test_megatron_reads_what_preprocess_wrote(tmp_path, megatron):
    assert run_preprocess(write_jsonl(tmp_path / "a.jsonl", TEXTS), prefix=tmp_path / "out") == 0
    theirs = megatron.indexed.IndexedDataset(str(tmp_path / "out_text_document"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [list(text.encode()) for text in TEXTS]


def test_preprocess_reads_gz_text_files_and_other_keys_in_order(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"body": "one"}\n\n  \n{"body": "two"}'))
    (tmp_path / "b.txt").write_bytes(b"three\nfour\n")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("fünf".encode()))
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"body": "six"}\n')
    inputs = [tmp_path / name for name in ("a.jsonl.gz", "b.txt", "c.txt.gz", "bom.jsonl")]
    assert run_preprocess(*inputs, prefix=tmp_path / "out", options=["--json-key", "body"]) == 0
    texts = ["one", "two", "three\nfour\n", "fünf", "six"]
    assert documents_of(tmp_path / "out_body_document") == [list(text.encode()) for text in texts]


def test_format_option_overrides_the_suffix(tmp_path):
    (tmp_path / "a.data").write_text('{"text": "one"}\n')
    assert run_preprocess(tmp_path / "a.data", prefix=tmp_path / "o") == 2
    assert run_preprocess(tmp_path / "a.data", prefix=tmp_path / "o", options=["--format", "jsonl"]) == 0
    assert documents_of(tmp_path / "o_text_document") == [list(b"one")]
    assert run_preprocess(tmp_path / "a.data", prefix=tmp_path / "o", options=["--format", "text"]) == 0
    assert documents_of(tmp_path / "o_text_document") == [list(b'{"text": "one"}\n')]


def test_output_does_not_depend_on_workers(tmp_path, hf_folder, monkeypatch):
    random = np.random.default_rng(0)
    texts = ["".join(chr(int(c)) for c in random.integers(32, 1000, size=int(n))) for n in random.integers(1, 400, size=400)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr("data_tools.reader.CHUNK_BYTES", 4096)  # many chunks, so that order could go wrong
    for workers in ("1", "2"):
        options = ["--workers", workers, "--append-eod"]
        assert run_preprocess(source, prefix=tmp_path / workers, tokenizer=f"hf:{hf_folder}", options=options) == 0
    for kind in ("bin", "idx"):
        one, two = (tmp_path / f"{w}_text_document.{kind}" for w in "12")
        assert one.read_bytes() == two.read_bytes()
    tokenizer = load_tokenizer(f"hf:{hf_folder}")
    documents = documents_of(tmp_path / "1_text_document")
    assert [tokenizer.decode(ids[:-1]) for ids in documents] == texts
    assert {ids[-1] for ids in documents} == {tokenizer.eod_id}


BAD_LINES = {
    2: (b'{"text": "cut', "not JSON: Unterminated string"),
    3: (b'["list"]', "a JSON list, expected an object with the key 'text'"),
    4: (b'{"body": "x", "id": 1}', "no key 'text' among 'body', 'id'; choose another with --json-key"),
    5: (b'{"text": 3}', "'text' is a int, expected a string"),
    6: (b'{"text": "\xff"}', "not UTF-8: byte 0xff"),
    7: (b'{"text": "\\ud800"}', "lone surrogate at character 0"),
    8: (b'{"text": ' + b"[" * 100000 + b"]" * 100000 + b"}", ""),
    9: (b'{"text": ""}', "empty document"),
}


def damaged_jsonl(path):
    lines = {1: b'{"text": "first"}', 10: b'{"text": "last"}'} | {n: line for n, (line, _) in BAD_LINES.items()}
    path.write_bytes(b"\n".join(lines[n] for n in sorted(lines)))
    return str(path)


def test_skip_counts_and_lists_every_document_left_out(tmp_path, capsys):
    source = damaged_jsonl(tmp_path / "a.jsonl")
    assert run_preprocess(source, prefix=tmp_path / "out", options=["--on-error", "skip", "--append-eod"]) == 0
    assert documents_of(tmp_path / "out_text_document") == [list(b"first") + [256], [], list(b"last") + [256]]
    out, err = capsys.readouterr()
    assert "10 documents in: 3 written (11 tokens, 1 empty), 7 malformed" in out
    report = [json.loads(line) for line in (tmp_path / "out_report.jsonl").read_text().splitlines()]
    for entry, (number, (_, reason)) in zip(report, BAD_LINES.items(), strict=True):
        assert (entry["file"], entry["line"], entry["kept"]) == (source, number, number == 9) and reason in entry["reason"]
        assert (f"{source}:{number}: {entry['reason']}" in err) == (number != 9)
    assert len(err.splitlines()) == 7


def test_stop_is_the_default_and_writes_nothing(tmp_path, capsys):
    source = damaged_jsonl(tmp_path / "a.jsonl")
    assert run_preprocess(source, prefix=tmp_path / "out") == 1
    assert f"7 malformed documents, the first at {source}:2: not JSON" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_stop_with_workers_ends_and_writes_nothing(tmp_path):
    source = damaged_jsonl(tmp_path / "a.jsonl")
    assert run_preprocess(source, prefix=tmp_path / "out", options=["--workers", "2"]) == 1
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_no_document_left_is_an_error(tmp_path, capsys):
    assert run_preprocess(write_jsonl(tmp_path / "a.jsonl", ["", ""]), prefix=tmp_path / "out") == 1
    assert "2 documents in: 2 written (0 tokens, 2 empty), 0 malformed: no document is left" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_damaged_gz_is_an_error(tmp_path, capsys):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 1000)[:-10])
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain")
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        assert run_preprocess(tmp_path / name, prefix=tmp_path / "out", options=["--on-error", "skip"]) == 1
        assert f"{name}: the compressed file is damaged or cut short" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl.gz", "b.jsonl.gz"]


def test_exit_codes_and_messages_of_user_mistakes(tmp_path, capsys, hf_folder):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no tokenizer")
    cases = [
        (1, [tmp_path / "missing.jsonl"], "bytes", [], "missing.jsonl"),
        (2, [source], "words", [], "'words' is not one of hf:"),
        (2, [source], "bytes:x", [], "is not one of"),
        (1, [source], "hf:/nowhere", [], "/nowhere does not exist"),
        (1, [source], f"hf:{tmp_path}/empty", [], "has no tokenizer.json"),
        (1, [source], f"hf:{tmp_path}/text.txt", [], "is no tokenizer.json"),
        (1, [source], f"sentencepiece:{tmp_path}/text.txt", [], "not a SentencePiece model"),
        (1, [source], f"tiktoken:{tmp_path}/text.txt", [], "not a rank file"),
        (2, [source], "bytes", ["--workers", "0"], "0 is not at least 1"),
        (2, [source], "bytes", ["--on-error", "never"], "invalid choice"),
    ]
    for code, inputs, tokenizer, options, words in cases:
        assert run_preprocess(*inputs, prefix=tmp_path / "out", tokenizer=tokenizer, options=options) == code
        assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


def test_append_eod_needs_an_end_token(tmp_path, hf_folder, capsys):
    content = json.loads((hf_folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["model"]["vocab"]["<|other|>"] = content["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    spec = f"hf:{tmp_path}/tokenizer.json"
    assert run_preprocess(source, prefix=tmp_path / "out", tokenizer=spec) == 0
    assert run_preprocess(source, prefix=tmp_path / "out2", tokenizer=spec, options=["--append-eod"]) == 2
    assert "names no end-of-document token" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["preprocess", "train_tokenizer", "merge", "peek"])
def test_tools_run_as_scripts_and_help_is_light(tool, tmp_path):
    script = str(TOOLS / f"{tool}.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = lambda *a: subprocess.run([sys.executable, *a], capture_output=True, text=True, cwd=tmp_path, env=env)  # noqa: E731
    shown = run("-X", "importtime", script, "--help")
    assert shown.returncode == 0 and "usage: " in shown.stdout
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "tokenizers", "transformers", "sentencepiece", "tiktoken"}
    wrong = run(script, "--no-such-option")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_script_with_workers_from_another_folder(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command = [sys.executable, str(TOOLS / "preprocess.py"), "--input", "a.jsonl", "--output-prefix", "o", "--tokenizer", "bytes", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert documents_of(tmp_path / "o_text_document") == [list(text.encode()) for text in TEXTS]


# --- tokenizers


def train_sentencepiece(folder):
    import sentencepiece

    (folder / "text").write_text("\n".join(["the quick brown fox jumps over the lazy dog"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False, byte_fallback=False, minloglevel=2
    )
    return f"sentencepiece:{folder}/spm.model"


def write_ranks(folder):
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" th", b" the"]
    (folder / "small.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return f"tiktoken:{folder}/small.tiktoken"


@pytest.fixture(params=["bytes", "hf", "sentencepiece", "tiktoken"])
def tokenizer(request, tmp_path, hf_folder):
    specs = {"bytes": lambda: "bytes", "hf": lambda: f"hf:{hf_folder}", "sentencepiece": lambda: train_sentencepiece(tmp_path), "tiktoken": lambda: write_ranks(tmp_path)}  # fmt: skip
    return load_tokenizer(specs[request.param]())


def test_every_tokenizer_keeps_the_protocol(tokenizer):
    texts = ["the quick brown fox", "the lazy dog"]
    ids = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == ids and tokenizer.encode_batch([]) == []
    assert [tokenizer.decode(i) for i in ids] == texts
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids[0])
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size and tokenizer.eod_id not in ids[0] + ids[1]


def test_tiktoken_ids_and_eod(tmp_path):
    tokenizer = load_tokenizer(write_ranks(tmp_path))
    assert tokenizer.encode("the the<|endoftext|>") == [257, 259] + list(b"<|endoftext|>")
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (260, 261)
    assert tokenizer.decode([257, 260]) == "the<|endoftext|>"
    (tmp_path / "none.tiktoken").write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        load_tokenizer(f"tiktoken:{tmp_path}/none.tiktoken")


def test_tiktoken_patterns_split_like_the_published_encodings(monkeypatch):
    import regex
    import tiktoken_ext.openai_public as public

    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
    pairs = [(GPT2_PATTERN, public.r50k_pat_str), (CL100K_PATTERN, public.cl100k_base()["pat_str"]), (O200K_PATTERN, public.o200k_base()["pat_str"])]
    random = np.random.default_rng(0)
    alphabet = list("aAbZéßǅʰ ẞ東京٣123  \t\n\r\n''sStTreLLvemd.,!?/-_<|>\u0301\u00a0🚅")
    texts = TEXTS + ["".join(random.choice(alphabet, size=40)) for _ in range(2000)] + [" It'S they'LL we've 12345 x\r\n\r\n  y/ "]
    for ours, theirs in pairs:
        for text in texts:
            assert regex.findall(ours, text) == regex.findall(theirs, text), text


def test_byte_tokenizer_decodes_eod_and_broken_text():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(list("é".encode()) + [256] + [0xC3]) == "é<eod>\ufffd"


def test_hf_eod_comes_from_the_config_then_from_known_names(tmp_path, hf_folder):
    assert load_tokenizer(f"hf:{hf_folder}/tokenizer.json").eod_id == 0
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(f"hf:{tmp_path}").eod_id == 0
    other = json.loads((hf_folder / "tokenizer.json").read_text())["model"]["vocab"]["!"]
    for value in ("!", {"content": "!"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": value}))
        assert load_tokenizer(f"hf:{tmp_path}").eod_id == other != 0


@pytest.mark.parametrize("content", ["{broken", "[]"], ids=["cut", "list"])
def test_a_damaged_config_beside_a_tokenizer_is_named(tmp_path, hf_folder, content):
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(DataError, match="tokenizer_config.json.*fetch the tokenizer again"):
        load_tokenizer(f"hf:{tmp_path}")


def test_unknown_spec_is_a_usage_error():
    for spec in ("", "hf", "hf:", "gpt2", "sentencepiece"):
        with pytest.raises(UsageError, match="is not one of"):
            load_tokenizer(spec)


def test_trained_tokenizer_loads_in_transformers_with_equal_ids(hf_folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(hf_folder), load_tokenizer(f"hf:{hf_folder}")
    assert theirs.eos_token == theirs.pad_token == "<|endoftext|>" and theirs.eos_token_id == ours.eod_id == 0
    assert len(theirs) == ours.vocab_size == 600
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert ours.decode(ours.encode(text)) == text == theirs.decode(ours.encode(text))


def test_train_tokenizer_refusals(tmp_path, capsys):
    source = damaged_jsonl(tmp_path / "a.jsonl")
    arguments = ["--input", source, "--vocab-size", "300", "--output", str(tmp_path / "t")]
    assert train_tokenizer.main(arguments) == 1
    assert f"7 malformed documents, the first at {source}:2" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
    assert train_tokenizer.main(arguments + ["--on-error", "skip"]) == 0
    assert "the text gave" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "t")) == ["tokenizer.json", "tokenizer.json.manifest.json", "tokenizer_config.json"]
    manifest = read_manifest(tmp_path / "t/tokenizer.json.manifest.json")
    assert manifest["tool"] == "train_tokenizer" and manifest["counts"]["malformed"] == 7 and manifest["counts"]["documents"] > 0
    assert [entry["path"] for entry in manifest["inputs"] + manifest["outputs"]] == ["../a.jsonl", "tokenizer_config.json", "tokenizer.json"]
    assert train_tokenizer.main(["--input", source, "--vocab-size", "256", "--output", str(tmp_path / "u")]) == 2
    assert "below 257" in capsys.readouterr().err


# --- merge and peek


def test_merge_joins_documents_in_order(tmp_path, capsys):
    for name, texts in (("a", ["one", "two"]), ("b", ["three"])):
        assert run_preprocess(write_jsonl(tmp_path / f"{name}.jsonl", texts), prefix=tmp_path / name) == 0
    prefixes = [str(tmp_path / f"{name}_text_document") for name in "ab"]
    assert merge.main(["--input", *prefixes, "--output-prefix", str(tmp_path / "all")]) == 0
    assert documents_of(tmp_path / "all") == [list(b"one"), list(b"two"), list(b"three")]
    assert "2 corpora, 3 documents, 11 tokens" in capsys.readouterr().out
    assert merge.main(["--input", *prefixes, "--output-prefix", prefixes[1]]) == 2
    assert merge.main(["--input", prefixes[0], str(tmp_path / "no"), "--output-prefix", str(tmp_path / "x")]) == 1
    assert "no.idx: cannot open" in capsys.readouterr().err
    assert documents_of(prefixes[1]) == [list(b"three")] and not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_had_enough_is_no_error(tmp_path, unbuffered):
    """`peek ... | head`: ended as the signal would end it, and without a word."""
    run_preprocess(write_jsonl(tmp_path / "a.jsonl", ["alpha"]), prefix=tmp_path / "a")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(Path(__file__).parents[2] / "data_tools" / "peek.py"), str(tmp_path / "a_text_document")]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_peek_prints_documents_and_samples(tmp_path, capsys):
    run_preprocess(write_jsonl(tmp_path / "a.jsonl", ["alpha", "beta", "gamma"]), prefix=tmp_path / "a", options=["--append-eod"])
    prefix = str(tmp_path / "a_text_document")
    show = lambda *a: (peek.main([prefix, *a]), capsys.readouterr())  # noqa: E731
    capsys.readouterr()
    assert show()[1].out == "3 documents, 3 sequences, 17 tokens, uint16, greatest id 256\n"
    assert "beta<eod>" in show("--document", "1", "--tokenizer", "bytes")[1].out
    assert "98 101 116 97 256" in show("--document", "1")[1].out
    samples = [show("--sample", str(j), "--seq-len", "4", "--tokenizer", "bytes")[1].out for j in range(4)]
    text = "".join(line for out in samples for line in out.splitlines()[1:] if not line.startswith("---"))
    assert len(text.replace("<eod>", "#")) == 4 * 5
    for arguments, code, words in [
        (["--document", "3"], 2, "has documents 0 to 2"),
        (["--sample", "0"], 2, "--sample needs --seq-len"),
        (["--sample", "4", "--seq-len", "4"], 2, "there are samples 0 to 3"),
        (["--document", "0", "--sample", "0"], 2, "not allowed with"),
        (["--sample", "0", "--seq-len", "400"], 1, "fewer than one sample"),
        (["--document", "0", "--tokenizer", "sentence"], 2, "is not one of"),
    ]:
        result = show(*arguments)
        assert result[0] == code and words in result[1].err
    with open(tmp_path / "small.tiktoken", "wb") as file:
        file.write(base64.b64encode(b"a") + b" 0\n")
    assert "written with another tokenizer" in show("--document", "0", "--tokenizer", f"tiktoken:{tmp_path}/small.tiktoken")[1].err
