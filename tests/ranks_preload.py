"""Imported once by the fork server of ranks.py, so that no rank imports megatron again, nor what a run imports with its first step."""

import gc
import os

# what ranks.py put in front for this import alone; processes that ranks start see what the tests' own process does
_paths = os.environ.pop("PYTHONPATH").split(os.pathsep)[2:]
if _paths:
    os.environ["PYTHONPATH"] = os.pathsep.join(_paths)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the ranks are CPU ranks also where there is a GPU

from engine.mcore import cpu  # noqa: E402

cpu.install()

import engine.mcore.checkpoint  # noqa: E402, F401
import engine.mcore.run  # noqa: E402, F401

import torch._dynamo  # noqa: E402, F401  an optimizer imports it

import engine.stages.pretrain  # noqa: E402, F401
import engine.train  # noqa: E402, F401

# Each job of a rank ends with a full collection (topology.stop): 0.2 s for the 300,000 objects of these imports alone, which stay anyway.
gc.collect()
gc.freeze()
