"""What a person did wrong ends in one message with the value, the limit and the cure, a documented exit code, and no traceback.

Most cases call engine.cli on a rank that is up already; a few start launch/pretrain.py, alone and under torchrun.
Left out: each single rule of the configuration (test_config.py) and of corpora (tests/data).
"""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
from omegaconf import OmegaConf
from training import EOD, VOCAB, merged, on_ranks, write_corpus

ROOT = Path(__file__).parents[1]
ERROR, USAGE = 1, 2


def command_line(argv):
    """On a rank: launch/pretrain.py without its start-up; (exit code, stderr)."""
    from engine.cli import main
    from engine.stages import TEXT

    sys.argv, stderr = ["pretrain.py", *argv], io.StringIO()
    os.environ.pop("RANK")      # as without torchrun, where a message is not told once per machine
    with contextlib.redirect_stderr(stderr):
        try:
            code = main("", TEXT)
        except SystemExit as stop:
            code = stop.code
    return code, stderr.getvalue()


@pytest.fixture
def pretrain(raw_run, tmp_path):
    """pretrain(changes, overrides) -> (exit code, stderr) of a run of raw_run with nested changes laid over it."""

    def pretrain(changes=None, *overrides):
        path = tmp_path / "run.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(merged(raw_run, changes or {}))))
        code, stderr = ranks.run(1, command_line, [str(path), *overrides])[0]
        assert "Traceback" not in stderr
        return code, stderr

    return pretrain


def test_a_sound_run_is_not_refused(pretrain, raw_run):
    assert pretrain({"train": {"steps": 2}, "schedule": {"kind": "constant"}})[0] == 0
    assert Path(raw_run["run"]["dir"], "checkpoints", "iter_0000002").is_dir()


# --- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("override,message", [
    ("stage=pretran", "stage=pretran is unknown; did you mean pretrain?"),
    ("model.family=lama", "model.family=lama is unknown; did you mean llama?"),
    ("schedule.kind=cosin", "schedule.kind='cosin': input should be 'constant', 'cosine'"),
    ("parallel.tp=3", "model.num_attention_heads(4) is not divisible by parallel.tp(3); legal tp: 1, 2, 4"),
    ("parallel.tp=2", "tp(2) * pp(1) * cp(1) = 2 does not divide the world size 1; start 2 ranks or a multiple (torchrun --nproc-per-node)"),
    ("train.steps", "override 'train.steps' is not of the form key=value, such as train.steps=100"),
    ("data.train.0=elsewhere", "data.train.0=elsewhere: an override replaces a list as a whole, such as data.train=[a,b]; it cannot reach into one"),
    ("train.global_batch=0", "train.global_batch=0: input should be greater than or equal to 1"),
])
def test_configuration(pretrain, raw_run, override, message):
    code, stderr = pretrain(None, override)
    assert code == USAGE and message in stderr
    assert not Path(raw_run["run"]["dir"]).exists()      # refused before anything is made


def test_no_such_file(pretrain, tmp_path):
    code, stderr = ranks.run(1, command_line, [str(tmp_path / "nothing.yaml")])[0]
    assert code == USAGE and f"no configuration file at {tmp_path / 'nothing.yaml'}" in stderr


# --- corpora -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_file_of_a_corpus(pretrain, corpus, tmp_path, suffix):
    prefix = str(tmp_path / "half")
    for kind in {"bin", "idx"} - {suffix}:
        shutil.copyfile(f"{corpus['train']}.{kind}", f"{prefix}.{kind}")
    code, stderr = pretrain({"data": {"train": [prefix]}})
    assert code == ERROR and f"{prefix}.{suffix}" in stderr


def test_a_truncated_corpus(pretrain, tmp_path):
    prefix = Path(write_corpus(tmp_path / "short"))
    whole = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(whole[:-10])
    code, stderr = pretrain({"data": {"train": [str(prefix)]}})
    assert code == ERROR and f"{prefix}.bin" in stderr and str(len(whole) - 10) in stderr and str(len(whole)) in stderr


def test_a_token_beyond_the_vocabulary(pretrain, tmp_path):
    prefix = write_corpus(tmp_path / "large", vocab=200)
    code, stderr = pretrain({"data": {"train": [prefix]}})
    assert code == ERROR and f"is outside the vocabulary of {VOCAB} (0 to {VOCAB - 1})" in stderr and "another tokenizer" in stderr


def test_a_corpus_without_tokens(pretrain, tmp_path):
    from engine.data.indexed import IndexedWriter

    with IndexedWriter(str(tmp_path / "empty"), np.uint16) as writer:
        writer.add_document([])
    code, stderr = pretrain({"data": {"train": [str(tmp_path / "empty")]}})
    assert code == ERROR and "0 tokens in 1 documents; add documents that are not empty" in stderr


def test_more_samples_than_one_epoch(pretrain, corpus):
    code, stderr = pretrain({"data": {"train": [1, corpus["train"]], "one_epoch": True}, "train": {"steps": 500}})
    assert code == ERROR and "in one epoch, but 2000 are asked for; lower the number of steps" in stderr


def test_a_split_that_leaves_nothing_to_validate_on(pretrain, raw_run):
    raw_run["data"] |= {"split": "100,0,0", "valid": {}}
    code, stderr = pretrain()
    assert code == ERROR and "leaves 0 of 60 documents for valid, expected at least 1; give valid a larger share" in stderr


@pytest.mark.parametrize("spec,message", [("hf:/nowhere", "/nowhere"), ("sentencepeace:x", "sentencepeace"), ("bytes", "model.vocab_size")])
def test_a_tokenizer_that_does_not_fit(pretrain, spec, message):
    code, stderr = pretrain({"data": {"tokenizer": spec, "eod_id": EOD}})
    assert code == ERROR and message in stderr


# --- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Folder of a finished run of raw_run's model, with checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    raw = {"run": {"dir": str(folder), "device": "cpu"},
           "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4,
                     "num_query_groups": 2, "vocab_size": VOCAB},
           "data": {"train": [corpus["train"]]}, "train": {"seq_len": 32, "global_batch": 4, "steps": 4, "precision": "fp32"},
           "checkpoint": {"save_every": 2}, "log": {"tensorboard": False}}
    on_ranks(1, raw)
    return folder


def test_no_checkpoint_there(pretrain, tmp_path):
    code, stderr = pretrain(None, f"checkpoint.load={tmp_path / 'none'}")
    assert code == ERROR and f"checkpoint.load={tmp_path / 'none'} holds no complete checkpoint (iter_*/metadata.json)" in stderr


def test_a_checkpoint_of_another_model(pretrain, trained):
    code, stderr = pretrain({"model": {"num_layers": 4, "tie_embeddings": True}}, f"checkpoint.load={trained}")
    assert code == ERROR and "holds another model" in stderr
    assert "model.num_layers is 4, the checkpoint has 2" in stderr and "model.tie_embeddings is True, the checkpoint has False" in stderr



def damage_metadata(folder):
    (folder / ".metadata").write_bytes(b"not a pickle")


def remove_metadata(folder):
    (folder / ".metadata").unlink()


def damage_format(folder):
    (folder / "metadata.json").write_text("{")


def truncate_tensors(folder):
    for path in folder.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:1000])


def remove_tensors(folder):
    for path in folder.glob("*.distcp"):
        path.unlink()


def truncate_common(folder):
    (folder / "common.pt").write_bytes(b"")


def damage_config(folder):
    (folder / "config.yaml").write_text("model: [")


def remove_config(folder):
    (folder / "config.yaml").unlink()


def damage_position(folder):
    (folder / "position.json").write_text('{"step": 4')


def remove_position(folder):
    (folder / "position.json").unlink()


@pytest.mark.parametrize("damage", [damage_metadata, remove_metadata, damage_format, truncate_tensors, remove_tensors, truncate_common,
                                    damage_config, remove_config, damage_position, remove_position], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint(pretrain, raw_run, trained, damage):
    """The run goes on from its own checkpoint before, with a word that names the file; what is left of the damaged one is set aside."""
    shutil.copytree(trained, raw_run["run"]["dir"])
    newest = Path(raw_run["run"]["dir"], "checkpoints", "iter_0000004")
    whole = {path.name: path.read_bytes() for path in newest.iterdir() if path.is_file()}
    damage(newest)
    differing = [name for name, data in whole.items() if not (newest / name).is_file() or (newest / name).read_bytes() != data]
    code, stderr = pretrain()
    assert code == 0 and any(f"{newest} is damaged and passed over: {name} " in stderr for name in differing)
    assert f"resumed {newest.parent / 'iter_0000002'} at step 2" in stderr
    assert newest.with_name("iter_0000004.aside").is_dir() and not newest.exists()


def test_when_no_checkpoint_is_good(pretrain, raw_run, trained):
    shutil.copytree(trained, raw_run["run"]["dir"])
    root = Path(raw_run["run"]["dir"], "checkpoints")
    for folder in root.glob("iter_*"):
        damage_position(folder)
    code, stderr = pretrain()
    assert code == ERROR and f"error: {root} holds no checkpoint that is as it was written: {root / 'iter_0000004'} is damaged" in stderr
    assert len(list(root.glob("*.aside"))) == 0
    code, stderr = pretrain(None, "checkpoint.verify=false")
    assert code == ERROR and "iter_0000004 is damaged (" in stderr and "name another one in checkpoint.load" in stderr


# --- the real command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(raw_run, tmp_path):
    """config(**changes) -> path of a YAML file."""

    def config(**changes) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(OmegaConf.to_yaml(OmegaConf.create(merged(raw_run, changes))))
        return str(path)

    return config


def start(*command, **environment) -> subprocess.CompletedProcess:
    """Run a command in a world of its own: the variables of ranks.py are not handed on."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**inherited, "OMP_NUM_THREADS": "1", **environment})
    try:
        stdout, stderr = process.communicate(timeout=120)
    except BaseException:
        process.terminate()      # not kill: torchrun then ends its ranks
        process.wait()
        raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_one_process(config, tmp_path):
    done = start("launch/pretrain.py", config(data={"train": [str(tmp_path / "nowhere")]}))
    assert done.returncode == ERROR and f"{tmp_path / 'nowhere'}" in done.stderr and "Traceback" not in done.stderr


def torchrun(tmp_path, *arguments) -> tuple[int, str]:
    """Two ranks; (torchrun's exit code, what the ranks wrote to stderr). torchrun's own report is left out."""
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--log-dir", str(tmp_path / "ranks"),
                 "--redirects", "3", "launch/pretrain.py", *arguments)
    return done.returncode, "".join(path.read_text() for path in sorted((tmp_path / "ranks").rglob("stderr.log")))


def test_torchrun_with_a_layout_that_does_not_fit(config, tmp_path):
    code, stderr = torchrun(tmp_path, config(), "parallel.pp=2", "parallel.tp=2", "train.stepz=1")
    assert code != 0 and "Traceback" not in stderr
    assert stderr.count("tp(2) * pp(2) * cp(1) = 4 does not divide the world size 2; start 4 ranks or a multiple") == 1
    assert "train.stepz is no key" in stderr


def test_torchrun_with_a_mistake_that_one_rank_meets(config, tmp_path):
    """Only the second dp rank reads the id that is no token; the first learns of it by losing its peer."""
    from engine.data.indexed import IndexedWriter

    prefix = str(tmp_path / "one_bad")
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.append(np.full(500, 5), VOCAB))
        writer.add_document(np.full(2000, 5))
    code, stderr = torchrun(tmp_path, config(data={"train": [prefix]}, train={"steps": 100, "eval_samples": 0}))
    assert code != 0 and "is outside the vocabulary of 61" in stderr
    assert "Traceback" not in stderr


def test_a_port_that_is_in_use(config):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = start("launch/pretrain.py", config(run={"timeout_minutes": 0.1}), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                     WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert done.returncode == ERROR and "Traceback" not in done.stderr
    assert f"rank 0 of 2 could not join the process group at 127.0.0.1:{port}" in done.stderr
    assert "Is the port in use by another job (choose another with torchrun --master-port), or a rank missing?" in done.stderr


def test_a_rank_that_never_comes(config):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = start("launch/pretrain.py", config(run={"timeout_minutes": 0.03}), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                 WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert done.returncode == ERROR and "Traceback" not in done.stderr
    assert f"rank 0 of 2 could not join the process group at 127.0.0.1:{port}" in done.stderr and "a rank missing?" in done.stderr


@pytest.mark.parametrize("command", ["pretrain", "align", "generate"])
def test_what_may_be_left_out_is_not_asked_for(command):
    done = subprocess.run([sys.executable, f"launch/{command}.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "arguments are required: " in done.stderr and "key=value" not in done.stderr.splitlines()[-1]
