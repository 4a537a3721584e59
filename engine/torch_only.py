"""Which parts of a model only the torch layer backend has; engine/checks.py refuses the others by name, mcore/build.py chooses it. No torch here."""

from collections.abc import Iterator


def reasons(model) -> list[str]:
    """The parts by the keys that ask for them; empty where Transformer Engine's layers do as well."""
    parts = {
        f"model.attention_softcap={model.attention_softcap:g}": model.attention_softcap > 0,
        "model.attention_sinks=true": model.attention_sinks,
        f"model.rope_local_theta={model.rope_local_theta:g}": model.rope_local_theta > 0,
        "model.norm_zero_centered=true": model.norm_zero_centered,
        "model.activation=clamped_swiglu": model.activation == "clamped_swiglu",
    }
    return [name for name, is_asked in parts.items() if is_asked]


def documents(run) -> Iterator[str]:
    """What is wrong with document masks under Transformer Engine. Not a check of every configuration: train.backend=auto takes it only where it is."""
    if run.data.reset_at_eod and run.train.micro_batch > 1:
        yield (f"the te backend takes document masks with train.micro_batch=1, not {run.train.micro_batch}: documents are laid "
               "end to end anyway; set micro_batch=1 with a longer seq_len, or train.backend=torch")
    if run.data.reset_at_eod and run.parallel.cp > 1:
        yield (f"the te backend has no document masks under context parallel (parallel.cp={run.parallel.cp}); set cp=1, "
               "data.reset_at_eod=false, or train.backend=torch")
