"""The sections of a configuration about what is kept of a run.

engine/config.py puts them into RunConfig; docs/checkpoints.md tells how they work together. As there: one field, one sentence, no torch.
"""

from typing import Literal

from pydantic import Field

from engine.section import Section


class Checkpoint(Section):
    load: str = ""
    """A run's checkpoints folder or one iter_ folder to start from; empty resumes run.dir when it holds a checkpoint."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 saves only at the end."""
    save_at_end: bool = True
    """Save when training stops."""
    async_save: bool = False
    """Copy what is to be saved and write it in the background while training goes on."""
    keep_last: int = Field(0, ge=0)
    """Delete all but this many of the newest checkpoints (and what also_save_hf made of them), once a newer one is written; 0 keeps all."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of every so many steps are kept whatever checkpoint.keep_last says; 0 makes no exceptions."""
    failures_allowed: int = Field(2, ge=0)
    """Saves in a row that may fail for lack of space, or because of the disk, before training stops."""
    verify: bool = True
    """Compare every file with the hashes it was written with before a checkpoint is loaded."""
    also_save_hf: bool = False
    """Write a Hugging Face folder beside every checkpoint: run.dir/hf/iter_0000100."""
    load_optimizer: bool = True
    """False starts the optimizer afresh, and with it the schedule and the data position."""
    load_position: bool = True
    """False starts the schedule and the data position afresh; only stage pretrain goes on where the checkpoint stopped."""
    roles: dict[str, str] = {}
    """Checkpoints of single roles of a stage, such as {reference: DIR}; the others load checkpoint.load."""
    grow_vocab: bool = True
    """Let a larger model.vocab_size take a checkpoint; new rows start at the mean of the old ones."""


class Faults(Section):
    hang_seconds: float = Field(900, ge=0)
    """A rank that ends no step, validation batch or save for so long has its stacks written and the run fails; from the second step on. 0: off."""
    nonfinite: Literal["skip", "stop"] = "skip"
    """A loss or gradient that is NaN or infinite: skip that update on all ranks, or stop. What fp16's loss scaler skips is not meant."""
    max_skips_in_row: int = Field(3, ge=1)
    """Training stops when so many updates of a role in a row were to be skipped, for either reason."""
    spike: Literal["off", "warn", "skip", "rollback"] = "warn"
    """A loss far above the recent ones: tell it; skip that update; or go back to a checkpoint and on with the data behind it."""
    spike_window: int = Field(64, ge=8)
    """Recent losses that a new one is held against; nothing is judged before half of them are known."""
    spike_factor: float = Field(8, gt=0)
    """How far above their median is a spike, in standard deviations as their median absolute deviation estimates them."""
    rollback_steps: int = Field(20, ge=1)
    """rollback: go back at least so many steps."""
    max_rollbacks: int = Field(3, ge=1)
    """rollback: training stops at the next spike after so many."""
    replica_check_every: int = Field(0, ge=0)
    """Steps between comparisons of the weights of ranks that must hold the same ones, bit for bit; 0: none."""
    replica_mismatch: Literal["stop", "warn"] = "stop"
    """What follows where they differ."""
