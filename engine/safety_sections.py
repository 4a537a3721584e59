"""The sections of a configuration about what is kept of a run.

engine/config.py puts them into RunConfig; docs/checkpoints.md tells how they work together. As there: one field, one sentence, no torch.
"""

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
    """Delete all but this many of the newest checkpoints, once a newer one is written; 0 keeps all."""
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
