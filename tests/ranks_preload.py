"""Imported once by the fork server of ranks.py, so that no rank imports megatron again."""

from engine.mcore import cpu

cpu.install()

import engine.mcore.checkpoint  # noqa: E402, F401
import engine.mcore.run  # noqa: E402, F401
