"""Which parts of a model only the torch layer backend has; engine/checks.py refuses the others by name, mcore/build.py chooses it. No torch here."""

from collections.abc import Iterator


def reasons(model) -> list[str]:
    """The parts by the keys that ask for them; empty where Transformer Engine's layers do as well."""
    parts = {
        f"model.attention_softcap={model.attention_softcap:g}": model.attention_softcap > 0,
    }
    return [name for name, is_asked in parts.items() if is_asked]


def limits(run) -> Iterator[str]:
    """What is wrong under Transformer Engine with document masks, sinks and fp32. Not a check of every configuration: train.backend=auto takes it only
    where it is."""
    is_packed = run.stage == "sft" and run.chat.pack
    switch = "chat.pack=false" if is_packed else "data.reset_at_eod=false"
    if (is_packed or run.data.reset_at_eod) and run.train.micro_batch > 1:
        yield (f"the te backend takes document masks with train.micro_batch=1, not {run.train.micro_batch}: documents are laid "
               f"end to end anyway; set micro_batch=1 with a longer seq_len, {switch}, or train.backend=torch")
    if (is_packed or run.data.reset_at_eod) and run.parallel.cp > 1:
        yield (f"the te backend has no document masks under context parallel (parallel.cp={run.parallel.cp}); set cp=1, "
               f"{switch}, or train.backend=torch")
    if run.train.precision == "fp32" and run.parallel.cp > 1:
        yield (f"the te backend has no attention in fp32 under context parallel (parallel.cp={run.parallel.cp}); set train.precision=bf16, cp=1, or "
               "train.backend=torch")
    if run.model.attention_sinks and run.parallel.cp > 1:
        yield (f"the te backend has no model.attention_sinks under context parallel (parallel.cp={run.parallel.cp}), whose ring knows none; set cp=1, or "
               "train.backend=torch")
