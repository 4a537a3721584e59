"""A recipe over tiny configurations, and a launcher that trains nothing: it writes what a run would leave, with losses that a test chooses."""

import json
from pathlib import Path

import yaml

MODEL = {"family": "llama", "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
         "vocab_size": 62, "vocab_pad_multiple": 1}
TRAIN = {"seq_len": 32, "global_batch": 4, "steps": 6, "precision": "fp32", "eval_samples": 4}
TEXT = {"data": {"train": ["corpus"], "valid": {"held_out": ["valid"]}, "eod_id": 3}, "train": TRAIN}
CHAT = {"data": {"train": ["chat.jsonl"], "valid": {"held_out": ["held.jsonl"]}, "tokenizer": "bytes"}, "train": TRAIN}


def base(**changes) -> dict:
    return {"keys": {"stage": "pretrain", "model": MODEL, **TEXT}, **changes}


def stage(kind: str, **changes) -> dict:
    return {"keys": {"stage": kind, **(TEXT if kind in ("continued", "anneal", "long_context") else CHAT)}, **changes}


def measure(kind: str = "continued", **changes) -> dict:
    return {"keys": {"stage": kind, **(TEXT if kind == "continued" else CHAT)}, **changes}


def chain(**stages) -> dict:
    """base -> more -> sft, or other stages given by name."""
    return {"stages": stages or {"base": base(), "more": stage("continued"), "sft": stage("sft")}}


def write(folder: Path, recipe: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dir": str(folder / "work"), **recipe}, sort_keys=False))
    return path


def checkpoint(folder: Path, step: int, config: dict, samples: int = 24) -> None:
    found = folder / "checkpoints" / f"iter_{step:07d}"
    found.mkdir(parents=True, exist_ok=True)
    (found / "config.yaml").write_text(yaml.safe_dump(config))
    (found / "position.json").write_text(json.dumps({"step": step, "consumed_samples": samples, "tokens": samples * 32}))
    (found / "metadata.json").write_text("{}")      # last: it makes the folder a checkpoint


def line(step: int, loss: float) -> dict:
    return {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "consumed_samples": 4 * step, "tokens": 128, "step_time_s": 0.5,
            "tokens_per_s": 256.0, "tflops_per_device": 0.25}


class Launcher:
    """launch(job) for Execution. losses: validation loss, of the set `split`, by title, such as {"sft": 1.0, "kept of sft": 2.0}; curves:
    training losses by title; extra: further numbers of the validation line. `titles` lists what was run; interrupt_at=n raises in the n-th
    call, after writing when late."""

    def __init__(self, losses=(), curves=(), extra=(), codes=(), interrupt_at=0, late=False, split="held_out"):
        self.losses, self.curves, self.extra, self.codes = dict(losses), dict(curves), dict(extra), dict(codes)
        self.interrupt_at, self.late, self.split, self.titles, self.jobs = interrupt_at, late, split, [], []

    def __call__(self, job) -> int:
        self.titles.append(job.title)
        self.jobs.append(job)
        if len(self.titles) == self.interrupt_at and not self.late:
            raise KeyboardInterrupt
        code = self.codes.pop(job.title, 0)
        if code:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            job.output.write_text("== torchrun\nnoise\nerror: the corpus is gone\nW1124 10:00:00 torch/elastic said something\n")
            return code
        self._write(job)
        if len(self.titles) == self.interrupt_at:
            raise KeyboardInterrupt
        return 0

    def _write(self, job) -> None:
        config = yaml.safe_load(job.config.read_text())
        for folder in job.folders:
            folder.mkdir(parents=True, exist_ok=True)
            steps = config["train"]["steps"]
            losses = self.curves.get(job.title, [3.0 - 0.1 * i for i in range(steps)])
            begins = self.losses.get(f"start of {job.title}")
            start = [] if begins is None else [{"step": 0, "split": self.split, "valid_loss": begins}]
            end = {"step": steps, "split": self.split, "valid_loss": self.losses.get(job.title, 2.5), **self.extra.get(job.title, {})}
            lines = [*start, *(line(i + 1, loss) for i, loss in enumerate(losses)), end]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines).replace("NaN", "null"))
            if steps:
                (folder / "env.json").write_text(json.dumps({"git_commit": "abc", "packages": {"torch": "2"}}))
                checkpoint(folder, steps, config)
