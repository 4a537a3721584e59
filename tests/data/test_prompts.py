"""Prompt files to tokens and records: transformers' rendering as oracle, lengths, mistakes, an order without end, and where answers end."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from chats import write_jsonl, write_tokenizer

from data_tools.tokenizer import load_tokenizer
from engine.config import ConfigError, validate
from engine.data import prompts
from engine.data.indexed import DataError
from engine.data.loader import Loader

SEQ, NEW = 64, 16
LINES = [{"prompt": "Say one.", "answer": 1, "source": {"page": [3]}},
         {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say two."}], "answer": "two"},
         {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "é\n?"}],
          "answer": "3"},
         {"conversations": [{"from": "human", "value": "Say four."}], "answer": 4.5},
         {"prompt": "Say five, please.", "answer": "x", "completion": "not part of it", "response": "nor this"}]
MESSAGES = [[{"role": "user", "content": "Say one."}], LINES[1]["messages"], LINES[2]["prompt"], [{"role": "user", "content": "Say four."}],
            [{"role": "user", "content": "Say five, please."}]]


@pytest.fixture(scope="session")
def spec(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_run(spec, tmp_path):
    """make_run(lines, **changes of sections) -> a run whose data.train is a file of these lines."""

    def make(lines=LINES, files=None, rewards=(), **sections):
        files = files or [write_jsonl(tmp_path / "prompts.jsonl", lines)]
        llama = dict(family="llama", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=400)
        raw = {"run": {"dir": str(tmp_path / "run"), "device": "cpu", "seed": 3}, "stage": "sft", "model": llama, "chat": {"template": "chatml"},
               "data": {"train": files, "tokenizer": spec}, "rollout": {"max_new_tokens": NEW}, "rewards": list(rewards),
               "train": {"seq_len": SEQ, "global_batch": 4, "steps": 1, "precision": "fp32"}}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return validate(raw)

    return make


def numbered(tmp_path, name, first, count):
    return write_jsonl(tmp_path / name, [{"prompt": f"Say {k}.", "n": k} for k in range(first, first + count)])


def drawn(dataset, numbers):
    return [dataset.record(number)["n"] for number in numbers]


# --- what a sample is -------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_transformers(make_run, spec):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec.removeprefix("hf:") + "/tokenizer.json", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (Path(prompts.__file__).parent / "templates/chatml.jinja").read_text()
    train, valid = prompts.datasets(make_run(), 10, 0)
    assert valid == {}
    batch = train.batch(np.arange(10))
    seen = []
    for row in range(10):
        record = train.record(row)
        which = LINES.index(record)
        seen.append(which)
        wanted = tokenizer.apply_chat_template(MESSAGES[which], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(wanted, add_special_tokens=False)["input_ids"]
        assert batch["tokens"][row].tolist() == ids + [0] * (SEQ - NEW - len(ids)) and batch["lengths"][row] == len(ids)
        assert train.text(row) == wanted and train.longest(np.array([row])) == len(ids)
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5)) and seen[:5] != seen[5:]
    assert batch["number"].tolist() == list(range(10)) and batch["dataset"].tolist() == [0] * 10
    assert train.longest(np.arange(10)) == batch["lengths"].max()
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


def test_validation_sets_are_told_apart(make_run, tmp_path):
    files = {"a": [numbered(tmp_path, "a.jsonl", 10, 3)], "b": [numbered(tmp_path, "b.jsonl", 20, 3)]}
    train, valid = prompts.datasets(make_run(data={"valid": files}), 4, 4)
    assert list(valid) == ["a", "b"]
    assert [valid[name].batch(np.arange(2))["dataset"].tolist() for name in valid] == [[1, 1], [2, 2]]
    assert sorted(drawn(valid["b"], range(3))) == [20, 21, 22]


def test_the_cache_is_used_again_and_knows_what_it_depends_on(make_run):
    folders = lambda: {path.name for path in Path(make_run().run.dir, "index_cache").iterdir()}  # noqa: E731
    prompts.datasets(make_run(), 4, 0)
    one = folders()
    prompts.datasets(make_run(), 4, 0)
    assert folders() == one and len(one) == 1
    for count, changes in enumerate(({"rollout": {"max_new_tokens": NEW - 1}}, {"chat": {"too_long": "refuse"}}, {"chat": {"template": "tags"}},
                                     {"rewards": [{"kind": "exact"}]}), start=2):
        prompts.datasets(make_run(**changes), 4, 0)
        assert len(folders()) == count


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [False, True])
def test_an_order_without_end(make_run, tmp_path, weights):
    files = [numbered(tmp_path, "a.jsonl", 0, 7), numbered(tmp_path, "b.jsonl", 100, 5)]
    run = make_run(files=[3, files[0], 1, files[1]] if weights else files)
    short, long = (prompts.datasets(run, count, 0)[0] for count in (4, 1000))
    order = drawn(long, range(240))
    assert drawn(short, range(240)) == order == [drawn(short, [k])[0] for k in range(240)]
    assert drawn(prompts.datasets(run, 4, 0)[0], [239, 3]) == [order[239], order[3]]
    if weights:
        assert sum(n >= 100 for n in order) == 60
        of_a = [n for n in order if n < 100]
        assert all(sorted(of_a[k:k + 7]) == list(range(7)) for k in range(0, 175, 7)) and of_a[:7] != of_a[7:14]
    else:
        assert all(sorted(order[k:k + 12]) == [*range(7), *range(100, 105)] for k in range(0, 240, 12)) and order[:12] != order[12:24]
    other = prompts.datasets(make_run(files=run.data.train, run={"seed": 4}), 4, 0)[0]
    assert drawn(other, range(24)) != order[:24]


def test_the_loader_reads_beyond_what_was_planned(make_run):
    train = prompts.datasets(make_run(), 4, 0)[0]
    parts = [Loader(train, 1, rank, 2, 4).batches(1000, 4) for rank in (0, 1)]
    numbers = [int(batch["number"]) for batches in zip(*parts) for batch in batches]
    assert numbers == [1000, 1001, 1002, 1003]
    assert {batch["tokens"].shape[1] for part in parts for batch in part} == {-(-train.longest(np.arange(1000, 1004)) // 4) * 4}


def test_one_epoch_is_kept_to(make_run):
    run = make_run(data={"one_epoch": True})
    train = prompts.datasets(run, 3, 0)[0]
    assert sorted(train.record(k)["answer"] == 1 for k in range(5)) == [False] * 4 + [True]
    with pytest.raises(DataError, match=r"data.train \(.*prompts.jsonl\) holds 5 samples in one epoch, but 6 are asked for"):
        train.batch(np.array([5]))
    with pytest.raises(DataError, match="holds 5 samples in one epoch, but 6"):
        prompts.datasets(run, 6, 0)


# --- lengths ----------------------------------------------------------------------------------------------------------


def long_and_short():
    return [{"prompt": "word " * 30 + "end", "answer": 1}, {"prompt": "short", "answer": 2}]


def test_too_long_is_dropped_and_counted(make_run, caplog):
    with caplog.at_level(logging.WARNING):
        train = prompts.datasets(make_run(long_and_short()), 4, 0)[0]
    assert {train.record(k)["answer"] for k in range(6)} == {2}
    assert "1 of 2 prompts exceed train.seq_len(64) - rollout.max_new_tokens(16); chat.too_long=drop: 1 dropped, 0 truncated" in caplog.text


def test_too_long_is_cut_on_the_left(make_run):
    train = prompts.datasets(make_run(long_and_short(), chat={"too_long": "truncate_left"}), 4, 0)[0]
    (row,) = [k for k in range(2) if train.record(k)["answer"] == 1]
    whole = prompts.datasets(make_run(long_and_short(), train={"seq_len": 512}), 4, 0)[0]
    (uncut,) = [k for k in range(2) if whole.record(k)["answer"] == 1]
    ids = whole.batch(np.array([uncut]))["tokens"][0, :whole.longest(np.array([uncut]))].tolist()
    assert train.batch(np.array([row]))["tokens"][0].tolist() == ids[-(SEQ - NEW):] and len(ids) > SEQ - NEW
    assert train.text(row).endswith("end<|im_end|>\n<|im_start|>assistant\n") and not train.text(row).startswith("<|im_start|>")


def test_a_prompt_may_fill_what_the_answer_leaves(make_run):
    length = int(prompts.datasets(make_run(LINES[:1]), 1, 0)[0].longest(np.array([0])))
    fits = make_run(LINES[:1], train={"seq_len": length + NEW}, chat={"too_long": "refuse"})
    assert prompts.datasets(fits, 1, 0)[0].batch(np.array([0]))["tokens"].shape == (1, length)
    with pytest.raises(DataError, match=rf"prompts.jsonl:1: a prompt of {length} tokens, but train.seq_len\({length + NEW - 1}\) - "
                                        rf"rollout.max_new_tokens\(16\) = {length - 1}; raise train.seq_len"):
        prompts.datasets(make_run(LINES[:1], train={"seq_len": length + NEW - 1}, chat={"too_long": "refuse"}), 1, 0)


def test_truncate_right_would_cut_off_the_assistants_header(make_run):
    with pytest.raises(DataError, match="prompts.jsonl:1: .*truncate_right would cut off what begins the answer; let it drop or truncate_left"):
        prompts.datasets(make_run(long_and_short(), chat={"too_long": "truncate_right"}), 4, 0)


def test_no_place_and_nothing_left(make_run):
    with pytest.raises(ConfigError, match=r"rollout.max_new_tokens\(64\) leaves no place for a prompt in train.seq_len\(64\)"):
        prompts.datasets(make_run(rollout={"max_new_tokens": SEQ}), 4, 0)
    with pytest.raises(DataError, match="nothing is left of 1 prompts: 1 exceed"):
        prompts.datasets(make_run(long_and_short()[:1]), 4, 0)
    with pytest.raises(DataError, match="nothing is left of 0 prompts"):
        prompts.datasets(make_run([]), 4, 0)


# --- mistakes ---------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("line, sentence", [
    ({"text": "x"}, "no prompt among the keys 'text'; expected prompt, messages or conversations"),
    ({}, r"no prompt among the keys \(none\)"),
    ({"messages": [USER, {"role": "assistant", "content": "Hello"}]}, "the last message is the assistant's, so nothing is left to answer"),
    ({"prompt": [USER, {"role": "assistant", "content": "Hello"}]}, "the last message is the assistant's"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "the last message is the assistant's"),
    ({"messages": []}, "messages is not a list with at least one message"), ({"messages": "Hi"}, "messages is not a list"),
    ({"messages": 3}, "messages is not a list"), ({"prompt": None}, "message 1 is a NoneType"), ({"messages": [{"role": "user"}]}, "has no content"),
    ([1], "a JSON list, expected an object"),
])
def test_lines_that_are_no_prompts_are_named(make_run, line, sentence):
    with pytest.raises(DataError, match=f"prompts.jsonl:2: .*{sentence}"):
        prompts.datasets(make_run([{"prompt": "Fine."}, line]), 4, 0)


@pytest.mark.parametrize("reward, missing, needer", [
    ({"kind": "exact"}, "answer", "exact"), ({"kind": "math", "key": "solution"}, "solution", "math"),
    ({"kind": "code", "key": "tests", "name": "unit"}, "tests", "unit"), ({"kind": "reasoning_gym"}, "reasoning_gym", "reasoning_gym")])
def test_what_a_reward_compares_with_must_be_there(make_run, reward, missing, needer):
    lines = [{"prompt": "Fine.", missing: "x"}, {"prompt": "Not.", missing: None}]
    with pytest.raises(DataError, match=f"prompts.jsonl:2: no '{missing}' among the keys .*, but reward {needer} needs it"):
        prompts.datasets(make_run(lines, rewards=[reward]), 4, 0)
    others = [{"kind": "regex", "pattern": "x"}, {"kind": "model"}, {"kind": "python", "path": "a:b"}]
    prompts.datasets(make_run(lines, rewards=others), 4, 0)


# --- where answers end ------------------------------------------------------------------------------------------------

THINKS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
ENDS_BEFORE = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}"


@pytest.mark.parametrize("template, ends", [("chatml", ["<|im_end|>"]), ("llama3", ["<|eot_id|>"]), ("mistral", []), ("tags", []),
                                            (THINKS, ["<|im_end|>"]), (PLAIN, []), (ENDS_BEFORE, [])])
def test_answers_end_with_the_turn_or_the_document(make_run, spec, tmp_path, template, ends):
    if "{" in template:
        (tmp_path / "own.jinja").write_text(template)
        template = str(tmp_path / "own.jinja")
    tokenizer = load_tokenizer(spec)
    stops = prompts.stop_tokens(make_run(chat={"template": template}))
    assert stops == tuple(sorted(tokenizer.encode(text)[0] for text in [*ends, "</s>"]))
    assert prompts.decoder(make_run())(tokenizer.encode("Hello<|im_end|>")) == "Hello<|im_end|>"


def test_answers_that_could_not_end_are_refused(make_run, tmp_path):
    (tmp_path / "own.jinja").write_text(PLAIN)
    spec = write_tokenizer(tmp_path / "endless", specials=("<|im_start|>", "<|im_end|>"), config={})
    with pytest.raises(DataError, match="names no end of document and chat template .*own.jinja ends turns with no special token"):
        prompts.stop_tokens(make_run(chat={"template": str(tmp_path / "own.jinja")}, data={"tokenizer": spec}))
    (tmp_path / "broken.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match="broken.jinja failed: no"):
        prompts.stop_tokens(make_run(chat={"template": str(tmp_path / "broken.jinja")}))


def test_records_are_the_lines(make_run, tmp_path):
    """Whatever JSON holds: other spacing, escapes, half characters, long integers, and keys of any name."""
    lines = ['{ "prompt":"a",  "x": "\\ud800", "n": 123456789012345678901234567890 }', '{"prompt": "b", "x": "\u2028\u0085", "": null}']
    (tmp_path / "odd.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    train = prompts.datasets(make_run(files=[str(tmp_path / "odd.jsonl")]), 2, 0)[0]
    found = sorted((train.record(k) for k in range(2)), key=lambda record: record["prompt"])
    assert found == [json.loads(line) for line in lines]
