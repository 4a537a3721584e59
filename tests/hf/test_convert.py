"""launch/convert.py: exit codes without tracebacks, and both directions proved end to end."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def convert():
    """launch/convert.py as a module; its main runs in this process, which has transformers and megatron loaded."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("convert", ROOT / "launch" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("words,message", [
    (["from-hf", "nowhere", "out"], "no folder nowhere"),
    (["from-hf", "tests", "tests"], "exists already"),
    (["to-hf", "tests", "out", "--tolerance", "0"], "positive"),
    (["to-hf", "tests", "out", "--tolerance", "inf"], "finite"),  # it would prove anything
    (["to-hf", "tests", "out", "--shard-gb", "nan"], "finite"),
    (["to-hf", "tests"], "required"),
    ([], "required"),
])
def test_usage_errors_are_2(convert, capsys, monkeypatch, words, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        convert.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_bad_folder_is_1_without_a_traceback(convert, tmp_path, capsys):
    pytest.importorskip("engine.mcore.checkpoint")
    (tmp_path / "model").mkdir()
    assert convert.main(["from-hf", str(tmp_path / "model"), str(tmp_path / "out")]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_transformers_does_not_load_is_told_without_a_traceback(tiny, tmp_path):
    import shutil

    from engine.hf.fields import HFError
    from engine.hf.verify import transformers_network

    folder = tmp_path / "model"
    shutil.copytree(tiny("llama").folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "no_such_function"}))
    with pytest.raises(HFError, match=r"transformers does not load .*model.*no_such_function"):
        transformers_network(folder)


@pytest.mark.parametrize("name", ["llama_tied", "mixtral", "gpt2_untied"])  # a save takes seconds
def test_there_and_back(convert, tiny, name, tmp_path, capsys):
    pytest.importorskip("engine.mcore.checkpoint")
    from engine.hf.load import open_hf

    model = tiny(name)
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    assert convert.main(["from-hf", str(model.folder), str(ckpt)]) == 0
    assert convert.main(["to-hf", str(ckpt), str(out)]) == 0
    assert capsys.readouterr().out.count("differ by at most") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]
    _, tensors = open_hf(out)
    assert all(torch.equal(tensors[name], model.tensors[name]) for name in model.tensors)
    assert "differ by at most" in (out / "README.md").read_text()


def test_disagreement_is_kept_aside(convert, tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("engine.mcore.checkpoint")
    from engine.hf import names

    model = tiny("llama")
    monkeypatch.setattr(names, "fuse_qkv", lambda model, q, k, v: torch.cat([q, k, v]))
    assert convert.main(["from-hf", str(model.folder), str(tmp_path / "ckpt")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.failed"]
    assert "differ by at most" in (err := capsys.readouterr().err) and "ckpt.failed" in err and "Traceback" not in err


def test_the_dtype_asked_for_is_not_held_against_the_conversion(convert, tiny, tmp_path):
    pytest.importorskip("engine.mcore.checkpoint")
    from engine.hf.load import open_hf

    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt")]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    assert {tensor.dtype for tensor in open_hf(tmp_path / "out")[1].values()} == {torch.bfloat16}


def test_a_dtype_on_the_way_in(convert, tiny, tmp_path, capsys):
    """The proof holds with transformers' weights rounded alike, and not without."""
    from engine.hf import verify
    from engine.mcore.checkpoint import read_config, read_tensors

    model, words = tiny("deepseek_v3"), ["--dtype", "bf16"]
    assert convert.main(["from-hf", str(model.folder), str(tmp_path / "ckpt"), *words]) == 0, capsys.readouterr().err
    tensors = read_tensors(tmp_path / "ckpt")
    kept = {name for name in tensors if tensors.dtype(name) != torch.bfloat16}
    assert kept == {name for name in tensors if name.endswith("expert_bias")} != set()
    assert read_config(tmp_path / "ckpt").train.precision == "bf16"
    plain = verify.transformers_logits(model.folder, verify.prompts(model.run.model))
    rounded = verify.transformers_network(model.folder, rounded=torch.bfloat16)(verify.prompts(model.run.model))
    assert (plain - rounded).abs().max() > 1e-3 * plain.abs().max()


def test_how_to_generate_survives(convert, tiny, tmp_path):
    """generation_config.json of the source, with several ends and how to sample, comes out again."""
    import json
    import shutil

    folder = shutil.copytree(tiny("llama").folder, tmp_path / "model")
    wanted = {"bos_token_id": 1, "eos_token_id": [7, 9], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(wanted))
    (folder / "tokenizer_config.json").write_text("{}")      # a tokenizer's folder is where they are looked for
    assert convert.main(["from-hf", str(folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--no-verify"]) == 0
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == wanted | {"pad_token_id": None}


@pytest.mark.parametrize("eod, expected", [(-1, [7, 9]), (9, [7, 9]), (5, 5)], ids=["unset", "one of them", "another"])
def test_a_runs_own_end_of_text_wins(tmp_path, eod, expected):
    import json

    from engine.hf.export import generation

    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "top_k": 3}))
    assert generation(tmp_path, {"eos_token_id": eod if eod >= 0 else None}, eod) == {"eos_token_id": expected, "top_k": 3}


def test_a_folder_that_may_not_be_written_to(convert, tmp_path, capsys):
    import os
    import tempfile

    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as place:        # not below pytest's folder, which nobody else may enter
        os.chmod(place, 0o755)
        closed = Path(place, "closed")
        closed.mkdir(mode=0o555)
        os.seteuid(65534 if is_root else os.geteuid())  # root may write anywhere
        try:
            with pytest.raises(SystemExit) as stop:
                convert.parse(["from-hf", "/", str(closed / "more" / "ckpt")])
        finally:
            os.seteuid(0 if is_root else os.geteuid())
    assert stop.value.code == 2 and f"{closed} may not be written to by this user" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        convert.parse(["from-hf", "/", str(tmp_path / "file" / "ckpt")])
    assert "file is no folder" in capsys.readouterr().err


def test_no_verify_says_what_is_not_proved(convert, tiny, tmp_path, capsys):
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--no-verify"]) == 0
    assert capsys.readouterr().out.count("not proved: logits and greedy tokens were not compared") == 2
    assert "not proved" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_that_was_changed_is_not_read(convert, tiny, tmp_path, capsys):
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--no-verify"]) == 0
    path = tmp_path / "out" / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 16
    path.write_bytes(whole)
    again = ["from-hf", str(tmp_path / "out"), str(tmp_path / "again"), "--no-verify"]
    assert convert.main(again) == 1 and not (tmp_path / "again").exists()
    assert "model.safetensors has other bytes than were written" in capsys.readouterr().err
    assert convert.main([*again, "--no-hashes"]) == 0
    path.write_bytes(whole[:-100])
    assert convert.main(["from-hf", str(tmp_path / "out"), str(tmp_path / "cut"), "--no-verify", "--no-hashes"]) == 1
    assert f"model.safetensors has {len(whole) - 100} bytes, {len(whole)} were written" in capsys.readouterr().err


def test_pickles_are_read_when_allowed_and_run_nothing(convert, tiny, tmp_path, capsys):
    model, folder = tiny("llama"), tmp_path / "old"
    folder.mkdir()
    # Such a folder may bring code for its model, and pickles that nobody asks for.
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(json.loads((model.folder / "config.json").read_text()) | {"auto_map": code}))
    for name in ("theirs.py", "tokenization_theirs.py", "setup.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pth"):
        (folder / name).write_bytes(f"cos\nsystem\n(S'touch {tmp_path / 'executed'}'\ntR.".encode())
    torch.save(dict(model.tensors), folder / "pytorch_model.bin")
    assert convert.main(["from-hf", str(folder), str(tmp_path / "ckpt")]) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert convert.main(["from-hf", str(folder), str(tmp_path / "ckpt"), "--allow-pickle"]) == 0
    assert "differ by at most" in capsys.readouterr().out

    torch.save(dict(model.tensors), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # as before torch 1.6
    assert convert.main(["from-hf", str(folder), str(tmp_path / "legacy"), "--allow-pickle"]) == 0

    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save(dict(model.tensors) | {"model.norm.weight": Payload()}, folder / "pytorch_model.bin")
    assert convert.main(["from-hf", str(folder), str(tmp_path / "bad"), "--allow-pickle"]) == 1
    assert "is no file of tensors alone" in capsys.readouterr().err and not (tmp_path / "executed").exists()


def test_files_are_for_the_group_too(convert, tiny, tmp_path):
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--no-verify", "--shard-gb", "1e-5"]) == 0
    modes = {path.name: path.stat().st_mode & 0o044 for path in (tmp_path / "out").iterdir()}
    assert len(modes) > 6 and set(modes.values()) == {0o044}


@pytest.mark.parametrize("public", [False, True], ids=["private", "public"])
def test_upload_comes_after_the_proof(convert, tiny, tmp_path, monkeypatch, public):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    words = ["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--upload", "me/model", *["--public"] * public]
    assert convert.main(words) == 0
    assert calls == [("me/model", not public), ("me/model", ["README.md", "config.json", "generation_config.json", "hashes.json", "model.safetensors"])]


def test_a_failed_upload_keeps_the_folder(convert, tiny, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--no-verify", "--upload", "me/model"]) == 1
    assert (tmp_path / "out" / "config.json").exists() and "no route to the hub" in (err := capsys.readouterr().err) and "hf upload me/model" in err


def test_greedy_tokens_are_compared(tiny):
    """A network whose logits agree within the tolerance but choose otherwise is refused, unless the choices are a tie."""
    from engine.hf.verify import Verdict, answers

    rows = [torch.arange(8).view(1, 8)]

    def network(gap, winner):
        def logits(tokens):
            found = torch.zeros(1, tokens.size(1), 10)
            found[..., 3], found[..., 4] = 1.0, 1.0
            found[..., winner] += gap
            return found
        return logits

    wide = Verdict(answers(network(0.2, 3), rows), answers(network(0.2, 4), rows), tolerance=0.2)
    tie = Verdict(answers(network(1e-6, 3), rows), answers(network(1e-6, 4), rows), tolerance=1e-3)
    nan = Verdict(answers(lambda tokens: torch.full((1, tokens.size(1), 10), float("nan")), rows), answers(network(0, 3), rows))
    assert tie.agrees and not nan.agrees and "0 of 8, then a tie" in tie.table()
    far = Verdict(answers(network(0.5, 3), rows), answers(network(0.5, 4), rows), tolerance=0.1)
    assert not far.agrees and wide.worst == pytest.approx(0.2)


def test_a_checkpoint_with_a_flipped_bit_is_not_exported(convert, tiny, tmp_path, capsys):
    """Both sides of the comparison would have it, so that comparing logits proves nothing."""
    source = tmp_path / "ckpt"
    assert convert.main(["from-hf", str(tiny("llama").folder), str(source), "--no-verify"]) == 0
    path = max(source.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    for command in (["to-hf", str(source)], ["upcycle", str(source)], ["average", str(source), str(source), "--output"]):
        assert convert.main([*command, str(tmp_path / "out")]) == 1
        assert f"{path.name} has other bytes than were written" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert convert.main(["to-hf", str(source), str(tmp_path / "out"), "--no-verify", "--no-hashes"]) == 0


def test_an_interrupt_leaves_nothing(convert, tiny, tmp_path, monkeypatch, capsys):
    from engine.mcore import stream

    def interrupted(folder, *args, **kwargs):
        assert folder.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "write", interrupted)
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "out")]) == 130
    assert f"interrupted; {tmp_path / 'out'} was not written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_goes(convert, tiny, tmp_path):
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    for name in ("out.unverified", "out.unverified.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert convert.main(["to-hf", str(tmp_path / "ckpt"), str(tmp_path / "out"), "--no-verify"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_numbers_that_are_no_plain_weights_are_refused(convert, tiny, tmp_path, capsys, dtype):
    from safetensors.torch import save_file

    model = tiny("llama")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((model.folder / "config.json").read_text())
    save_file({name: tensor.to(dtype) for name, tensor in model.tensors.items()}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    assert convert.main(["from-hf", str(tmp_path / "hf"), str(tmp_path / "out"), "--no-verify"]) == 1
    assert "weights are F32, BF16 or F16" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_of_the_other_kind_are_told(convert, tiny, tmp_path, capsys):
    folder = tiny("llama").folder
    assert convert.main(["upcycle", str(folder), str(tmp_path / "out")]) == 1
    assert "is a Hugging Face folder; from-hf" in capsys.readouterr().err
    assert convert.main(["from-hf", str(folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    assert convert.main(["from-hf", str(tmp_path / "ckpt"), str(tmp_path / "out")]) == 1
    assert "it is a checkpoint of ours; to-hf" in capsys.readouterr().err


def test_a_new_checkpoint_is_on_the_disk_before_it_has_its_name(convert, tiny, tmp_path, monkeypatch):
    import os

    synced, real = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert convert.main(["from-hf", str(tiny("llama").folder), str(tmp_path / "ckpt"), "--no-verify"]) == 0
    named = next(i for i, path in enumerate(synced) if path.name == "ckpt.unverified")  # the folder that the rename changes
    before = {path.name.removesuffix(".tmp") for path in synced[:named] if path.parent.name.startswith("iter_")}
    assert before == {path.name for path in (tmp_path / "ckpt" / "iter_0000000").iterdir()} and any(name.endswith(".distcp") for name in before)
