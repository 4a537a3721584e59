"""launch/generate.py: what it prints and writes is what the network says, from checkpoints and Hugging Face folders, in every layout."""

import contextlib
import io
import json
import subprocess
import sys

import pytest
import ranks
from training import merged, on_ranks

RAW = {
    "model": {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 257,
              "vocab_pad_multiple": 2, "init_std": 0.3},
    "data": {"tokenizer": "bytes"}, "chat": {"template": "tags", "workers": 1},
    "train": {"seq_len": 64, "global_batch": 2, "steps": 1, "precision": "fp32"},
    "optim": {"lr": 1e-5}, "log": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks that learnt nothing: `policy`, a run, `reward`, a run with a scalar head, and `hf`, the policy for transformers with no tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "yes", "rejected": "no"}) + "\n")
    (folder / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]}) + "\n")
    for stage, name, file in (("sft", "policy", "chat"), ("reward", "reward", "pairs")):
        on_ranks(1, merged(RAW, {"stage": stage, "run": {"dir": str(folder / name), "device": "cpu", "seed": 3},
                                 "data": {"train": [str(folder / f"{file}.jsonl")]}}))
    ranks.run(1, export, str(folder))
    return folder


def export(folder):
    from engine.hf.export import export
    from engine.mcore import checkpoint

    run, tensors = checkpoint.read_config(f"{folder}/policy"), checkpoint.read_tensors(f"{folder}/policy")
    export(run, tensors, f"{folder}/hf", "fp32")


def command(argv, stdin=""):
    """On a rank: launch/generate.py. (exit code, what it printed, what it complained of)."""
    import runpy

    sys.argv, sys.stdin = ["generate.py", *argv], io.StringIO(stdin)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path("launch/generate.py", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    sys.stdin = sys.__stdin__
    return code, out.getvalue(), err.getvalue()


def said(num_ranks, argv, stdin=""):
    """What rank 0 printed; the others are silent."""
    found = ranks.run(num_ranks, command, [*map(str, argv), "run.device=cpu"], stdin)
    assert [code for code, _, _ in found] == [0] * num_ranks, found
    assert not any(out for _, out, _ in found[1:])
    return found[0][1]


def greedy(folder, text, num_new):
    """On a rank: transformers' greedy answer to the bytes of `text`, and its bytes as text."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = torch.tensor([list(text.encode())])
    found = network.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=num_new, do_sample=False, pad_token_id=0, eos_token_id=256)
    return bytes(byte for byte in found[0, asked.size(1):].tolist() if byte < 256).decode("utf-8", errors="replace")


GREEDY = ["--temperature", "0", "--max-new-tokens", "24"]


def test_a_prompt_is_gone_on_with_as_transformers_does(folder):
    """From the checkpoint and from the Hugging Face folder, on one rank and spread over two."""
    wanted = ranks.run(1, greedy, str(folder / "hf"), "Hello", 24)[0]
    prompt = ["--prompt", "Hello", *GREEDY]
    assert said(1, [folder / "policy", *prompt]) == wanted + "\n"
    assert said(2, [folder / "policy", *prompt, "parallel.tp=2", "parallel.sequence_parallel=true"]) == wanted + "\n"
    for num_ranks, layout in ((1, []), (2, ["parallel.pp=2"]), (2, ["parallel.tp=2"])):
        assert said(num_ranks, [folder / "hf", *prompt, "--tokenizer", "bytes", *layout]) == wanted + "\n"
    assert not list(folder.glob("unused")) and len(wanted) > 5


def lines(path) -> list[dict]:
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_a_file_is_answered_line_by_line(folder, tmp_path):
    asked = [{"prompt": f"Question {i}", "id": i} for i in range(5)] + [{"messages": [{"role": "user", "content": "Hi"}], "id": 5}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, asked)))
    flags = ["--prompts", tmp_path / "in.jsonl", "--seed", "4", "--temperature", "0.7", "--max-new-tokens", "20", "--stop", "e"]
    for num_ranks, name in ((1, "one"), (2, "two")):      # two replicas
        assert said(num_ranks, [folder / "policy", *flags, "--output", tmp_path / name]) == ""
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert one == two and [{key: line[key] for key in line if key not in ("answer", "reason")} for line in one] == asked
    assert all((line["reason"] == "stop") == ("e" in line["answer"] or len(line["answer"].encode()) < 20) for line in one)
    said(1, [folder / "policy", *flags, "--output", tmp_path / "three", "--samples", "3"])
    three = lines(tmp_path / "three")
    assert all(len(line["answers"]) == len(line["reasons"]) == 3 and len(set(line["answers"])) > 1 for line in three)
    assert three[0]["answers"][0] == one[0]["answer"] and not list(tmp_path.glob("*.tmp*"))


def test_lines_of_the_terminal_are_answered_until_they_end(folder):
    alone = [said(1, [folder / "policy", *GREEDY, "--prompt", text]) for text in ("Hello", "World")]
    assert said(1, [folder / "policy", *GREEDY], "Hello\nWorld\n") == "".join(alone)
    assert said(2, [folder / "policy", *GREEDY, "parallel.tp=2"], "Hello\nWorld\n") == "".join(alone)


def test_a_chat_remembers(folder, tmp_path):
    first, second = said(1, [folder / "policy", *GREEDY, "--chat", "--prompt", "Hello"]), None
    both = said(1, [folder / "policy", *GREEDY, "--chat"], "Hello\nAgain\n")
    assert both.startswith(first)
    second = both[len(first):].removesuffix("\n")
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": first.removesuffix("\n")}, {"role": "user", "content": "Again"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": history}) + "\n")
    said(1, [folder / "policy", *GREEDY, "--prompts", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"])
    assert lines(tmp_path / "out.jsonl")[0]["answer"] == second
    assert first != said(1, [folder / "policy", *GREEDY, "--prompt", "Hello"])


@pytest.mark.parametrize("argv, code, words", [
    (["{}/nowhere", "--prompt", "x"], 2, "neither a complete checkpoint"),
    (["{}/policy", "--prompt", "x", "--prompts", "y"], 2, "do not go together"),
    (["{}/policy", "--prompts", "{}/pairs.jsonl"], 2, "--prompts and --output go together"),
    (["{}/policy", "--prompt", "x", "--top-p", "0"], 2, "0 is not above 0 and at most 1"),
    (["{}/policy", "--prompt", "x", "--stop", ""], 2, "--stop is empty"),
    (["{}/policy", "--prompt", "x", "parallel.tp=2"], 2, "tp(2)"),
    (["{}/reward", "--prompt", "x"], 2, "is a reward model"),
    (["{}/hf", "--prompt", "x"], 1, "has no tokenizer.json"),
    (["{}/policy", "--prompt", "x", "--tokenizer", "hf:nowhere"], 1, "nowhere does not exist"),
    (["{}/policy", "--prompts", "{}/wrong.jsonl", "--output", "{}/out"], 1, "line 1 has neither"),
], ids=["nowhere", "two ways", "no output", "range", "empty stop", "layout", "reward", "no tokenizer", "tokenizer", "line"])
def test_mistakes_are_told(folder, argv, code, words):
    (folder / "wrong.jsonl").write_text('{"text": 3}\n')
    found, out, err = ranks.run(1, command, [part.format(folder) for part in argv])[0]
    assert (found, out) == (code, "") and words in err, err
    assert not (folder / "out").exists()


def test_it_runs_by_itself(folder):
    done = subprocess.run([sys.executable, "launch/generate.py", str(folder / "policy"), "--prompt", "Hello", *GREEDY, "run.device=cpu"],
                          capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, said(1, [folder / "policy", "--prompt", "Hello", *GREEDY])), done.stderr[-2000:]
