"""What the families share between config.json and `config.Model`: required keys, refusals, heads, RoPE in both spellings.

A config.json enters as the dict json.load returned; keys of config.Model leave, and the other way round. transformers 4.x
reads `rope_theta` and `rope_scaling`, 5.x `rope_parameters`; likewise `torch_dtype` and `dtype`. We write all of them and read
whichever is there. No torch here. Left out, and refused: RoPE of part of a head, but for a family
that knows it (phi3.py), and types with no `model.rope_scaling.kind`.
"""

import math
from typing import Any, Mapping

from pydantic import ValidationError

from engine.config import Model
from engine.stage_sections import RopeScaling


class HFError(ValueError):
    """A folder or a model that cannot be converted; str() says why and what to do."""


def refuse(problems: Mapping[str, bool], what: str) -> None:
    """Raise one HFError naming every problem whose flag is True; `what` opens the sentence."""
    found = [text for text, is_problem in problems.items() if is_problem]
    if found:
        raise HFError(f"{what}: " + "; ".join(found))


# What few architectures have, and so nearly all must refuse: fields of config.Model with the value that stands for none.
_RARE = dict(norm_place="pre", norm_zero_centered=False, scale_embeddings=False, logits_softcap=0.0, attention_softcap=0.0,
             query_pre_attn_scalar=0.0, attention_sinks=False, rope_local_theta=0.0)


def differing(model: Model, is_deepseek: bool = False, has_mtp: bool = False, **fixed) -> dict[str, bool]:
    """Fields of `model` that an architecture has another value of, as problems for `refuse`. fixed: those of its own, None for any value;
    what few architectures have is off where it is not named. is_deepseek: does it have latent attention and grouped experts? has_mtp:
    layers for further tokens?"""
    wanted = {name: value for name, value in {**_RARE, **fixed}.items() if value is not None}
    return {
        **{f"model.{name}={_spelled(getattr(model, name))}": getattr(model, name) != value for name, value in wanted.items()},
        f"model.mla.kv_lora_rank={model.mla.kv_lora_rank}": model.is_latent and not is_deepseek,
        f"model.mtp.num_layers={model.mtp.num_layers}": model.mtp.num_layers > 0 and not has_mtp,
        f"model.moe.num_groups={model.moe.num_groups}": model.moe.num_experts > 0 and model.moe.num_groups > 0 and not is_deepseek,
    }


def _spelled(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def need(hf: Mapping[str, Any], *keys: str) -> list[Any]:
    """The numbers under `keys`; HFError names all that config.json lacks (or sets to null)."""
    missing = [key for key in keys if hf.get(key) is None]
    if missing:
        raise HFError(f"config.json lacks {', '.join(missing)}")
    refuse({f"{key}={hf[key]!r} is not a number": type(hf[key]) not in (int, float) for key in keys}, "config.json")
    return [hf[key] for key in keys]


def refuse_texts(hf: Mapping[str, Any]) -> None:
    """Raise HFError for numbers that are spelled as texts, also among the RoPE parameters, as YAML's readers leave 1e-5."""
    found, inner = {}, [hf, *(hf.get(key) for key in ("rope_scaling", "rope_parameters"))]
    inner += [value for mapping in inner[1:] if isinstance(mapping, dict) for value in mapping.values()]
    for mapping in (mapping for mapping in inner if isinstance(mapping, dict)):
        found |= {f"{key}={value!r} is a text where a number belongs; write {value.strip()}": True for key, value in mapping.items()
                  if isinstance(value, str) and _is_number(value) and not key.startswith("_") and not key.endswith(("version", "revision"))}
    refuse(found, "config.json")


def _is_number(text: str) -> bool:
    try:
        return bool(text) and math.isfinite(float(text))
    except ValueError:
        return False


def count(hf: Mapping[str, Any], key: str, default: int, least: int = 0) -> int:
    """The whole number under `key`, or transformers' default where it is left out or null; HFError for anything else."""
    value = default if hf.get(key) is None else hf[key]
    refuse({f"{key}={value!r} is not a whole number of {least} or more": type(value) is not int or value < least}, "config.json")
    return value


def to_model(fields: Mapping[str, Any]) -> Model:
    """A Model from a family's model_fields; HFError for values that no model can have, such as a negative size."""
    try:
        model = Model.model_validate(fields)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise HFError("config.json describes no model: " + "; ".join(wrong)) from None
    refuse({
        f"{model.num_attention_heads} heads do not divide the hidden size {model.hidden_size} and there is no head_dim":
            not (model.head_dim or model.is_latent) and model.hidden_size % model.num_attention_heads != 0,
        f"{model.kv_heads} key/value heads do not divide {model.num_attention_heads} query heads":
            model.num_attention_heads % model.kv_heads != 0,
    }, "config.json describes no model")
    scaling, dims = model.rope_scaling, model.rope_dims
    pairs = dims // 2
    refuse({f"RoPE rotates pairs, but {dims} dims of a head are to be rotated": model.position == "rope" and dims % 2 != 0},
           "config.json describes no model")
    refuse({f"RoPE type longrope has {len(factors)} entries in {name}, but a head has {pairs} pairs": len(factors) != pairs
            for name, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor))
            if scaling.kind == "longrope"}, "config.json describes no model")
    return model


def classifier(architecture: str) -> str:
    """The HF architecture with a scalar head that goes with one for tokens: AutoModelForSequenceClassification's."""
    if architecture == "Gemma3ForCausalLM":  # without Text it is the vision model's
        return "Gemma3TextForSequenceClassification"
    return architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + "ForSequenceClassification"


def named(architecture: str, model_type: str, model: Model) -> dict[str, Any]:
    """The keys by which transformers finds the classes of `model`: a scalar head is a classifier with one label."""
    if model.head == "scalar":
        return {"architectures": [classifier(architecture)], "model_type": model_type, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {"architectures": [architecture], "model_type": model_type}


def head_of(hf: Mapping[str, Any]) -> str:
    """`head` of config.Model. Raises HFError for a classifier that gives more than one number."""
    if not (hf.get("architectures") or [""])[0].endswith("ForSequenceClassification"):
        return "tokens"
    labels = len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2)
    refuse({f"num_labels={labels} is not supported; a reward model has 1": labels != 1}, "config.json")
    return "scalar"


def dtype_keys(dtype: str) -> dict[str, str]:
    """`float32`, `bfloat16` or `float16` under both of its names."""
    return {"torch_dtype": dtype, "dtype": dtype}


def rope_keys(model: Model) -> dict[str, Any]:
    """RoPE of `model` under the keys of transformers 4.x and of 5.x (modeling_rope_utils.py).

    Holds max_position_embeddings too where transformers takes the original length from it (dynamic).
    """
    scaling, theta = model.rope_scaling, model.rope_theta
    if scaling.kind == "ntk":
        # transformers knows no fixed NTK, which only changes the base period: it is written as that period, without a scaling.
        dims = model.rope_dims
        theta, scaling = theta * scaling.factor ** (dims / (dims - 2)), RopeScaling()
    parameters = {"rope_type": "default" if scaling.kind == "none" else scaling.kind}
    for ours, theirs in _ROPE_NAMES.get(scaling.kind, {}).items():
        value = getattr(scaling, ours)
        if value or ours not in _ROPE_UNSET:
            parameters[theirs] = value
    keys = {
        "rope_theta": theta,
        "rope_scaling": None if scaling.kind == "none" else dict(parameters),
        "rope_parameters": {**parameters, "rope_theta": theta},
    }
    return keys | ({"max_position_embeddings": scaling.original_max_position} if scaling.kind == "dynamic" else {})


def rope_fields(hf: Mapping[str, Any], default_theta: float, has_partial: bool = False) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_percent` of config.Model; rope_scaling wins over rope_parameters, as in transformers 5.

    default_theta: the base period transformers takes when config.json names none. has_partial: does the family know partial_rotary_factor?
    Raises HFError for a type, or a partial rotation, that the engine would not reproduce.
    """
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise HFError(f"config.json: the RoPE parameters are {rope!r}, not a mapping")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    refuse({
        f"RoPE type {kind!r} is not supported (default, {', '.join(_ROPE_NAMES)} are)": kind != "default" and kind not in _ROPE_NAMES,
        f"partial_rotary_factor={partial} is not supported (only 1.0 is)": partial != 1.0 and not has_partial,
    }, "config.json")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or default_theta
    found = {"rope_theta": theta, **({"rope_percent": partial} if partial != 1.0 else {})}
    return found if kind == "default" else found | {"rope_scaling": {"kind": kind, **_scaling_fields(kind, rope, hf)}}


# The parameters of each type: our field -> transformers' key.
_FACTOR, _ORIGINAL = {"factor": "factor"}, {"original_max_position": "original_max_position_embeddings"}
_ROPE_NAMES = {
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "yarn": _FACTOR | _ORIGINAL | {name: name for name in ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim",
                                                           "attention_factor")},
    "longrope": _FACTOR | _ORIGINAL | {name: name for name in ("short_factor", "long_factor", "attention_factor")},
    "llama3": _FACTOR | _ORIGINAL | {name: name for name in ("low_freq_factor", "high_freq_factor")},
}
_ROPE_UNSET = ("mscale", "mscale_all_dim", "attention_factor")  # 0 stands for a key that is left out
_ROPE_OPTIONAL = _ROPE_UNSET + ("beta_fast", "beta_slow", "truncate")  # transformers' defaults are ours


def _scaling_fields(kind: str, rope: Mapping[str, Any], hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RopeScaling that this type reads, completed as transformers completes them."""
    rope = dict(rope)
    if kind == "dynamic":
        return {"factor": need(rope, "factor")[0], "original_max_position": need(hf, "max_position_embeddings")[0]}
    if kind in ("yarn", "longrope", "llama3"):  # a length beside the parameters goes before one in them; without either it is today's
        original = hf.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or need(hf, "max_position_embeddings")[0]
    if kind in ("yarn", "longrope") and rope.get("factor") is None:
        rope["factor"] = need(hf, "max_position_embeddings")[0] / need(rope, "original_max_position_embeddings")[0]
    names = _ROPE_NAMES[kind]
    lists = [name for name in ("short_factor", "long_factor") if name in names]
    need(rope, *(key for name, key in names.items() if name not in (*_ROPE_OPTIONAL, *lists)))
    refuse({f"RoPE type {kind} lacks {name}": not rope.get(name) for name in lists}, "config.json")
    return {name: rope[key] for name, key in names.items() if rope.get(key) is not None}
