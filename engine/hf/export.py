"""Write a Hugging Face folder from engine tensors: config, generation config, safetensors, tokenizer, model card.

    export(run, tensors, "out/my-model", dtype="bf16")

Tensors enter by engine name from a mapping that may read each one on access; they leave under HF names, in shards, and a few of them are in
memory at a time (shards.py). The folder is written beside its final place and renamed when complete, so a reader never sees half of it.
Left out: proving it (launch/convert.py compares logits) and uploading it.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
from safetensors import safe_open
from torch import Tensor

from engine.config import RunConfig, dump_config
from engine.data.chat import source_of
from engine.hf import FAMILIES, names, shards
from engine.hf.fields import HFError, dtype_keys, head_of
from engine.hf.load import read_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
                   "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json")


def export(run: RunConfig, tensors: Mapping[str, Tensor], out_dir: str | Path, dtype: str | None = None,
           tokenizer_dir: str | Path | None = None, shard_bytes: float = 5e9, tokens_trained: int = 0,
           verification: str = "", written: Callable[[int], None] = lambda num_bytes: None) -> Path:
    """Write `out_dir`, which must not exist yet or be empty, and return it.

    tensors: engine name -> tensor, whole (tp = pp = ep = 1). dtype: fp32, bf16 or fp16; None keeps the tensors' own.
    tokenizer_dir: folder (or tokenizer.json) to copy from instead of the run's data.tokenizer. shard_bytes: largest weight file.
    tokens_trained (0: unknown) and verification go into the model card. written: hears of bytes as they go to disk.
    Raises HFError when the architecture cannot express the model, a tensor is amiss or the tokenizer is not there.
    """
    out = Path(out_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HFError(f"{out} exists already; name another folder or remove it")
    if run.model.family not in FAMILIES:
        raise HFError(f"model.family={run.model.family} has no Hugging Face form here; these have: {', '.join(FAMILIES)}")
    family, model = FAMILIES[run.model.family], full_model(run)
    hf = family.hf_config(model, run.train.seq_len)  # refuses before anything is written
    if head_of(hf) != model.head:
        raise HFError(f"model.head={model.head} has no Hugging Face form in family {model.family}")
    source, pairs = tokenizer_source(run, tokenizer_dir), family.pairs(model)
    part = out.with_name(f"{out.name}.partial")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    part.mkdir(parents=True)
    try:
        shapes = shards.outline(family, model, tensors, DTYPES[dtype] if dtype else None)
        with shards.Ahead(tensors, [pair.engine for pair in pairs]) as ahead:
            shards.write(part, shapes, names.rows_to_hf(pairs, ahead), shard_bytes, written)
        copy_tokenizer(part, source, run.data.eod_id)
        if run.chat.template:  # the one the model was trained with, over the tokenizer's own
            (part / "chat_template.jinja").write_text(source_of(run.chat.template), encoding="utf-8")
        ids = special_ids(part, run.data.eod_id)
        write_json(part / "config.json", hf | dtype_keys(str(next(iter(shapes.values())).dtype).removeprefix("torch.")) | ids)
        if model.head == "tokens":
            write_json(part / GENERATION, generation(source, ids, run.data.eod_id))
        write_card(part, run, out.name, tokens_trained, verification)
        part.replace(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return out


def full_model(run: RunConfig):
    """run.model with max_position filled in from train.seq_len."""
    return run.model.model_copy(update={"max_position": run.model.max_position or run.train.seq_len})


def tokenizer_source(run: RunConfig, tokenizer_dir: str | Path | None) -> Path | None:
    """The folder or tokenizer.json to copy; None when the run's tokenizer is not a Hugging Face one."""
    if tokenizer_dir is None and not run.data.tokenizer.startswith("hf:"):
        return None
    path = Path(tokenizer_dir if tokenizer_dir is not None else run.data.tokenizer.removeprefix("hf:"))
    if path.is_file() or (path.is_dir() and any((path / name).is_file() for name in TOKENIZER_FILES)):
        return path
    raise HFError(f"there is no tokenizer at {path}; name the folder that holds it (tokenizer_dir, or --tokenizer)")


def copy_tokenizer(folder: Path, source: Path | None, eod_id: int) -> None:
    """Copy the tokenizer's files; one that is a bare tokenizer.json gets the tokenizer_config.json that transformers needs."""
    if source is None:
        return
    if source.is_file():
        shutil.copyfile(source, folder / "tokenizer.json")
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        tokens = {number: token for token, number in _vocabulary(folder).items()}
        end = {"eos_token": tokens[eod_id]} if eod_id in tokens else {}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **end})


def special_ids(folder: Path, eod_id: int) -> dict[str, int | None]:
    """bos, eos and pad ids from the copied tokenizer; a run that sets data.eod_id knows its end of text better.

    All three are always there: transformers' defaults (1 and 2 for Llama) would end texts at ordinary tokens.
    """
    path = folder / "tokenizer_config.json"
    config, ids = read_json(path) if path.exists() else {}, _vocabulary(folder)
    found = {}
    for kind in ("bos", "eos", "pad"):
        token = config.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found[f"{kind}_token_id"] = ids.get(token)
    if eod_id >= 0:
        found["eos_token_id"] = eod_id
    return found


def generation(source: Path | None, ids: Mapping[str, int | None], eod_id: int) -> dict[str, Any]:
    """generation_config.json: that of the folder the tokenizer came from (how to sample, several ends of an answer), completed by `ids`.

    A run that sets data.eod_id to none of its ends has trained with another one, which then is the only end.
    """
    kept = read_json(source / GENERATION) if source is not None and (source / GENERATION).is_file() else {}
    ends = kept.get("eos_token_id")
    if eod_id >= 0 and eod_id not in (ends if isinstance(ends, list) else [ends]):
        kept.pop("eos_token_id", None)
    return {**ids, **kept}


def _vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id of tokenizer.json (or vocab.json); empty without them."""
    if (folder / "tokenizer.json").exists():
        tokenizer = read_json(folder / "tokenizer.json")
        vocab = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocab, list):  # Unigram: [[token, score], ...]
            vocab = {token: number for number, (token, _) in enumerate(vocab)}
        return vocab | {added["content"]: added["id"] for added in tokenizer.get("added_tokens") or []}
    return read_json(folder / "vocab.json") if (folder / "vocab.json").exists() else {}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_card(folder: Path, run: RunConfig, title: str, tokens_trained: int = 0, verification: str = "", source: Path | None = None) -> None:
    """README.md: what the model is, how big, how far trained, on what, from what, the configuration, and whether the conversion was proved.

    source: the checkpoint it was made of.
    """
    model = run.model
    rows = {
        "family": f"{model.family} ({model.size})", "layers": model.num_layers, "hidden size": model.hidden_size,
        "FFN size": model.ffn_hidden_size,
        "attention": f"{model.num_attention_heads} query heads, {model.kv_heads} key/value heads of {model.head_size}",
        "experts": f"{model.moe.num_experts}, {model.moe.top_k} per token" if model.moe.num_experts else "",
        "vocabulary": model.vocab_size, "longest sequence": model.max_position or run.train.seq_len,
        "parameters": f"{num_parameters(folder):,}", "stage": run.stage,
        "tokens trained": f"{tokens_trained:,}" if tokens_trained else "",
        "trained on": ", ".join(f"`{item}`" for item in run.data.train),
        "checkpoint": f"`{source.name}` of the run `{Path(run.run.dir).name}`" if source else "",
        "started from": ", ".join(f"{role}: `{path}`" for role, path in {"": run.checkpoint.load, **run.checkpoint.roles}.items() if path).removeprefix(": "),
        "conversion": verification or "logits not compared",
    }
    task, loader = (("text-classification", "AutoModelForSequenceClassification") if model.head == "scalar" else
                    ("text-generation", "AutoModelForCausalLM"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value != "")
    (folder / "README.md").write_text(f"""---
library_name: transformers
pipeline_tag: {task}
---
# {title}

Trained with Trireme, exported to Hugging Face format.

| | |
| --- | --- |
{table}

```python
from transformers import {loader}

model = {loader}.from_pretrained("path/of/this/folder")
```

## Configuration

```yaml
{dump_config(run).strip()}
```
""", encoding="utf-8")


def num_parameters(folder: Path) -> int:
    """Numbers in the folder's weight files, from their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())
    return total
