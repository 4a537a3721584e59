"""Qwen2 and Qwen2.5: Qwen2ForCausalLM of transformers, a Llama with biases on q, k and v (arXiv 2407.10671).

As in llama.py. The sliding window holds in the layers from max_window_layers on, and only where use_sliding_window is true, which it is in no
published model of this family; `layer_types` says the same layer by layer.
Left out, and refused: windows in other patterns, an output bias, mixtures of experts.
"""

from functools import partial
from typing import Any, Mapping

from engine.config import Model
from engine.hf import llama, names
from engine.hf.fields import count, named, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Qwen2ForCausalLM", "qwen2"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Qwen2ForCausalLM cannot express the model."""
    refuse(llama.inexpressible(model, qkv_bias=True, linear_bias=False) | windows_alternate(model) | llama.has_experts(model),
           f"{ARCHITECTURE} cannot express this model")
    return llama.common_config(model, seq_len, dtype) | window_config(model) | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "intermediate_size": model.ffn_hidden_size,
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    return llama.common_fields(hf, rms_norm_eps=1e-6, rope_theta=10000.0) | window_fields(hf) | {
        "family": "qwen2",
        "max_position": hf.get("max_position_embeddings", 32768),
        "num_query_groups": llama.groups(hf, hf.get("num_key_value_heads", 32)),
        "qkv_bias": True,
    }


def pairs(model: Model) -> list[Pair]:
    """The tensors of Qwen2ForCausalLM, in model order."""
    return llama.trunk(model, llama.mlp, attention=partial(llama.llama_attention, has_output_bias=False))


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))


# --- shared with Qwen3 ---


def windows_alternate(model: Model) -> dict[str, bool]:
    return {f"model.sliding_window_freq={model.sliding_window_freq}": model.sliding_window > 0 and model.sliding_window_freq != 1}


def window_config(model: Model) -> dict[str, Any]:
    """Keys of config.json for a window in the layers from model.full_attention_layers on."""
    return {
        "use_sliding_window": model.sliding_window > 0,
        "sliding_window": model.sliding_window or None,
        "max_window_layers": model.full_attention_layers if model.sliding_window else model.num_layers,
    }


def window_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` and `full_attention_layers` of config.Model. Raises HFError for layers that take turns."""
    layers, window = hf["num_hidden_layers"], hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    types = hf.get("layer_types") or None
    first = count(hf, "max_window_layers", 28) if types is None else list(types).count("full_attention")
    if types is not None:
        has_windows_last = list(types) == ["full_attention"] * first + ["sliding_attention"] * (layers - first)
        refuse({f"layer_types={types} has windows in other layers than the last ones": not has_windows_last,
                f"layer_types names {layers - first} layers with a sliding window, but use_sliding_window is not true":
                    window is None and first < layers}, "config.json")
    return {} if not window or first >= layers else {"sliding_window": window, "full_attention_layers": first}
