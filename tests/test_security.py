"""What comes from elsewhere runs no code, reads nothing of this machine, and is refused in words: checkpoints, and what lies beside them.

Left out, because other files have them: chat templates (tests/data/test_conversations.py), pickled Hugging Face weights and code in such folders
(tests/hf/test_convert.py), shard names in index files (tests/hf/test_load.py), hashes.json (tests/test_hashes.py), a model's own programs
(tests/test_reward_programs.py).
"""

import builtins
import os
import pickle
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import ranks
from training import merged, on_ranks

ROOT = Path(__file__).parents[1]


class Code:
    """Pickled, it is a call; what it calls would make the file `mark`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(mark: str) -> dict[str, object]:
    """Objects whose unpickling would make the file `mark`, by name."""
    return {
        "os.system": Code(os.system, f"touch {mark}"),
        "eval": Code(builtins.eval, f"open({mark!r}, 'w')"),
        "Path.touch": Code(Path.touch, Path(mark)),
        "getattr": Code(builtins.getattr, Code(builtins.__import__, "os"), "system"),
        "nested": {"a": [{"b": ({"c": Code(os.system, f"touch {mark}")},)}]},
    }


def pickled(mark: str):
    """(name, bytes) of every payload, in each protocol and as torch writes it, with and without an archive."""
    import io

    import torch

    for name, payload in payloads(mark).items():
        for protocol in (0, 2, 4):
            yield f"{name}, protocol {protocol}", pickle.dumps(payload, protocol)
        for is_archive in (True, False):
            file = io.BytesIO()
            torch.save({"x": torch.zeros(2), "y": payload}, file, _use_new_zipfile_serialization=is_archive)
            yield f"{name}, torch.save, archive {is_archive}", file.getvalue()


# --- a checkpoint of ours, attacked ----------------------------------------------------------------------------------------


def in_metadata(folder: Path, payload, where: str) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if where == "planner_data":
        metadata.planner_data = {"x": payload}
    else:
        getattr(metadata, where)[next(iter(getattr(metadata, where)))] = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_shard(folder: Path, content: bytes, begins: str) -> None:
    """The first stored object or tensor whose key begins so lies in a file of its own, which holds this."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn.startswith(begins))
    metadata.storage_data[index] = type(metadata.storage_data[index])("__9_9.distcp", 0, len(content))
    (folder / "__9_9.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def moved_file(folder: Path, relative_path: str) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, place = next(iter(metadata.storage_data.items()))
    metadata.storage_data[index] = type(place)(relative_path, place.offset, place.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def linked_out(folder: Path, name: str) -> None:
    """The same bytes behind a link to another folder."""
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (folder / name).rename(elsewhere / name)
    (folder / name).symlink_to(elsewhere / name)


def attacks(folder: Path, mark: str):
    """(name, function that changes a copy of `folder`)."""
    shard = min(path.name for path in folder.glob("*.distcp"))
    for name, content in pickled(mark):
        yield f".metadata: {name}", lambda f, content=content: (f / ".metadata").write_bytes(content)
        yield f"common.pt: {name}", lambda f, content=content: (f / "common.pt").write_bytes(content)
        yield f"random state: {name}", lambda f, content=content: in_shard(f, content, "random")
        yield f"moments: {name}", lambda f, content=content: in_shard(f, content, "optimizer.state.exp_avg.")
        yield f"weights: {name}", lambda f, content=content: in_shard(f, content, "embedding.")
    for where in ("planner_data", "storage_data", "state_dict_metadata"):
        yield f".metadata: within {where}", lambda f, where=where: in_metadata(f, payloads(mark)["os.system"], where)
    yield ".metadata: another object", lambda f: (f / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    for path in ("../elsewhere/x.distcp", "/etc/passwd", "..", "", "a/b.distcp"):
        yield f"a shard at {path!r}", lambda f, path=path: moved_file(f, path)
    for name in (".metadata", "common.pt", "config.yaml", "position.json", shard):
        yield f"{name} is a link", lambda f, name=name: linked_out(f, name)
    yield "config.yaml: a call", lambda f: (f / "config.yaml").write_text(f'!!python/object/apply:os.system ["touch {mark}"]')
    yield "config.yaml: a call in a field", lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text().replace("family: llama", f'family: !!python/object/apply:os.system ["touch {mark}"]'))
    yield "config.yaml: the environment", lambda f: (f / "config.yaml").write_text(
        (f / "config.yaml").read_text().replace("family: llama", "family: ${oc.env:TRIREME_SECRET}"))
    for text in ("[]", '{"step": "../../x", "consumed_samples": 0, "tokens": 0}', '{"step": -1, "consumed_samples": 0, "tokens": 0}'):
        yield f"position.json: {text}", lambda f, text=text: (f / "position.json").write_text(text)


def attacked(raw: dict, folder: str, mark: str) -> dict[str, str]:
    """On a rank: what each attack on a copy of the folder leads to: "loaded", or the error's kind and text."""
    from engine.config import validate
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel
    from engine.stages.pretrain import Pretrain

    os.environ["TRIREME_SECRET"] = "told"
    run, found, work = validate(raw, 1), {}, Path(folder).parent / "attacked"
    model = ParallelModel(run, topology.start(run), Pretrain(), "policy")
    for name, change in attacks(Path(folder), mark):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        (work / "hashes.json").unlink(missing_ok=True)  # who changes a folder can change its hashes
        change(work)
        try:
            checkpoint.load(model, work)
            tensors = checkpoint.Tensors(work)
            found[name] = f"loaded {sum(tensors[key].numel() for key in tensors)}"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
    """(the configuration, the checkpoint folder) of a small run."""
    from training import small_run

    raw = merged(small_run(corpus, tmp_path_factory.mktemp("saved")), {"train": {"steps": 1, "eval_samples": 0}, "schedule": {"kind": "constant"}})
    on_ranks(1, raw)
    return raw, next(Path(raw["run"]["dir"], "checkpoints").glob("iter_*"))


def test_no_attack_on_a_checkpoint_runs_or_tells_anything(saved, tmp_path):
    raw, folder = saved
    mark = tmp_path / "executed"
    shutil.copytree(folder, tmp_path / folder.name)
    found, = ranks.run(1, attacked, raw, str(tmp_path / folder.name), str(mark))
    assert len(found) > 140 and not mark.exists()
    let_in = {name: what for name, what in found.items() if not what.startswith("CheckpointError: ")}
    assert not let_in, let_in
    for name, what in found.items():
        assert "told" not in what and "root:x" not in what and "weights_only" not in what and "add_safe_globals" not in what, (name, what)
        assert "damaged" in what and "attacked" in what, (name, what)


def test_the_payloads_would_run(tmp_path):
    """Read without care, each makes its mark: what the test above asserts is not for want of trying."""
    import io

    import torch

    for number, name in enumerate(payloads("")):
        mark = tmp_path / str(number)
        content = next(content for kind, content in pickled(str(mark)) if kind == f"{name}, protocol 2")
        pickle.loads(content)
        saved = next(content for kind, content in pickled(str(mark) + "t") if kind == f"{name}, torch.save, archive True")
        torch.load(io.BytesIO(saved), weights_only=False)
        assert name == "getattr" or mark.exists() and Path(f"{mark}t").exists(), name


def test_environment_variables_do_not_open_the_loader(saved, tmp_path):
    """torch obeys one that turns weights_only off wherever a caller has not said."""
    raw, folder = saved
    mark = tmp_path / "executed"
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "common.pt").write_bytes(next(content for _, content in pickled(str(mark))))
    what, = ranks.run(1, unsafe_environment, raw, str(tmp_path / "copy"))
    assert "CheckpointError" in what and not mark.exists()


def unsafe_environment(raw, folder):
    from engine.config import validate
    from engine.mcore import checkpoint, topology
    from engine.mcore.run import ParallelModel
    from engine.stages.pretrain import Pretrain

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        run = validate(raw, 1)
        checkpoint.load(ParallelModel(run, topology.start(run), Pretrain(), "policy"), folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]


# --- FP8 state -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(monkeypatch):
    """A stand-in for the module in which Transformer Engine keeps its recipes, with what that module imports."""
    import dataclasses
    import enum

    from engine.mcore import safe_load  # before it: megatron's import looks for the package

    module = types.ModuleType("transformer_engine.common.recipe")

    class Format(enum.Enum):
        HYBRID = (448, 57344)

    @dataclasses.dataclass
    class DelayedScaling:
        fp8_format: Format = Format.HYBRID
        margin: int = 0

    for kind in (Format, DelayedScaling):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    module.os, module.Path = os, Path
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(safe_load, "te_problem", "")
    return module


def as_bytes(value, protocol: int = 4):
    import torch

    return torch.frombuffer(bytearray(value if isinstance(value, bytes) else pickle.dumps(value, protocol)), dtype=torch.uint8)  # [bytes]


def test_fp8_state_keeps_its_scales(recipes):
    import torch

    from engine.mcore.safe_load import clean_fp8_state

    state = {"recipe": recipes.DelayedScaling(margin=3), "scale_fwd": torch.tensor([2.0, 4.0]), "amax_history_fwd": torch.ones(4, 2),
             "extra_fp8_variables": {"num_gemms": 1, "fp8_checkpoint": True, "names": ("a", ["b"])}}
    again = pickle.loads(clean_fp8_state(as_bytes(state)).numpy().tobytes())
    assert again["recipe"] == state["recipe"] and again["extra_fp8_variables"] == state["extra_fp8_variables"]
    assert torch.equal(again["scale_fwd"], state["scale_fwd"]) and torch.equal(again["amax_history_fwd"], state["amax_history_fwd"])
    assert clean_fp8_state(torch.empty(0, dtype=torch.uint8)).numel() == 0 and clean_fp8_state(None) is None


def test_fp8_state_runs_no_code(recipes, tmp_path):
    from engine.mcore.safe_load import clean_fp8_state

    mark = tmp_path / "executed"
    through_module = b"\x80\x04ctransformer_engine.common.recipe\n%s\n."
    called = through_module[:-1] % b"os.system" + f"(Vtouch {mark}\ntR.".encode()
    stored = b"\x80\x04ctorch.storage\n_load_from_bytes\n(" + pickle.dumps(pickle.dumps(payloads(str(mark))["os.system"]), 0)[:-1] + b"tR."
    attack = [content for _, content in pickled(str(mark))] + [through_module % b"os", through_module % b"Path", called, stored]
    for content in attack:
        with pytest.raises((pickle.UnpicklingError, AttributeError, UnicodeDecodeError, EOFError)):
            clean_fp8_state(as_bytes(content))
    import torch

    with pytest.raises(pickle.UnpicklingError, match="no tensor of bytes"):
        clean_fp8_state(torch.zeros(2))
    assert not mark.exists()


# --- configurations --------------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_says_of_itself_is_not_looked_up_here(saved, tmp_path, monkeypatch, capsys):
    """Every reader of a checkpoint's config.yaml: ${oc.env:...} is refused, and nothing of the environment is printed."""
    from engine.config import ConfigError, load_config
    from engine.recipe.scaling import point_of
    from engine.stages import loaded
    from launch import generate, score

    monkeypatch.setenv("TRIREME_SECRET", "told")
    raw, folder = saved
    run = tmp_path / "run"
    shutil.copytree(folder, run / "checkpoints" / folder.name)
    config = run / "checkpoints" / folder.name / "config.yaml"
    config.write_text(config.read_text().replace("family: llama", "family: ${oc.env:TRIREME_SECRET}"))
    shutil.copy(config, run / "config.yaml")
    (config.parent / "hashes.json").unlink(missing_ok=True)
    (run / "metrics.jsonl").write_text("")
    (tmp_path / "new.yaml").write_text(f"checkpoint: {{load: {run}}}\ndata: {{train: [x]}}\ntrain: {{seq_len: 8, global_batch: 1, steps: 1}}\n")
    said = []
    for read in (lambda: loaded.config(config.parent), lambda: load_config(str(tmp_path / "new.yaml"), []), lambda: point_of(run)):
        with pytest.raises(ValueError, match="interpolates family=") as caught:
            read()
        assert isinstance(caught.value, (ConfigError, ValueError))
        said.append(str(caught.value))
    for command, arguments in ((generate, [str(run), "--prompt", "x"]), (score, [str(run), "--input", "x.jsonl", "--output", str(tmp_path / "y.jsonl")])):
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        assert command.main() == 1
        said.append(capsys.readouterr().err)
    assert all("interpolates family=" in text and "told" not in text for text in said)


# --- arrays, and the repository --------------------------------------------------------------------------------------------


def test_arrays_of_objects_are_not_read(tmp_path):
    from engine.data.index_cache import _load_arrays

    mark = tmp_path / "executed"
    np.save(tmp_path / "x.npy", np.array([payloads(str(mark))["os.system"]], dtype=object), allow_pickle=True)
    assert _load_arrays([str(tmp_path / "x.npy")]) is None
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "x.npy")  # what engine/data/ calls; the scan below sees that it says no more
    assert not mark.exists()


def test_no_file_of_ours_unpickles_freely():
    """Each of the calls that could run a file's code stands in the place that makes it safe, and nowhere else."""
    calls = re.compile(r"pickle\.loads?\(|np\.load\([^)]*allow_pickle|torch\.load\((?![^\n]*weights_only=True)|yaml\.(unsafe_|full_)?load\(|"
                       r"trust_remote_code=True|extractall\(|weights_only=False|allow_pickle=True")
    files = [path for folder in ("engine", "data_tools", "launch", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for path in files for line in path.read_text().splitlines() if calls.search(line)]
    assert not found, found
