"""Adapters in PEFT's format, in and out, and merged into the weights they adapt.

    save_adapter(model, lora, tensors, "out/adapter", base_name="meta-llama/Llama-3.2-1B")    # PeftModel.from_pretrained reads it
    lora, adapters = load_adapter("out/adapter", model)                                       # engine name -> tensor
    weights = Merged(tensors, model, lora)                                                    # a Mapping without adapters

Engine tensors are whole and named as engine/mcore/checkpoint.read_tensors names them; which Hugging Face layer a part of a fused matrix
is, the family's Pairs say. For a mixture of experts the names are those of transformers 4 (`experts.3.w1`), which PEFT converts for 5.
Left out: parts that a family's Hugging Face form fuses too (phi3's q, k and v: PEFT has one adapter for the three), gpt2, whose matrices are
transposed, adapters that PEFT itself fused for transformers 5, and what engine/mcore/lora.py does not train (adapted embeddings, biases, ranks that
differ by layer).
"""

from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import adapters
from engine.config import Model
from engine.hf import FAMILIES
from engine.hf.export import write_json
from engine.hf.fields import HFError, refuse
from engine.hf.load import read_json
from engine.hf.names import Pair, some
from engine.hf.verify import transformers_network
from engine.stage_sections import Lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PREFIX = "base_model.model."
VALUE_HEAD = {"value_head.weight": PREFIX + "score.weight"}

# Keys of adapter_config.json that change what an adapter computes, with the values that leave it as lora.py computes it.
_PLAIN = {
    "peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False, None), "lora_bias": (False, None), "use_qalora": (False, None),
    "init_lora_weights": (True, False, "gaussian", None),  # others (pissa, olora, ...) start from base weights they have changed
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication", "target_parameters", "megatron_config",
                     "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
                     "monteclora_config"), ({}, [], None, False)),
}


def save_adapter(model: Model, lora: Lora, tensors: Mapping[str, Tensor], folder: str | Path, base_name: str) -> Path:
    """Write adapter_config.json and adapter_model.safetensors to `folder`, made if missing, and return it.

    tensors: whole engine tensors, of which the adapters (and a value head, as PEFT's saved module `score`) are written in their dtype.
    base_name: the Hugging Face name or folder of the model they adapt. Raises HFError where PEFT cannot express the adapters.
    """
    lora, names = _for_peft(model, lora), _hf_names(model, lora)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise HFError(f"the checkpoint lacks the adapters {some(missing)}; was it trained with these lora.targets?")
    names |= {name: hf for name, hf in VALUE_HEAD.items() if name in tensors}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = {hf: tensors[name].detach().cpu().clone().contiguous() for name, hf in names.items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    write_json(folder / CONFIG, _config(lora, names, base_name))
    return folder


def load_adapter(folder: str | Path, model: Model) -> tuple[Lora, dict[str, Tensor]]:
    """(lora section, engine name -> tensor) of a PEFT folder for `model`. Raises HFError for adapters that the engine has no form for."""
    folder = Path(folder)
    refuse(_transposed(model), str(folder))
    config = read_json(folder / CONFIG)
    every, stored = _section(folder, config, model), _stored(folder)
    names = {hf: name for name, hf in (_hf_names(model, every) | VALUE_HEAD).items()}
    unknown = sorted(set(stored) - set(names))
    if unknown:
        why = "; in the engine q, k and v (gate and up) have an adapter each" if model.family in FUSED else ""
        raise HFError(f"{folder / WEIGHTS} holds {some(unknown)}, for which this {model.family} model has no adapter{why}")
    tensors = {names[hf]: tensor for hf, tensor in stored.items()}
    targets = [part for part in every.targets if any(f"{adapters.MARK}{part}." in name for name in tensors)]
    lora = every.model_copy(update={"targets": targets})
    _check_shapes(folder, model, lora, tensors)
    return lora, tensors


def _section(folder: Path, config: Mapping[str, Any], model: Model) -> Lora:
    """The `lora` section of an adapter_config.json, with every legal target: which there are, the tensors say."""
    refuse({f"{key}={config.get(key)!r}": config.get(key, legal[0]) not in legal for key, legal in _PLAIN.items()}
           | {f"{key} is missing": key not in config for key in ("peft_type", "r", "lora_alpha")},
           f"{folder / CONFIG}: the engine trains plain LoRA and DoRA on linear layers, which this is not")
    try:
        return Lora(rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout") or 0.0,
                    targets=adapters.legal_targets(model), dora=bool(config.get("use_dora")), rslora=bool(config.get("use_rslora")))
    except ValidationError as error:
        raise HFError(f"{folder / CONFIG}: " + "; ".join(f"lora.{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())) from None


def _stored(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        raise HFError(f"{folder} has no {WEIGHTS}; save the adapter again with PEFT, which writes it")
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise HFError(f"{folder / WEIGHTS} is no readable safetensors file: {error}") from None


class Unadapted(Mapping[str, Tensor]):
    """The tensors of `tensors` that are no adapters, as they are."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        if adapters.MARK in name:
            raise KeyError(name)
        return self._tensors[name]

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return adapters.MARK not in name and name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._tensors if adapters.MARK not in name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Merged(Unadapted):
    """The same with the adapters merged in: a matrix that has some is read as W + s B A, with DoRA as m (W + s B A) / |W + s B A| per row
    (arXiv 2402.09353, eq. 5), in fp32. The adapters are held in memory, a matrix only while it is used."""

    def __init__(self, tensors: Mapping[str, Tensor], model: Model, lora: Lora):
        super().__init__(tensors)
        self._model, self._scale = model, adapters.scale(lora)
        self._adapters: dict[str, dict[str, dict[str, Tensor]]] = {}  # linear layer -> part -> kind -> tensor
        for name in tensors:
            layer, mark, rest = name.partition(adapters.MARK)
            if mark:
                part, kind = rest.split(".")
                self._adapters.setdefault(layer, {}).setdefault(part, {})[kind] = tensors[name].float()

    def __getitem__(self, name: str) -> Tensor:
        tensor, (layer, _, kind) = super().__getitem__(name), name.rpartition(".")
        found = self._adapters.get(layer, {}) if kind == "weight" else {}
        return self._merge(layer.rpartition(".")[2], tensor.float(), found) if found else tensor

    def _merge(self, linear: str, weight: Tensor, found: dict[str, dict[str, Tensor]]) -> Tensor:
        block = adapters.block_of(linear, self._model, weight.shape[0])
        rows = weight.unflatten(0, (-1, sum(block.values()))).clone()  # [blocks, rows of a block, in]
        for part, piece in zip(block, rows.split(list(block.values()), dim=1)):
            if part in found:
                adapter = found[part]
                piece += (self._scale * adapter["B"] @ adapter["A"]).view_as(piece)
                if "magnitude" in adapter:
                    piece *= adapter["magnitude"].view(*piece.shape[:2], 1) / piece.norm(dim=-1, keepdim=True)
        return rows.flatten(0, 1)


@torch.no_grad()
def peft_logits(base: str | Path, adapter: str | Path, tokens: Tensor) -> Tensor:
    """Logits [b, s, vocab] in fp32 of the Hugging Face model in `base` with the adapter of `adapter`, by transformers and PEFT."""
    return transformers_network(base, adapter)(tokens)


def check_expressible(model: Model, lora: Lora) -> None:
    """Raise HFError where PEFT has no form for these adapters."""
    targets = set(lora.targets)
    on_experts = bool(model.moe.num_experts and targets & {"gate_proj", "up_proj", "down_proj"})
    cure = "; export the merged model (launch/convert.py to-hf)"
    fused = sorted(targets & set(FUSED.get(model.family, ())))
    refuse(_transposed(model) | {
        "the model has none (lora.rank=0); launch/convert.py to-hf exports it": not lora.rank,
        f"lora.dora=true: PEFT has no DoRA for experts{cure}": on_experts and lora.dora,
        f"lora.targets names one of gate_proj and up_proj: transformers 5 fuses them{cure}":
            on_experts and len(targets & {"gate_proj", "up_proj"}) == 1,
        f"lora.targets names MLPs, and some layers are dense beside the experts: PEFT takes all of them for experts{cure}":
            on_experts and not all(model.moe_layers),
        f"lora.targets names {', '.join(fused)}: a Hugging Face {model.family} fuses q, k and v (gate and up), and PEFT's adapter with them{cure}": bool(fused),
        f"lora.targets names MLPs, and there are shared experts beside the others: PEFT takes all of them for experts{cure}":
            on_experts and model.moe.shared_expert_ffn_hidden_size > 0,
        f"lora.targets names MLPs: a Hugging Face gpt_oss lets rows of gate and up take turns in one parameter{cure}":
            on_experts and model.family == "gpt_oss",
    }, "PEFT cannot express these adapters")


FUSED = {"phi3": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")}
"""Parts that a family's Hugging Face form has one layer for several of."""


def _transposed(model: Model) -> dict[str, bool]:
    return {f"model.family={model.family}: its Hugging Face form fuses q, k and v and transposes every matrix (Conv1D); convert merged models":
            model.family == "gpt2"}


def _for_peft(model: Model, lora: Lora) -> Lora:
    """`lora` as it goes into adapter_config.json. PEFT doubles rank and alpha where it fuses experts, which keeps alpha / rank alone."""
    check_expressible(model, lora)
    if lora.rslora and model.moe.num_experts:
        return lora.model_copy(update={"rslora": False, "alpha": adapters.scale(lora) * lora.rank})
    return lora


def _hf_names(model: Model, lora: Lora) -> dict[str, str]:
    """Engine name -> PEFT name of every adapter tensor, in model order."""
    kinds = KINDS if lora.dora else {kind: KINDS[kind] for kind in ("A", "B")}
    names = {}
    for pair in FAMILIES[model.family].pairs(model):
        layer = pair.engine.removesuffix(".weight")
        parts = adapters.parts_of(layer.rpartition(".")[2], model)
        if layer != pair.engine:
            names |= {f"{layer}{adapters.MARK}{part}.{kind}": PREFIX + hf.removesuffix("weight") + suffix
                      for part, hf in _layers(parts, pair) if part in lora.targets for kind, suffix in kinds.items()}
    return names


def _layers(parts: tuple[str, ...], pair: Pair) -> Iterator[tuple[str, str]]:
    """(part of an engine matrix, name of the HF layer's weight); none where HF fuses parts or stacks experts."""
    return zip(parts, pair.hf) if len(parts) == len(pair.hf) and all(hf.endswith(".weight") for hf in pair.hf) else iter(())


def other_base(folder: Path, base: Path) -> str:
    """The base model that an adapter_config.json names where it cannot be the one in the folder `base`; empty where it may be.

    The same folder, the same last part of the name, or a name of the hub's cache (models--org--name) may be.
    """
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ""
    known = {*base.resolve().parts[-1:], *(part.removeprefix("models--").split("--")[-1] for part in base.resolve().parts if part.startswith("models--")),
             Path(str(read_json(base / "config.json").get("_name_or_path", ""))).name}
    return "" if Path(named).name in known else named


def _config(lora: Lora, names: Mapping[str, str], base_name: str) -> dict[str, Any]:
    """adapter_config.json; PEFT's defaults stand for what is not there."""
    modules = {name.split(".")[-3] for name in names.values() if name.endswith(KINDS["A"])}
    has_head = any(name in names for name in VALUE_HEAD)
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM", "base_model_name_or_path": base_name,
        "r": lora.rank, "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha, "lora_dropout": lora.dropout,
        "target_modules": sorted(modules), "modules_to_save": ["score"] if has_head else None, "bias": "none", "fan_in_fan_out": False,
        "use_dora": lora.dora, "use_rslora": lora.rslora, "init_lora_weights": True, "inference_mode": True,
    }


def _check_shapes(folder: Path, model: Model, lora: Lora, tensors: Mapping[str, Tensor]) -> None:
    missing = [name for name in _hf_names(model, lora) if name not in tensors]
    problems = [f"{len(missing)} tensors missing: {some(missing)}"] if missing else []
    for pair in FAMILIES[model.family].pairs(model):
        layer = pair.engine.removesuffix(".weight")
        for part, hf in _layers(adapters.parts_of(layer.rpartition(".")[2], model), pair):
            shape = pair.hf[hf]
            wanted = {"A": (lora.rank, shape[-1]), "B": (shape[0], lora.rank), "magnitude": (shape[0],)}
            for kind, size in wanted.items():
                tensor = tensors.get(f"{layer}{adapters.MARK}{part}.{kind}")
                if tensor is not None and tuple(tensor.shape) != size:
                    problems.append(f"{layer}{adapters.MARK}{part}.{kind} has shape {list(tensor.shape)}, the model makes it {list(size)}")
    if problems:
        raise HFError(f"{folder} does not fit the model: {'; '.join(problems[:4])}")
