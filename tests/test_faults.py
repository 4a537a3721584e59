"""What a run is asked from outside, and what goes wrong inside a step. docs/faults.md, table Steps, has the figures.

Faults that end a process are met by processes of their own; the others on ranks that stay up.
"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import ranks
from omegaconf import OmegaConf
from training import MOE, merged, on_ranks

ROOT = Path(__file__).parents[1]


def status(raw) -> dict:
    return json.loads(Path(raw["run"]["dir"], "status.json").read_text())


def checkpoints(raw) -> list[int]:
    return sorted(int(path.name[5:]) for path in Path(raw["run"]["dir"], "checkpoints").glob("iter_*") if path.suffix == "")


def column(lines, name) -> list:
    return [line[name] for line in lines]


def meddled(meddle, act):
    """act() while meddle(model, number) is called after each forward and backward pass, counted from 1."""
    from engine.mcore.run import ParallelModel

    honest, count = ParallelModel.forward_backward, itertools.count(1)

    def forward_backward(self, micro_batches):
        result = honest(self, micro_batches)
        return meddle(self, next(count), result) or result

    ParallelModel.forward_backward = forward_backward
    try:
        return act()
    finally:
        ParallelModel.forward_backward = honest


def command_line(path, meddle, *args):
    """On a rank: the exit code of launch/pretrain.py with this configuration."""
    from engine import cli
    from engine.stages import TEXT

    sys.argv = ["pretrain.py", path]
    return meddled(partial(meddle, *args), lambda: cli.main("", TEXT))


def leave_alone(model, step, result):
    pass


@pytest.fixture
def start(tmp_path):
    """start(num_ranks, raw, meddle, *args) -> exit codes of the ranks."""

    def start(num_ranks, raw, meddle=leave_alone, *args):
        path = tmp_path / "run.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))
        return ranks.run(num_ranks, command_line, str(path), meddle, *args)

    return start


# --- what a run is asked from outside ----------------------------------------------------------------------------------


def signal_to_one_rank(number, rank, at, model, step, result):
    if step == at and os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_asks_for_another_start(raw_run, tmp_path, start, number):
    expected = on_ranks(2, merged(raw_run, {"run": {"dir": str(tmp_path / "unbroken")}}))
    before = signal.getsignal(number)
    assert start(2, raw_run, signal_to_one_rank, number, 1, 3) == [75, 75]
    assert checkpoints(raw_run) == [3] and signal.getsignal(number) == before
    assert status(raw_run) == {**status(raw_run), "state": "requeue", "step": 3, "reason": f"{number.name} came"}
    assert start(2, raw_run) == [0, 0] and status(raw_run)["state"] == "done"
    from engine.log import read_metrics

    assert column(read_metrics(raw_run["run"]["dir"]), "loss") == column(expected, "loss")


def test_a_signal_after_the_last_step_changes_nothing(raw_run, start):
    assert start(2, raw_run, signal_to_one_rank, signal.SIGTERM, 0, 6) == [0, 0]
    assert status(raw_run)["state"] == "done"


def touch(path, at, model, step, result):
    if step == at and os.environ["RANK"] == "0":
        Path(path).touch()


def test_a_file_asks_for_a_checkpoint(raw_run, start):
    file = Path(raw_run["run"]["dir"], "SAVE")
    assert start(2, raw_run, touch, str(file), 2) == [0, 0]
    assert checkpoints(raw_run) == [2, 6] and not file.exists()


def test_a_file_stops_the_run(raw_run, start):
    file = Path(raw_run["run"]["dir"], "STOP")
    raw = merged(raw_run, {"checkpoint": {"save_at_end": False}})
    assert start(2, raw, touch, str(file), 2) == [0, 0]
    assert checkpoints(raw) == [2] and status(raw) == {**status(raw), "state": "stopped", "step": 2, "reason": f"{file} was there"}
    assert file.exists()
    assert start(2, raw) == [0, 0]      # started again, it goes on to the end
    assert not file.exists() and status(raw) == {**status(raw), "state": "done", "step": 6}


# --- numbers that are not finite -----------------------------------------------------------------------------------------


def everything(model) -> list:
    """Bits of all that an update may touch on this rank."""
    import torch

    from engine.mcore import checkpoint

    found = [shard[3] for shard in checkpoint.local_shards(model)]
    for optimizer in model.optimizer.chained_optimizers:
        if not optimizer.is_stub_optimizer:
            found += [t.detach().clone() for state in optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            found += [p.detach().clone() for group in optimizer.optimizer.param_groups for p in group["params"]]
    return found


def spoiled(raw, world_size, kind, at, rank):
    """On a rank: (training lines, was everything of the skipped step left as it was). At these steps one rank's gradient or loss is NaN."""
    import torch
    import torch.distributed as dist
    from training import train

    from engine.mcore.run import ParallelModel

    untouched, before = [], {}
    honest = ParallelModel.skip_update

    def spoil(model, step, result):
        if step in at and dist.get_rank() == rank:
            if kind == "gradient":
                next(model.chunks[-1].parameters()).main_grad.view(-1)[0] = float("nan")
            else:
                return type(result)({**result.sums, "loss": (float("inf"), 1.0)})

    def skip_update(self):
        honest(self)
        untouched.append(all(torch.equal(one, other) for one, other in zip(before["all"], everything(self), strict=True)))

    def forward_backward(self, batch):
        self.gather_weights()      # with overlap_param_gather the forward pass would
        before["all"] = everything(self)      # before the backward pass, which moves a router's bias
        return original(self, batch)

    original = ParallelModel.forward_backward
    ParallelModel.skip_update, ParallelModel.forward_backward = skip_update, forward_backward
    try:
        return meddled(spoil, lambda: train(raw, world_size)), untouched
    finally:
        ParallelModel.skip_update, ParallelModel.forward_backward = honest, original


BIASED = {"model": {"moe": {**MOE, "balance": "aux_free", "score": "sigmoid"}}}
SKIPPED = {
    "dp2 gradient": ("gradient", {}),
    "zero1 overlap gradient": ("gradient", {"parallel": {"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "bf16 pp2 loss": ("loss", {"parallel": {"pp": 2}, "train": {"precision": "bf16"}}),
    "moe ep2 loss": ("loss", {"parallel": {"ep": 2}, **BIASED}),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_one_ranks_nan_skips_the_update_on_all(raw_run, name):
    kind, change = SKIPPED[name]
    answers = ranks.run(2, spoiled, merged(raw_run, change), 2, kind, [3], 1)
    lines, untouched = answers[0]
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    assert all(flags == [True] for _, flags in answers)
    assert all(line["loss"] is not None and line["grad_norm"] is not None for line in lines if not line["skipped"])
    where = "the gradient norm is nan" if kind == "gradient" else "the loss is inf"
    assert lines[2]["why"].startswith(f"{where} on samples 8 to 11") and ("why" not in lines[3])
    if kind == "gradient":
        assert "rank 1: " in lines[2]["why"] and ".weight" in lines[2]["why"]
    assert status(raw_run)["state"] == "done"


def test_nan_after_nan_stops_the_run_and_resuming_does_not_forget(raw_run):
    from engine.log import read_metrics

    raw = merged(raw_run, {"checkpoint": {"save_every": 1}})
    with pytest.raises(ranks.RankError, match="step 4: the loss is inf .*; 3 updates in a row were to be skipped"):
        ranks.run(2, spoiled, raw, 2, "loss", [2, 3, 4], 0)
    assert status(raw)["state"] == "failed" and "changed no weight" in status(raw)["reason"] and checkpoints(raw) == [1, 2, 3]
    with pytest.raises(ranks.RankError, match="step 4: the loss is inf .*; 3 updates in a row were to be skipped"):
        ranks.run(2, spoiled, raw, 2, "loss", [1], 0)
    assert column(read_metrics(raw["run"]["dir"]), "skipped") == [False, True, True]


def test_the_samples_of_a_bad_loss_are_named(raw_run):
    """Sample 13 of step 4 makes its replica's loss NaN."""
    answers = ranks.run(2, with_bad_sample, raw_run, 2, 13)
    assert answers[0][3]["why"] == "the loss is nan on samples 12 to 15 (replica 1: samples 13)"


def with_bad_sample(raw, world_size, number):
    from training import train

    from engine.data.loader import Loader
    from engine.stages.pretrain import Pretrain

    honest, count, bad = Pretrain.loss, Loader.batches, set()

    def batches(self, first, size):
        found = count(self, first, size)
        for i, numbers in enumerate(self.sample_numbers(first, size)):
            (bad.add if number in numbers else bad.discard)(found[i]["tokens"].data_ptr())      # buffers are used again
        return found

    def loss(self, role, output, batch):
        found = honest(self, role, output, batch)
        return type(found)(found.sum * float("nan"), found.metrics) if batch["tokens"].data_ptr() in bad and output.requires_grad else found

    Pretrain.loss, Loader.batches = loss, batches
    try:
        return train(raw, world_size)
    finally:
        Pretrain.loss, Loader.batches = honest, count


# --- loss spikes -------------------------------------------------------------------------------------------------------


def test_a_spike_is_judged_against_what_is_usual():
    from engine.faults import Spikes

    spikes = Spikes(window=8)
    for loss in (3.0, 3.1, 2.9):
        spikes.add(loss)
        assert spikes.deviation(100.0) == 0      # too little is known
    spikes.add(3.2)
    assert spikes.deviation(float("nan")) == 0 and spikes.deviation(2.0) == 0 and spikes.deviation(3.05) == 0
    assert spikes.deviation(3.05 + 1.4826 * 0.1 * 5) == pytest.approx(5)      # the deviations are 0.05, 0.05, 0.15, 0.15
    for _ in range(8):
        spikes.add(9.0)
    assert spikes.deviation(9.0) == 0 and spikes.deviation(9.009) == pytest.approx(1)      # a new level; a thousandth is the least scale


def trained_meddled(raw, world_size, meddle, *args):
    from training import train

    return meddled(partial(meddle, *args), lambda: train(raw, world_size))


def high_loss(calls, model, number, result):
    """The loss of these passes is told as 50 higher, on the last rank alone."""
    if number in calls and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        total, count = result.sums["loss"]
        return type(result)({**result.sums, "loss": (total + 50 * count, count)})


SPIKY = {"train": {"steps": 12, "eval_samples": 0}, "schedule": {"kind": "constant", "warmup_steps": 0}, "optim": {"lr": 1e-3},
         "faults": {"spike_window": 8, "rollback_steps": 2}}


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike_is_told_or_skipped(raw_run, policy):
    raw = merged(raw_run, SPIKY, {"faults": {"spike": policy}})
    lines = ranks.run(2, trained_meddled, raw, 2, high_loss, [6])[0]
    assert [line["step"] for line in lines if line["skipped"]] == ([6] if policy == "skip" else [])
    assert [line["step"] for line in lines if "spike" in line] == [6]
    log = Path(raw["run"]["dir"], "logs", "rank_00001.log").read_text()
    assert "standard deviations above" in log and "on samples 20 to 23" in log


def test_after_a_spike_the_run_goes_back_and_on_behind_the_samples(raw_run, tmp_path, capsys):
    """Likewise a run that is killed right after it has written that it will, and starts again: the same losses, bit for bit."""
    from data_tools.which import main as which

    raw = merged(raw_run, SPIKY, {"checkpoint": {"save_every": 2}, "faults": {"spike": "rollback"}, "average": {"kind": "uniform", "start": 0.1}})
    lines = ranks.run(2, trained_meddled, raw, 2, high_loss, [7])[0]
    assert column(lines, "step") == list(range(1, 13))
    assert column(lines, "consumed_samples") == [4, 8, 12, 16] + list(range(32, 64, 4))      # 16 to 27 were passed over
    entry, = json.loads(Path(raw["run"]["dir"], "rollbacks.json").read_text())
    assert {**entry, "why": ""} == {"at_step": 7, "to_step": 4, "first_sample": 16, "next_sample": 28, "why": ""}
    assert checkpoints(raw) == [2, 4, 6, 8, 10, 12]
    assert {path.name for path in Path(raw["run"]["dir"], "checkpoints").glob("*.aside")} == {"iter_0000006.aside"}

    assert sum(source["samples"] for source in lines[-1]["sources"].values()) == 60      # those that were passed over were read

    again = merged(raw, {"run": {"dir": str(tmp_path / "again")}})
    ranks.run(2, trained_meddled, merged(again, {"train": {"steps": 6}}), 2, leave_alone)
    shutil.copy(Path(raw["run"]["dir"], "rollbacks.json"), Path(again["run"]["dir"]))
    assert column(on_ranks(2, again), "loss") == column(lines, "loss")
    assert json.loads(Path(again["run"]["dir"], "checkpoints", "iter_0000012", "stage.json").read_text())["faults"]["rollbacks"] == 1

    capsys.readouterr()
    assert which([raw["run"]["dir"], "--step", "5"]) == which([raw["run"]["dir"], "--samples", "24-27"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("before it samples 16 to 27 were passed over: the run went back from step 7 to 4, since the loss is ")
    assert "step 5: samples 28 to 31\n" in said and [f"sample {n}: " in said for n in (23, 24, 27, 28, 31, 32)] == [False, True, True, True, True, False]


def test_spike_after_spike_stops_the_run(raw_run):
    raw = merged(raw_run, SPIKY, {"checkpoint": {"save_every": 2}, "faults": {"spike": "rollback", "max_rollbacks": 1}})
    with pytest.raises(ranks.RankError, match="has gone back faults.max_rollbacks=1 times"):
        ranks.run(2, trained_meddled, raw, 2, high_loss, [7, 10])
    assert status(raw)["state"] == "failed"


# --- replicas ------------------------------------------------------------------------------------------------------------


REPLICAS = {
    "dp2": {},
    "dp2 bf16": {"train": {"precision": "bf16"}},
    "tp2": {"parallel": {"tp": 2, "sequence_parallel": True}},
    "pp2 tied": {"parallel": {"pp": 2}, "model": {"tie_embeddings": True}},
    "moe tp2": {"parallel": {"tp": 2, "sequence_parallel": True}, "model": {"moe": MOE}},
}
HELD_TWICE = {"tp2": "decoder.final_layernorm.weight", "moe tp2": "decoder.layers.1.mlp.router.weight", "pp2 tied": "output_layer.weight"}


def one_bit(name, at, model, step, result):
    """On rank 1 the lowest bit of a parameter's last element is another one; of its master, where there is one."""
    import torch

    from engine.mcore.build import bare

    if step == at and os.environ["RANK"] == "1":
        parameter = dict(bare(model.chunks[-1]).named_parameters())[name]
        getattr(parameter, "main_param", parameter).detach().view(torch.int32).view(-1)[-1] ^= 1


@pytest.mark.parametrize("name", REPLICAS)
def test_one_changed_bit_is_found_and_named(raw_run, name):
    raw = merged(raw_run, {"train": {"steps": 4, "eval_samples": 0}, "faults": {"replica_check_every": 1}, "optim": {"lr": 0.0}}, REPLICAS[name])
    parameter = HELD_TWICE.get(name, "decoder.layers.1.mlp.linear_fc2.weight")
    told = {"pp2 tied": "(output_layer|embedding.word_embeddings).weight", "dp2 bf16": f"{parameter} .fp32 master."}.get(name, parameter)
    with pytest.raises(ranks.RankError, match=f"after step 3, {told} differs between ranks 0 .*, 1 "):
        ranks.run(2, trained_meddled, raw, 2, one_bit, parameter, 3)
    assert status(raw)["step"] == 3      # nothing was found in the steps before


def test_most_ranks_are_right():
    from engine.mcore.replicas import _sentence

    assert _sentence("w", (0, 2), (1,), ["a", "b", "c"]) == "w of rank 1 (b) is not that of rank 0 (a), 2 (c)"


# --- ranks that hang -----------------------------------------------------------------------------------------------------


def hang(model, step, result):
    """In step 3 rank 1 is stopped from outside, and rank 2 is lost in a function of its own."""
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    if step == 3 and os.environ["RANK"] == "2":
        lost()


def lost():
    threading.Event().wait()


def test_ranks_that_hang_are_named_and_all_end(raw_run):
    raw = merged(raw_run, {"train": {"global_batch": 3, "eval_samples": 0}, "faults": {"hang_seconds": 6}})
    with pytest.raises(ranks.RankError) as error:
        ranks.run(3, trained_meddled, raw, 3, hang)
    assert [line for line in str(error.value).splitlines() if line] == ["rank 0:", "the process died", "rank 2:", "the process died"]      # 1 is still stopped
    folder = Path(raw["run"]["dir"])
    reason = status(raw)["reason"]
    assert status(raw)["state"] == "failed" and status(raw)["step"] == 2 and "(faults.hang_seconds=6): rank 1 did not answer" in reason
    assert "rank 0 in all_gather" in reason or "rank 0 in all_reduce" in reason
    assert "rank 2 in wait, called from engine/train.py" in reason
    logs = [(folder / "logs" / f"rank_{rank:05d}.log").read_text() for rank in range(3)]
    assert all("Thread 0x" in logs[rank] for rank in (0, 2)) and "in agree" in logs[0] and "in lost" in logs[2]


def test_a_slow_start_is_no_hang(raw_run):
    """Nothing is looked at before the first step is done, and a whole process that was stopped for a while goes on."""
    raw = merged(raw_run, {"train": {"eval_samples": 0}, "faults": {"hang_seconds": 4}, "checkpoint": {"save_at_end": False}})
    assert len(ranks.run(1, trained_meddled, raw, 1, pause, 1)[0]) == 6
    assert len(ranks.run(1, stopped_for_a_while, merged(raw, {"run": {"dir": raw["run"]["dir"] + "2"}}))[0]) == 6


def pause(at, model, step, result):
    if step == at:
        threading.Event().wait(6)


def stopped_for_a_while(raw):
    """On a rank: its training, in the midst of which a child stops it for longer than faults.hang_seconds."""
    return trained_meddled(raw, 1, stop_and_wake)


def stop_and_wake(model, step, result):
    if step == 3:
        subprocess.run(["sh", "-c", f"kill -STOP {os.getpid()}; sleep 6; kill -CONT {os.getpid()}"], check=True)


def test_a_live_rank_says_where_it_is(raw_run, start):
    assert start(2, raw_run, signal_to_one_rank, signal.SIGUSR2, 1, 3) == [0, 0]
    one, other = (Path(raw_run["run"]["dir"], "logs", f"rank_{rank:05d}.log").read_text() for rank in range(2))
    assert "most recent call first" not in one and "in signal_to_one_rank" in other and "in prefetch" not in one
    assert "Thread 0x" in other      # not the main one alone


# --- processes of their own --------------------------------------------------------------------------------------------


def wait_for(true, seconds=120):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_steps(raw, number):
    path = Path(raw["run"]["dir"], "metrics.jsonl")
    return path.exists() and path.read_bytes().count(b"\n") >= number


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(raw) -> a torchrun of two ranks. Whatever is left of it is killed in the end."""
    family = []

    def torchrun(raw):
        (tmp_path / "run.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "launch" / "pretrain.py"), "run.yaml"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        family.append(psutil.Process(process.pid))
        return process

    yield torchrun
    for process in [one for parent in family if parent.is_running() for one in [parent, *parent.children(recursive=True)]]:
        process.kill()


def test_ranks_whose_launcher_dies_save_and_leave(raw_run, torchrun):
    """As Slurm's --signal=USR1 does it to a plain torchrun, which dies of it and tells its ranks nothing."""
    raw = merged(raw_run, {"train": {"steps": 100000, "eval_samples": 0}, "schedule": {"kind": "constant", "warmup_steps": 0}})
    launcher = torchrun(raw)
    wait_for(lambda: has_steps(raw, 3))
    ranks_of_it = [one for one in psutil.Process(launcher.pid).children(recursive=True) if "pretrain.py" in " ".join(one.cmdline())]
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(30) == -signal.SIGUSR1
    gone, left = psutil.wait_procs(ranks_of_it, 60)
    assert len(gone) == 2 and not left
    assert status(raw) == {**status(raw), "state": "requeue", "reason": "SIGTERM came"}
    assert checkpoints(raw) == [status(raw)["step"]]
