"""The stages continued and anneal: what they make of a configuration, the learning rates that really run, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
from training import merged, on_ranks

from engine.config import ConfigError, validate
from engine.schedule import learning_rate
from engine.stages import build_stage


def configured(raw):
    run = validate(raw)
    return build_stage(run.stage).configure(run)


def rates(run):
    return [learning_rate(step, run.optim, run.schedule, run.train.steps) for step in range(1, run.train.steps + 1)]


@pytest.fixture
def base(raw_run, tmp_path):
    """base(step, **sections): what a checkpoint at that step says of itself, written by raw_run with other sections; its run's folder."""

    def write(step, **sections):
        from engine.config import dump_config

        folder = tmp_path / "base" / "checkpoints" / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")
        (folder / "config.yaml").write_text(dump_config(validate(merged(raw_run, sections))))
        (folder / "position.json").write_text(json.dumps({"step": step, "consumed_samples": 4 * step, "tokens": 128 * step}))
        return str(tmp_path / "base")

    return write


def annealing(raw_run, load, **sections):
    start = {"stage": "anneal", "checkpoint": {"load": load}, "optim": {"lr": 0.5}, "schedule": {"warmup_steps": 0}, "train": {"steps": 8}}
    return merged(raw_run, start, sections)


# --- anneal: the rates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, step, last", [
    ({"kind": "constant", "warmup_steps": 0}, 50, 0.01),
    ({"kind": "linear", "warmup_steps": 0, "min_lr": 0.002}, 51, 0.01 - 50 / 100 * 0.008),
    ({"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 20}, 4, 3 / 10 * 0.01),
    ({"kind": "wsd", "warmup_steps": 10, "wsd_decay_steps": 20}, 79, 0.01),
    ({"kind": "linear", "warmup_steps": 0, "decay_steps": 30, "min_lr": 0.002}, 90, 0.002),
])  # fmt: skip
def test_the_fall_begins_where_the_checkpoint_stopped(raw_run, base, schedule, step, last):
    load = base(step, schedule=schedule, train={"steps": 100})
    run = configured(annealing(raw_run, load))
    assert run.optim.lr == pytest.approx(last, rel=1e-12)
    assert np.allclose(rates(run), [last * (1 - k / 8) for k in range(8)], rtol=1e-12)


SHAPES = {"linear": lambda p: 1 - p, "cosine": lambda p: (1 + np.cos(np.pi * p)) / 2, "exponential": lambda p: 2 * 0.5**p - 1,
          "minus_sqrt": lambda p: 1 - np.sqrt(p)}


@pytest.mark.parametrize("shape", SHAPES)
def test_start_lr_goes_before_the_checkpoint_and_min_lr_ends_it(raw_run, shape):
    run = configured(annealing(raw_run, "not/read", anneal={"shape": shape, "start_lr": 0.2}, schedule={"min_lr": 0.1, "kind": "cosine"}))
    assert np.allclose(rates(run), 0.1 + 0.1 * SHAPES[shape](np.arange(8) / 8), rtol=1e-12)
    assert (run.optim.lr, run.schedule.kind, run.schedule.wsd_shape) == (0.2, "wsd", shape)


def test_max_tokens_ends_the_fall(raw_run):
    """Three steps of 4 samples of 32 tokens: the rate falls over these, not over train.steps."""
    run = configured(annealing(raw_run, "not/read", anneal={"start_lr": 0.3}, train={"steps": 1000, "max_tokens": 3 * 4 * 32}))
    assert np.allclose(rates(run)[:3], [0.3, 0.2, 0.1], rtol=1e-12)


def test_a_resolved_anneal_configures_to_itself(raw_run, base):
    load = base(50, schedule={"kind": "constant", "warmup_steps": 0}, train={"steps": 100})
    once = configured(annealing(raw_run, load, average={"kind": "ema"}))
    assert configured(once.model_dump()) == once
    assert once.average.kind == "ema" and not once.checkpoint.load_position


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["continued", "anneal"])
def test_a_stage_that_goes_on_needs_a_checkpoint(raw_run, stage):
    with pytest.raises(ConfigError, match=f"stage={stage} goes on from a trained model, but checkpoint.load is empty"):
        configured(merged(raw_run, {"stage": stage, "schedule": {"warmup_steps": 0}}))


def test_a_start_that_is_no_start_is_refused(raw_run, base, tmp_path):
    with pytest.raises(ConfigError, match="has no warm-up, but schedule.warmup_steps"):
        validate(annealing(raw_run, "x", schedule={"warmup_steps": 2}))
    with pytest.raises(ConfigError, match=r"anneal.start_lr\(0.1\) is not above schedule.min_lr\(0.1\)"):
        configured(annealing(raw_run, "x", anneal={"start_lr": 0.1}, schedule={"min_lr": 0.1}))
    with pytest.raises(ConfigError, match="missing holds no complete checkpoint"):
        configured(annealing(raw_run, str(tmp_path / "missing")))
    load = base(0)  # weights that were converted: no step was taken
    with pytest.raises(ConfigError, match=r"stopped\(0\) is not above schedule.min_lr\(0\), so there is nothing to anneal; set anneal.start_lr"):
        configured(annealing(raw_run, load))


@pytest.mark.parametrize("name, text", [("config.yaml", "train: ["), ("config.yaml", "train: {}"), ("position.json", "{"), ("position.json", "{}")])
def test_a_damaged_checkpoint_is_told_without_a_traceback(raw_run, base, name, text):
    load = base(5)
    Path(load, "checkpoints", "iter_0000005", name).write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s){name} cannot be read .* name another checkpoint"):
        configured(annealing(raw_run, load))


# --- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(raw_run, tmp_path):
    """A run of 8 steps, its rate constant after two steps of warm-up: (configuration, its lines)."""
    raw = merged(raw_run, {"run": {"dir": str(tmp_path / "trained")}, "train": {"steps": 8}, "schedule": {"kind": "constant"}})
    raw["schedule"].pop("wsd_decay_steps")
    return raw, on_ranks(1, raw)


def test_continued_starts_over_on_other_data_with_trained_weights(trained, corpus, tmp_path):
    raw, _ = trained
    data = {"train": ["1", corpus["valid"]], "replay": ["1", corpus["train"]], "replay_share": 0.25}
    new = {"stage": "continued", "train": {"steps": 3}, "data": data, "checkpoint": {"load": raw["run"]["dir"], "save_every": 1}}
    runs = {kept: merged(raw, new, {"run": {"dir": str(tmp_path / f"kept {kept}")}, "checkpoint": {"load_optimizer": kept}})
            for kept in (False, True)}
    fresh, kept = on_ranks(1, runs[False]), on_ranks(1, runs[True])
    for lines in (fresh, kept):
        assert [(line["step"], line["consumed_samples"]) for line in lines] == [(1, 4), (2, 8), (3, 12)]
        assert np.allclose([line["lr"] for line in lines], [0, 0.005, 0.01])  # warms up again
    assert [line["loss"] for line in fresh[:2]] == [line["loss"] for line in kept[:2]] and fresh[2]["loss"] != kept[2]["loss"]  # Adam's moments
    from engine.mcore.checkpoint import read_tensors

    loaded, after_a_step_at_0 = read_tensors(raw["run"]["dir"]), read_tensors(tmp_path / "kept False" / "checkpoints" / "iter_0000001")
    assert all(np.array_equal(loaded[name], after_a_step_at_0[name]) for name in loaded)
    train = build_stage("continued").datasets(validate(runs[True]), 40, 0)[0]
    assert train.samples.counts(40).tolist() == [30, 10]


def test_anneal_runs_down_from_the_rate_of_the_loaded_run(trained, tmp_path):
    raw, before = trained
    new = {"stage": "anneal", "run": {"dir": str(tmp_path / "new")}, "checkpoint": {"load": raw["run"]["dir"]}, "train": {"steps": 5},
           "schedule": {"warmup_steps": 0}, "optim": {"lr": 0.5}}
    lines = on_ranks(1, merged(raw, new))
    assert [(line["step"], line["consumed_samples"]) for line in lines] == [(k, 4 * k) for k in range(1, 6)]
    assert np.allclose([line["lr"] for line in lines], [0.01, 0.008, 0.006, 0.004, 0.002])
    assert lines[0]["loss"] < before[0]["loss"]  # the same samples, seen by trained weights
