"""Optimizer state in the shape of the parameters it belongs to, so that any layout, with or without ZeRO-1, reads any other's.

    state = describe(model, model_state)                 # ShardedTensors to hand to dist_checkpointing, and a few numbers
    wanted = describe(model, model_state, stored=keys)   # the same for loading, less what the checkpoint lacks
    restore(model, loaded)

Keys are `optimizer.state.{exp_avg,exp_avg_sq,fp32_param}.<parameter>`, megatron's own. Its state_dict of an optimizer is not
used: its parameter groups depend on the layout (experts apart or not), and everything in them follows from the configuration
and the schedule anyway. Moments kept in lower precision (optim.precision_aware) are stored in fp32 like the others.
A master copy is stored of what is not fp32 itself, under one name with ZeRO-1 and without. A run in fp32 that goes on from bf16 takes it for its
weights; one in bf16 that goes on from fp32 starts its master copies at the rounded weights.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

MOMENTS, MASTER = ("exp_avg", "exp_avg_sq"), "fp32_param"
_ZERO1_MASTER = "param"  # megatron's name for it there, and ours in checkpoints written before 2026-11-26
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": False}


def describe(model, model_state: dict, stored: set[str] | None = None) -> dict:
    """Sharded optimizer state of this rank. `stored`: names of stored tensors, to load only the kinds that are there."""
    in_fp32 = {value.key for value in _by_data(model_state).values() if isinstance(value.data, torch.Tensor) and value.data.dtype == torch.float32}
    described = {"step": _step(model.optimizer), "parts": {}}
    if _scaler(model.optimizer) is not None:
        described["loss_scaler"] = _scaler(model.optimizer).state_dict()
    for i, part in enumerate(model.optimizer.chained_optimizers):
        if getattr(part, "is_stub_optimizer", False):
            continue
        _make_moments(part.optimizer)
        tensors = _zero1(part, model_state, stored is not None) if isinstance(part, DistributedOptimizer) else _whole(part, model_state)
        described["parts"][i] = {j: dict(_kept(kinds, in_fp32, stored)) for j, kinds in tensors.items()}
    return described


def lacking(model, model_state: dict, stored: set[str]) -> list[str]:
    """The parameters that any rank trains and of which no moments are stored. Collective: pp ranks train different ones, and none may go on alone."""
    sharded = _by_data(model_state)
    trained = [(name, parameter) for chunk in model.chunks for name, parameter in chunk.named_parameters() if parameter.requires_grad]
    keys = [sharded[id(parameter)].key if id(parameter) in sharded else name for name, parameter in trained]  # a new head is not in model_state
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, [key for key in keys if f"optimizer.state.{MOMENTS[0]}.{key}" not in stored])
    return sorted({key for keys in found for key in keys})


def _kept(kinds: dict, in_fp32: set[str], stored: set[str] | None):
    """Of one parameter's tensors, by kind, those to save, or those that are stored, under their keys."""
    for kind, tensor in kinds.items():
        name = tensor.key.split(".", 3)[3]
        is_weight = kind == MASTER and name in in_fp32
        tensor = replace(tensor, key=f"optimizer.state.{kind}.{name}")
        if stored is None:
            if not is_weight:
                yield kind, tensor
            continue
        if kind == MASTER and tensor.key not in stored:
            tensor.key = f"optimizer.state.{_ZERO1_MASTER}.{name}"
        if tensor.key in stored:
            # The weight itself is read under its own name, into its own memory.
            yield kind, replace(tensor, data=torch.empty_like(tensor.data)) if is_weight else tensor


def _make_moments(adam) -> None:
    """Transformer Engine's FusedAdam makes its state in its first step; a checkpoint may be wanted before (build.py fills torch's)."""
    if isinstance(adam, torch.optim.AdamW):
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.initialize_state(parameter, False)  # False: whole masters, see store_param_remainders in build.py


def restore(model, loaded: dict) -> None:
    """Copy what dist_checkpointing.load returned for `describe` into the live optimizer. The model's weights are loaded already."""
    for i, part in enumerate(model.optimizer.chained_optimizers):
        if getattr(part, "is_stub_optimizer", False):
            continue
        tensors = loaded["parts"][i]
        if isinstance(part, DistributedOptimizer):
            _restore_zero1(part, tensors, float(loaded["step"]))
        else:
            for j, (parameter, main, state) in enumerate(_entries(part)):
                main.data.copy_(tensors[j].get(MASTER, parameter.data))
                for kind in MOMENTS:
                    state[kind].copy_(tensors[j][kind])
        _set_step(part.optimizer, loaded["step"])
    if model.run.parallel.zero1 and model.run.train.precision == "fp32":
        for chunk in model.chunks:
            chunk.start_param_sync(force_sync=True)  # master copies of a run in bf16 may have become weights, on each dp rank a part
    if "loss_scaler" in loaded and _scaler(model.optimizer) is not None:
        for part in model.optimizer.chained_optimizers:
            part.grad_scaler.load_state_dict(loaded["loss_scaler"])


# --- whole parameters on every dp rank ---------------------------------------------------------------------------------


def _whole(part, model_state) -> dict:
    sharded = _by_data(model_state)
    described = {}
    for j, (parameter, main, state) in enumerate(_entries(part)):
        kinds = {**{kind: state[kind] for kind in MOMENTS}, MASTER: main}
        described[j] = {kind: make_sharded_optimizer_tensor(sharded[id(parameter)], tensor, f"optimizer.state.{kind}")
                        for kind, tensor in kinds.items()}
    return described


def _entries(part):
    """(model parameter, fp32 master, AdamW state) of a non-distributed optimizer, in a fixed order."""
    if hasattr(part, "float16_groups"):
        for halves, masters in zip(part.float16_groups, part.fp32_from_float16_groups):
            yield from ((half, master, part.optimizer.state[master]) for half, master in zip(halves, masters))
        for group in part.fp32_from_fp32_groups:
            yield from ((parameter, parameter, part.optimizer.state[parameter]) for parameter in group)
    else:
        for group in part.optimizer.param_groups:
            yield from ((parameter, parameter, part.optimizer.state[parameter]) for parameter in group["params"])


def _by_data(model_state) -> dict[int, ShardedBase]:
    """ShardedTensor (or factory) of each parameter, by the parameter's identity."""
    return {id(value.data): value for value in nested_values(model_state) if isinstance(value, ShardedBase) and hasattr(value, "data")}


# --- ZeRO-1: flat buffers split over dp, which megatron gathers into the parameters' shapes ------------------------------


def _zero1(part, model_state, is_loading: bool) -> dict:
    metadata = {**_METADATA, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    return {j: {MASTER if kind == _ZERO1_MASTER else kind: tensor for kind, tensor in kinds.items()}
            for j, kinds in part.sharded_param_state_fully_reshardable(model_state, is_loading, metadata).items()}


def _restore_zero1(part, tensors: dict, step: float) -> None:
    """Cut this rank's ranges out of whole parameters. `tensors`: {running number of the parameter: {kind: tensor}}."""
    original = type(part)._set_main_param_and_optimizer_states
    # The checkpoint has no step per parameter, which torch's AdamW wants, and no master copy of what was fp32.
    steps = {"step": torch.tensor(step)} if isinstance(part.optimizer, torch.optim.AdamW) else {}

    def with_missing(parameter, found):
        if "param" not in found:
            span = part._get_model_param_range_map(parameter)["param"]
            plain = dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter
            found = {**found, "param": plain.detach().view(-1)[span.start:span.end].float()}
        original(part, parameter, {**steps, **found})

    part._set_main_param_and_optimizer_states = with_missing
    try:
        part.load_parameter_state_from_fully_reshardable(tensors)
    finally:
        del part._set_main_param_and_optimizer_states
    part._copy_main_params_to_model_params()


# --- the numbers -------------------------------------------------------------------------------------------------------


def _adams(optimizer):
    return [part.optimizer for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]


def _step(optimizer) -> int:
    """Updates taken so far: torch's AdamW counts per parameter, Transformer Engine's FusedAdam per group."""
    for adam in _adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                return int(state["step"])
        for group in adam.param_groups:
            if "step" in group:
                return int(group["step"])
    return 0


def _set_step(adam, step: int) -> None:
    if isinstance(adam, torch.optim.AdamW):
        for state in adam.state.values():
            state["step"] = torch.full_like(state["step"], float(step))
    else:
        for group in adam.param_groups:
            group["step"] = int(step)


def _scaler(optimizer):
    return getattr(optimizer.chained_optimizers[0], "grad_scaler", None)
