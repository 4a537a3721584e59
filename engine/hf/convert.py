"""What lies between a checkpoint and load.py or export.py: a RunConfig for a foreign model, rounded views, the folder that a run
writes beside its checkpoints (checkpoint.also_save_hf).

Left out: the checkpoint itself, which engine/mcore reads and writes.
"""

import shutil
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor

from engine import hashes
from engine.config import Data, Run, RunConfig, Train
from engine.hf import FAMILIES, family_of, read_model
from engine.hf.export import DTYPES, TOKENIZER_FILES, export, full_model, tokenizer_source, write_card
from engine.hf.fields import HFError
from engine.hf.load import Tensors, named
from engine.hf.peft import Merged
from engine.run_folder import export_of

PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def run_of(hf: Mapping[str, Any], tensors: Tensors, source: str | Path, run_dir: str | Path) -> RunConfig:
    """The RunConfig of a model that no run of ours trained: its sizes, its precision and its tokenizer; the rest is default.

    hf, tensors: as open_hf gives them. source: the folder they came from, where the tokenizer lies too.
    Raises HFError for what the engine would compute differently.
    """
    source = Path(source).resolve()
    with named(source):
        model = read_model(hf)
    precision = PRECISIONS.get(tensors.dtype(family_of(hf).EMBEDDING), "fp32")
    end = hf.get("eos_token_id")  # a list (Llama 3 Instruct) names no single end of document: the tokenizer then does
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    return RunConfig(
        run=Run(dir=str(run_dir)), model=model, stage="reward" if model.head == "scalar" else "pretrain",
        data=Data(tokenizer=f"hf:{source}" if has_tokenizer else "",
                  eod_id=end if type(end) is int and 0 <= end < model.vocab_size else -1),
        train=Train(seq_len=max(model.max_position, 2), global_batch=1, steps=1, precision=precision),
    )


def merge(run: RunConfig, tensors: Mapping[str, Tensor]) -> tuple[RunConfig, Mapping[str, Tensor]]:
    """The run and its weights with the adapters merged in, as a model that never had any."""
    return run.model_copy(update={"lora": type(run.lora)()}), Merged(tensors, run.model, run.lora)


def check_expressible(run: RunConfig) -> None:
    """Raise HFError now for what would keep `beside_checkpoint` from writing later."""
    if run.model.head != "tokens":
        raise HFError(f"checkpoint.also_save_hf=true, but stage {run.stage} trains a scalar head; set it to false and convert afterwards")
    if run.model.family not in FAMILIES:
        raise HFError(f"checkpoint.also_save_hf=true, but model.family={run.model.family} has no Hugging Face form here; these have: {', '.join(FAMILIES)}")
    FAMILIES[run.model.family].hf_config(full_model(run), run.train.seq_len)
    tokenizer_source(run, None)


def beside_checkpoint(run: RunConfig, tensors: Mapping[str, Tensor], folder: Path, tokens: int) -> Path:
    """Write run.dir/hf/NAME of the checkpoint `folder` (its name), adapters merged; one that is there from before goes. Returns it.

    tensors: those of the checkpoint. Logits are not compared here; launch/convert.py does that. Raises OSError when the disk is full.
    """
    out = export_of(folder)
    shutil.rmtree(out, ignore_errors=True)
    if run.lora.rank:
        run, tensors = merge(run, tensors)
    export(run, tensors, out, run.train.precision)
    write_card(out, run, out.name, tokens, source=folder)
    hashes.write(out)
    return out


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An engine tensor, or some of its rows, in `dtype`; what every dtype of a model keeps in fp32 stays as it is."""
    return tensor if not tensor.is_floating_point() or name.endswith("expert_bias") else tensor.to(dtype)


class Rounded(Mapping[str, Tensor]):
    """A mapping whose floating tensors went through `dtype` (fp32, bf16, fp16; None leaves them) and back, on access."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: str | None):
        self._tensors, self._dtype = tensors, DTYPES[dtype] if dtype else None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor if self._dtype is None else cast(name, tensor, self._dtype).to(tensor.dtype)

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
