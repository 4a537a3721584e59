"""Which parts of a model only the torch layer backend has; engine/checks.py refuses the others by name, mcore/build.py chooses it. No torch here."""


def reasons(model) -> list[str]:
    """The parts by the keys that ask for them; empty where Transformer Engine's layers do as well."""
    parts = {
        f"model.mla.kv_lora_rank={model.mla.kv_lora_rank} (latent attention)": model.is_latent,
    }
    return [name for name, is_asked in parts.items() if is_asked]
