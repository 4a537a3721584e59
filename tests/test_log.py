"""The run folder, metrics.jsonl across crashes and resumptions, the console as parsers of Megatron-LM read it, the progress bar.

Left out: a live Weights & Biases server (a stand-in module notes the calls).
"""

import datetime
import json
import logging
import math
import re
import subprocess
import sys
import types

import orjson
import pytest

from engine.config import ConfigError, load_config, validate
from engine.log import RunLog, drop_lines_after, flatten, read_metrics


@pytest.fixture
def make_log(tmp_path):
    """make_log(rank, stage, log.* fields...) -> RunLog in tmp_path / "run", closed at the end of the test."""
    opened = []

    def make_log(rank: int = 0, stage: str = "pretrain", **fields) -> RunLog:
        raw = dict(run=dict(dir=str(tmp_path / "run")), model=dict(family="gpt2", size="small"), data=dict(train=["x"]),
                   train=dict(seq_len=16, global_batch=32, steps=100), log=dict(tensorboard=False, progress="plain") | fields)
        run = validate(raw)
        opened.append(RunLog(run.model_copy(update={"stage": stage}), rank, world_size=4, dp_size=2))
        return opened[-1]

    yield make_log
    for log in opened:
        log.close()


def record(step: int, **fields) -> dict:
    return dict(step=step, loss=9.0 - step / 100, grad_norm=1.2344, lr=1e-4, consumed_samples=32 * step, tokens=512,
                step_time_s=0.1234, tokens_per_s=4150.0, global_batch=32) | fields


def steps_in(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_the_folder_of_a_run(make_log, tmp_path):
    log = make_log()
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == log.run
    env = json.loads((folder / "env.json").read_text())
    assert env["world_size"] == 4 and env["dp_size"] == 2 and env["command"][1:] == sys.argv
    assert env["packages"]["megatron-core"] == "0.16.1" and env["device"]["type"] in ("cpu", "cuda")
    assert {"python", "platform", "git_commit"} <= set(env)


def test_status_follows_the_run(make_log, tmp_path):
    def status():
        return json.loads((tmp_path / "run" / "status.json").read_text())

    log = make_log(every=2)
    first = status()
    assert (first["state"], first["step"], first["consumed_samples"], first["reason"]) == ("running", 0, 0, "")
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(first["updated"])
    assert abs(age.total_seconds()) < 60
    log.step(record(1))
    log.step(record(2))
    assert (status()["step"], status()["consumed_samples"]) == (2, 64)
    log.step(record(3))
    log.close("requeue", "signal 12")
    assert {key: status()[key] for key in ("state", "step", "consumed_samples", "reason")} == dict(
        state="requeue", step=3, consumed_samples=96, reason="signal 12")
    log.close("done")
    assert status()["state"] == "requeue"      # the first word is the last
    assert not list((tmp_path / "run").glob("*.part"))


def test_every_step_is_a_line_at_once(make_log, tmp_path):
    log = make_log(every=50)
    for step in (1, 2, 3):
        log.step(record(step, layers={"0": {"weight_norm": 1.5}}, mfu=None))
        assert steps_in(tmp_path / "run") == list(range(1, step + 1))      # without close: flushed per line
    line = read_metrics(tmp_path / "run")[2]
    assert line == record(3, layers={"0": {"weight_norm": 1.5}}, mfu=None)


def test_numbers_that_are_no_json(make_log, tmp_path):
    import numpy as np
    import torch

    make_log().step(record(1, loss=math.nan, grad_norm=torch.tensor(2.5), num_zeros=np.int64(7)))
    [line] = read_metrics(tmp_path / "run")
    assert line["loss"] is None and line["grad_norm"] == 2.5 and line["num_zeros"] == 7


def test_resuming_leaves_one_line_per_step(make_log, tmp_path):
    log = make_log()
    log.resume(0)
    for step in range(1, 8):
        log.step(record(step))
        if step in (4, 6):
            log.validation("pile", step, 5.0)
    log.close("failed")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step":8,"lo')      # cut off by a crash
    log = make_log()
    log.resume(4)
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4]
    for step in (5, 6):
        log.step(record(step, again=True))
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["again" in line for line in lines] == [False] * 4 + [True] * 2
    assert [line["step"] for line in read_metrics(tmp_path / "run", "pile")] == [4]


def test_a_new_run_in_an_old_folder_starts_empty_even_when_not_told(make_log, tmp_path):
    log = make_log()
    for step in (1, 2, 3):
        log.step(record(step))
    log.close()
    log = make_log()
    log.step(record(1))
    log.step(record(2))
    assert steps_in(tmp_path / "run") == [1, 2]
    log.close()
    log = make_log()
    log.validation("pile", 2, 1.0)      # comes after step 2, which stays
    assert steps_in(tmp_path / "run") == [1, 2]


def test_dropping_lines_needs_no_file_and_reads_past_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_after(path, 3)
    assert not path.exists()
    path.write_bytes(b'{"step":1}\n{"step":2,"l\n{"step":3}\n{"step":4}\n{"step":3}')
    drop_lines_after(path, 3)
    assert path.read_bytes() == b'{"step":1}\n{"step":3}\n'


def test_the_console_line_in_megatrons_words(make_log, capsys):
    log = make_log(every=10)
    for step in range(1, 11):
        log.step(record(step, tflops_per_device=1.23))
    out = capsys.readouterr().out
    assert re.fullmatch(
        r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration       10/     100 \| consumed samples:          320 \| "
        r"elapsed time per iteration \(ms\): 123\.4 \| throughput per GPU \(TFLOP/s/GPU\): 1\.2 \| learning rate: 1\.000000E-04 \| "
        r"global batch size:    32 \| lm loss: 8\.945000E\+00 \| loss scale: 1\.0 \| grad norm: 1\.234 \| "
        r"number of skipped iterations:   0 \| number of nan iterations:   0 \|\n", out)


def test_the_console_counts_bad_steps_and_averages_the_good(make_log, capsys):
    log = make_log(every=4)
    for step, fields in enumerate([dict(loss=2.0), dict(loss=math.nan), dict(loss=4.0, skipped=True), dict(loss=math.inf)], start=1):
        log.step(record(step, **fields))
    for step in (5, 6, 7, 8):
        log.step(record(step, loss=1.0, step_time_s=step / 10))
    bad, good = capsys.readouterr().out.splitlines()
    assert "lm loss: 3.000000E+00 |" in bad
    assert bad.endswith("number of skipped iterations:   1 | number of nan iterations:   2 |")
    assert "throughput" not in bad
    assert "elapsed time per iteration (ms): 650.0 |" in good and "lm loss: 1.000000E+00 |" in good
    assert good.endswith("number of skipped iterations:   0 | number of nan iterations:   0 |")


def test_the_console_shows_moe_losses_and_counts_where_known(make_log, capsys):
    make_log(every=1).step(record(1, moe={"load_balancing_loss": 1.5}, num_zeros=12, params_norm=3.25, loss_scale=65536.0))
    out = capsys.readouterr().out
    assert "| load balancing loss: 1.500000E+00 | loss scale: 65536.0 | grad norm: 1.234 | num zeros: 12 | params norm: 3.250 |" in out


def test_the_last_step_is_always_shown(make_log, capsys):
    log = make_log(every=30)
    for step in range(85, 101):
        log.step(record(step))
    shown = re.findall(r"iteration +(\d+)/", capsys.readouterr().out)
    assert shown == ["90", "100"]


def test_other_stages_do_not_call_their_loss_lm_loss(make_log, capsys):
    make_log(stage="dpo", every=1).step(record(1))
    assert "| dpo loss: 8.990000E+00 |" in capsys.readouterr().out


def test_validation_is_shown_and_written(make_log, tmp_path, capsys):
    log = make_log()
    log.validation("pile", 100, 3.2, {"tokens": 64})
    log.validation("code", 100, 50.0)
    first, numbers, second = capsys.readouterr().out.splitlines()
    assert numbers.endswith("pile at iteration 100 | tokens: 64 | ")
    assert first == " validation loss at iteration 100 on pile | lm loss value: 3.200000E+00 | lm loss PPL: 2.453253E+01 | "
    assert f"PPL: {math.exp(20):.6E}" in second
    assert read_metrics(tmp_path / "run", "pile") == [{"step": 100, "split": "pile", "valid_loss": 3.2, "tokens": 64}]
    assert read_metrics(tmp_path / "run") == []


def test_notes_go_to_the_log_of_the_rank_and_rank_0_speaks(make_log, tmp_path, capsys):
    log = make_log(rank=0)
    log.note("from zero")
    logging.getLogger("engine.data.blend").warning("from a module")
    log.step(record(10))
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["from zero", "from a module"]
    log.close()
    written = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert "INFO from zero" in written and "WARNING from a module" in written and "| lm loss: 8.9" in written


def test_other_ranks_write_their_own_log_only(make_log, tmp_path, capsys):
    log = make_log(rank=3)
    log.resume(0)
    log.note("from three")
    log.step(record(10))
    log.validation("pile", 10, 1.0)
    log.close("failed", "lost")
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["rank_00003.log"]
    assert "from three" in (tmp_path / "run" / "logs" / "rank_00003.log").read_text()
    assert capsys.readouterr() == ("", "")


def test_a_closed_log_is_silent(make_log, capsys):
    first = make_log(every=1)
    first.close()
    second = make_log(every=1)
    second.note("once")
    assert capsys.readouterr().err == "once\n"


def test_a_progress_bar_takes_the_place_of_lines(make_log, tmp_path, capsys):
    log = make_log(every=1, progress="bar")
    log.resume(40)
    log._bar._progress.refresh()      # draws now; its own thread draws four times a second
    for step in (41, 50):
        log.step(record(step, loss=2.5))
    log.validation("pile", 50, 3.2)
    log.close()
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    assert "iteration       50/" not in out
    assert "40/100" in out and "50/100" in out and "loss 2.5000" in out and "4,150 tokens/s" in out
    assert " validation loss at iteration 50 on pile |" in out
    assert "iteration       50/" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()


def test_plain_lines_where_there_is_no_terminal(make_log, capsys):
    make_log(progress="auto").step(record(10))
    assert "iteration       10/" in capsys.readouterr().out


def test_tensorboard_gets_every_number_and_hides_steps_taken_again(make_log, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = make_log(tensorboard=True)
    for step in (1, 2, 3):
        log.step(record(step, moe={"aux": 0.5}, mfu=None))
    log.close()
    log = make_log(tensorboard=True)
    log.resume(1)
    log.step(record(2, loss=7.0))
    log.validation("pile", 2, 3.0)
    log.close()
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 8.99), (2, 7.0)]
    assert {"lr", "grad_norm", "tokens_per_s", "moe/aux", "valid_loss/pile", "valid_ppl/pile"} <= set(events.Tags()["scalars"])
    assert "mfu" not in events.Tags()["scalars"]


def test_a_failing_tensorboard_stops_no_run(make_log, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)      # importing it raises ImportError
    log = make_log(tensorboard=True)
    log.step(record(1))
    log.close()
    assert "TensorBoard failed" in capsys.readouterr().err
    assert steps_in(tmp_path / "run") == [1]


def test_wandb_must_be_installed_to_be_asked_for(make_log, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for rank in (0, 1):      # every rank, so that none waits for the others
        with pytest.raises(ConfigError, match="log.wandb=team needs the package wandb; pip install wandb"):
            make_log(rank=rank, wandb="team")


def test_wandb_goes_on_with_the_same_run(make_log, monkeypatch):
    calls = []

    class Run:
        id = "abc"

        def log(self, scalars, step):
            calls.append((step, scalars["loss"]))

        def finish(self):
            calls.append("finish")

    wandb = types.ModuleType("wandb")
    wandb.__spec__ = types.SimpleNamespace()      # find_spec asks a loaded module for it
    wandb.init = lambda **kwargs: calls.append((kwargs["project"], kwargs["id"], kwargs["config"]["train"]["steps"])) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (1, 2):
        log = make_log(wandb="team")
        log.step(record(first_step, loss=2.0))
        log.close()
    assert calls == [("team", None, 100), (1, 2.0), "finish", ("team", "abc", 100), (2, 2.0), "finish"]


def test_flatten_names_nested_numbers():
    assert flatten({"a": 1, "b": {"c": 2.5, "d": {"e": True}}, "text": "x", "none": None, "list": [1]}) == {"a": 1.0, "b/c": 2.5, "b/d/e": 1.0}


def test_reading_leaves_out_a_cut_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(orjson.dumps({"step": 1}) + b"\n" + b'{"step":2')
    assert steps_in(tmp_path) == [1]


def test_starting_a_log_imports_neither_torch_nor_tensorboard(make_log, tmp_path):
    make_log().close()
    code = f"""if True:
        import sys
        from engine.config import load_config
        from engine.log import RunLog
        log = RunLog(load_config({str(tmp_path / "run" / "config.yaml")!r}, ["log.tensorboard=true"]), 0, 1, 1)
        assert not {{"torch", "tensorboard", "rich", "wandb"}} & set(sys.modules)
        log.close()
    """
    subprocess.run([sys.executable, "-c", code], check=True)
