"""What adapters there can be: Hugging Face's linear layers, where they lie in the engine's fused matrices, and what is no legal `lora`.

    for part, rows in block_of("linear_qkv", model, num_rows).items(): ...

The engine multiplies by q, k and v (gate and up) at once; an adapter belongs to one of them, as in PEFT. No torch here: checks.py,
mcore/lora.py and hf/peft.py read one table.
"""

from typing import Iterator

MARK = ".lora."  # in the name of every adapter parameter: <linear>.lora.<part>.A

PARTS = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
_VOCABULARY = ("embed_tokens", "lm_head", "wte", "embedding", "output_layer")


def parts_of(linear: str, model) -> tuple[str, ...]:
    """The Hugging Face layers fused into one linear layer of the engine; none for a layer that takes no adapter."""
    parts = PARTS.get(linear, ())
    if linear == "linear_qkv" and model.is_latent:
        return ()  # latent attention has no such layer, and its own ones take no adapter
    return parts if linear != "linear_fc1" or model.gated else parts[1:]


def legal_targets(model) -> list[str]:
    return [part for linear in PARTS for part in parts_of(linear, model)]


def block_of(linear: str, model, num_rows: int) -> dict[str, int]:
    """Rows of each part within one block of the fused matrix; its num_rows rows (whole, or one tp rank's) are blocks of that size.

    linear_qkv: a block is one key/value group, [its query heads, key, value]. linear_fc1: one block, [gate, up]. Others: one part.
    """
    if linear == "linear_qkv":
        heads = model.num_attention_heads // model.kv_heads
        return {"q_proj": heads * model.head_size, "k_proj": model.head_size, "v_proj": model.head_size}
    parts = parts_of(linear, model)
    return {part: num_rows // len(parts) for part in parts}


def scale(lora) -> float:
    """What the product B A is multiplied by: alpha / rank (arXiv 2106.09685, sec. 4.1), or alpha / sqrt(rank) (arXiv 2312.03732)."""
    return lora.alpha / (lora.rank ** 0.5 if lora.rslora else lora.rank)


def problems(run) -> Iterator[str]:
    """What is wrong with the `lora` section, one sentence each."""
    lora, model = run.lora, run.model
    if not lora.rank:
        return
    legal = legal_targets(model)
    if not lora.targets:
        yield f"lora.rank={lora.rank}, but lora.targets is empty; legal: {', '.join(legal)}"
    for target in lora.targets:
        if target in _VOCABULARY:
            yield f"lora.targets: {target} belongs to the vocabulary, which takes no adapter here; leave it out (legal: {', '.join(legal)})"
        elif target not in legal:
            why = ", whose latent attention takes no adapters" if model.is_latent else f" (activation {model.activation})"
            yield f"lora.targets: {target} is no linear layer of this model{why}; legal: {', '.join(legal)}"
    small = {name: min(dims) for name, dims in _dims(model) if name in lora.targets and min(dims) < lora.rank}
    if small:
        yield (f"lora.rank({lora.rank}) exceeds the smaller dim of {', '.join(f'{name}({width})' for name, width in small.items())}; "
               f"set lora.rank to {min(small.values())} or less")
    tune = run.tune
    if tune.freeze or tune.unfreeze_every or tune.layer_lr_decay != 1 or tune.l2_to_init:
        yield (f"lora.rank={lora.rank} freezes the whole model, so tune.freeze, unfreeze_every, layer_lr_decay and l2_to_init have nothing to "
               "act on; leave them out, or set lora.rank=0")
    yield from _backend_problems(run)


def _dims(model) -> Iterator[tuple[str, tuple[int, int]]]:
    hidden, queries, keys = model.hidden_size, model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    yield from {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, model.num_attention_heads * model.value_size)}.items()
    widths = [model.ffn_hidden_size] if not all(model.moe_layers) else []
    widths += [model.moe_ffn_hidden_size] if any(model.moe_layers) else []
    widths += [model.moe.shared_expert_ffn_hidden_size] if any(model.moe_layers) and model.moe.shared_expert_ffn_hidden_size else []
    for part in ("gate_proj", "up_proj", "down_proj"):
        yield part, (hidden, min(widths))


def _backend_problems(run) -> Iterator[str]:
    if run.train.backend == "te":
        yield f"lora.rank={run.lora.rank}: adapters sit on the layers of the torch backend; set train.backend=torch"
    if run.train.fp8.recipe != "none":
        yield f"lora.rank={run.lora.rank}: adapters need the torch backend, which has no FP8; set train.fp8.recipe=none"
    if run.parallel.tp_comm_overlap:
        yield f"lora.rank={run.lora.rank}: adapters need the torch backend; set parallel.tp_comm_overlap=false"
