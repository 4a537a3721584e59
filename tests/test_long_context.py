"""Long-context stage: the rungs as runs, what is refused beforehand, the measurements, the gates, and a ladder climbed on a real model."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
from training import SEQ, VOCAB, merged

from engine.config import ConfigError, validate
from engine.stages import ladder, long_context
from engine.stages.long_context import LadderStopped, LongContext, gate

RUNGS = [
    dict(seq_len=64, tokens=1000, global_batch=4, rope_theta=5e5),
    dict(seq_len=128, tokens=1024, global_batch=4, micro_batch=2, lr=1e-4, rope_scaling=dict(kind="yarn", factor=8, original_max_position=32)),
    dict(seq_len=256, tokens=1025, global_batch=2, train=["other"]),
]
PLACE = SimpleNamespace(rank=0, dp_rank=0, dp=1)


def changes(folder="base", **keys):
    """What turns the pretraining run of the fixture raw_run into a ladder above the checkpoint in `folder`."""
    return merged({"stage": "long_context", "checkpoint": {"load": str(folder)}, "schedule": {"kind": "constant", "warmup_steps": 0},
                   "long_context": {"ladder": RUNGS, "needle_samples": 8, "needle_depths": 4, "needle_tokens": 1}}, keys)


# --- rungs as runs -----------------------------------------------------------------------------------------------------


def test_each_rung_is_a_run_above_the_one_before(raw_run):
    run = validate(merged(raw_run, changes(model={"max_position": 96})))
    first, second, third = ladder.rungs(run)
    root = Path(run.run.dir)
    assert [rung.run.dir for rung in (first, second, third)] == [str(root / name) for name in ("rung_1_64", "rung_2_128", "rung_3_256")]
    assert [rung.checkpoint.load for rung in (first, second, third)] == ["base", first.run.dir, second.run.dir]
    assert [rung.train.steps for rung in (first, second, third)] == [4, 2, 3]      # 1000 / 256, 1024 / 512, 1025 / 512, rounded up
    assert [(rung.train.seq_len, rung.train.global_batch, rung.train.micro_batch) for rung in (first, second, third)] == [
        (64, 4, 1), (128, 4, 2), (256, 2, 1)]
    assert [rung.model.max_position for rung in (first, second, third)] == [96, 128, 256]
    assert [rung.model.rope_theta for rung in (first, second, third)] == [5e5] * 3
    assert [rung.model.rope_scaling.kind for rung in (first, second, third)] == ["none", "yarn", "yarn"]
    assert [rung.optim.lr for rung in (first, second, third)] == [run.optim.lr, 1e-4, run.optim.lr]
    assert [rung.data.train for rung in (first, second, third)] == [run.data.train, run.data.train, ["other"]]
    assert len({rung.run.seed for rung in (run, first, second, third)}) == 4
    for rung in (first, second, third):
        assert not rung.checkpoint.load_position and rung.checkpoint.load_optimizer and rung.stage == "long_context"
        assert rung.long_context.ladder == [] and validate(rung.model_dump()) == rung      # its config.yaml is usable as input
        assert rung.data.cache_dir == str(root / "index_cache")


def test_without_a_ladder_the_run_is_the_only_rung(raw_run):
    run = validate(merged(raw_run, changes(long_context={"ladder": []}, model={"max_position": 16})))
    rung, = ladder.rungs(run)
    assert rung.run == run.run and rung.train == run.train and rung.model.max_position == SEQ and not rung.checkpoint.load_position


@pytest.mark.parametrize("change, message", [
    ({"checkpoint": {"load": ""}}, "name its checkpoint in checkpoint.load"),
    ({"train": {"eval_samples": 0}}, "train.eval_samples is 0"),
    ({"long_context": {"ladder": [RUNGS[1], RUNGS[0]]}}, r"ladder.1.seq_len\(64\) does not exceed that of the rung before \(128\)"),
    ({"long_context": {"ladder": [RUNGS[0], RUNGS[0]]}}, r"ladder.1.seq_len\(64\) does not exceed"),
    ({"long_context": {"needle_threshold": 0.5, "needle_samples": 0}}, r"needle_threshold\(0.5\) but needle_samples is 0"),
    ({"long_context": {"short_seq_len": 65}}, r"short_seq_len\(65\) exceeds the length that is trained first\(64\)"),
    ({"long_context": {"short_seq_len": 30}, "parallel": {"cp": 2}}, r"short_seq_len\(30\) is not divisible by 4.*set it to 28"),
    ({"long_context": {"short_seq_len": 30}, "parallel": {"tp": 2, "cp": 2, "sequence_parallel": True}}, "is not divisible by 4"),
    ({"train": {"max_tokens": 5}}, r"train.max_tokens\(5\) would end every rung"),
    ({"parallel": {"tp": 2, "sequence_parallel": True, "tp_comm_overlap": True}}, "tp_comm_overlap fixes the number of tokens"),
    ({"long_context": {"ladder": [dict(RUNGS[0], seq_len=66)]}, "parallel": {"cp": 2}}, r"ladder.0: train.seq_len\(66\) is not divisible"),
    ({"long_context": {"ladder": [RUNGS[0], dict(RUNGS[1], seq_len=512)]}}, r"ladder.1: model.rope_scaling.factor.*raise factor to 16"),
    ({"long_context": {"ladder": [RUNGS[0], dict(RUNGS[1], global_batch=3)]}}, r"ladder.1: train.global_batch\(3\) is not divisible"),
    ({"schedule": {"kind": "cosine", "warmup_steps": 4}}, r"ladder.0: schedule.warmup_steps\(4\) leaves no step of the 4"),
])
def test_impossible_ladders_are_refused_beforehand(raw_run, change, message):
    validate(merged(raw_run, changes()), 2)
    world = 4 if "parallel" in change else 2
    with pytest.raises(ConfigError, match=message):
        validate(merged(raw_run, changes(), change), world)


def test_a_ladder_without_a_validation_set_is_refused(raw_run):
    raw = merged(raw_run, changes())
    raw["data"]["valid"] = {}
    with pytest.raises(ConfigError, match="measures the short-context loss, but there is no validation set; set data.valid or data.split"):
        validate(raw)


# --- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short, share, failing", [
    (2.04, 0.5, []), (2.0401, 0.5, ["short"]), (1.0, 0.49, ["needle"]), (float("nan"), None, ["short"]), (1.0, None, []),
    (3.0, 0.0, ["short", "needle"]),
])
def test_a_gate_names_value_limit_and_cure(raw_run, short, share, failing):
    run = validate(merged(raw_run, changes(long_context={"short_tolerance": 0.02, "needle_threshold": 0.5})))
    verdict = gate(run, short, 2.0, share)
    assert verdict.passed == (not failing) and len(verdict.sentences) == len(failing)
    text = "; ".join(verdict.sentences)
    if "short" in failing:
        assert f"the short-context loss is {short:.4f}, above 2.0400" in text and "short_tolerance=0.02" in text and "more tokens" in text
    if "needle" in failing:
        assert f"{share:.1%} of the needles are found at 32 tokens" in text and "needle_threshold=0.5" in text and "rope_theta" in text


class Fake:
    """A model whose loss is a constant and which finds every needle, or none."""

    def __init__(self, loss, finds):
        self.loss, self.finds, self.lengths = loss, finds, set()

    def evaluate(self, micro_batches):
        self.lengths |= {batch["tokens"].size(1) for batch in micro_batches}
        count = float(sum(batch["loss_mask"].sum() for batch in micro_batches))
        return SimpleNamespace(sums={"loss": (self.loss * count, count)})

    def greedy(self, micro_batches):
        self.lengths |= {batch["tokens"].size(1) for batch in micro_batches}
        return [torch.full(batch["tokens"].shape, self.finds) for batch in micro_batches]

    def total(self, values):
        return values


@pytest.fixture
def trained(raw_run, tmp_path):
    """A folder that looks like a trained run of 32 tokens at another RoPE."""
    folder = tmp_path / "base" / "checkpoints" / "iter_0000006"
    finished(folder, validate(merged(raw_run, {"model": {"rope_theta": 123.0}})), 6)
    return tmp_path / "base"


def finished(folder, run, step):
    from engine.config import dump_config

    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "position.json").write_text(json.dumps({"step": step, "consumed_samples": 0, "tokens": 0}))
    (folder / "config.yaml").write_text(dump_config(run))


class Trainer:
    """What engine/train.py gives to stages, over fakes."""

    def __init__(self, baseline=2.0):
        self.place, self.baseline, self.opened = PLACE, baseline, []

    def frozen(self, role="policy", run=None):
        self.opened.append(run)
        return Fake(self.baseline, False)


def climb(run, losses, finds=True):
    """What engine/train.py does with a ladder, over fakes whose loss at each rung is given by its name; what happened."""
    stage, trainer, trained, logged = LongContext(), Trainer(), [], []
    run = stage.configure(run)
    for rung in stage.runs(run, trainer):
        folder = Path(rung.run.dir) / "checkpoints" / f"iter_{rung.train.steps:07d}"
        if not folder.exists():
            trained.append(Path(rung.run.dir).name)
            finished(folder, rung, rung.train.steps)
        model = Fake(losses[rung.train.seq_len], finds)
        logged.append(stage.finish(rung, model))
        assert model.lengths == {SEQ, rung.train.seq_len}
    return SimpleNamespace(opened=trainer.opened, trained=trained, logged=logged)


def test_the_baseline_is_the_loaded_model_at_its_own_length_and_rope(raw_run, trained):
    run = validate(merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:2]}, model={"rope_theta": 9.0})))
    (wanted,), logged = (seen := climb(run, {64: 2.0, 128: 2.03})).opened, seen.logged
    assert wanted.train.seq_len == SEQ and wanted.model.rope_theta == 123 and not wanted.checkpoint.load_optimizer
    assert wanted.checkpoint.load == str(trained)
    by_depth = {"0": 1, "33": 1, "67": 1, "100": 1}
    assert logged == [{"short_loss": pytest.approx(loss), "short_baseline": pytest.approx(2), "needle_retrieval": 1, "needle_by_depth": by_depth}
                      for loss in (2.0, 2.03)]
    from engine.data.needle import Needles
    assert Needles(None, 64, None, 4, 8, 0).depth(1) == pytest.approx(1 / 3)


def test_a_closed_gate_stops_the_ladder_and_a_rerun_judges_without_training(raw_run, trained):
    base = merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:2]}))
    with pytest.raises(LadderStopped, match=r"rung_1_64: the short-context loss is 2.0500, above 2.0400"):
        climb(validate(base), {64: 2.05, 128: 1.0})
    with pytest.raises(LadderStopped, match="rung_1_64"):
        climb(validate(base), {64: 1.0, 128: 1.0})                       # what was measured counts, not what it would be today
    loose = validate(merged(base, {"long_context": {"short_tolerance": 0.03}}))
    again = climb(loose, {128: 1.0})
    assert again.trained == ["rung_2_128"] and again.opened == []
    done = climb(loose, {})
    assert done.trained == done.logged == done.opened == []


def test_other_settings_measure_again_but_do_not_train_again(raw_run, trained):
    base = merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:1]}))
    climb(validate(base), {64: 2.0})
    again = climb(validate(merged(base, {"long_context": {"needle_samples": 4}})), {64: 2.01})
    assert again.trained == [] and again.opened == [] and again.logged[0]["short_loss"] == pytest.approx(2.01)
    again = climb(validate(merged(base, {"train": {"eval_samples": 8}, "long_context": {"needle_samples": 4}})), {64: 2.02})
    assert again.trained == [] and len(again.opened) == 1 and again.logged[0]["short_loss"] == pytest.approx(2.02)


def test_a_rung_that_was_trained_again_is_measured_again(raw_run, trained):
    run = validate(merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:1]})))
    climb(run, {64: 2.0})
    shutil.rmtree(ladder.rungs(run)[0].run.dir)
    assert climb(run, {64: 2.02}).logged[0]["short_loss"] == pytest.approx(2.02)


def test_an_unfinished_rung_is_not_done(raw_run, trained):
    run = validate(merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:2]})))
    with pytest.raises(KeyError, match="128"):      # no loss is given there, so the second rung is trained and not measured
        climb(run, {64: 2.0})
    rung, second = ladder.rungs(run)
    shutil.rmtree(second.run.dir)
    last = Path(rung.run.dir) / "checkpoints" / "iter_0000004"
    (last / "position.json").write_text(json.dumps({"step": 3, "consumed_samples": 0, "tokens": 0}))
    stage = LongContext()
    steps = stage.runs(run, Trainer())
    assert next(steps).run.dir == rung.run.dir      # it is to be trained on
    assert stage.finish(rung, None) == {}           # and stopped again before its end: nothing is measured
    assert list(steps) == []                        # nor is the next rung begun


def test_warn_goes_on_and_says_so(raw_run, trained, caplog):
    run = validate(merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:2], "on_failure": "warn", "needle_threshold": 0.9})))
    assert climb(run, {64: 3.0, 128: 2.0}, finds=False).trained == ["rung_1_64", "rung_2_128"]
    first, second = (record.getMessage() for record in caplog.records if record.name == long_context.__name__)
    assert first.startswith("rung_1_64: the short-context loss is 3.0000") and "0.0% of the needles are found at 64 tokens" in first
    assert second.startswith("rung_2_128: 0.0% of the needles") and "going on" in second


def test_without_needles_only_the_short_loss_is_measured(raw_run, trained):
    run = validate(merged(raw_run, changes(trained, long_context={"ladder": RUNGS[:1], "needle_samples": 0})))
    model = Fake(1.5, True)
    steps = long_context.Climb(run, PLACE, LongContext().datasets)
    steps.measure_baseline(lambda _: Fake(2.0, True))
    assert steps.measure(ladder.rungs(run)[0], model) == {"short_loss": pytest.approx(1.5), "short_baseline": pytest.approx(2)}
    assert model.lengths == {SEQ}


def test_a_checkpoint_whose_length_does_not_split_is_told(raw_run, trained):
    run = validate(merged(raw_run, changes(trained, train={"seq_len": 64}, parallel={"cp": 32}, long_context={"ladder": RUNGS[:1]})), None)
    with pytest.raises(ConfigError, match=r"short_seq_len\(32\) is not divisible by 64"):
        next(LongContext().runs(run, Trainer()))


def test_a_stage_without_a_checkpoint_is_told(raw_run):
    run = validate(raw_run)
    with pytest.raises(ConfigError, match="checkpoint.load is empty"):
        LongContext().configure(run)


def test_words_where_there_is_a_tokenizer(raw_run, trained):
    from data_tools.tokenizer import ByteTokenizer
    from engine.data import needle

    run = validate(merged(raw_run, changes(trained, data={"tokenizer": "bytes", "eod_id": -1}, model={"vocab_size": 257},
                                           train={"seq_len": 300}, long_context={"ladder": []})))
    _, valid = LongContext().datasets(run, 1, 1)
    batch = needle.from_run(run, valid["held_out"]).batch([2])
    text = ByteTokenizer().decode(batch["tokens"][0].tolist())
    answer = ByteTokenizer().decode(batch["labels"][0][batch["loss_mask"][0] == 1].tolist())
    assert text.count(answer) == 1 and "Question: What is the secret number of" in text and len(answer) == 6


# --- with a real model -------------------------------------------------------------------------------------------------


def climb_for_real(raw, world_size):
    """On a rank: pretrain, then climb two rungs; (what finish found, validation loss of the pretraining, training lines of the rungs)."""
    import training
    from engine import train as loop
    from engine.log import read_metrics

    base = merged(raw, {"run": {"dir": raw["run"]["dir"] + "/base"}, "model": {"rope_theta": 100.0}})
    training.train(base, world_size)
    run = validate(merged(raw, changes(base["run"]["dir"], long_context={"ladder": RUNGS[:2], "short_tolerance": 9.0})), world_size)
    loop.train(run)
    loop.train(run)      # does nothing more
    rungs = [rung.run.dir for rung in ladder.rungs(run)]
    found = [read_metrics(folder, "long_context") for folder in rungs]
    lines = [[(line["step"], line["loss"], line["tokens"]) for line in read_metrics(folder)] for folder in rungs]
    return found, read_metrics(base["run"]["dir"], "held_out")[-1]["valid_loss"], lines


def test_a_ladder_climbed_on_two_ranks(raw_run):
    raw = merged(raw_run, {"train": {"steps": 4, "global_batch": 4}})
    mine, other = ranks.run(2, climb_for_real, raw, 2)
    assert mine == other
    ((first,), (second,)), valid_loss, lines = mine
    assert first["short_baseline"] == second["short_baseline"] == pytest.approx(valid_loss, rel=1e-6)      # the same samples and RoPE
    assert len({first["short_loss"], second["short_loss"], valid_loss}) == 3
    assert 0 <= first["needle_retrieval"] <= 1 and list(first["needle_by_depth"]) == ["0", "33", "67", "100"]
    assert [[(step, tokens) for step, _, tokens in rung] for rung in lines] == [[(i, 256) for i in (1, 2, 3, 4)], [(1, 512), (2, 512)]]
