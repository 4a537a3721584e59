"""Preference files to rows: what counts, against TRL's tokens and texts written by hand; lengths, mistakes, order and stored references."""

import copy
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import ranks
from chats import runs, write_jsonl, write_tokenizer

from data_tools.tokenizer import load_tokenizer
from engine.config import validate
from engine.data import pairs
from engine.data.chat import Encoded
from engine.data.indexed import DataError
from engine.data.preference import Encoder, Report, _fitted, preferences
from engine.stages import dpo

SEQ = 64
user, assistant = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
TALK = [user("Hi there"), assistant("Hello, you!"), user("And now?")]
LINES = [
    {"prompt": "Hi there", "chosen": "Hello, you!", "rejected": "Bye."},
    {"prompt": TALK, "chosen": "Good bye.", "rejected": [assistant("What?")]},
    {"chosen": [*TALK, assistant("Good bye."), user("Really?"), assistant("Yes.")], "rejected": [*TALK, assistant("No. And you?")]},
    {"prompt": "Hi there", "chosen": [user("Hi there"), assistant("Three.")], "rejected": [user("Hi there"), assistant("Seven.")]},
]
SAID = [(["Hello, you!<|im_end|>"], ["Bye.<|im_end|>"]), (["Good bye.<|im_end|>"], ["What?<|im_end|>"]),
        (["Good bye.<|im_end|>", "Yes.<|im_end|>"], ["No. And you?<|im_end|>"]), (["Three.<|im_end|>"], ["Seven.<|im_end|>"])]
LABELLED = [{"prompt": f"Say {word}.", "completion": word * (k + 1), "label": k % 2 == 0} for k, word in enumerate("abcdefg")]


@pytest.fixture(scope="session")
def spec(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_run(spec, tmp_path):
    """make_run(lines, stage, **changes of sections) -> a run whose data.train is a file of these lines."""

    def make(lines, stage="dpo", name="pairs.jsonl", files=None, **sections):
        files = files or [write_jsonl(tmp_path / name, lines)]
        llama = dict(family="llama", num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=400)
        raw = {"run": {"dir": str(tmp_path / "run"), "device": "cpu", "seed": 3}, "stage": stage, "model": llama, "chat": {"template": "chatml"},
               "data": {"train": files, "tokenizer": spec}, "train": {"seq_len": SEQ, "global_batch": 4, "steps": 1, "precision": "fp32"}}
        for section, values in sections.items():
            raw[section] = {**raw.get(section, {}), **values}
        return validate(raw)

    return make


def pieces(batch, row, spec):
    """(text of each run of labels that count, text of everything before the first of them)."""
    n = int(batch["ends"][row]) + 1
    ids, mask = batch["tokens"][row, :n].tolist(), [False, *(batch["loss_mask"][row, :n - 1] > 0).tolist()]
    decode = load_tokenizer(spec).decode
    return [decode(run) for run in runs(Encoded(ids, mask))], decode(ids[:mask.index(True)])


# --- what counts ------------------------------------------------------------------------------------------------------


def test_only_the_answer_counts_and_the_row_ends_with_it(make_run, spec):
    run = make_run(LINES)
    source = preferences(run, run.data.train)
    batch = pairs.in_order(source, SEQ, 4).batch(np.arange(4))
    assert batch["tokens"].shape == (8, SEQ) and batch["loss_mask"].dtype == batch["margins"].dtype
    for pair, (chosen, rejected) in enumerate(SAID):
        assert pieces(batch, 2 * pair, spec)[0] == chosen and pieces(batch, 2 * pair + 1, spec)[0] == rejected
        assert pieces(batch, 2 * pair, spec)[1] == pieces(batch, 2 * pair + 1, spec)[1]
    end_of_turn = load_tokenizer(spec).encode("<|im_end|>")
    for row in range(8):
        n = int(batch["ends"][row]) + 1
        assert batch["tokens"][row, n - 1:n].tolist() == end_of_turn and not batch["tokens"][row, n:].any()
        assert batch["labels"][row, :n - 1].tolist() == batch["tokens"][row, 1:n].tolist()
        assert not batch["loss_mask"][row, n - 1:].any() and batch["position_ids"][row].tolist() == list(range(SEQ))
    assert source.report.trained_tokens == batch["loss_mask"].sum() and source.report.kept == 4


def test_tokens_are_those_of_trl(make_run, spec, tmp_path):
    """TRL's own preparation of the same lines with the same template; its answers go on to the line break after the turn."""
    import datasets
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    file = spec.removeprefix("hf:") + "/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>", pad_token="<s>")
    tokenizer.chat_template = (Path(pairs.__file__).parent / "templates/chatml.jinja").read_text()
    asked = lambda line: line["prompt"] if isinstance(line["prompt"], list) else [user(line["prompt"])]  # noqa: E731
    said = lambda answer: answer if isinstance(answer, list) else [assistant(answer)]  # noqa: E731
    lines = [{"prompt": asked(line), "chosen": said(line["chosen"]), "rejected": said(line["rejected"])} for line in LINES[:2]]
    network = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    trainer = trl.DPOTrainer(model=network, ref_model=copy.deepcopy(network), processing_class=tokenizer,
                             train_dataset=datasets.Dataset.from_list(lines),
                             args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False))
    run = make_run(LINES[:2])
    batch = pairs.in_order(preferences(run, run.data.train), SEQ, 2).batch(np.arange(2))
    line_break = load_tokenizer(spec).encode("\n")
    for pair, theirs in enumerate(trainer.train_dataset):
        for k, name in enumerate(("chosen_ids", "rejected_ids")):
            row = 2 * pair + k
            ids = batch["tokens"][row, :int(batch["ends"][row]) + 1].tolist()
            assert ids + line_break == theirs["prompt_ids"] + theirs[name]
            assert int(batch["loss_mask"][row].argmax()) + 1 == len(theirs["prompt_ids"])


def test_last_turn_and_switched_off_turns(make_run, spec):
    off = {**LINES[2], "chosen": [*TALK, {**assistant("Good bye."), "weight": 0}, user("Really?"), assistant("Yes.")]}
    for run in (make_run([LINES[2]], chat={"train_on": "last"}), make_run([off])):
        batch = pairs.in_order(preferences(run, run.data.train), SEQ, 1).batch(np.arange(1))
        assert pieces(batch, 0, spec)[0] == ["Yes.<|im_end|>"] and pieces(batch, 1, spec)[0] == ["No. And you?<|im_end|>"]


def test_labelled_answers_and_pairs_make_single_rows(make_run, spec):
    run = make_run([*LABELLED[:2], LINES[0]])
    source = preferences(run, run.data.train, paired=False)
    assert source.is_desirable.tolist() == [True, False, True, False] and source.report.kept == 4
    dataset = pairs._dataset(run, "data.train", run.data.train, 4, False, False, "")
    batch = dataset.batch(np.arange(4))
    answers = {pieces(batch, row, spec)[0][0]: bool(batch["is_desirable"][row]) for row in range(4)}
    assert answers == {"a<|im_end|>": True, "bb<|im_end|>": False, "Hello, you!<|im_end|>": True, "Bye.<|im_end|>": False}


def test_mismatched_answers_come_from_the_sample_before(make_run, spec):
    """In a block of global_batch samples, however the rows are read."""
    run = make_run(LABELLED, train={"global_batch": 3})
    dataset = pairs._dataset(run, "data.train", run.data.train, 6, False, False, "")
    whole = dataset.batch(np.arange(6))
    other = {**whole, **{name: whole[f"kl_{name}"] for name in ("tokens", "labels", "loss_mask")}}
    for k in range(6):
        partner = k - 1 if k % 3 else k + 2
        n = int((other["loss_mask"][k] > 0).nonzero().max()) + 1
        answers, prompt = pieces({**other, "ends": {k: n}}, k, spec)
        assert prompt == pieces(whole, k, spec)[1] and answers == pieces(whole, partner, spec)[0]
    for numbers in ([4], [5, 0], [2, 3]):
        part = dataset.batch(np.array(numbers))
        assert all((part[name] == whole[name][numbers]).all() for name in whole)
        lengths = [int(batch["loss_mask"][k].nonzero().max()) + 2 for batch in (whole, other) for k in numbers]
        assert dataset.longest(np.array(numbers)) == max(lengths)


def test_margins_and_scores(make_run):
    lines = [{**LINES[0], "margin": 0.5}, {**LINES[1], "chosen_score": 4, "rejected_score": 1.5},
             {**LINES[2], "score_chosen": 1, "score_rejected": 3, "margin": 9}]
    run = make_run(lines)
    source = preferences(run, run.data.train)
    assert pairs._margins(source, "margin").tolist() == [0.5, 2.5, 9]
    with pytest.raises(DataError, match="1 of 3 pairs do not say chosen_score and rejected_score"):
        pairs._margins(source, "scores")
    assert pairs.in_order(source, SEQ, 3).batch(np.arange(3))["margins"].tolist() == [0] * 6      # scoring needs none
    assert pairs._dataset(run, "data.train", run.data.train, 3, False, True, "margin").batch(np.arange(3))["margins"].sort().values.tolist() == [
        0.5, 0.5, 2.5, 2.5, 9, 9]
    plain = make_run(LINES[:1])
    with pytest.raises(DataError, match='1 of 1 pairs do not say a "margin"'):
        pairs.datasets(plain, 1, 0, needs="margin")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line, words", [
    ({**LINES[0], "rejected": "Hello, you!"}, "chosen and rejected are the same answer"),
    ({"chosen": TALK, "rejected": TALK[:1]}, "an answer holds no message of role assistant after the prompt"),
    ({**LINES[0], "rejected": [user("What?")]}, "an answer holds no message of role assistant after the prompt"),
    ({**LINES[0], "rejected": [{**assistant("What?"), "train": False}]}, "every turn of the assistant switched off"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "there is no prompt"),
    ({**LINES[0], "prompt": []}, "there is no prompt"),
    ({"prompt": "Hi", "completion": "a", "label": True}, "single answers with a label are for dpo.loss=kto"),
    ({"prompt": "Hi", "chosen": "a"}, "no preference among the keys 'prompt', 'chosen'; expected chosen and rejected"),
    ({**LINES[0], "margin": "much"}, "margin is 'much', expected a number"),
    ({**LINES[0], "margin": True}, "margin is True, expected a number"),
    ({**LINES[0], "chosen_score": 1}, "only one of chosen_score and rejected_score"),
    ({**LINES[0], "chosen": [{"role": "robot", "content": "a"}, assistant("b")]}, "role 'robot'"),
    ({**LINES[0], "prompt": 7}, "message 1 is a int"),
])
def test_a_line_that_cannot_be_used_is_refused(spec, line, words):
    with pytest.raises(DataError) as error:
        Encoder("chatml", spec, "all", True)(json.dumps(line))
    assert words in str(error.value)


def test_labels_must_be_booleans(spec):
    with pytest.raises(DataError, match="label is 'good', expected true or false"):
        Encoder("chatml", spec, "all", False)(json.dumps({**LABELLED[0], "label": "good"}))


def test_the_line_is_named(make_run):
    run = make_run([LINES[1], {"prompt": "Hi", "chosen": "a", "rejected": "a"}])
    with pytest.raises(DataError, match="pairs.jsonl:2: chosen and rejected are the same answer"):
        preferences(run, run.data.train)


# --- lengths ----------------------------------------------------------------------------------------------------------

LONG = {"prompt": "one two three four five", "chosen": "six seven eight nine", "rejected": "ten"}


@pytest.fixture(scope="session")
def rows_of(spec):
    """rows_of(line) -> [chosen, rejected] as the worker gives them."""
    return lambda line: Encoder("chatml", spec, "all", True)(json.dumps(line))["rows"]


def fitted(rows, policy, seq_len):
    report = Report()
    found = _fitted(rows, "here:1", seq_len, policy, report)
    assert report.read == 1 and report.kept == bool(found) and report.tokens == sum(len(row["ids"]) for row in found)
    assert report.too_long == report.dropped + report.truncated + report.truncated_to_nothing
    return [row["ids"] for row in found], report


def test_both_answers_are_cut_alike(rows_of):
    rows = rows_of(LONG)
    chosen, rejected = (row["ids"] for row in rows)
    assert len(chosen) > len(rejected)
    seq_len = len(chosen) - 2
    assert fitted(rows, "refuse", len(chosen)) == ([chosen, rejected], Report(read=1, kept=1, tokens=len(chosen + rejected),
                                                                            trained_tokens=sum(sum(row["mask"]) for row in rows)))
    assert fitted(rows, "truncate_left", seq_len)[0] == [chosen[2:], rejected[2:]]
    assert fitted(rows, "truncate_right", seq_len)[0] == [chosen[:-2], rejected]
    assert fitted(rows, "drop", seq_len)[0] == [] and fitted(rows, "drop", seq_len)[1].dropped == 1
    with pytest.raises(DataError, match=f"here:1: {len(chosen)} tokens, but train.seq_len is {seq_len}; raise it"):
        fitted(rows, "refuse", seq_len)


def test_what_nothing_would_remain_of_is_left_out(rows_of):
    rows = rows_of(LONG)
    prompt, longest = rows[0]["mask"].index(1), len(rows[0]["ids"])
    for policy, seq_len, num_rows in (("truncate_left", longest - prompt + 1, 2), ("truncate_left", longest - prompt, 0),
                                      ("truncate_right", prompt + 1, 2), ("truncate_right", prompt, 0)):
        found, report = fitted(rows, policy, seq_len)
        assert len(found) == num_rows and report.truncated == bool(num_rows) and report.truncated_to_nothing == (not num_rows)
    twins = rows_of({"prompt": "Hi", "chosen": "one two three four a", "rejected": "one two three four b"})
    assert fitted(twins, "truncate_right", twins[0]["mask"].index(1) + 2)[1].truncated_to_nothing == 1      # equal after the cut


def test_what_is_left_out_is_told(make_run, caplog):
    caplog.set_level(logging.INFO)
    short = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    run = make_run([LONG, short], train={"seq_len": 40})
    source = preferences(run, run.data.train)
    assert len(source.tokens) == 2 and source.report.dropped == 1 and source.margins.shape == (1, 2)
    assert "1 of 2 pairs exceed train.seq_len; chat.too_long=drop: 1 dropped, 0 truncated" in caplog.text
    with pytest.raises(DataError, match="nothing is left of 2 pairs: 2 exceed train.seq_len"):
        preferences(make_run([LONG, short], train={"seq_len": 8}), run.data.train)


# --- order ------------------------------------------------------------------------------------------------------------


def test_epochs_are_shuffled_anew_and_alike_for_one_seed(make_run):
    run = make_run([{"prompt": f"Say {k}.", "chosen": f"{k}", "rejected": "No."} for k in range(12)])
    (train, _), (again, _) = (pairs.datasets(run, 24, 0) for _ in range(2))
    tokens = [train.batch(np.arange(e * 12, e * 12 + 12))["tokens"] for e in (0, 1)]
    as_set = [{tuple(row.tolist()) for row in epoch} for epoch in tokens]
    assert as_set[0] == as_set[1] and len(as_set[0]) == 24 and not (tokens[0] == tokens[1]).all()
    assert (again.batch(np.arange(24))["tokens"].flatten(0, 1) == np.concatenate([t.numpy() for t in tokens]).reshape(-1)).all()
    other = make_run([], files=run.data.train, run={"seed": 4})
    assert not (pairs.datasets(other, 12, 0)[0].batch(np.arange(12))["tokens"] == tokens[0]).all()
    assert train.batch(np.array([7, 2]))["row"].tolist() == [14, 15, 4, 5]
    batch = train.batch(np.array([7, 2]))
    assert train.longest(np.array([7, 2])) == int(batch["ends"].max()) + 1


def test_weights_and_validation_and_one_epoch(make_run, tmp_path):
    files = [write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {k}", "chosen": "a", "rejected": "b"} for k in range(6)]) for name in "xy"]
    run = make_run([], files=["3", files[0], "1", files[1]], data={"valid": {"held_out": [files[1]]}}, train={"eval_samples": 4})
    train, valid = pairs.datasets(run, 8, 4)
    sources = [source for source, _ in train.order.where(np.arange(8))]
    assert sources.count(0) == 6 and len(valid["held_out"]) == 4 and len(train) == 8
    lone = make_run([], files=[files[0]], data={"one_epoch": True})
    with pytest.raises(DataError, match="holds 6 samples in one epoch, but 7 are asked for"):
        pairs.datasets(lone, 7, 0)


# --- the stored reference ---------------------------------------------------------------------------------------------


def stored(run, num_train):
    """Runs on a rank: (a stored-reference run's batches, how often a reference was built, and the same by a reference at hand)."""
    from engine.stages.dpo import sequence_logps, stored_reference

    run, place, train, make_loader, reference = prepared(run, num_train)
    built = []
    stored_reference(run, [train], place, make_loader, lambda: built.append(reference) or reference)
    found = make_loader(train).batches(0, run.train.global_batch)
    expected = [sequence_logps(logp, batch["loss_mask"]) for logp, batch in zip(reference.score(found), found)]
    return [batch["reference_logps"].numpy() for batch in found], len(built), [logps.numpy() for logps in expected]


def broken_off(run, num_train):
    """Runs on a rank whose reference fails in the middle of the data."""
    from engine.stages.dpo import stored_reference

    run, place, train, make_loader, reference = prepared(run, num_train)
    answers = iter([reference.score(make_loader(train).batches(0, 4))])
    reference.score = lambda batches: next(answers)
    with pytest.raises(StopIteration):
        stored_reference(run, [train], place, make_loader, lambda: reference)


def prepared(run, num_train):
    from engine.data.loader import Loader
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role
    from engine.stages import build_stage

    stage = build_stage("dpo")
    run = stage.configure(run)
    place = topology.start(run)
    make_loader = lambda dataset: Loader(dataset, run.train.micro_batch, place.dp_rank, place.dp, multiple=8)  # noqa: E731
    return run, place, stage.datasets(run, num_train, 0)[0], make_loader, ParallelModel(run, place, stage, "reference", Role(train=False))


def stored_files(run):
    return sorted(Path(run.run.dir, "index_cache").glob("*/reference-*"))


SEVEN = [{"prompt": f"Say {k}.", "chosen": f"{k} " * (k % 5 + 1), "rejected": "No."} for k in range(7)]      # no multiple of the batch


def test_the_reference_is_stored_once_and_equals_one_at_hand(make_run):
    run = make_run(SEVEN, dpo={"reference": "stored"})
    (logps, built, expected), = ranks.run(1, stored, run, 8)
    assert built == 1 and len(stored_files(run)) == 1
    np.testing.assert_allclose(logps, expected, rtol=1e-6)
    values = np.load(stored_files(run)[0])
    assert values.shape == (14,) and values.dtype == np.float32 and len(set(values.tolist())) == 14
    assert ranks.run(1, stored, run, 8)[0][1] == 0      # read, not built
    stored_files(run)[0].unlink()
    for logps, built, expected in ranks.run(2, stored, run, 8):      # two replicas
        assert built == 1
        np.testing.assert_allclose(logps, expected, rtol=1e-6)
    np.testing.assert_allclose(np.load(stored_files(run)[0]), values, rtol=1e-6)
    reseeded = run.model_copy(update={"run": run.run.model_copy(update={"seed": 9})})      # other initial weights are another reference
    assert ranks.run(1, stored, reseeded, 8)[0][1] == 1 and len(stored_files(run)) == 2


def test_a_pass_that_is_broken_off_leaves_no_file(make_run):
    run = make_run(SEVEN, dpo={"reference": "stored"})
    ranks.run(1, broken_off, run, 4)
    assert stored_files(run) == [] and preferences(run, run.data.train).report.kept == 7


def test_a_checkpoint_written_anew_is_another_reference(make_run, tmp_path):
    run = make_run(LINES, checkpoint={"load": str(tmp_path / "start")})
    marker = tmp_path / "start/iter_0000001/metadata.json"
    marker.parent.mkdir(parents=True)
    found = []
    for seed, text, seconds in ((3, "{}", 1), (4, "{}", 1), (3, "{}", 2), (3, "{ }", 2)):
        marker.write_text(text)
        os.utime(marker, (seconds, seconds))
        found.append(dpo._identity(run.model_copy(update={"run": run.run.model_copy(update={"seed": seed})})))
    assert found[0] == found[1] and len(set(found)) == 3      # the seed draws nothing where a checkpoint is loaded


def test_a_stored_file_that_does_not_fit_is_told(tmp_path):
    path = tmp_path / "reference.npy"
    dpo._write_whole(path, np.arange(4, dtype=np.float32))
    assert dpo._read(path, 4).tolist() == [0, 1, 2, 3] and [file.name for file in tmp_path.iterdir()] == ["reference.npy"]
    with pytest.raises(DataError, match="holds 4 log-probabilities, .* but the data has 6 answers; remove it"):
        dpo._read(path, 6)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="cannot be read .*; remove it, and the reference is computed again"):
        dpo._read(path, 4)
    dpo._write_whole(path, np.array([1.0, np.nan], dtype=np.float32))
    with pytest.raises(DataError, match="not finite"):
        dpo._read(path, 2)


def test_report_lies_in_the_cache(make_run):
    run = make_run([*LINES, {**LINES[0], "chosen": "<|im_end|> indeed"}])
    source = preferences(run, run.data.train)
    report = json.loads((source.folder / "report.json").read_text())
    assert report["read"] == 5 and report["special_tokens_in_text"] == 1 and report["tokens"] == source.tokens.num_tokens
