"""What megatron and torch unpickle of a checkpoint, unpickled as tensors, numbers and names alone, so that a foreign folder runs no code.

    safe_load.install()          # checkpoint.py does so at its import; dist_checkpointing.load is then safe in this process

A torch_dist folder holds four kinds of pickles. Tensors go through torch's loader for tensors alone in any case. This file sees to the others:
`.metadata`, which torch reads with plain pickle (here stream.read_metadata); common.pt, for which an environment variable decides; and objects in
the shards (random states, Transformer Engine's FP8 state), which torch reads without that restriction.
FP8 state is a pickle inside a tensor, which Transformer Engine unpickles by itself: it gets one that was made here, of what was found.
Left out: folders that lie about sizes to waste memory.
"""

import enum
import io
import pickle
import re

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, register_default_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from engine.foreign import inside
from engine.mcore import stream, te_problem

EXTRA_STATE = "_extra_state"


def install() -> None:
    """Put the readers below where megatron takes its own from. Idempotent."""
    register_default_strategy(StrategyAction.LOAD_COMMON, "torch", 1, _Common())
    torch_dist._get_filesystem_reader = lambda folder, cache_metadata=False: _Reader(folder)
    torch_dist.MCoreLoadPlanner = _Planner


def reason(error: BaseException) -> str:
    """What an error says. Of a file that torch's loader for tensors alone refuses: what it names, without the advice to trust it."""
    if not isinstance(error, pickle.UnpicklingError) or "weights_only" not in str(error):
        return str(error)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"a file names {found[1]}, which is no tensor" if found else "a file holds other things than tensors, numbers and names"


class _Common(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir):
        return torch.load(inside(checkpoint_dir, COMMON_STATE_FNAME), map_location="cpu", weights_only=True)


class _Reader(CachedMetadataFileSystemReader):
    def read_metadata(self) -> Metadata:
        if self._cached_metadata is None:
            metadata = stream.read_metadata(self.path)
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            self._cached_metadata = metadata
        return self._cached_metadata


class _Planner(torch_dist.MCoreLoadPlanner):
    def load_bytes(self, read_item, value: io.BytesIO) -> None:
        """Hand on what torch's loader for tensors alone makes of an object, pickled again: torch unpickles that without a check."""
        found, checked = torch.load(value, map_location="cpu", weights_only=True), io.BytesIO()
        if EXTRA_STATE in read_item.dest_index.fqn:
            found = [clean_fp8_state(state) for state in found]
        torch.save(found, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def clean_fp8_state(state: torch.Tensor | None) -> torch.Tensor | None:
    """`_extra_state` of a layer, uint8 [bytes] (a pickle; empty where there is no FP8): a new pickle of the same scales, or None where no
    Transformer Engine would read it. Raises UnpicklingError for a state that names anything but tensors and recipes."""
    if state is None or te_problem:
        return None
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise pickle.UnpicklingError(f"an {EXTRA_STATE} is no tensor of bytes, as Transformer Engine 2 writes it")
    if not state.numel():
        return state
    found = _Scales(io.BytesIO(state.numpy().tobytes())).load()
    if not isinstance(found, dict | None):
        raise pickle.UnpicklingError(f"an {EXTRA_STATE} holds a {type(found).__name__}, which is no FP8 state")
    return torch.frombuffer(bytearray(pickle.dumps(found)), dtype=torch.uint8)


class _Scales(pickle.Unpickler):
    """Unpickles the FP8 state of a layer: tensors, numbers, and the recipe that they are of; raises UnpicklingError for any other name."""

    ALLOWED = {"torch._utils": ("_rebuild_tensor_v2",), "collections": ("OrderedDict",), "torch": ("Size", "device"), "builtins": ("set",),
               "megatron.core.extensions.transformer_engine": ("TEDelayedScaling",)}      # a recipe too
    RECIPES = "transformer_engine.common.recipe"

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _tensors_alone  # theirs unpickles whatever the bytes say
        if (module, name) == ("builtins", "getattr"):
            return _member  # how some versions of Python pickle an Enum
        if name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == self.RECIPES:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:  # what that module imports is not of it
                return found
        raise pickle.UnpicklingError(f"an {EXTRA_STATE} names {module}.{name}, which is no part of an FP8 state")


def _tensors_alone(stored: bytes):
    return torch.load(io.BytesIO(stored), map_location="cpu", weights_only=True)


def _member(kind, name: str):
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind[name]
    raise pickle.UnpicklingError(f"an {EXTRA_STATE} looks up {name!r} in {kind!r}, which is no enumeration")
