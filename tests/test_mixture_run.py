"""Mixtures in a run: caps, ledger and losses by source under other layouts and through a resume; which documents a step read; weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from training import merged, on_ranks, small_run

from data_tools import reweight, which
from data_tools.origins import OriginsWriter
from engine.config import dump_config, validate
from engine.data import text
from engine.data.indexed import DataError, IndexedCorpus
from engine.data.ledger import Ledger
from engine.data.pretraining import GPTSamples
from engine.log import read_metrics

CHANGE = {"data": {"split": "8,2", "valid_by_source": True, "train_by_source": True},
          "train": {"steps": 6, "eval_samples": 8, "eval_every": 3}, "schedule": {"decay_steps": 6}}


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """A run of six steps on one rank, in which the small corpus is spent in the fourth; its raw configuration."""
    raw = merged(small_run(corpus, tmp_path_factory.mktemp("unbroken")), CHANGE,
                 {"data": {"train": ["1", corpus["train"], "1", corpus["valid"]], "max_epochs": {corpus["valid"]: 0.5}}})
    del raw["data"]["valid"]
    on_ranks(1, raw)
    return raw


def test_caps_ledger_and_losses_by_source_hold_under_another_layout_and_a_resume(unbroken, tmp_path):
    """One rank in one go against two pp ranks, whose first does not see the loss, in two goes."""
    broken = merged(unbroken, {"run": {"dir": str(tmp_path / "run")}, "parallel": {"pp": 2}})
    on_ranks(2, merged(broken, {"train": {"steps": 3}}))
    broken = merged(broken, {"data": {"read_on": "first_rank"}})  # the rank that has the loss is told which source a row is of
    lines, expected = on_ranks(2, broken), read_metrics(unbroken["run"]["dir"])
    small = unbroken["data"]["train"][3]
    spent = [line["sources"][small]["samples"] for line in lines]
    assert spent[-1] == spent[-2] > spent[0] and lines[-1]["sources"][small]["epochs"] <= 0.5
    assert [line["sources"] for line in lines] == [line["sources"] for line in expected]
    names = [f"source_loss/{prefix}" for prefix in unbroken["data"]["train"][1::2]]
    for line, other in zip(lines, expected):
        for name in names:
            assert (line[name] is None) == (other[name] is None)
            assert line[name] is None or np.isclose(line[name], other[name], rtol=1e-5)
    assert lines[-1][names[1]] is None  # nothing of it was in that step
    valid = read_metrics(unbroken["run"]["dir"], "valid")
    again = read_metrics(broken["run"]["dir"], "valid")
    assert [line["step"] for line in valid] == [line["step"] for line in again] == [3, 6]
    for line, other in zip(valid, again):
        assert np.allclose([line[name] for name in names], [other[name] for name in names], rtol=1e-5)
        assert min(line[name] for name in names) <= line["valid_loss"] <= max(line[name] for name in names)
        assert np.isclose(line["valid_loss"], np.mean([line[name] for name in names]))  # 1:1, and all samples are full


def test_a_changed_history_is_refused_with_the_counts(unbroken, tmp_path):
    """Opening the data is enough; which.py goes by the checkpoint, although RUN/config.yaml is then of the run that was refused."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken["run"]["dir"], folder)
    small = unbroken["data"]["train"][3]
    kept, changed = (merged(unbroken, {"run": {"dir": str(folder)}, "train": {"steps": 8}, "data": change}) for change in (
        {"phases": [{"after_tokens": 24 * 32, "train": ["1", small]}], "max_epochs": {small: 2}},
        {"train": ["3", unbroken["data"]["train"][1], "1", small]}))
    with pytest.raises(DataError, match=rf"first 24 samples were read from \(.*{small}: \d+ read, \d+ by this configuration\).*data.phases"):
        text.datasets(validate(changed), 32, 0)
    (folder / "config.yaml").write_text(dump_config(validate(changed)))
    assert which.main([str(folder), "--step", "2"]) == 0 and which.main([str(folder), "--step", "7"]) == 1
    with pytest.raises(DataError, match="first 24 samples"):  # a larger cap, too, would have read more of it
        text.datasets(validate(kept), 32, 0)
    kept["data"]["max_epochs"] = unbroken["data"]["max_epochs"]
    with pytest.raises(DataError, match="leaves no source of the mixture after 24 samples"):
        text.datasets(validate(kept), 32, 0)
    kept["data"]["phases"][0]["train"] = ["1", unbroken["data"]["train"][1]]
    train, _ = text.datasets(validate(kept), 32, 0)
    before = read_metrics(unbroken["run"]["dir"])[-1]["sources"]
    assert Ledger(train).read(32)[small] == (before[small]["samples"], before[small]["tokens"])


# --- which.py


def ids_of(corpus, parts):
    return np.concatenate([corpus.get(part["document"], part["first_token"], part["num_tokens"]) for part in parts])


def test_which_names_what_a_step_read(unbroken, capsys):
    run = unbroken["run"]["dir"]
    for prefix in unbroken["data"]["train"][1::2]:
        writer = OriginsWriter(prefix)
        writer.add("raw/first.jsonl", np.arange(1, 11))
        writer.add("raw/second.jsonl", np.arange(1, len(IndexedCorpus(prefix)) - 9))
        writer.finalize()
    found = {}
    for step in range(1, 7):
        assert which.main([run, "--step", str(step), "--json", "--text"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["sample"] for line in lines] == list(range(4 * step - 4, 4 * step)) and {line["step"] for line in lines} == {step}
        found |= {line["sample"]: line for line in lines}
    counts = {}
    for line in found.values():
        counts[line["source"]] = counts.get(line["source"], 0) + 1
        ids = ids_of(IndexedCorpus(line["source"]), line["documents"])
        assert ids.size == 33 and " ".join(part["text"] for part in line["documents"]) == " ".join(map(str, ids.tolist()))
        for part in line["documents"]:
            later = part["document"] >= 10
            assert (part["file"], part["line"]) == (("raw/second.jsonl", part["document"] - 9) if later else ("raw/first.jsonl", part["document"] + 1))
    assert counts == {name: entry["samples"] for name, entry in read_metrics(run)[-1]["sources"].items()}


@pytest.mark.parametrize("tp, world_size", [(1, 2), (2, 4)])
def test_which_tells_the_share_of_a_rank(raw_run, corpus, tmp_path, capsys, tp, world_size):
    """Two replicas, micro-batches of two: each reads every other pair. The second phase of a ramp-up, told as planned and as logged."""
    run = Path(raw_run["run"]["dir"])
    run.mkdir()
    raw = merged(raw_run, {"train": {"micro_batch": 2, "global_batch": 8, "rampup": {"start": 4, "increment": 4, "samples": 8}}, "parallel": {"tp": tp},
                           "data": {"train": [corpus["train"]]}})
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    (run / "env.json").write_text(json.dumps({"world_size": world_size, "dp_size": 2}))
    samples = GPTSamples(IndexedCorpus(corpus["train"]), np.arange(60), 40, 32, 11, "train")

    def told(step, *more):
        assert which.main([str(run), "--step", str(step), "--json", *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [line["sample"] for line in told(4)] == list(range(16, 24))
    assert [line["sample"] for line in told(4, "--rank", str(world_size - 1))] == [18, 19, 22, 23]
    assert [line["sample"] for line in told(4, "--rank", str(world_size // 2 - 1))] == [16, 17, 20, 21]
    for line in told(3):
        assert [tuple(part[key] for key in ("document", "first_token", "num_tokens")) for part in line["documents"]] == samples.documents_of(line["sample"])
    (run / "metrics.jsonl").write_text(json.dumps({"step": 2, "consumed_samples": 20, "global_batch": 4}) + "\n")  # of a run that was loaded
    assert [line["sample"] for line in told(2)] == list(range(16, 20)) and [line["sample"] for line in told(3)] == list(range(20, 28))


@pytest.mark.parametrize("change, words, more", [
    ({"stage": "sft"}, "stage sft, which reads conversations", []), ({}, "steps 1 to 6", []), ({}, "had ranks 0 to 0", ["--rank", "1"]), (None, "no config.yaml", []),
], ids=["conversations", "beyond the end", "no such rank", "no run"])  # fmt: skip
def test_which_says_what_it_cannot_tell(raw_run, capsys, change, words, more):
    run = Path(raw_run["run"]["dir"])
    run.mkdir()
    if change is not None:
        (run / "config.yaml").write_text(yaml.safe_dump(merged(raw_run, change)))
        (run / "env.json").write_text(json.dumps({"world_size": 1, "dp_size": 1}))
    assert which.main([str(run), "--step", "1" if more else "7", *more]) == 2
    assert words in capsys.readouterr().err


# --- reweight.py


def algorithm_1(excess, eta, c):
    """DoReMi's, in logarithms and arrays: independent of the tool's."""
    log_alpha = np.full(excess.shape[1], -np.log(excess.shape[1]))
    alphas = []
    for row in excess:
        log_alpha = log_alpha + eta * np.clip(row, 0, None)
        alpha = np.exp(log_alpha - np.logaddexp.reduce(log_alpha))
        alphas.append((1 - c) * alpha + c / alpha.size)
        log_alpha = np.log(alphas[-1])
    return np.mean(alphas, axis=0)


@pytest.mark.parametrize("eta, c", [(1.0, 1e-3), (5.0, 0.1), (400.0, 1e-3), (1.0, 1.0)], ids=["paper", "fast", "huge", "uniform"])
def test_weights_are_algorithm_1s(eta, c):
    excess = np.random.default_rng(0).normal(0.1, 0.5, (12, 5))
    assert np.allclose(reweight.doremi(excess.tolist(), eta, c), algorithm_1(excess, eta, c), rtol=1e-12, atol=0)


def test_one_step_by_hand():
    """Excess (ln 2, -1): weights 1/2 and 1/2 become 2/3 and 1/3; without smoothing that is the answer."""
    assert np.allclose(reweight.doremi([[np.log(2), -1.0]], 1.0, 0.0), [2 / 3, 1 / 3])


def runs(tmp_path, proxy, reference):
    for name, lines in (("proxy", proxy), ("reference", reference)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [str(tmp_path / "proxy"), str(tmp_path / "reference")]


def measured(step, split, **by_source):
    return {"step": step, "split": split, "valid_loss": 3.0, **{f"source_loss/{name}": value for name, value in by_source.items()}}


def test_reweight_writes_a_data_section_that_the_engine_reads(tmp_path, capsys, raw_run):
    from engine.config import load_config
    from engine.data.blend import parse_blend

    proxy = [{"step": 1, "loss": 4.0}, *(measured(step, "held_out", web=3.0, code=2.5 - 0.1 * step, law=None if step == 3 else 4.0) for step in (1, 2, 3, 5))]
    reference = [measured(step, "held_out", law=3.0, web=3.1, code=2.0) for step in (1, 2, 3, 4)]
    fragment = tmp_path / "weights.yaml"
    assert reweight.main([*runs(tmp_path, proxy, reference), "--eta", "2", "--source", "web=data/web", "--output", str(fragment)]) == 0
    out = capsys.readouterr().out
    excess = np.array([[-0.1, 0.4, 1.0], [-0.1, 0.3, 1.0]])  # steps 1 and 2, at which both know all
    prefixes, weights = parse_blend(yaml.safe_load(fragment.read_text())["data"]["train"])
    assert prefixes == ["data/web", "code", "law"] and np.allclose(weights, algorithm_1(excess, 2.0, 1e-3), rtol=1e-5)
    assert "2 steps, 1 to 2" in out
    override = next(line for line in out.splitlines() if line.startswith("data.train="))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw_run))
    assert parse_blend(load_config(tmp_path / "run.yaml", [override]).data.train) == (prefixes, weights)


def test_reweight_takes_a_set_per_source(tmp_path, capsys):
    lines = [[{"step": 5, "split": name, "valid_loss": loss} for name, loss in found.items()] for found in ({"w": 3.0, "c": 2.0}, {"w": 2.5, "c": 2.0})]
    assert reweight.main([*runs(tmp_path, *lines), "--set", "w", "--set", "c", "--source", "w=web", "--source", "c=code", "--smoothing", "0"]) == 0
    weight = np.exp(0.5) / (1 + np.exp(0.5))
    assert f"data.train=[{weight:.6g},web,{1 - weight:.6g},code]" in capsys.readouterr().out


def test_reweight_reads_what_a_run_wrote(unbroken, capsys):
    run = unbroken["run"]["dir"]
    assert reweight.main([run, run]) == 0 and reweight.main([run, run, "--set", "train"]) == 0
    assert f"data.train=[0.5,{unbroken['data']['train'][1]},0.5,{unbroken['data']['train'][3]}]" in capsys.readouterr().out


@pytest.mark.parametrize("proxy, reference, options, words", [
    ([measured(1, "v", a=1.0, b=1.0)], [measured(1, "v", a=1.0, c=1.0)], [], "different sources"),
    ([measured(1, "v", a=1.0, b=1.0)], [measured(2, "v", a=1.0, b=1.0)], [], "at no step do both runs know"),
    ([measured(1, "v", a=1.0, b=None)], [measured(1, "v", a=1.0, b=1.0)], [], "at no step do both runs know"),
    ([measured(1, "v", a=1.0)], [measured(1, "v", a=1.0)], [], "loss of one source"),
    ([{"step": 1, "loss": 2.0}], [], [], "has no losses by source; train with data.valid_by_source=true"),
    ([measured(1, "v", a=1.0, b=1.0)], [measured(1, "v", a=1.0, b=1.0)], ["--source", "x=y"], "names x, but the losses are of a, b"),
    ([measured(1, "v", a=1.0, b=1.0)], [measured(1, "v", a=1.0, b=1.0)], ["--eta", "0"], "expected a number above 0"),
    ([measured(1, "v", a=1.0, b=1.0)], [], ["--set", "v", "--set", "w"], "has no validation set w"),
], ids=["sources", "steps", "unknown loss", "one source", "none", "unknown name", "eta", "no set"])  # fmt: skip
def test_reweight_says_what_is_missing(tmp_path, capsys, proxy, reference, options, words):
    assert reweight.main([*runs(tmp_path, proxy, reference), *options]) == 2
    assert words in capsys.readouterr().err
