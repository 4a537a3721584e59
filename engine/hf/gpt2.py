"""GPT-2: GPT2LMHeadModel of transformers.

config.json enters and keys of config.Model leave (`model_fields`), and back (`hf_config`); tensors go through the Pairs below.
HF keeps linear layers as Conv1D, [in, out], so every matrix is transposed; its c_attn is [all q | all k | all v], the engine's
linear_qkv goes head by head. Folders from before the `transformer.` prefix are read too, and the stored causal masks passed over.
Left out, and refused: cross-attention, attention scaled by layer, the exact (erf) GELU, anything but learned positions.
"""

from typing import Any, Iterator, Mapping

import torch
from torch import Tensor

from engine.config import Model
from engine.hf import names
from engine.hf.fields import differing, dtype_keys, head_of, named, need, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "GPT2LMHeadModel", "gpt2"
EMBEDDING = "transformer.wte.weight"
POSITIONS = "embedding.position_embeddings.weight"

ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu", "squared_relu": "relu2", "silu": "silu"}
HF_ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "relu2": "squared_relu", "silu": "silu"}


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x.

    seq_len: tokens per training sample, the number of positions where model.max_position is 0.
    Raises HFError where GPT2LMHeadModel cannot express the model.
    """
    refuse({
        f"model.norm={model.norm}": model.norm != "layernorm",
        f"model.activation={model.activation}": model.activation not in ACTIVATIONS,
        f"model.position={model.position}": model.position != "learned",
        "model.linear_bias=false": not model.linear_bias,
        f"model.num_query_groups={model.num_query_groups}": model.kv_heads != model.num_attention_heads,
        f"model.head_dim={model.head_dim}": model.head_size * model.num_attention_heads != model.hidden_size,
        "model.qk_norm=true": model.qk_norm,
        f"model.sliding_window={model.sliding_window}": model.sliding_window > 0,
        f"model.moe.num_experts={model.moe.num_experts}": model.moe.num_experts > 0,
    } | differing(model), f"{ARCHITECTURE} cannot express this model")
    return {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position or seq_len,
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.norm_eps,
        "initializer_range": model.init_std,
        "resid_pdrop": model.hidden_dropout,
        "embd_pdrop": model.hidden_dropout,
        "attn_pdrop": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        **dtype_keys(dtype),
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    vocab, hidden, layers, heads = need(hf, "vocab_size", "n_embd", "n_layer", "n_head")
    activation = hf.get("activation_function", "gelu_new")
    refuse({
        f"activation_function={activation!r} is not supported ({', '.join(HF_ACTIVATIONS)} are)": activation not in HF_ACTIVATIONS,
        "scale_attn_weights=false is not supported": not hf.get("scale_attn_weights", True),
        "scale_attn_by_inverse_layer_idx=true is not supported": bool(hf.get("scale_attn_by_inverse_layer_idx")),
        "add_cross_attention=true is not supported": bool(hf.get("add_cross_attention")),
    }, "config.json")
    return {
        "family": "gpt2",
        "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": hf.get("n_inner") or 4 * hidden,
        "num_attention_heads": heads, "vocab_size": vocab, "max_position": hf.get("n_positions", 1024),
        "norm": "layernorm", "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
        "activation": HF_ACTIVATIONS[activation], "position": "learned",
        "qkv_bias": True, "linear_bias": True, "head": head_of(hf),
        "tie_embeddings": bool(hf.get("tie_word_embeddings", True)),
        "hidden_dropout": hf.get("resid_pdrop", 0.1), "attention_dropout": hf.get("attn_pdrop", 0.1),
        "init_std": hf.get("initializer_range", 0.02),
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of GPT2LMHeadModel, in model order; model.max_position must be set."""
    h = model.hidden_size
    found = [names.vocabulary("embedding.word_embeddings.weight", EMBEDDING, model),
             names.same(POSITIONS, "transformer.wpe.weight", model.max_position, h)]
    for i in range(model.num_layers):
        found += _layer(model, f"decoder.layers.{i}.", f"transformer.h.{i}.")
    found += _norm(model, "decoder.final_layernorm.", "transformer.ln_f.")
    return found + names.head(model)


def to_hf(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Engine tensors -> HF (name, tensor)."""
    if not model.max_position and POSITIONS in tensors:  # 0 means train.seq_len, which only the tensor tells here
        model = model.model_copy(update={"max_position": tensors[POSITIONS].shape[0]})
    return names.to_hf(pairs(model), tensors)


def from_hf(model: Model, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """HF tensors -> engine (name, tensor)."""
    return names.from_hf(pairs(model), tensors)


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


def canonical(name: str) -> str:
    """The name as transformers writes it today; empty for a stored buffer that is no weight."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return ""
    return name if name.startswith(("transformer.", "lm_head.", "score.")) else "transformer." + name


def _layer(model: Model, engine: str, hf: str) -> list[Pair]:
    h, ffn = model.hidden_size, model.ffn_hidden_size
    attention, mlp = engine + "self_attention.", engine + "mlp."
    return [
        *_norm(model, engine + "input_layernorm.", hf + "ln_1."),
        *_qkv(model, attention + "linear_qkv.", hf + "attn.c_attn."),
        *_linear(attention + "linear_proj.", hf + "attn.c_proj.", h, h),
        *_norm(model, engine + "pre_mlp_layernorm.", hf + "ln_2."),
        *_linear(mlp + "linear_fc1.", hf + "mlp.c_fc.", ffn, h),
        *_linear(mlp + "linear_fc2.", hf + "mlp.c_proj.", h, ffn),
    ]


def _norm(model: Model, engine: str, hf: str) -> list[Pair]:
    return [names.same(engine + part, hf + part, model.hidden_size) for part in ("weight", "bias")]


def _linear(engine: str, hf: str, rows: int, cols: int) -> list[Pair]:
    return [names.transposed(engine + "weight", hf + "weight", rows, cols), names.same(engine + "bias", hf + "bias", rows)]


def _qkv(model: Model, engine: str, hf: str) -> list[Pair]:
    h = model.hidden_size
    weight = Pair(engine + "weight", {hf + "weight": (h, 3 * h)}, lambda t: _by_head(model, t.T),
                  lambda t: (_by_part(model, t).T,))
    bias = Pair(engine + "bias", {hf + "bias": (3 * h,)}, lambda t: _by_head(model, t), lambda t: (_by_part(model, t),))
    return [weight, bias]


def _by_head(model: Model, stacked: Tensor) -> Tensor:
    """[all q; all k; all v] -> linear_qkv."""
    return names.fuse_qkv(model, *stacked.chunk(3))


def _by_part(model: Model, fused: Tensor) -> Tensor:
    """linear_qkv -> [all q; all k; all v]."""
    return torch.cat(names.split_qkv(model, fused))
