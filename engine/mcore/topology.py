"""The grid of ranks: start torch.distributed and megatron's process groups, and say who this rank is.

    topology = start(run)        # collective over all ranks
    print(topology)              # TP(2)-PP(2)-CP(1)-DP(2) of 8 ranks

Rank order is megatron's default tp-cp-ep-dp-pp: tensor-parallel neighbours are adjacent, pipeline ranks far apart.
Left out: which layouts are legal; engine/checks.py refuses the others before anything starts.
"""

import datetime
import gc
import math
import os
import random
import sys
from dataclasses import dataclass

import numpy
import torch
import torch.distributed as dist

from engine import environment
from engine.mcore import tp_overlap


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes and this rank's place on them. `device` is "cpu" or "cuda"."""

    device: str
    rank: int
    world_size: int
    tp: int
    pp: int
    cp: int
    dp: int
    ep: int
    etp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int

    def sequence_multiple(self, run) -> int:
        """What the length of a sequence must divide by, so that this layout can split it (and 8, which suits the kernels; products in FP8 want
        multiples of 16 tokens on each rank, of 32 with mxfp8)."""
        recipe = run.train.fp8.recipe
        of_split = math.lcm(8, 2 * self.cp) if recipe == "none" else (32 if recipe == "mxfp8" else 16) * self.cp
        return of_split * (self.tp if run.parallel.sequence_parallel else 1)

    def __str__(self) -> str:
        experts = f"-EP({self.ep})-ETP({self.etp})" if self.ep > 1 or self.etp != self.tp else ""
        return f"TP({self.tp})-PP({self.pp})-CP({self.cp})-DP({self.dp}){experts} of {self.world_size} rank{'s' * (self.world_size > 1)}"


def device_of(run) -> str:
    """"cuda" or "cpu", as run.run.device asks; auto takes CUDA when torch sees a GPU."""
    if run.run.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if run.run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but torch sees no GPU; set run.device=cpu or auto, or install a CUDA build of torch")
    return run.run.device


def start(run) -> Topology:
    """Join the process group (unless joined already), build megatron's groups for run.parallel, seed everything.

    Raises ValueError when the rendezvous fails, naming the address (a port in use, a missing rank).
    """
    if run.run.device != "cpu":
        environment.apply(run)  # engine/cli.py has done so before CUDA started; for whoever comes another way
    device = device_of(run)
    if device == "cpu":
        from engine.mcore import cpu

        cpu.install()
        cpu.keep_memory()
        if sys.modules["transformer_engine"] is not None:
            raise ValueError("run.device=cpu, but this process sees a GPU and has loaded Transformer Engine for it; "
                             "hide the GPU: CUDA_VISIBLE_DEVICES= torchrun ...")
    if not dist.is_initialized():
        _join(run, device)
    _groups(run)
    topology = _describe(device)
    _seed(run, topology)
    return topology


def start_single() -> Topology:
    """One CPU rank of its own, for conversion and comparison. Does nothing if the groups stand already."""
    from engine.mcore import cpu

    cpu.install()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return _describe("cpu")


def stop() -> None:
    """Leave the groups; safe to call twice.

    Each gloo group has threads that live as long as anything refers to it: cycles around models, and megatron's cache of
    rotary embeddings, which holds the embeddings themselves, and its tracker of MoE losses.
    """
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    tp_overlap.stop()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    RotaryEmbedding.forward.cache_clear()
    get_moe_layer_wise_logging_tracker().clear()
    gc.collect()


def _join(run, device: str) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    timeout = datetime.timedelta(minutes=run.run.timeout_minutes)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timeout, rank=rank, world_size=world)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"rank {rank} of {world} could not join the process group at {address}: {error}. Is the port in use by "
                         "another job (choose another with torchrun --master-port), or a rank missing?") from None


def _groups(run) -> None:
    from megatron.core import parallel_state

    p = run.parallel
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.expert_tp,
        distributed_timeout_minutes=max(1, int(run.run.timeout_minutes)),
    )


def _describe(device: str) -> Topology:
    from megatron.core import parallel_state as mpu

    return Topology(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=mpu.get_tensor_model_parallel_world_size(),
        pp=mpu.get_pipeline_model_parallel_world_size(),
        cp=mpu.get_context_parallel_world_size(),
        dp=mpu.get_data_parallel_world_size(),
        ep=mpu.get_expert_model_parallel_world_size(),
        etp=mpu.get_expert_tensor_parallel_world_size(),
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
    )


def _seed(run, topology: Topology) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    seed = run.run.seed + 100 * topology.pp_rank  # pp ranks hold different layers, so their dropout must differ
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # A graph takes generators themselves; outside graphs megatron keeps their states, which are what a checkpoint holds.
    model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=run.train.cuda_graphs and topology.device == "cuda", force_reset_rng=True)
    if run.run.deterministic:
        torch.use_deterministic_algorithms(True)
