"""Imported once by the fork server of ranks.py, so that no rank imports megatron again."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks are CPU ranks also where there is a GPU

from engine.mcore import cpu  # noqa: E402

cpu.install()

import engine.mcore.checkpoint  # noqa: E402, F401
import engine.mcore.run  # noqa: E402, F401
