"""The loop: what a run leaves behind, how it ends, what it reads, what it reports, and that it stops before a step that would harm.

Left out: resuming (test_resume.py), schedules and the log as such (test_schedule.py, test_log.py).
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import ranks
from training import EOD, SEQ, VOCAB, merged, on_ranks
from training import train as train_on_rank

PROMISED = {"step", "loss", "grad_norm", "lr", "consumed_samples", "tokens", "step_time_s", "tokens_per_s", "data_wait_s"}


def status(raw) -> dict:
    return json.loads(Path(raw["run"]["dir"], "status.json").read_text())


def checkpoints(raw) -> list[str]:
    return sorted(path.name for path in Path(raw["run"]["dir"], "checkpoints").glob("iter_*"))


def column(lines, name) -> list:
    return [line[name] for line in lines]


# --- the run folder ----------------------------------------------------------------------------------------------------


def test_what_a_run_leaves_behind(raw_run, tmp_path):
    from engine.config import dump_config, load_config, validate

    lines = on_ranks(2, raw_run)
    folder = Path(raw_run["run"]["dir"])
    assert column(lines, "step") == [1, 2, 3, 4, 5, 6]
    assert all(PROMISED <= line.keys() for line in lines)
    assert column(lines, "tokens") == [4 * SEQ] * 6 and column(lines, "consumed_samples") == [4, 8, 12, 16, 20, 24]
    for line in lines:
        assert 0 < line["data_wait_s"] < line["step_time_s"]
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_time_s"])
    assert lines[0]["loss"] == pytest.approx(math.log(VOCAB), rel=0.02) and lines[-1]["loss"] < lines[0]["loss"]
    environment = json.loads((folder / "env.json").read_text())
    assert environment["world_size"] == 2 and environment["dp_size"] == 2 and "torch" in environment["packages"]
    assert {**status(raw_run), "updated": ""} == {"state": "done", "step": 6, "consumed_samples": 24, "reason": "", "updated": ""}
    assert sorted(path.name for path in (folder / "logs").iterdir()) == ["rank_00000.log", "rank_00001.log"]
    assert checkpoints(raw_run) == ["iter_0000006"]

    again = load_config(folder / "config.yaml", [f"run.dir={tmp_path / 'again'}"], 2)
    assert dump_config(again.model_copy(update={"run": validate(raw_run).run})) == (folder / "config.yaml").read_text()
    assert column(on_ranks(2, again.model_dump()), "loss") == column(lines, "loss")


def test_a_hugging_face_folder_beside_every_checkpoint(raw_run):
    import torch

    from engine.hf.load import open_hf
    from engine.mcore.checkpoint import read_tensors

    raw = merged(raw_run, {"train": {"steps": 2}, "schedule": {"kind": "constant", "warmup_steps": 0}, "checkpoint": {"save_every": 1, "also_save_hf": True}, "parallel": {"tp": 2}})
    on_ranks(2, raw)
    folder = Path(raw["run"]["dir"])
    assert sorted(path.name for path in (folder / "hf").iterdir()) == checkpoints(raw) == ["iter_0000001", "iter_0000002"]
    for name in checkpoints(raw):
        hf, tensors = open_hf(folder / "hf" / name)
        stored = read_tensors(folder / "checkpoints" / name)
        assert hf["architectures"] == ["LlamaForCausalLM"]
        assert torch.equal(tensors["model.norm.weight"], stored["decoder.final_layernorm.weight"])
        assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], stored["decoder.layers.1.mlp.linear_fc2.weight"])
    assert "logits not compared" in (folder / "hf" / "iter_0000002" / "README.md").read_text()
    on_ranks(2, merged(raw, {"train": {"steps": 3}, "checkpoint": {"keep_last": 1}}))
    assert [path.name for path in (folder / "hf").iterdir()] == checkpoints(raw) == ["iter_0000003"]


def test_a_folder_that_cannot_be_written_ends_no_training(raw_run):
    raw = merged(raw_run, {"train": {"steps": 1}, "schedule": {"kind": "constant", "warmup_steps": 0}, "checkpoint": {"also_save_hf": True}})
    folder = Path(raw["run"]["dir"])
    folder.mkdir()
    (folder / "hf").write_text("in the way")
    assert len(on_ranks(2, raw)) == 1 and checkpoints(raw) == ["iter_0000001"]
    assert "no Hugging Face folder for" in (folder / "logs" / "rank_00000.log").read_text() and status(raw)["state"] == "done"


def test_a_model_without_a_hugging_face_form_is_refused_before_it_is_trained(raw_run):
    raw = merged(raw_run, {"model": {"norm": "layernorm"}, "checkpoint": {"also_save_hf": True}})
    with pytest.raises(ranks.RankError, match="LlamaForCausalLM cannot express this model: model.norm=layernorm"):
        on_ranks(1, raw)
    assert not checkpoints(raw)


# --- how a run ends ----------------------------------------------------------------------------------------------------


def test_a_finished_run_takes_no_more_steps(raw_run):
    lines = on_ranks(1, raw_run)
    written = Path(raw_run["run"]["dir"], "checkpoints", "iter_0000006", "metadata.json").stat().st_mtime_ns
    assert on_ranks(1, raw_run) == lines
    assert Path(raw_run["run"]["dir"], "checkpoints", "iter_0000006", "metadata.json").stat().st_mtime_ns == written
    assert status(raw_run)["state"] == "done"


def test_max_tokens_ends_with_the_step_that_reaches_it(raw_run):
    lines = on_ranks(1, merged(raw_run, {"train": {"max_tokens": 2 * 4 * SEQ + 1}}))
    assert column(lines, "step") == [1, 2, 3]
    assert checkpoints(raw_run) == ["iter_0000003"] and status(raw_run)["state"] == "done"


def test_max_minutes_saves_and_stops(raw_run):
    hurried = merged(raw_run, {"train": {"max_minutes": 1e-9}})
    assert column(on_ranks(2, hurried), "step") == [1]
    assert checkpoints(raw_run) == ["iter_0000001"]
    assert column(on_ranks(2, hurried), "step") == [1, 2]      # started again, it goes on
    assert status(raw_run) == {**status(raw_run), "state": "done", "step": 2}


# --- what it reads -----------------------------------------------------------------------------------------------------


def samples_read(raw, world_size):
    """On a rank: (the training lines, the sample numbers of each global batch as this rank read them)."""
    from engine.data.loader import Loader

    honest, read = Loader.sample_numbers, []

    def sample_numbers(self, *where):
        read.append(honest(self, *where))
        return read[-1]

    Loader.sample_numbers = sample_numbers
    try:
        return train_on_rank(raw, world_size), [numbers.ravel().tolist() for numbers in read]
    finally:
        Loader.sample_numbers = honest


def test_batch_ramp_up(raw_run):
    """From 2 to 6 in steps of 2 over 8 samples, that is one increment every 4 samples; two dp ranks read what one reads."""
    raw = merged(raw_run, {"train": {"global_batch": 6, "rampup": {"start": 2, "increment": 2, "samples": 8}, "eval_samples": 0}})
    one, read = ranks.run(1, samples_read, raw, 1)[0]
    assert column(one, "global_batch") == [2, 2, 4, 6, 6, 6]
    assert column(one, "consumed_samples") == [2, 4, 8, 14, 20, 26]
    assert column(one, "tokens") == [SEQ * n for n in (2, 2, 4, 6, 6, 6)]
    assert sum(read, []) == list(range(26)) and [len(numbers) for numbers in read] == [2, 2, 4, 6, 6, 6]
    (two, first), (_, second) = ranks.run(2, samples_read, merged(raw, {"run": {"dir": raw_run["run"]["dir"] + "2"}}), 2)
    assert [sorted(numbers) for numbers in map(list.__add__, first, second)] == read
    assert column(two, "consumed_samples") == column(one, "consumed_samples")
    assert np.allclose(column(two, "loss"), column(one, "loss"), rtol=1e-5, atol=0)


def test_two_corpora_are_blended_by_weight(raw_run, tmp_path):
    """Three samples of the first for each of the second; their ids do not overlap, so a sample shows where it is from."""
    from engine.config import validate
    from engine.data.indexed import IndexedWriter
    from engine.stages import build_stage

    prefixes = [str(tmp_path / name) for name in ("low", "high")]
    for prefix, ids in zip(prefixes, (range(4, 30), range(30, 60))):
        with IndexedWriter(prefix, np.uint16) as writer:
            for _ in range(20):
                writer.add_document(np.resize(np.array(ids), 70))
    raw = merged(raw_run, {"data": {"train": [3, prefixes[0], 1, prefixes[1]]}})
    lines = on_ranks(2, raw)
    assert column(lines, "step") == [1, 2, 3, 4, 5, 6] and lines[-1]["loss"] < lines[0]["loss"]
    run = validate(raw, 2)
    train, _ = build_stage(run.stage).datasets(run, 24, 4)
    tokens = train.batch(np.arange(24))["tokens"]
    assert (tokens < 30).all(1).sum() == 18 and (tokens >= 30).all(1).sum() == 6
    first = (tokens[:4] < 30).all(1).sum()
    assert first == 3      # every global batch has the mixture, not the run as a whole only


def mean_by_hand(raw, samples) -> float:
    """-log p per token of samples 0 to 7 of `samples` (with gather()), EOD inputs left out, by the weights the run saved."""
    import torch

    from engine.config import validate
    from engine.mcore import build, checkpoint

    text = torch.from_numpy(samples.gather(np.arange(8)))
    tensors = checkpoint.read_tensors(Path(raw["run"]["dir"], "checkpoints"))
    logp = build.single_rank_logits(validate(raw), tensors, text[:, :-1]).double().log_softmax(-1)
    own = logp.gather(2, text[:, 1:, None])[..., 0]
    return float(-own[text[:, :-1] != EOD].mean())


def validation_lines(raw, names) -> dict:
    from engine.log import read_metrics

    return {name: read_metrics(raw["run"]["dir"], name) for name in names}


def test_validation_is_a_mean_over_tokens(raw_run, corpus, tmp_path):
    """Two sets, two dp ranks, and eval_samples rounded up to global batches. In `other` some samples are mostly EOD inputs, which do
    not count, so a mean of the batches' means is another number."""
    from engine.data.indexed import IndexedCorpus, IndexedWriter
    from engine.data.pretraining import GPTSamples

    other = str(tmp_path / "other")
    with IndexedWriter(other, np.uint16) as writer:
        for length in (70, 69, 68, *[2] * 60):
            writer.add_document(np.append(np.arange(4, 4 + length) % VOCAB, EOD) if length > 2 else [5, EOD, EOD, EOD])
    raw = merged(raw_run, {"data": {"valid": {"held_out": [corpus["valid"]], "other": [other]}, "reset_at_eod": False, "eod_mask_loss": True},
                           "train": {"eval_samples": 5, "eval_every": 4}})
    on_ranks(2, raw)
    found = validation_lines(raw, ("held_out", "other"))
    for name, prefix in (("held_out", corpus["valid"]), ("other", other)):
        opened = IndexedCorpus(prefix)
        samples = GPTSamples(opened, np.arange(len(opened)), 8, SEQ, raw["run"]["seed"], "valid")
        assert column(found[name], "step") == [4, 6]
        assert found[name][-1]["valid_loss"] == pytest.approx(mean_by_hand(raw, samples), rel=1e-5)
    assert found["held_out"][-1]["valid_loss"] != found["other"][-1]["valid_loss"]


def test_a_run_stops_and_saves_when_validation_has_found_enough(raw_run, corpus):
    from engine.log import read_metrics

    valid = {"data": {"valid": {"held_out": [corpus["valid"]]}}, "train": {"eval_samples": 4, "eval_every": 2}}
    whole = merged(raw_run, valid)
    on_ranks(2, whole)
    losses = column(read_metrics(whole["run"]["dir"], "held_out"), "valid_loss")
    assert losses[0] > losses[1] > losses[2]
    limit = (losses[0] + losses[1]) / 2
    folder = f"{whole['run']['dir']}-enough"
    stopped = merged(whole, {"run": {"dir": folder}, "parallel": {"pp": 2}, "train": {"stop_when": {"metric": "valid_loss", "at_most": limit}}})
    assert column(on_ranks(2, stopped), "step") == [1, 2, 3, 4]
    assert Path(folder, "checkpoints/iter_0000004/metadata.json").is_file()
    assert column(on_ranks(2, stopped), "step") == [1, 2, 3, 4]  # the same command knows that it is done
    with pytest.raises(ranks.RankError, match="valid_los is no number of the validation set held_out; there are valid_loss"):
        on_ranks(1, merged(stopped, {"run": {"dir": f"{folder}2"}, "parallel": {"pp": 1}, "train": {"stop_when": {"metric": "valid_los"}}}))


def test_a_run_killed_before_its_last_validation_makes_up_for_it(raw_run, corpus):
    from engine.log import read_metrics

    raw = merged(raw_run, {"data": {"valid": {"held_out": [corpus["valid"]]}}, "train": {"eval_samples": 4}})
    folder = Path(raw["run"]["dir"])
    on_ranks(2, raw)
    whole, = read_metrics(folder, "held_out")
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(line for line in lines if b"held_out" not in line))
    on_ranks(2, raw)
    assert read_metrics(folder, "held_out") == [whole] and len(read_metrics(folder)) == 6
    on_ranks(2, raw)
    assert read_metrics(folder, "held_out") == [whole]  # and does not do so twice


def test_split_cuts_the_validation_set_out_of_the_corpus(raw_run, corpus):
    from engine.data.indexed import IndexedCorpus
    from engine.data.pretraining import GPTSamples, split_documents

    raw = merged(raw_run, {"data": {"split": "50,50,0", "reset_at_eod": False, "eod_mask_loss": True}, "train": {"eval_samples": 8}})
    raw["data"]["valid"] = {}
    on_ranks(1, raw)
    opened = IndexedCorpus(corpus["train"])
    documents = split_documents(len(opened), "50,50,0")
    assert [documents[1][0], documents[1][-1]] == [30, 59]
    samples = GPTSamples(opened, np.array(documents[1]), 8, SEQ, raw["run"]["seed"], "valid")
    assert validation_lines(raw, ["valid"])["valid"][-1]["valid_loss"] == pytest.approx(mean_by_hand(raw, samples), rel=1e-5)


# --- what it reports ---------------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_schedule(raw_run):
    """wsd: two steps of warm-up from 0, then the peak, and a linear decay over the last two."""
    assert column(on_ranks(1, raw_run), "lr") == pytest.approx([0, 0.005, 0.01, 0.01, 0.01, 0.005])


@pytest.fixture(scope="module")
def one_rank_norms(tmp_path_factory):
    """norms(raw, name) -> the training lines of that run on one rank, made once per name."""
    made = {}

    def norms(raw, name):
        if name not in made:
            made[name] = on_ranks(1, merged(raw, {"run": {"dir": str(tmp_path_factory.mktemp(name))}}))
        return made[name]

    return norms


MODELS = {"plain": {}, "tied": {"tie_embeddings": True}, "moe": {"moe": {"num_experts": 4, "z_loss_coeff": 1e-3}}}
SP = {"tp": 2, "sequence_parallel": True}


@pytest.mark.parametrize("model,layout", [("plain", SP), ("plain", {"tp": 2}), ("plain", {"pp": 2}), ("tied", SP), ("tied", {"pp": 2}),
                                          ("moe", {"ep": 2}), ("moe", SP), ("moe", {**SP, "etp": 1})],
                         ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_norms_by_layer_equal_one_rank(raw_run, one_rank_norms, model, layout):
    raw = merged(raw_run, {"log": {"norms": True}, "model": MODELS[model], "train": {"steps": 4, "eval_samples": 0}})
    expected, lines = one_rank_norms(raw, model), on_ranks(2, merged(raw, {"parallel": layout}))
    places = {"layer_00", "layer_01", "embedding", "output"}
    for ours, theirs in zip(lines, expected):
        assert ours["norms"].keys() == {"weight", "grad"} and ours["norms"]["weight"].keys() == ours["norms"]["grad"].keys() == places
        for kind in ("weight", "grad"):
            assert ours["norms"][kind] == pytest.approx(theirs["norms"][kind], rel=1e-5)
        together = math.sqrt(sum(norm**2 for norm in ours["norms"]["grad"].values()))
        assert together == pytest.approx(min(ours["grad_norm"], 1.0), rel=1e-5)      # as the optimizer took them, clipped to 1


def deterministic(raw, world_size):
    """On a rank: (torch's switch, losses); the switch is put back for the next job of this process."""
    import torch

    try:
        lines = train_on_rank(raw, world_size)
        return torch.are_deterministic_algorithms_enabled(), [(line["loss"], line["grad_norm"]) for line in lines]
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_runs_are_bit_equal(raw_run, tmp_path):
    change = {"run": {"deterministic": True}, "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}, "parallel": SP}
    runs = [ranks.run(2, deterministic, merged(raw_run, change, {"run": {"dir": str(tmp_path / f"{i}"), "seed": seed}}), 2)
            for i, seed in enumerate((3, 3, 4))]
    assert all(switch for run in runs for switch, _ in run)
    assert runs[0] == runs[1] and runs[0] != runs[2]


# --- what it refuses ---------------------------------------------------------------------------------------------------


def attempt(raw, world_size):
    """On a rank: the message that training ends with; None if it does not."""
    from engine.faults import TrainingStopped

    try:
        train_on_rank(raw, world_size)
    except TrainingStopped as error:
        return str(error)
    return None


@pytest.mark.parametrize("num_ranks,layout", [(1, {}), (2, {"pp": 2}), (2, {})], ids=["one rank", "pp2", "dp2"])
def test_a_loss_that_is_nan_stops_the_run(raw_run, num_ranks, layout):
    raw = merged(raw_run, {"optim": {"lr": 1e38, "clip_grad": 0.0}, "schedule": {"kind": "constant", "warmup_steps": 0},
                           "checkpoint": {"save_every": 1}, "parallel": layout, "faults": {"nonfinite": "stop"}})
    messages = ranks.run(num_ranks, attempt, raw, num_ranks)
    assert messages == [messages[0]] * num_ranks
    assert messages[0].startswith("step 2: the loss is nan on samples 4 to 7 (replica 0: samples 4, ") and "changed no weight" in messages[0]
    assert "Lower optim.lr" in messages[0]
    assert status(raw) == {**status(raw), "state": "failed", "step": 1, "reason": messages[0]}
    assert checkpoints(raw) == ["iter_0000001"]
    assert Path(raw["run"]["dir"], "checkpoints", "latest_checkpointed_iteration.txt").read_text() == "1\n"


def with_bad_gradient(raw, world_size, value):
    """On a rank: training where the last rank's gradient gets `value` at step 3; (message, were the weights touched)."""
    import torch
    import torch.distributed as dist

    from engine.faults import TrainingStopped
    from engine.mcore import checkpoint
    from engine.mcore.run import ParallelModel

    honest, calls, kept = ParallelModel.forward_backward, [], {}

    def forward_backward(self, micro_batches):
        result = honest(self, micro_batches)
        calls.append(self)
        if len(calls) == 3:
            kept["before"] = checkpoint.local_shards(self)
            if dist.get_rank() == world_size - 1:
                next(self.chunks[-1].parameters()).main_grad.view(-1)[0] = value
        return result

    ParallelModel.forward_backward = forward_backward
    try:
        train_on_rank(raw, world_size)
    except TrainingStopped as error:
        after = checkpoint.local_shards(calls[-1])
        return str(error), any(not torch.equal(one[3], other[3]) for one, other in zip(kept["before"], after))
    finally:
        ParallelModel.forward_backward = honest
    return None, None


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("num_ranks,change", [(1, {}), (2, {"parallel": SP}), (2, {"parallel": {"pp": 2}, "train": {"precision": "bf16"}})],
                         ids=["one rank", "tp2", "pp2 bf16"])
def test_a_gradient_that_is_not_finite_stops_the_run(raw_run, num_ranks, change, value):
    """On one rank only; all ranks must stop alike."""
    raw = merged(raw_run, {"checkpoint": {"save_every": 2}, "faults": {"nonfinite": "stop"}}, change)
    answers = ranks.run(num_ranks, with_bad_gradient, raw, num_ranks, value)
    assert answers == [answers[0]] * num_ranks
    message, touched = answers[0]
    assert message.startswith(f"step 3: the gradient norm is {value} on samples 8 to 11 (rank {num_ranks - 1}: ")
    assert not touched
    assert status(raw) == {**status(raw), "state": "failed", "reason": message} and checkpoints(raw) == ["iter_0000002"]


def test_a_finished_run_does_nothing_again(raw_run):
    on_ranks(1, raw_run)
    before = Path(raw_run["run"]["dir"], "metrics.jsonl").read_bytes()
    on_ranks(1, raw_run)
    assert Path(raw_run["run"]["dir"], "metrics.jsonl").read_bytes() == before
