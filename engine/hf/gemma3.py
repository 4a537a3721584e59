"""Gemma 3, the text model: Gemma3ForCausalLM of transformers, Gemma 2 with q/k norms and two RoPEs (arXiv 2503.19786).

As in gemma2.py. Layers with a sliding window turn with the base period rope_local_theta and no scaling, the others with rope_theta;
transformers 4.x calls them rope_local_base_freq and rope_theta, 5.x keeps both under rope_parameters, by kind of layer.
Left out, and refused: capped attention logits (transformers names the field and reads it nowhere), the models with a vision tower
(Gemma3ForConditionalGeneration), and what gemma2.py refuses.
"""

from typing import Any, Mapping

from engine.config import Model
from engine.hf import gemma2, llama, names
from engine.hf.fields import named, need, refuse, to_model
from engine.hf.names import Pair, Shape

ARCHITECTURE, MODEL_TYPE = "Gemma3ForCausalLM", "gemma3_text"
EMBEDDING = llama.EMBEDDING


def hf_config(model: Model, seq_len: int, dtype: str = "float32") -> dict[str, Any]:
    """config.json of `model` for transformers 4.x and 5.x; see llama.py. Raises HFError where Gemma3ForCausalLM cannot express the model."""
    refuse(llama.inexpressible(model, qk_norm=True, **gemma2.FIXED, logits_softcap=None, query_pre_attn_scalar=None, rope_local_theta=None)
           | gemma2.common_problems(model), f"{ARCHITECTURE} cannot express this model")
    config = gemma2.common_config(model, seq_len, dtype)
    local = model.rope_local_theta or model.rope_theta
    return config | {
        **named(ARCHITECTURE, MODEL_TYPE, model),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": model.logits_softcap or None,
        "rope_local_base_freq": local,
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": {"rope_type": "default", "rope_theta": local}},
    }


def model_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of config.Model. Raises HFError for what the engine would compute differently."""
    both = hf.get("rope_parameters") or {}
    everywhere, local = (_mapping(both, kind) for kind in ("full_attention", "sliding_attention"))
    refuse({
        f"attn_logit_softcapping={hf.get('attn_logit_softcapping')}, which transformers ignores in this architecture, is not supported":
            bool(hf.get("attn_logit_softcapping")),
        f"RoPE type {local.get('rope_type')!r} of layers with a sliding window is not supported (default is)":
            local.get("rope_type", "default") != "default",
    }, "config.json")
    own = {key: value for key, value in hf.items() if key != "rope_parameters"}
    own |= {"rope_scaling": own.get("rope_scaling") or {key: value for key, value in everywhere.items() if key != "rope_theta"},
            "rope_theta": everywhere.get("rope_theta") or hf.get("rope_theta") or 1e6}
    (freq,) = need({"sliding_window_pattern": hf.get("sliding_window_pattern") or 6}, "sliding_window_pattern")
    fields = gemma2.common_fields(own, rope_theta=1e6, freq=freq)
    theta = local.get("rope_theta") or hf.get("rope_local_base_freq") or 10000.0
    return fields | {
        "family": "gemma3",
        "max_position": hf.get("max_position_embeddings", 131072),
        "qk_norm": True,
        "logits_softcap": hf.get("final_logit_softcapping") or 0.0,
        "rope_local_theta": theta if fields.get("sliding_window") else 0.0,
    }


def _mapping(rope: Any, kind: str) -> Mapping[str, Any]:
    """The RoPE parameters of one kind of layers."""
    found = rope.get(kind) or {} if isinstance(rope, dict) else rope
    refuse({f"the RoPE parameters of {kind} are {found!r}, not a mapping": not isinstance(found, dict)}, "config.json")
    return found


def pairs(model: Model) -> list[Pair]:
    """The tensors of Gemma3ForCausalLM, in model order."""
    return gemma2.pairs(model)


to_hf, from_hf = names.ways(pairs)
canonical = llama.canonical


def hf_shapes(hf: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a folder with this config.json must hold: HF name -> shape."""
    return names.hf_shapes(pairs(to_model(model_fields(hf))))
