"""profile.*: a trace and a summary of the steps that were asked for, on the ranks that were, and no other effect."""

import gzip
import json
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType
from training import merged, on_ranks, small_run, write_corpus

from engine import profiling
from engine.config import ConfigError, validate
from engine.stages.ladder import rungs


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    return small_run({"train": write_corpus(folder / "train"), "valid": write_corpus(folder / "valid", seed=1)}, folder)


def test_two_steps_of_one_of_two_ranks(raw, tmp_path):
    plain = on_ranks(2, merged(raw, {"run": {"dir": str(tmp_path / "plain")}, "parallel": {"tp": 2}}))
    found = on_ranks(2, merged(raw, {"run": {"dir": str(tmp_path / "run")}, "parallel": {"tp": 2},
                                     "profile": {"first_step": 3, "num_steps": 2, "ranks": [1], "memory": True}}))
    assert [record["loss"] for record in found] == [record["loss"] for record in plain]
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "run" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank_00001.trace.json.gz", "rank_00001.txt"]
    with gzip.open(folder / "rank_00001.trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("optimizer") == names.count("forward and backward") == 2
    text = (folder / "rank_00001.txt").read_text()
    assert text.startswith("rank 1, steps 3 to 4: ")
    phases = text.split("\n\n")[1]
    assert all(name in phases for name in ("forward and backward", "optimizer", "wait for data"))
    assert shares(text.split("\n\n")[2]) == pytest.approx(100, abs=1), "kinds of work and the rest are all of the time"
    assert {"matrix products", "communication", "Python, and waiting for other ranks"} <= {line[:44].strip() for line in text.split("\n\n")[2].splitlines()}
    assert "MiB kept" in text


def shares(table: str) -> float:
    return sum(float(line.split("%")[0].split()[-1]) for line in table.splitlines()[1:])


def test_a_run_that_ends_inside_the_profiled_steps(raw, tmp_path):
    on_ranks(1, merged(raw, {"run": {"dir": str(tmp_path / "run")}, "profile": {"first_step": 6, "num_steps": 5}}))
    assert (tmp_path / "run/profile/rank_00000.txt").read_text().startswith("rank 0, steps 6 to 6: ")


def test_impossible_wishes_are_refused(raw):
    with pytest.raises(ConfigError, match="profile.ranks names rank 4, but the 2 ranks of this run are numbered from 0 to 1"):
        validate(merged(raw, {"profile": {"first_step": 2, "ranks": [0, 4]}}), 2)
    run = validate(merged(raw, {"profile": {"first_step": 2, "kind": "nsys"}}), 1)
    with pytest.raises(ConfigError, match="profile.kind=nsys marks the work of a GPU, but this run is on cpu"):
        profiling.opened(run, SimpleNamespace(device="cpu", rank=0), 0, None)


def test_a_first_step_after_the_last_one_is_refused(raw):
    def profiled(first: int, **keys):
        return validate(merged(raw, {"profile": {"first_step": first}, **keys}))

    last = raw["train"]["steps"]
    told = r"profile.first_step\({}\) is after the last step of this run\({}; .*; set it to {} or less, or to 0"
    with pytest.raises(ConfigError, match=told.format(last + 1, last, last)):
        profiled(last + 1)
    profiled(last), profiled(30, train={"steps": 30}), profiled(30, train={"steps": 0})
    tokens = raw["train"]["seq_len"] * raw["train"]["global_batch"]      # of one step
    with pytest.raises(ConfigError, match=told.format(3, 2, 2)):
        profiled(3, train={"max_tokens": 2 * tokens})


def test_a_ladder_is_profiled_in_the_rungs_that_are_long_enough(raw):
    ladder = [{"seq_len": 64, "tokens": 64 * 8 * 2, "global_batch": 8}, {"seq_len": 128, "tokens": 128 * 8 * 5, "global_batch": 8}]
    keys = {"stage": "long_context", "checkpoint": {"load": "x"}, "schedule": {"kind": "constant", "warmup_steps": 0},
            "long_context": {"ladder": ladder}}
    run = validate(merged(raw, {**keys, "profile": {"first_step": 4}}))
    short, long = rungs(run)
    assert (short.train.steps, long.train.steps) == (2, 5) and (short.profile.first_step, long.profile.first_step) == (0, 4)
    with pytest.raises(ConfigError, match=r"^  - profile.first_step\(6\) is after the last step of this run\(5;[^\n]*$"):
        validate(merged(raw, {**keys, "profile": {"first_step": 6}}))


def test_a_resume_past_the_profiled_steps_says_so(raw):
    said, run = [], validate(merged(raw, {"profile": {"first_step": 3}}), 1)
    for done in (0, 2, 3, 6):      # the last: a run that is over
        profiling.opened(run, SimpleNamespace(device="cpu", rank=0), done, said.append)
    assert said == ["profile.first_step=3 is among the 3 steps before this start, so nothing is profiled; set it to 4 or more"]


def test_time_that_overlaps_counts_once():
    assert profiling.union([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


@pytest.mark.parametrize("name, kind", [
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"), ("gloo:all_reduce", "communication"), ("aten::addmm", "matrix products"),
    ("nvjet_hsh_128x256_64x4_1x2_h_bz_TNT", "matrix products"), ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_f16", "attention"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"), ("aten::_fused_adamw_", "optimizer"), ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("aten::mul", "other operations"),
])
def test_kinds_of_work(name, kind):
    assert profiling.kind_of(name) == kind


def test_a_gpu_that_waits_is_idle():
    """As torch tells it: the operation carries its kernels' time, and the kernels are told once more."""
    def event(key, device, **more):
        return SimpleNamespace(**{**dict(key=key, device_type=device, is_user_annotation=False, count=4, self_device_time_total=6e5, self_cpu_time_total=9e5,
                                         self_device_memory_usage=0, self_cpu_memory_usage=0), **more})

    events = [event("nvjet_gemm", DeviceType.CUDA), event("aten::mm", DeviceType.CPU, self_device_memory_usage=2**21)]
    text = profiling.summary(events, 0.6, {"optimizer": 0.1}, 1.0, 2, "cuda", "rank 0, steps 3 to 4")
    rows = [line.split() for line in text.splitlines()]
    assert text.splitlines()[0] == "rank 0, steps 3 to 4: 500.0 ms per step"
    assert ["idle", "200.00", "40.0%"] in rows and ["matrix", "products", "300.00", "60.0%"] in rows
    assert ["nvjet_gemm", "300.00", "60.0%", "2"] in rows and ["aten::mm", "1.0"] in rows
