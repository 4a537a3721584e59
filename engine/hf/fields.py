"""What the families share between config.json and `config.Model`: required keys, refusals, RoPE in both spellings.

A config.json enters as the dict json.load returned; keys of config.Model leave, and the other way round. transformers 4.x
reads `rope_theta` and `rope_scaling`, 5.x `rope_parameters`; likewise `torch_dtype` and `dtype`. We write all of them and read
whichever is there. No torch here. Left out: RoPE types that the engine does not build (dynamic, yarn, longrope); they are refused.
"""

from typing import Any, Mapping

from pydantic import ValidationError

from engine.config import Model


class HFError(ValueError):
    """A folder or a model that cannot be converted; str() says why and what to do."""


def refuse(problems: Mapping[str, bool], what: str) -> None:
    """Raise one HFError naming every problem whose flag is True; `what` opens the sentence."""
    found = [text for text, is_problem in problems.items() if is_problem]
    if found:
        raise HFError(f"{what}: " + "; ".join(found))


def need(hf: Mapping[str, Any], *keys: str) -> list[Any]:
    """The numbers under `keys`; HFError names all that config.json lacks (or sets to null)."""
    missing = [key for key in keys if hf.get(key) is None]
    if missing:
        raise HFError(f"config.json lacks {', '.join(missing)}")
    refuse({f"{key}={hf[key]!r} is not a number": type(hf[key]) not in (int, float) for key in keys}, "config.json")
    return [hf[key] for key in keys]


def to_model(fields: Mapping[str, Any]) -> Model:
    """A Model from a family's model_fields; HFError for values that no model can have, such as a negative size."""
    try:
        model = Model.model_validate(fields)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise HFError("config.json describes no model: " + "; ".join(wrong)) from None
    refuse({
        f"{model.num_attention_heads} heads do not divide the hidden size {model.hidden_size} and there is no head_dim":
            not model.head_dim and model.hidden_size % model.num_attention_heads != 0,
        f"{model.kv_heads} key/value heads do not divide {model.num_attention_heads} query heads":
            model.num_attention_heads % model.kv_heads != 0,
    }, "config.json describes no model")
    return model


def dtype_keys(dtype: str) -> dict[str, str]:
    """`float32`, `bfloat16` or `float16` under both of its names."""
    return {"torch_dtype": dtype, "dtype": dtype}


def rope_keys(model: Model) -> dict[str, Any]:
    """RoPE of `model` under the keys of transformers 4.x and of 5.x (modeling_rope_utils.py)."""
    scaling = model.rope_scaling
    parameters = {"rope_type": "default" if scaling.kind == "none" else scaling.kind}
    if scaling.kind != "none":
        parameters["factor"] = scaling.factor
    if scaling.kind == "llama3":
        parameters["low_freq_factor"] = scaling.low_freq_factor
        parameters["high_freq_factor"] = scaling.high_freq_factor
        parameters["original_max_position_embeddings"] = scaling.original_max_position
    return {
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling.kind == "none" else dict(parameters),
        "rope_parameters": {**parameters, "rope_theta": model.rope_theta},
    }


def rope_fields(hf: Mapping[str, Any], default_theta: float) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of config.Model; rope_scaling wins over rope_parameters, as in transformers 5.

    default_theta: the base period transformers takes when config.json names none.
    Raises HFError for a type, or a partial rotation, that the engine would not reproduce.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise HFError(f"config.json: the RoPE parameters are {rope!r}, not a mapping")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    refuse({
        f"RoPE type {kind!r} is not supported (default, linear and llama3 are)": kind not in ("default", "linear", "llama3"),
        f"partial_rotary_factor={partial} is not supported (only 1.0 is)": partial != 1.0,
    }, "config.json")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or default_theta
    if kind == "default":
        return {"rope_theta": theta}
    scaling = {"kind": kind, "factor": need(rope, "factor")[0]}
    if kind == "llama3":
        low, high, original = need(rope, "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling |= {"low_freq_factor": low, "high_freq_factor": high, "original_max_position": original}
    return {"rope_theta": theta, "rope_scaling": scaling}
