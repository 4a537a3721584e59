"""The mean of the weights that a run passes through (Polyak), beside the weights it trains: in fp32, in host memory.

    average = Average(model, run.average, total_steps)
    average.after_step(position.step)              # takes the weights when they are due
    if average.num_taken:
        with average.swapped():                    # the model is the average: validate it, generate with it
            ...
        average.save(root, position)               # root/iter_N, weights only, in fp32; average.json says how many were taken
    average.restore(folder)                        # under any layout

kind uniform: all visited weights alike, m_n = m_{n-1} + (w - m_{n-1}) / n. kind ema: m = decay * m + (1 - decay) * w, the first
taking copies; no correction for the start is needed then. Each rank averages the shards it holds, which are whole over dp ranks.
Left out: averages of the optimizer's state, of FP8 parameters and of what layers count beside their weights; averaging checkpoints
of other runs.
"""

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from engine.mcore import checkpoint, saving
from engine.mcore.build import bare
from engine.mcore.checkpoint import CheckpointError
from engine.mcore.saving_plan import Part

RECORD = "average.json"


class Average:
    """settings: the `average` section; total_steps: planned steps of the run, of which settings.start is a share."""

    def __init__(self, model, settings, total_steps: int) -> None:
        self.model, self.settings = model, settings
        self.first_step = math.floor(settings.start * total_steps + 1e-9) + 1  # 0.29 * 100 is a little less than 29
        self.num_taken = 0
        self.chunks = [_MeanOfChunk(bare(chunk)) for chunk in model.chunks] if settings.kind != "none" else []

    def after_step(self, step: int) -> None:
        """Take the weights as they are after `step`, when it is due. Collective."""
        if self._is_due(step):
            self.model.gather_weights()
            self.num_taken += 1
            is_ema = self.settings.kind == "ema" and self.num_taken > 1
            share = 1 - self.settings.decay if is_ema else 1 / self.num_taken
            for chunk in self.chunks:
                chunk.move(share)

    def _is_due(self, step: int) -> bool:
        return self.settings.kind != "none" and step >= self.first_step and step % self.settings.every == 0

    @contextlib.contextmanager
    def swapped(self):
        """The model's weights are the average, in the model's precision, and afterwards bit for bit what they were. Master weights
        and moments stay as they are, so nothing may be trained or saved with the optimizer meanwhile. Collective."""
        assert self.num_taken, "no weights were taken yet"
        self.model.gather_weights()
        live = [chunk.exchange() for chunk in self.chunks]
        try:
            yield
        finally:
            for chunk, weights in zip(self.chunks, live):
                chunk.put_back(weights)

    # --- across a resume ---------------------------------------------------------------------------------------------------

    def save(self, root: str | Path, position) -> Path:
        """Write the average as a checkpoint without optimizer, root/iter_N. Collective. Save it before the run's own checkpoint of the
        same step: where that one is complete, this one then is, too."""
        return saving.save(checkpoint.folder_of(root, position.step), self.contents(position))

    def contents(self, position) -> list[Part]:
        """What `save` writes."""
        first, *rest = checkpoint.contents(self._as_model(), position)
        first.files[RECORD] = json.dumps({"kind": self.settings.kind, "num_taken": self.num_taken})
        return [first, *rest]

    def resume(self, root: str | Path, step: int) -> None:
        """Go on with the average saved after `step`; nothing is there to read when none was due until then. Collective.

        Raises CheckpointError when one was due and is missing, damaged, or of another kind."""
        last_beat = step - step % self.settings.every
        if self.settings.kind != "none" and last_beat >= self.first_step:
            self.restore(checkpoint.folder_of(root, step))

    def restore(self, folder: str | Path) -> None:
        """Read what save wrote, under any layout. Collective. Raises CheckpointError."""
        record = _record(Path(folder))
        if record["kind"] != self.settings.kind:
            raise CheckpointError(f"{folder} is an average of kind {record['kind']}, but average.kind={self.settings.kind}; "
                                  "keep the kind, or start a new run.dir")
        # Not checkpoint.load: the average is the run's own, so there is no other model to refuse, adapt or extend.
        described = checkpoint._model_state(self._as_model())
        parts = list(described)
        with checkpoint._reading(folder):
            loaded = dist_checkpointing.load(described, str(folder))
        for chunk, part in zip(self.chunks, parts):
            chunk.fill(loaded[part])
        self.num_taken = record["num_taken"]

    def _as_model(self):
        """What checkpoint.save asks of a model."""
        return SimpleNamespace(run=self.model.run, chunks=self.chunks, optimizer=None, topology=self.model.topology)


def _record(folder: Path) -> dict:
    try:
        record = json.loads((folder / RECORD).read_text())
        return {"kind": str(record["kind"]), "num_taken": int(record["num_taken"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / RECORD} cannot be read ({type(error).__name__}: {error}), so the average cannot go on; resume from an "
                              "earlier checkpoint, begin the average later (average.start), or set average.kind=none") from error


class _MeanOfChunk:
    """The means of one model chunk's parameters, under their names. To checkpoint.py it is a chunk that holds these weights."""

    def __init__(self, chunk) -> None:
        self.chunk = chunk
        self.means = {name: torch.zeros(weight.shape, dtype=torch.float32) for name, weight in self._weights().items()}

    def _weights(self) -> dict[str, torch.Tensor]:
        """Parameters, and the bias by which aux-free balancing steers the router, which learns without gradients."""
        buffers = {name: buffer for name, buffer in self.chunk.named_buffers() if name.endswith("expert_bias")}
        return {name: parameter.detach() for name, parameter in self.chunk.named_parameters()} | buffers

    def move(self, share: float) -> None:
        """Bring every mean nearer to the weight by `share` of their distance; 1 copies."""
        for name, weight in self._weights().items():
            mean, weight = self.means[name], weight.to("cpu", torch.float32)
            mean.copy_(weight) if share == 1 else mean.add_(weight - mean, alpha=share)

    def exchange(self) -> dict[str, torch.Tensor]:
        """Write the means into the chunk; returns what was there, in host memory."""
        live = {}
        for name, weight in self._weights().items():
            live[name] = weight.to("cpu", copy=True)
            weight.copy_(self.means[name])
        return live

    def put_back(self, live: dict[str, torch.Tensor]) -> None:
        for name, weight in self._weights().items():
            weight.copy_(live[name])

    def sharded_state_dict(self, metadata=None) -> dict:
        """The chunk's own description of its weights, with the means in their place: fp32, whatever the model's precision is."""
        described = self.chunk.sharded_state_dict(metadata=metadata)
        state = {name: described[name] for name in self.means}
        for name, item in state.items():
            item.data = self.means[name].view(item.data.shape)
            if isinstance(item, ShardedTensor):  # what a factory makes takes the dtype of its data
                item.dtype = torch.float32
        return state

    def fill(self, loaded: dict) -> None:
        """Take the means from what was read for sharded_state_dict."""
        for name, mean in self.means.items():
            mean.copy_(loaded[name])
