"""Slurm without a Slurm: job scripts, node lists, which rank a task is, the check of the nodes, and the decision to start again.

tests/slurm/ runs the same against a real one (make slurm-test).
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from omegaconf import OmegaConf
from training import merged, small_run

from engine.config import ConfigError, validate
from engine.slurm import attempts, nodes, script, tasks
from engine.slurm.attempts import Limits, Outcome, decide, restarts_without_progress

ROOT = Path(__file__).parents[1]
CPU = {"slurm": {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 2}}


# --- names and numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "names"), [
    ("login", ["login"]),
    ("n[1-3]", ["n1", "n2", "n3"]),
    ("gpu[001-003,010]", ["gpu001", "gpu002", "gpu003", "gpu010"]),
    ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
    ("a[1-2],b7,c[5,9]", ["a1", "a2", "b7", "c5", "c9"]),
    ("r[1-2]n[01-02]-ib", ["r1n01-ib", "r1n02-ib", "r2n01-ib", "r2n02-ib"]),
])
def test_lists_of_nodes_are_expanded(text, names):
    assert tasks.expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n[3-1]", "n[a-b]", "n[]"])
def test_a_list_that_cannot_be_read_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        tasks.expand(text)


def test_tasks_per_node_are_expanded():
    assert tasks.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="cannot be read at 'x'"):
        tasks.tasks_per_node("2,x")


# What Slurm 22.05 sets in each place (seen there, and shortened).
BATCH = {"SLURM_JOB_ID": "70001", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "localhost,n[1-2]"}
TASK = {**BATCH, "SLURM_STEP_ID": "1", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_NODELIST": "localhost,n2", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
SALLOC = {key: value for key, value in BATCH.items() if not key.endswith("ID")} | {"SLURM_JOB_ID": "70001"}
INTERACTIVE = {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}


def adopted(environ: dict) -> dict:
    """What adopt() adds."""
    environ = dict(environ)
    before = dict(environ)
    tasks.adopt(environ)
    return {key: value for key, value in environ.items() if key not in before}


def test_a_task_of_srun_is_a_rank():
    assert adopted(TASK) == {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1", "OMP_NUM_THREADS": "1",
                             "MASTER_ADDR": "localhost", "MASTER_PORT": str(20_000 + (8 * 70001 + 1) % 12_000)}
    assert tasks.nodes_of_ranks(TASK) == ["localhost", "localhost", "n2"]


@pytest.mark.parametrize("environ", [{}, BATCH, SALLOC, INTERACTIVE, {**TASK, "SLURM_STEP_ID": "4294967291"}, {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
                                     {**TASK, "RANK": "0"}],
                         ids=["no Slurm", "batch script", "salloc", "salloc's own step", "a batch script's step", "one task", "below torchrun"])
def test_nothing_else_is(environ):
    assert adopted(environ) == {}


def test_what_is_set_already_stays():
    found = adopted({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "OMP_NUM_THREADS": "4"})
    assert not found.keys() & {"MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"} and found["RANK"] == "2"


def test_ports_differ_between_steps_and_stay_below_the_ephemeral_ones():
    ports = [tasks.port(job, step) for job in (1, 2, 10**6) for step in range(8)]
    assert len(set(ports)) == len(ports) and all(20_000 <= port < 32_768 for port in ports)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """scontrol(answers) puts a program of that name first on PATH; it prints answers[first argument], notes its arguments, and fails for the rest."""
    folder = tmp_path / "bin"

    def scontrol(answers: dict[str, str]) -> Path:
        folder.mkdir(exist_ok=True)
        cases = "".join(f"  {word}) cat <<'END'\n{answer}\nEND\n  ;;\n" for word, answer in answers.items())
        (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\ncase "$1" in\n{cases}  *) echo "Access denied" >&2; exit 1 ;;\nesac\n')
        (folder / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return folder / "calls"

    return scontrol


def test_a_node_that_is_no_host_name_has_slurms_address(scontrol):
    scontrol({"show": "NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.9 NodeHostName=vm"})
    assert tasks.address("no-such-host.invalid") == "127.0.0.9"
    scontrol({})
    with pytest.raises(ValueError, match="slurm.env.MASTER_ADDR"):
        tasks.address("no-such-host.invalid")


# --- the job script ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rendered(corpus, tmp_path):
    """rendered(changes, **series) -> the text for two nodes of two CPU ranks, with changes laid over; bash accepts it."""

    def rendered(changes=None, **series):
        raw = merged(small_run(corpus, tmp_path), CPU, changes or {})
        path = tmp_path / "run.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(raw)))
        text = script.render(script.request(str(path), ["train.steps=7", "run.seed=2"], **series))
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        return text

    return rendered


def options(text: str) -> dict[str, str]:
    """The #SBATCH lines; those behind the first command would not count."""
    head = text.split("\nset -u\n")[0]
    assert "#SBATCH" not in text[len(head):]
    return dict(re.match(r"--([\w-]+)=?(.*)", line).groups() for line in re.findall(r"^#SBATCH (.*)$", head, re.M))


def test_a_script_has_what_the_section_says(rendered, tmp_path):
    text = rendered({"slurm": {"time_limit_hours": 25.5, "save_seconds": 120, "account": "me", "partition": "a,b", "qos": "high", "cpus_per_rank": 3,
                               "sbatch": ["--exclusive", "--constraint=h100"], "setup": ["module load cuda"], "network_interface": "ib0",
                               "env": {"NCCL_IB_HCA": "mlx5 $x"}, "max_restarts": 5}})
    assert options(text) == {
        "job-name": "run", "nodes": "2", "ntasks-per-node": "2", "cpus-per-task": "3", "time": "1-01:30:00", "signal": "USR1@120", "account": "me",
        "partition": "a,b", "qos": "high", "requeue": "", "open-mode": "append", "chdir": os.getcwd(), "output": f"{tmp_path}/run/slurm/%j.out",
        "exclusive": "", "constraint": "h100"}
    assert "\nmodule load cuda\n" in text and "\nexport NCCL_IB_HCA='mlx5 $x'\n" in text
    assert "export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0" in text
    assert "srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=2 --cpus-per-task=3 --cpu-bind=cores" in text
    assert f"arguments=({tmp_path}/run.yaml train.steps=7 run.seed=2)" in text and f"{ROOT}/launch/pretrain.py" in text
    assert "--max-restarts 5" in text and "--then requeue" in text and f"python=({ROOT}/.venv/bin/python)" in text


def test_gpus_are_asked_for_one_way_or_the_other(rendered):
    gpus = {"run": {"device": "auto"}, "slurm": {"gpus_per_node": 2, "ranks_per_node": 0}}
    assert options(rendered(gpus))["gpus-per-node"] == "2"
    found = options(rendered(merged(gpus, {"slurm": {"gres": "gpu:h100:2"}})))
    assert found["gres"] == "gpu:h100:2" and "gpus-per-node" not in found


def test_containers(rendered, tmp_path):
    image = {"slurm": {"container": "/img/a b.sqsh", "mounts": ["/data:/data"]}}
    text = rendered(image)
    assert "--container-image='/img/a b.sqsh'" in text and "python=(python)" in text
    assert re.search(rf"--container-mounts={ROOT}:{ROOT},\S*{tmp_path}/run:{tmp_path}/run,/data:/data", text)
    text = rendered(merged(image, {"slurm": {"container_runtime": "apptainer"}}))
    assert "--container-image" not in text and re.search(rf"python=\(apptainer exec --bind \S+\s+--pwd {os.getcwd()} '/img/a b.sqsh' python\)", text)


def test_series_do_not_requeue(rendered):
    text = rendered(array=4)
    assert options(text)["array"] == "1-4%1" and "no-requeue" in options(text) and "--then next" in text
    text = rendered(chain=4)
    assert re.search(r"export TRIREME_SERIES=chain-\w+", text) and "no-requeue" in options(text) and "--then next" in text
    assert "--then nothing" in rendered({"slurm": {"requeue": False}})


def test_alignment_stages_have_their_own_command(raw_run, tmp_path):
    raw = merged(raw_run, CPU, {"stage": "sft", "train": {"eval_samples": 0}})
    raw["data"] = {"train": ["chats.jsonl"], "tokenizer": "bytes"}
    assert f"{ROOT}/launch/align.py" in script.render(script.Request(tmp_path / "x.yaml", (), validate(raw, 4)))


# One row per refusal: changes, and the sentence.
REFUSALS = [
    ({"slurm": {"gpus_per_node": 4}}, "slurm.ranks_per_node(2) is not slurm.gpus_per_node(4), but every GPU has one rank"),
    ({"slurm": {"ranks_per_node": 0}}, "slurm.gpus_per_node=0 asks for CPU ranks; set slurm.ranks_per_node"),
    ({"slurm": {"gpus_per_node": 2}}, "run.device=cpu, but slurm.gpus_per_node(2) asks for GPUs"),
    ({"run": {"device": "cuda"}}, "run.device=cuda, but slurm.gpus_per_node=0 asks for no GPU"),
    ({"slurm": {"gres": "gpu:2"}}, "slurm.gres=gpu:2 asks for GPUs, but slurm.gpus_per_node=0"),
    ({"slurm": {"nodes": 1, "ranks_per_node": 1}, "parallel": {"tp": 2}}, "tp(2) * pp(1) * cp(1) = 2 does not divide the world size 1"),
    ({"slurm": {"time_limit_hours": 0.05}}, "slurm.time_limit_hours(0.05) is 180 s, and slurm.save_seconds(300) asks the ranks to leave before"),
    ({"slurm": {"env": {"A-B": "1"}}}, "slurm.env has 'A-B', which is no name of an environment variable"),
    ({"slurm": {"sbatch": ["exclusive"]}}, "slurm.sbatch has 'exclusive', which is no option of sbatch"),
    ({"slurm": {"mounts": ["/data"]}}, "slurm.mounts has '/data'; write HOST:CONTAINER"),
    ({"slurm": {"account": 'me"\nrm -rf /'}}, "slurm.account='me\"\\nrm -rf /' cannot stand in an #SBATCH line"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS, ids=[sentence[:40] for _, sentence in REFUSALS])
def test_what_cannot_run_is_refused(rendered, changes, sentence):
    with pytest.raises(ConfigError) as refusal:
        rendered(changes)
    assert sentence in str(refusal.value)


def job_py(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "launch/slurm/job.py"), *args], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def test_a_chain_is_submitted_with_dependencies(corpus, tmp_path):
    """With a stand-in for sbatch, which counts jobs and notes how it was called."""
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexpr 100 + $(wc -l < {tmp_path}/calls)\n')
    (tmp_path / "sbatch").chmod(0o755)
    config = tmp_path / "run.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(merged(small_run(corpus, tmp_path), CPU))))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = job_py(str(config), "--submit", "--chain", "3", "train.steps=9", PATH=path)
    assert done.returncode == 0, done.stderr
    job_sh = tmp_path / "run" / "slurm" / "job.sh"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--parsable {job_sh}", f"--parsable --dependency=afterany:101 {job_sh}", f"--parsable --dependency=afterany:102 {job_sh}"]
    assert "train.steps=9" in job_sh.read_text()
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2; exit 1\n")
    done = job_py(str(config), "--submit", PATH=path)
    assert done.returncode == 1 and "invalid account" in done.stderr and "Traceback" not in done.stderr
    done = job_py(str(config), "slurm.nodes=1", "parallel.pp=2", "parallel.tp=2")
    assert done.returncode == 2 and "does not divide the world size 2" in done.stderr


# --- once more? --------------------------------------------------------------------------------------------------------

LIMITS = Limits(max_restarts=3, max_requeues=10)
SAVED = {"code": 143, "state": "requeue", "reason": "SIGUSR1 came"}


@pytest.mark.parametrize(("outcome", "verdict"), [
    ({}, "done"),
    ({"state": "done"}, "done"),
    ({"state": "stopped"}, "stopped"),
    ({"code": 75, "state": "requeue"}, "requeue"),
    (SAVED, "requeue"),                                                     # srun killed a rank on its way out
    ({"code": 137, "state": "running"}, "requeue"),                         # a rank was killed
    ({"code": 137}, "requeue"),                                             # before anything was written
    ({"code": 1, "state": "failed"}, "requeue"),
    ({"code": 143, "state": "done"}, "requeue"),                            # a rung of a ladder was done, and then something happened
    ({"checked": 1}, "requeue"),
    ({"code": 1, "state": "failed", "stop_file": True}, "stopped"),
    ({"code": 2}, "refused"),
    ({"code": 143, "refusal": "no such layout"}, "refused"),
    ({"checked": 2}, "refused"),
    ({**SAVED, "job_state": "COMPLETING"}, "cancelled"),                    # scancel
    ({**SAVED, "job_state": "COMPLETING NodeDown"}, "cancelled"),           # Slurm requeues it by itself
    ({**SAVED, "job_state": "COMPLETING TimeLimit"}, "requeue"),
    ({"code": 1, "without_progress": 3}, "requeue"),
    ({"code": 1, "without_progress": 4}, "gave up"),
    ({**SAVED, "without_progress": 4}, "gave up"),
    ({**SAVED, "restarts": 9}, "requeue"),
    ({**SAVED, "restarts": 10}, "gave up"),
])
def test_a_job_is_started_again_when_that_helps(outcome, verdict):
    assert decide(Outcome(**outcome), LIMITS)[0] == verdict


def test_a_series_goes_on_with_its_next_job():
    limits = Limits(3, 0, then="next")
    assert decide(Outcome(**SAVED), limits)[0] == decide(Outcome(code=137), limits)[0] == "next"
    assert decide(Outcome(code=137, without_progress=4), limits)[0] == "gave up"
    assert decide(Outcome(**SAVED), Limits(3, 3, then="nothing"))[0] == "next"
    assert decide(Outcome(code=137), Limits(3, 3, then="nothing"))[0] == "gave up"


@pytest.mark.parametrize(("starts", "now", "count"), [([], 0, 0), ([0], 0, 1), ([0, 0, 0], 0, 3), ([0], 5, 0), ([0, 5, 5], 5, 2), ([0, 5, 7], 5, 2)])
def test_restarts_are_counted_while_no_checkpoint_comes(starts, now, count):
    assert restarts_without_progress(starts, now) == count


class Job:
    """attempts.begin and end as a job script calls them, with a stand-in for scontrol."""

    def __init__(self, run_dir: Path, monkeypatch):
        self.run_dir, self.said, self.monkeypatch = run_dir, [], monkeypatch
        for name in ("TRIREME_SERIES", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(attempts.signal, "signal", lambda *args: None)      # of this very process
        self.be("7")

    def be(self, job: str, restart: int = 0, series: str = "") -> None:
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", str(restart)), ("TRIREME_SERIES", series)):
            self.monkeypatch.setenv(name, value)

    def begin(self, max_restarts=1) -> int:
        return attempts.begin(self.run_dir, max_restarts, self.said.append)

    def end(self, code=0, checked=0, then="requeue", max_restarts=1) -> int:
        return attempts.end(self.run_dir, checked, code, Limits(max_restarts, 10, then), self.said.append)

    def status(self, state: str, reason: str = "") -> None:
        (self.run_dir / "status.json").write_text(json.dumps({"state": state, "reason": reason, "written": time.time_ns()}))

    def checkpoint(self, step: int) -> None:
        folder = self.run_dir / "checkpoints" / f"iter_{step:07d}"
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text("{}")


@pytest.fixture
def job(tmp_path, monkeypatch, scontrol):
    calls = scontrol({"show": "JobId=7 JobState=RUNNING Reason=None ExcNodeList=n9", "requeue": "", "update": ""})
    job = Job(tmp_path / "run", monkeypatch)
    job.calls = lambda: [line for line in calls.read_text().splitlines() if not line.startswith("show")] if calls.exists() else []
    return job


def test_faults_are_restarted_until_they_bring_nothing_more(job):
    for restart in range(2):
        job.be("7", restart)
        assert job.begin() == attempts.START
        job.status("failed", "lost a peer")
        if restart == 0:
            assert job.end(code=137) == attempts.REQUEUE and job.calls() == ["requeue 7"]
    assert job.end(code=137) == 1 and len(job.calls()) == 1
    assert "gave up; the ranks ended with code 137 (lost a peer); no newer checkpoint after 1 restarts (slurm.max_restarts)" in job.said[-1]


def test_a_newer_checkpoint_earns_new_restarts(job):
    for restart in range(4):
        job.be("7", restart)
        assert job.begin() == attempts.START
        job.checkpoint(restart + 1)
        assert job.end(code=1) == attempts.REQUEUE


def test_a_status_from_before_does_not_count(job):
    job.run_dir.mkdir()
    job.status("stopped")
    assert job.begin() == attempts.START
    assert job.end(code=137) == attempts.REQUEUE


def test_bad_nodes_are_excluded_unless_they_are_most(job):
    job.begin()
    for bad, update in (({"n3": ["3 GPUs, not 4"]}, ["update JobId=7 ExcNodeList=n9,n3"]), ({"n3": ["x"], "n4": ["x"], "n5": ["x"]}, [])):
        (job.run_dir / "slurm" / "nodes.json").write_text(json.dumps({"num_nodes": 4, "bad": bad}))
        before = len(job.calls())
        assert job.end(checked=1) == attempts.REQUEUE
        assert job.calls()[before:] == ["requeue 7", *update]


def test_a_cluster_that_forbids_requeues_is_told(job, scontrol):
    scontrol({"show": "JobState=RUNNING"})
    job.begin()
    job.status("requeue")
    assert job.end(code=75) == 1
    assert "requeue 7: Access denied; this cluster may forbid it: submit with launch/slurm/job.py --chain N" in job.said[-1]


def test_a_cancelled_job_stays_cancelled(job, scontrol):
    scontrol({"show": "JobState=COMPLETING Reason=None", "requeue": ""})
    job.begin()
    job.status("requeue", "SIGTERM came")
    assert job.end(code=75) == 1 and job.calls() == []


def test_the_rest_of_a_chain_ends_when_there_is_nothing_to_do(job):
    job.be("7", series="c")
    assert job.begin() == attempts.START
    job.status("requeue")
    assert job.end(code=75, then="next") == attempts.REQUEUE and job.calls() == []
    job.be("8", series="c")
    assert job.begin() == attempts.START and "attempt 2" in job.said[-1]
    job.status("done")
    assert job.end(then="next") == 0
    job.be("9", series="c")
    assert job.begin() == attempts.NOTHING_LEFT and "nothing to do, since an earlier job of this series ended: done" in job.said[-1]
    job.be("10")
    assert job.begin() == attempts.START      # a job of its own


def test_a_stop_file_ends_a_series(job):
    assert job.begin() == attempts.START
    (job.run_dir / "STOP").touch()
    assert job.end(code=137) == 0 and job.calls() == []
    job.be("8", series="c")
    assert job.begin() == attempts.START      # the ranks of a first start remove the file
    job.be("9", series="c")
    assert job.begin() == attempts.NOTHING_LEFT


def test_who_requeues_a_job_by_hand_gets_fresh_restarts(job):
    for restart in range(2):
        job.be("7", restart)
        assert job.begin() == attempts.START
        code = job.end(code=1)
    assert code == 1
    job.be("7", 2)
    assert job.begin() == attempts.START and "attempt 1" in job.said[-1]


def test_a_job_whose_node_died_again_and_again_is_given_up(job):
    """Slurm requeues it without asking, and the script is not there to be asked."""
    for restart, code in enumerate((attempts.START, attempts.START, attempts.GIVE_UP)):
        job.be("7", restart)
        assert job.begin() == code


def test_progress_is_summed_over_the_rungs_of_a_ladder(tmp_path):
    for folder, step in ((tmp_path / "rung_1_64", 20), (tmp_path / "rung_2_128", 5)):
        (folder / "checkpoints" / f"iter_{step:07d}").mkdir(parents=True)
        (folder / "checkpoints" / f"iter_{step:07d}" / "metadata.json").write_text("{}")
    assert attempts.progress(tmp_path) == 25


def test_the_hosts_python_needs_no_packages(tmp_path):
    command = [sys.executable, "-S", "-I", str(ROOT / "launch/slurm/attempt.py"), "begin", str(tmp_path), "--max-restarts", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "attempt 1" in done.stdout, done.stderr


# --- the check of the nodes --------------------------------------------------------------------------------------------


def test_a_node_is_looked_at(raw_run, tmp_path):
    slurm = {"gpus_per_node": 0, "ranks_per_node": 2, "check": {"min_shm_gb": 0, "min_disk_gb": 0}}
    assert nodes.problems(validate(merged(raw_run, {"slurm": slurm}))) == []
    greedy = validate(merged(raw_run, {"slurm": slurm}, {"slurm": {"check": {"min_memory_gb": 1e6, "min_shm_gb": 1e6, "min_disk_gb": 1e6}}}))
    assert [re.sub(r"[\d.]+ GB", "N GB", problem) for problem in nodes.problems(greedy)] == [
        "memory has N GB free, less than 1e+06 (slurm.check.min_memory_gb)", "/dev/shm has N GB free, less than 1e+06 (slurm.check.min_shm_gb)",
        f"{raw_run['run']['dir']} has N GB free, less than 1e+06 (slurm.check.min_disk_gb)"]
    (tmp_path / "file").touch()
    assert "cannot be written" in nodes.disk_problems(tmp_path / "file" / "run", 0)[0]


def test_gpus_are_counted(tmp_path):
    smi = tmp_path / "smi"
    smi.write_text("#!/bin/sh\necho '0, 81559, 81070'\necho '1, 81559, 500'\n")
    smi.chmod(0o755)
    assert nodes.gpu_problems(2, 0.95, str(smi)) == ["GPU 1 has 500 of 81559 MiB free, less than 95% (slurm.check.min_gpu_free); another process holds it"]
    assert nodes.gpu_problems(4, 0, str(smi)) == ["2 GPUs, not 4"]
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert nodes.gpu_problems(4, 0, str(smi)) == [f"{smi} ended with code 9: NVIDIA-SMI has failed"]
    assert "is not installed" in nodes.gpu_problems(4, 0, str(tmp_path / "none"))[0]


def compared(raw: dict, port: int, found: dict[int, list[str]], clocks_ahead: dict[int, float], absent: tuple[int, ...], wrong: tuple[int, ...]):
    """On a rank: the verdict of the check; absent: ranks that never answer; wrong: ranks whose sums come out wrong."""
    import torch.distributed as dist

    from engine.mcore import topology
    from engine.slurm.collective import compare

    topology.stop()      # the ranks of these tests are in a group already
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank in absent:
        return None
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    honest = dist.all_reduce
    if rank in wrong:
        dist.all_reduce = lambda numbers: honest(numbers) or numbers[3:5].zero_()
    try:
        return compare(found.get(rank, []), validate(raw), f"n{rank}", [f"n{i}" for i in range(world)], lambda: time.time() + clocks_ahead.get(rank, 0))
    finally:
        dist.all_reduce = honest
        del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


@pytest.mark.parametrize(("found", "ahead", "absent", "wrong", "verdict"), [
    ({}, {}, (), (), {}),
    ({1: ["3 GPUs, not 4"]}, {}, (), (), {"n1": ["3 GPUs, not 4"]}),
    ({}, {1: -60.0}, (), (), {"n1": [r"its clock is (59|60)\.\d s behind that of n0 \(slurm.check.max_clock_seconds\)"]}),
    ({}, {}, (1,), (), {"n1": [r"rank 1 has not answered in 2 s \(node; slurm.check.timeout_seconds\)"]}),
    ({}, {}, (), (1,), {"n1": ["2 of 1048576 sums of the gloo collective are wrong"]}),
], ids=["sound", "reported", "clock", "absent", "sum"])
def test_nodes_are_compared(raw_run, found, ahead, absent, wrong, verdict):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    raw = merged(raw_run, {"slurm": {"gpus_per_node": 0, "ranks_per_node": 1, "check": {"timeout_seconds": 2 if absent else 60}}})
    for rank, bad in enumerate(ranks.run(2, compared, raw, port, found, ahead, absent, wrong)):
        if rank in absent:
            continue
        assert bad.keys() == verdict.keys()
        assert all(re.fullmatch(pattern, problem) for node in bad for pattern, problem in zip(verdict[node], bad[node], strict=True)), bad


def test_this_machine_alone_is_checked_by_the_command(raw_run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(merged(raw_run, {"slurm": {"gpus_per_node": 0, "ranks_per_node": 1, "check": {"min_shm_gb": 0}}}))))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM") and key != "RANK"}

    def check(*overrides):
        return subprocess.run([sys.executable, str(ROOT / "launch/slurm/check_node.py"), str(config), *overrides], capture_output=True, text=True,
                              env={**environment, "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "n1", "TRIREME_REFUSAL": str(tmp_path / "refusal")})

    done = check()
    assert done.returncode == 0 and done.stdout == "check of the nodes: 1 node sound\n", done.stderr
    done = check("slurm.check.min_disk_gb=1e6")
    assert done.returncode == 1 and re.search(r"n1: .*/run has .* GB free", done.stdout)
    assert list(json.loads(Path(raw_run["run"]["dir"], "slurm", "nodes.json").read_text())["bad"]) == ["n1"]
    done = check("parallel.tp=3")
    assert done.returncode == 2 and "parallel.tp(3)" in (tmp_path / "refusal").read_text()


