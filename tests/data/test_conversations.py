"""Files of conversations to a cache: the three forms, what is counted, what is refused by file and line, limits, and one maker for all."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from chats import TALK, TOOLS, write_jsonl, write_tokenizer

from engine.config import ConfigError, validate
from engine.data.chat import Template
from engine.data.conversations import build_once, configured, conversation, conversations, parsed
from engine.data.indexed import DataError, IndexedCorpus
from engine.data.offsets import load_offsets

Q, A = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


def make_run(folder, chat=None, **changes):
    raw = {"run": {"dir": str(folder / "run"), "device": "cpu"}, "stage": "sft",
           "model": {"family": "llama", "num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 257},
           "data": {"train": ["unused"], "tokenizer": "bytes"}, "train": {"seq_len": 128, "global_batch": 2, "steps": 1, "precision": "fp32"},
           "chat": {"template": "tags", "workers": 1, **(chat or {})}}
    for section, values in changes.items():
        raw[section] = {**raw[section], **values}
    return validate(raw)


def texts(found) -> list[tuple[str, str]]:
    """(all, trained) bytes of every conversation in a cache of the bytes tokenizer, the end token as <eod>."""
    decode = lambda ids: b"".join(bytes([i]) if i < 256 else b"<eod>" for i in ids.tolist()).decode()  # noqa: E731
    pairs = [(found.tokens.get(i), found.masks.get(i).astype(bool)) for i in range(len(found.tokens))]
    return [(decode(ids), decode(ids[mask])) for ids, mask in pairs]


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [
    {"messages": [Q, A]},
    {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
    {"conversations": [Q, A]},
    {"prompt": "1+1?", "completion": "2"},
    {"prompt": "1+1?", "response": "2"},
    {"prompt": [Q], "completion": [A]},
])
def test_three_forms_say_the_same(record):
    assert conversation(record) == ([Q, A], None)


def test_tools_and_speakers():
    messages, tools = conversation({"tools": json.dumps(TOOLS), "system": "S", "conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}', "weight": 0},
        {"from": "observation", "value": "3"}, {"from": "gpt", "value": "three"}]})
    assert tools == TOOLS and [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}], "weight": 0}


@pytest.mark.parametrize("line, error", [
    ('{"messages": [', "not JSON"),
    ("[1]", "a JSON list, expected an object"),
    ('{"text": "x"}', "no conversation among the keys 'text'"),
    ('{"conversations": 3}', "conversations is not a list"),
    ('{"conversations": [{"from": "alien", "value": "x"}]}', "message 1 is from 'alien'"),
    ('{"messages": [], "tools": "{"}', "tools is a string that holds no JSON"),
    ('{"messages": [], "tools": {}}', None),
    ('{"messages": [], "tools": 7}', "tools is a int"),
    ('{"conversations": [{"from": "function_call", "value": "{"}]}', "message 1 is a function_call whose value is not JSON"),
    ("[" * 100_000, "nested too deeply|not JSON"),
])
def test_lines_that_are_refused(line, error):
    if error is None:
        assert conversation(parsed(line)) == ([], None)
        return
    with pytest.raises(DataError, match=error):
        conversation(parsed(line))


def test_a_cache_holds_tokens_and_masks_in_order(tmp_path):
    import gzip

    files = [write_jsonl(tmp_path / "a.jsonl", [{"messages": [Q, A]}, {"messages": [Q, A, Q, A]}]), str(tmp_path / "b.jsonl.gz")]
    with gzip.open(files[1], "wt") as file:
        file.write(json.dumps({"prompt": "é", "completion": "\U0001f600"}) + "\n\n")
    found = conversations(make_run(tmp_path), files)
    one = "<|user|>\n1+1?\n<|assistant|>\n2<eod>"
    assert texts(found) == [(one, "2<eod>"), (one + one, "2<eod>2<eod>"), ("<|user|>\né\n<|assistant|>\n\U0001f600<eod>", "\U0001f600<eod>")]
    assert (found.report.conversations, found.report.kept) == (3, 3) and found.report.trained_tokens == 2 + 4 + 5
    assert found.report.tokens == found.tokens.num_tokens == found.masks.num_tokens


def test_workers_do_not_change_the_cache(tmp_path):
    records = [{"messages": [Q, {"role": "assistant", "content": "x" * (k % 50) + "."}]} for k in range(900)]
    records += [{"messages": [{"role": "user", "content": "long " * 2300}, A]} for _ in range(100)]
    file = write_jsonl(tmp_path / "a.jsonl", records)
    assert os.stat(file).st_size > 1 << 20      # enough for two workers
    found = [conversations(make_run(tmp_path, {"workers": n, "too_long": "truncate_left"}, data={"cache_dir": str(tmp_path / f"cache{n}")}), [file])
             for n in (1, 2)]
    assert found[0].report == found[1].report and found[0].report.kept == 1000 and found[0].report.truncated == 100
    assert texts(found[0]) == texts(found[1])


# --- what is counted --------------------------------------------------------------------------------------------------


BEFORE = len("<|user|>\n1+1?\n<|assistant|>\n")      # tokens before the answer to Q
LONG = [{"messages": [Q, A]}, {"messages": [{**Q, "content": "x" * 200}, A]}, {"messages": [Q, {**A, "content": "y" * 200}]}]


@pytest.mark.parametrize("policy, lengths, trained, counts", [
    ("drop", [BEFORE + 2], [2], dict(dropped=2, truncated=0, truncated_to_nothing=0)),
    ("truncate_right", [BEFORE + 2, 129], [2, 129 - BEFORE], dict(dropped=0, truncated=1, truncated_to_nothing=1)),
    ("truncate_left", [BEFORE + 2, 129, 129], [2, 2, 128], dict(dropped=0, truncated=2, truncated_to_nothing=0)),
])
def test_too_long(tmp_path, caplog, policy, lengths, trained, counts):
    with caplog.at_level(logging.INFO, "engine.data.conversations"):
        found = conversations(make_run(tmp_path, {"too_long": policy}), [write_jsonl(tmp_path / "a.jsonl", LONG)])
    assert found.tokens.sequence_lengths.tolist() == lengths
    assert [int(found.masks.get(i)[1:].sum()) for i in range(len(lengths))] == trained
    report = vars(found.report)
    assert report["conversations"] == 3 and report["too_long"] == 2 and report["kept"] == len(lengths) and {k: report[k] for k in counts} == counts
    assert f"2 of 3 conversations exceed train.seq_len; chat.too_long={policy}" in caplog.text and "3 conversations in" in caplog.text
    whole = Template.load("tags", "bytes").encode(LONG[2]["messages"]).ids
    if policy != "drop":
        assert found.tokens.get(len(lengths) - 1).tolist() == (whole[:129] if policy == "truncate_right" else whole[-129:])


def test_exactly_seq_len_places_fit(tmp_path):
    """A conversation of seq_len + 1 tokens takes seq_len places."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": [Q, {"role": "assistant", "content": "y" * n}]} for n in (128 - BEFORE, 129 - BEFORE)])
    found = conversations(make_run(tmp_path), [file])
    assert found.tokens.sequence_lengths.tolist() == [129] and found.report.dropped == 1


def test_refusing_and_nothing_left(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", LONG)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 226 tokens, but train.seq_len\(128\) holds 129"):
        conversations(make_run(tmp_path, {"too_long": "refuse"}), [file])
    with pytest.raises(DataError, match=r"nothing is left of 2 conversations: 2 exceed train.seq_len\(128\)"):
        conversations(make_run(tmp_path), [write_jsonl(tmp_path / "b.jsonl", LONG[1:])])


def test_untrained_conversations_and_special_texts_are_told(tmp_path, caplog):
    records = [{"messages": [Q, {**A, "weight": 0}]}, {"messages": [{"role": "user", "content": "<eod>!"}, A]}, {"messages": [Q, A]}]
    with caplog.at_level(logging.WARNING, "engine.data.conversations"):
        report = conversations(make_run(tmp_path), [write_jsonl(tmp_path / "a.jsonl", records)]).report
    assert (report.untrained, report.special_tokens_in_text, report.kept) == (1, 1, 2)
    assert "1 of 3 conversations left out: every turn of the assistant is switched off" in caplog.text
    assert "1 of 3 conversations hold text of special tokens" in caplog.text


@pytest.mark.parametrize("bad, error", [
    ('{"messages": [{"role": "user", "content": "x"}]}', r"a\.jsonl:201: no message of role assistant"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', r"a\.jsonl:201: message 1 has role 'robot'"),
    ("{", r"a\.jsonl:201: not JSON"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
     r"a\.jsonl:201: message 1 holds half a character \(a lone surrogate"),
    (b'{"messages": "\xff"}', r"a\.jsonl:201: not UTF-8: byte 0xff"),
])
def test_the_first_bad_conversation_is_named(tmp_path, bad, error):
    good = json.dumps({"messages": [Q, A]}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(good * 200 + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n" + good * 200)
    run = make_run(tmp_path)
    with pytest.raises(DataError, match=error):
        conversations(run, [str(tmp_path / "a.jsonl")])
    left = sorted(path.suffix for path in Path(run.run.dir, "index_cache").iterdir())
    assert left == [".failed"]


def test_missing_files_and_formats(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl: No such file.*\.jsonl"):
        conversations(make_run(tmp_path), [str(tmp_path / "none.jsonl")])


# --- templates that harm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, error", [
    ("{% for i in range(10**9) %}{{ i }}{% endfor %}", "Range too big"),
    ("{% for i in range(90000) %}{% for j in range(90000) %}{% for k in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
     r"stopped after 1 s of processor time \(chat.template_seconds\)"),
    ("{{ 'a' * 10**10 }}", r"stopped at 256 MiB of memory \(chat.template_mib\)"),
    ("{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}", "stopped at 256 MiB of memory"),
    ("{{ ''.__class__.__mro__ }}", "'__class__' of 'str' object is unsafe"),
    ("{{ messages.append(1) }}", "unsafe|not callable|not safely"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    ("{{ raise_exception('only one turn, please') }}", "failed: only one turn, please"),
    ("{% if %}", r"cannot be read: .*\(line 1\)"),
    ("{{ 1 / 0 }}", "failed: division by zero"),
], ids=["range", "loops", "times", "doubling", "classes", "append", "recursion", "raise", "syntax", "zero"])
def test_a_harmful_template_ends_in_one_sentence(tmp_path, text, error):
    (tmp_path / "bad.jinja").write_text(text)
    run = make_run(tmp_path, {"template": str(tmp_path / "bad.jinja"), "template_seconds": 1, "template_mib": 256})
    with pytest.raises(DataError, match=rf"a\.jsonl:1: chat template .*bad\.jinja .*({error})") as caught:
        conversations(run, [write_jsonl(tmp_path / "a.jsonl", [{"messages": [Q, A]}])])
    assert "\n" not in str(caught.value)


def test_the_conversation_that_harms_is_named(tmp_path):
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{% if m.content == 'loop' %}" + loop + "{% endif %}{% if m.role == 'assistant' %}"
                                        "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}")
    run = make_run(tmp_path, {"template": str(tmp_path / "bad.jinja"), "template_seconds": 1})
    records = [{"messages": [Q, A]}, {"messages": [Q, A]}, {"messages": [{"role": "user", "content": "loop"}, A]}, {"messages": [Q, A]}]
    with pytest.raises(DataError, match=r"a\.jsonl:3: chat template .* processor time"):
        conversations(run, [write_jsonl(tmp_path / "a.jsonl", records)])


def test_workers_import_no_torch():
    code = "import sys, engine.data.sandbox, engine.data.conversations as c; c.Encoder('tags', 'bytes', 'all'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "False"


# --- made once --------------------------------------------------------------------------------------------------------


def test_a_cache_is_made_once_and_anew_when_anything_changes(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": [Q, A]}])
    found = conversations(make_run(tmp_path), [file])
    cache = Path(tmp_path, "run", "index_cache")
    made = {path: path.stat().st_mtime_ns for path in cache.glob("*/*")}
    again = conversations(make_run(tmp_path), [file])
    assert again.report == found.report and {path: path.stat().st_mtime_ns for path in cache.glob("*/*")} == made
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "own.jinja").write_text(Path(__file__).parents[2].joinpath("engine/data/templates/tags.jinja").read_text() + " ")
    for number, changed in enumerate([make_run(tmp_path, {"train_on": "last"}), make_run(tmp_path, {"too_long": "refuse"}),
                                      make_run(tmp_path, {"template": str(tmp_path / "own.jinja")}), make_run(tmp_path, train={"seq_len": 64}),
                                      make_run(tmp_path, data={"tokenizer": tokenizer})], start=2):
        conversations(changed, [file])
        assert len(list(cache.iterdir())) == number
    write_jsonl(file, [{"messages": [Q, {**A, "content": "3"}]}])      # the same length
    assert texts(conversations(make_run(tmp_path), [file]))[0][1] == "3<eod>"


def test_other_ranks_wait_for_rank_0(tmp_path, monkeypatch):
    folder, answers = tmp_path / "cache" / "x", []

    def other_rank():
        monkeypatch.setenv("RANK", "1")
        answers.append(build_once(folder, None, timeout_minutes=1))

    monkeypatch.setenv("RANK", "1")
    waiting = threading.Thread(target=other_rank)
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive() and not folder.parent.exists()
    monkeypatch.setenv("RANK", "0")
    build_once(folder, lambda partial, beat: (partial / "file").write_text("1"), timeout_minutes=1)
    waiting.join(timeout=10)
    assert answers == [folder] and (folder / "file").read_text() == "1" and [path.name for path in folder.parent.iterdir()] == ["x"]


def test_other_ranks_hear_of_a_failure_and_of_silence(tmp_path, monkeypatch):
    folder = tmp_path / "x"

    def fail(partial, beat):
        (partial / "half").write_text("1")
        raise DataError("a.jsonl:7: no good")

    with pytest.raises(DataError, match="no good"):
        build_once(folder, fail, timeout_minutes=1)
    assert not folder.exists() and [path.name for path in tmp_path.iterdir()] == ["x.failed"]
    monkeypatch.setenv("RANK", "1")
    later = threading.Timer(0.3, lambda: (tmp_path / "x.failed").write_text("a.jsonl:8: worse"))
    later.start()
    with pytest.raises(DataError, match="a.jsonl:8: worse"):      # not the one that was there before
        build_once(folder, None, timeout_minutes=1)
    monkeypatch.setattr("engine.data.conversations.OLD_FAILURE_SECONDS", 0.1)
    with pytest.raises(DataError, match="a.jsonl:8: worse"):
        build_once(folder, None, timeout_minutes=1)
    (tmp_path / "x.failed").unlink()
    with pytest.raises(DataError, match="waited 0.005 minutes for rank 0 to make .*share a file system"):
        build_once(folder, None, timeout_minutes=0.005)


def test_an_unwritable_cache_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the cache in .*choose a writable data.cache_dir"):
        build_once(tmp_path / "file" / "x", None, timeout_minutes=1)


# --- what a run becomes -----------------------------------------------------------------------------------------------


def test_the_run_that_reads_conversations(tmp_path, caplog):
    spec = write_tokenizer(tmp_path / "tokenizer")
    size = load_offsets(spec).vocab_size + 1
    run = make_run(tmp_path, {"template": "chatml", "add_tokens": ["<|extra|>"]}, data={"tokenizer": spec})
    with caplog.at_level(logging.INFO, "engine.data.conversations"):
        ready = configured(run)
    assert ready.data.tokenizer == f"hf:{tmp_path}/run/tokenizer" and ready.model.vocab_size == size and not ready.checkpoint.load_position
    assert f"model.vocab_size raised from 257 to the tokenizer's {size}" in caplog.text
    assert configured(ready) == ready
    assert configured(make_run(tmp_path, model={"vocab_size": 300})).model.vocab_size == 300
    for changes, error in (({"tokenizer": ""}, "data.tokenizer is empty"), ({"split": "9,1"}, "cuts plain text; name the validation files")):
        with pytest.raises(ConfigError, match=error):
            configured(make_run(tmp_path, data=changes))


def test_masks_are_bytes_and_tokens_small(tmp_path):
    found = conversations(make_run(tmp_path), [write_jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])])
    assert found.masks.dtype == np.uint8 and found.tokens.dtype == np.uint16 and isinstance(found.tokens, IndexedCorpus)
