"""Checkpoints: one folder per saved step, readable under any layout.

    save(model, root, position)                 # root/iter_0000100/, then root/latest_checkpointed_iteration.txt
    position = load(model, folder, optimizer=True)
    tensors = read_tensors(folder)              # name -> whole tensor, lazily, without process groups

The tensors are megatron dist_checkpointing (torch_dist): each global tensor is stored in shards with its offsets, so another
layout reads what it needs. Beside them lie config.yaml (the run that wrote it), position.json (step, samples, tokens), stage.json (what the
stage keeps) and, where several networks learn, one such folder for each of the others: roles/critic.
Left out: how a folder is written, kept and chosen (saving.py).
"""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.api import CheckpointException

from engine import adapters, hashes, rope
from engine.config import RunConfig, dump_config
from engine.foreign import inside, written_config
from engine.mcore import lora, mtp, optim_state, safe_load, saving, stream, vocabulary
from engine.mcore.build import bare
from engine.mcore.saving import CheckpointError
from engine.mcore.saving_plan import Part
from engine.run_folder import find

safe_load.install()

STAGE = "stage.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands: everything that is needed to go on, beside the tensors."""

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0


def folder_of(root: str | Path, step: int) -> Path:
    return Path(root) / f"iter_{step:07d}"


# --- saving and loading a model that is spread over ranks ------------------------------------------------------------


def save(model, root: str | Path, position: Position, others: Mapping[str, object] | None = None, stage: Mapping[str, float] | None = None) -> Path:
    """Write what `contents` says, now. Collective. Returns the folder. Raises saving.SaveError."""
    return saving.save(folder_of(root, position.step), contents(model, position, others, stage))


def contents(model, position: Position, others: Mapping[str, object] | None = None, stage: Mapping[str, float] | None = None) -> list[Part]:
    """What a checkpoint consists of: model, optimizer, random states and position. Collective.

    others: further networks that learn, each in a folder roles/NAME that is a checkpoint by itself. stage: what Stage.state says, and
    under "ledger" what was read of each source.
    """
    first = _part("", model, position)
    first.files[STAGE] = json.dumps(dict(stage or {}))
    return [first, *(_part(f"roles/{name}", other, position) for name, other in (others or {}).items())]


def _part(folder: str, model, position: Position) -> Part:
    if model.optimizer is not None:
        model.gather_weights()
    state = _model_state(model)
    if model.optimizer is not None:
        state["optimizer"] = optim_state.describe(model, state)
        state["random"] = _random_state(model.topology)
    force_all_tensors_to_non_fp8(state)
    networks = [network for network in map(bare, model.chunks) if isinstance(network, torch.nn.Module)]  # not so an average
    buffers = [buffer for network in networks for buffer in network.buffers()]
    return Part(folder, state, _files(model.run, position), buffers)


def _files(run: RunConfig, position: Position) -> dict[str, str]:
    return {"config.yaml": dump_config(run), "position.json": json.dumps(asdict(position))}


def load(model, folder: str | Path, optimizer: bool = True) -> Position:
    """Fill the model (and the optimizer) from a folder written under any layout. Collective. Returns the position.

    Raises CheckpointError when the folder is incomplete or holds another model.
    """
    folder = Path(folder)
    written_by = read_config(folder)
    with_optimizer = optimizer and model.optimizer is not None
    _refuse_other_model(folder, written_by, model.run, with_optimizer)
    _refuse_other_depth(folder, written_by.model.mtp.num_layers, model, with_optimizer)
    state, stored = _model_state(model), _stored_keys(folder)
    absent = _pop_absent(state, stored, _is_new(written_by, model.run))
    if with_optimizer:
        _refuse_without_moments(folder, optim_state.lacking(model, state, stored))
        state["optimizer"] = optim_state.describe(model, state, stored=stored)
        if _same_layout(written_by, model.run):
            state["random"] = _random_state(model.topology)
    grows = vocabulary.grows(written_by.model, model.run.model)
    if grows:
        vocabulary.allow_growth(state)
    with _reading(folder):
        loaded = dist_checkpointing.load(state, str(folder))
    for i, chunk in enumerate(model.chunks):
        part = f"model{i}" if len(model.chunks) > 1 else "model"
        bare(chunk).load_state_dict({**loaded[part], **absent[part]})
        if grows:
            vocabulary.fill_new_rows(bare(chunk), written_by.model.vocab_size, model.topology)
        if not written_by.lora.rank:
            lora.start_magnitudes(bare(chunk))  # of the weights that are there now
    if with_optimizer:
        optim_state.restore(model, loaded["optimizer"])
        if "random" in loaded:
            _restore_random(loaded["random"], model.topology.device)
    elif model.optimizer is not None:
        model.optimizer.reload_model_params()
    if model.optimizer is not None:
        model.gather_weights()
    return read_position(folder)


def _is_new(written: RunConfig, wanted: RunConfig):
    """Which parameters may be absent, as a test of their names: a head, adapters or layers for further tokens that the checkpoint's model did not have."""
    new_head = written.model.head != wanted.model.head
    new_adapters = wanted.lora.rank and not written.lora.rank
    further = tuple(f"{mtp.PREFIX}layers.{i}." for i in range(written.model.mtp.num_layers, wanted.model.mtp.num_layers))
    return lambda name: (new_head and "value_head." in name) or (new_adapters and adapters.MARK in name) or name.startswith(further)


def read_position(folder: str | Path) -> Position:
    with _reading(folder):
        counts = json.loads(inside(folder, "position.json").read_text())
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            raise ValueError(f"position.json counts {counts}")
        return Position(**counts)


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of the run that wrote a checkpoint (a root or one iter_ folder)."""
    found = find(folder)
    if found is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint (a folder iter_*/ with metadata.json); check checkpoint.load")
    # Not load_config: what a checkpoint was written with need not be a run that could start here (its data, its ranks).
    with _reading(found):
        return RunConfig.model_validate(written_config(found))


def read_stage(folder: str | Path) -> dict[str, float]:
    """What the stage that wrote a checkpoint said of its state."""
    with _reading(folder):
        path = inside(folder, STAGE)
        return json.loads(path.read_text()) if path.is_file() else {}


def _stored_keys(folder: Path) -> set[str]:
    with _reading(folder):
        return set(stream.read_metadata(Path(folder)).state_dict_metadata)


@contextlib.contextmanager
def _reading(folder: str | Path) -> Iterator[None]:
    """Whatever damaged files make torch, pickle, yaml or megatron raise becomes one CheckpointError that says what to do."""
    try:
        yield
    except (Exception, CheckpointException) as error:  # torch's derives from BaseException and holds one error per rank
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise CheckpointError(f"{folder} is damaged ({type(cause).__name__}: {safe_load.reason(cause)}). To go on from an earlier checkpoint, remove this "
                              "folder or name another one in checkpoint.load") from error


def _model_state(model) -> dict:
    names = [f"model{i}" for i in range(len(model.chunks))] if len(model.chunks) > 1 else ["model"]
    return {name: chunk.sharded_state_dict(metadata=_metadata()) for name, chunk in zip(names, map(bare, model.chunks))}


def _pop_absent(state: dict, stored: set[str], is_new) -> dict[str, dict]:
    """Take out of `state` what the checkpoint does not hold and need not; by part, what the layers are to be given instead.

    Parameters that are new (`is_new`) keep their initial values. Where Transformer Engine keeps FP8 state (`_extra_state`) the
    torch backend has nothing, in its norms for example, and None says so.
    """
    absent = {}
    for part, entries in state.items():
        objects = {name: None for name, value in entries.items() if isinstance(value, ShardedObject) and value.unique_key not in stored}
        tensors = {name: value.data for name, value in entries.items()
                   if isinstance(value, (ShardedTensor, ShardedTensorFactory)) and value.key not in stored and is_new(name)}
        absent[part] = objects | tensors
        for name in absent[part]:
            del entries[name]
    return absent


def _metadata() -> dict:
    return {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}


def _random_state(topology) -> ShardedObject:
    """torch's and megatron's generators; dp ranks share theirs, tp and pp ranks each have their own."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import convert_cuda_rng_state

    tracked = get_cuda_rng_tracker().get_states()  # with train.cuda_graphs generators, else their states
    state = {"torch": torch.get_rng_state(), "tracker": {name: convert_cuda_rng_state(kept) for name, kept in tracked.items()}}
    if topology.device == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    where = (topology.pp_rank, topology.tp_rank)
    return ShardedObject("random", state, (topology.pp, topology.tp), where, replica_id=mpu.get_data_parallel_rank(with_context_parallel=True))


def _restore_random(state, device: str) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import convert_cuda_rng_state

    if ("cuda" in state) != (device == "cuda"):
        return  # the generators of a CPU and of a GPU have different states; the run goes on with those of its seed
    torch.set_rng_state(state["torch"])
    if device == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
    tracker = get_cuda_rng_tracker()
    as_kept = partial(convert_cuda_rng_state, to_graphable=getattr(tracker, "use_cudagraphable_rng", False))
    tracker.set_states({name: as_kept(kept) for name, kept in state["tracker"].items()})


def _same_layout(one: RunConfig, other: RunConfig) -> bool:
    return all(getattr(one.parallel, axis) == getattr(other.parallel, axis) for axis in ("tp", "pp", "vpp", "pp_layers"))


def _refuse_without_moments(folder: Path, lacking: list[str]) -> None:
    if lacking:
        some = ", ".join(lacking[:3]) + f" and {len(lacking) - 3} more" * (len(lacking) > 3)
        raise CheckpointError(f"{folder} holds no optimizer state of {some}, which this run trains: it was converted, is an average, or trained "
                              "other parameters; set checkpoint.load_optimizer=false")


def _refuse_other_model(folder: Path, written: RunConfig, wanted: RunConfig, with_optimizer: bool) -> None:
    shape = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_heads", "head_size",
             "norm", "activation", "position", "rope_percent", "qkv_bias", "linear_bias", "qk_norm", "qk_norm_width", "norm_place",
             "moe_ffn_hidden_size", "mla", "norm_zero_centered", "scale_embeddings", "query_pre_attn_scalar", "attention_softcap", "logits_softcap",
             "attention_sinks")
    if wanted.model.head == "tokens":  # a scalar head has no output matrix to share with the embedding
        shape += ("tie_embeddings",)
    pairs = [(f"model.{name}", getattr(written.model, name), getattr(wanted.model, name)) for name in shape]
    pairs += [("model.moe.num_experts", written.model.moe.num_experts, wanted.model.moe.num_experts)]
    if written.model.head == "scalar":
        pairs += [("model.head", written.model.head, wanted.model.head)]
    if written.lora.rank:
        pairs += [(f"lora.{name}", getattr(written.lora, name), getattr(wanted.lora, name)) for name in ("rank", "alpha", "rslora", "dora")]
        pairs += [("lora.targets", sorted(written.lora.targets), sorted(wanted.lora.targets))]
    if not vocabulary.grows(written.model, wanted.model):
        pairs += [(f"model.{name}", getattr(written.model, name), getattr(wanted.model, name)) for name in ("vocab_size", "padded_vocab_size")]
    elif not wanted.checkpoint.grow_vocab:
        pairs += [("model.vocab_size", written.model.vocab_size, wanted.model.vocab_size)]
    differing = [f"{name} is {ours}, the checkpoint has {theirs}" for name, theirs, ours in pairs if theirs != ours]
    if differing:
        raise CheckpointError(f"{folder} holds another model: {'; '.join(differing)}. Give the checkpoint's sizes or another checkpoint.load")
    if wanted.stage != "long_context" and (changed := rope.contradictions(written.model, wanted.model)):
        raise CheckpointError(f"{folder}: {'; '.join(changed)}")
    if with_optimizer and vocabulary.grows(written.model, wanted.model):
        raise CheckpointError(f"{folder} has {written.model.vocab_size} tokens and this run {wanted.model.vocab_size}, so the optimizer's state "
                              "does not fit; set checkpoint.load_optimizer=false")
    if with_optimizer and wanted.lora.rank and not written.lora.rank:
        raise CheckpointError(f"{folder} has no adapters and this run has lora.rank={wanted.lora.rank}, so the optimizer's state does not fit; "
                              "set checkpoint.load_optimizer=false")


def _refuse_other_depth(folder: Path, num_stored: int, model, with_optimizer: bool) -> None:
    """A network that learns drops no layers for further tokens unless its head has no use for any; new ones start from initial weights."""
    wanted = model.run.model.mtp.num_layers
    if num_stored > wanted and model.role.train and model.run.model.head == "tokens":
        raise CheckpointError(f"{folder} has {num_stored} layers for further tokens, but model.mtp.num_layers is {wanted}; set it to {num_stored} (with "
                              "model.mtp.loss_weight=0 they are kept as they are), or convert the model without them (docs/convert.md, --drop-mtp)")
    if num_stored < wanted and with_optimizer:
        raise CheckpointError(f"{folder} has {num_stored} layers for further tokens and this run has model.mtp.num_layers={wanted}, so the optimizer's "
                              "state does not fit; set checkpoint.load_optimizer=false")


# --- whole tensors, one process ---------------------------------------------------------------------------------------


class Tensors(Mapping):
    """Whole parameters of a checkpoint by their GPTModel names, each read when asked for."""

    def __init__(self, folder: Path, model=None):
        """model: config.Model; None reads it from the folder's config.yaml."""
        self.folder = folder
        with _reading(folder):
            self.metadata = stream.read_metadata(folder)
        self.places = dict(_places(model or read_config(folder).model, self.metadata.state_dict_metadata))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name) -> bool:  # Mapping's own would read the tensor
        return name in self.places

    def __getitem__(self, name: str) -> torch.Tensor:
        key, index = self.places[name]
        sizes = self.shape(name)
        with _reading(self.folder):
            found = stream.read(self.folder, self.metadata, key, (*index, *[0] * len(sizes)), (*[1] * len(index), *sizes))
        return found.view(sizes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        key, index = self.places[name]
        return tuple(self.metadata.state_dict_metadata[key].size[len(index):])

    def without_mtp(self) -> "Tensors":
        """The same but for layers that predict further tokens."""
        rest = copy.copy(self)
        rest.places = {name: place for name, place in self.places.items() if not name.startswith(mtp.PREFIX)}
        return rest

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return self.metadata.state_dict_metadata[self.places[name][0]].properties.dtype


def read_tensors(path: str | Path) -> Tensors:
    """Whole parameters of a checkpoint (root or iter_ folder), under the names of GPTModel.state_dict() on one rank."""
    folder = find(path)
    if folder is None:
        raise CheckpointError(f"{path} holds no complete checkpoint")
    return Tensors(folder)


def _places(model, stored) -> Iterator[tuple[str, tuple[str, tuple]]]:
    """Name on one rank -> (stored key, index into its leading axes).

    Layers of equal kind are stacked along a first axis; when dense and MoE layers mix, each layer has a key of its own.
    Experts are stacked along the next axis.
    """
    for key, entry in stored.items():
        if not hasattr(entry, "size") or key.startswith("optimizer") or key.endswith("_extra_state"):
            continue
        name = unfused(key)
        head, dot, tail = name.partition("decoder.layers.")
        if not dot:
            yield from _experts_of(name, key, (), model.moe.num_experts)
        elif tail.split(".")[0].isdigit():
            layer, rest = tail.split(".", 1)
            yield from _experts_of(f"decoder.layers.{layer}.{rest}", key, (), model.moe.num_experts)
        else:
            for layer in range(entry.size[0]):
                yield from _experts_of(f"decoder.layers.{layer}.{tail}", key, (layer,), model.moe.num_experts)


def unfused(key: str) -> str:
    """The norm before a linear layer is stored under the te backend's name, as part of that layer."""
    return key.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.").replace(
        "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def name_of(key: str, where: list[int]) -> str:
    """The name on one rank of what lies under a key of sharded_state_dict, at this place of its counting axes."""
    name = unfused(key)
    head, dot, tail = name.partition("decoder.layers.")
    if dot and not tail.split(".")[0].isdigit():
        name = f"{head}{dot}{where.pop(0)}.{tail}"
    return name.replace(".experts.experts.", f".experts.local_experts.{where.pop(0)}.") if ".experts.experts." in name else name


def _experts_of(name: str, key: str, index: tuple, num_experts: int):
    if ".experts.experts." not in name:
        yield name, (key, index)
        return
    for expert in range(num_experts):
        yield name.replace(".experts.experts.", f".experts.local_experts.{expert}."), (key, (*index, expert))


def write_tensors(root: str | Path, run: RunConfig, tensors: Iterable[tuple[str, torch.Tensor]], written=lambda num_bytes: None,
                  safe: bool = True) -> Path:
    """Write whole parameters, (name, tensor) pairs of which a few are in memory at a time, as a checkpoint at step 0 (no optimizer).

    They keep their dtypes. written: hears of bytes as they go to files. safe: with hashes, and on the disk when this returns. Runs on one CPU rank and
    starts it if needed.
    """
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from engine.mcore import build, topology

    topology.start_single()
    one_rank = build.one_rank(run)
    # Its weights are never touched, so they take no memory.
    chunk = build.build_chunk(one_rank, build.transformer_config(one_rank, "cpu"), "cpu", with_weights=False)
    state = chunk.sharded_state_dict(metadata=_metadata())
    apply_factories(state)
    where = stream.places(build.sharded_tensors(state), name_of)
    final = folder_of(root, 0)
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    stream.write(temporary, where, tensors, written=written)
    for name, text in {**_files(run, Position()), STAGE: "{}"}.items():
        (temporary / name).write_text(text)
    if safe:
        for path in temporary.iterdir():
            saving.sync(path)
        hashes.write(temporary)
    saving.commit(temporary, final)
    return final


def local_shards(model) -> list[tuple[str, tuple, tuple, torch.Tensor]]:
    """(key, global shape, offset, values) of every parameter shard this rank holds, for comparing layouts."""
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from engine.mcore.build import sharded_tensors

    state = _model_state(model)
    apply_factories(state)
    return [(s.key, tuple(s.global_shape), tuple(s.global_offset), s.data.detach().clone().view([1] * s.prepend_axis_num + list(s.local_shape)))
            for s in sharded_tensors(state)]
