"""parallel.tp_comm_overlap: tensor-parallel communication in pieces, beside the matrix products that use it.

    start(run)      # collective over all ranks, before the model is built
    stop()          # before the process groups go

Transformer Engine's layers look up their communication buffers by name ("qkv_fprop", "fc2_dgrad", ...); this makes them, with
its default method for each. Needs Transformer Engine 2.7 and tensor-parallel ranks on one NVLink domain, without multicast
also UB_SKIPMC=1 in the environment. Left out: a method per layer, and buffers of a second size in one process.
"""

_size: list[int] = []


def start(run) -> None:
    """Make the buffers: one row per token of a micro-batch on this cp rank. Does nothing if they stand already."""
    from transformer_engine.pytorch.module import base

    from engine.mcore.build import DTYPES

    train, parallel = run.train, run.parallel
    size = [train.seq_len * train.micro_batch // parallel.cp, run.model.hidden_size]
    if not _size:
        modes = base.UserBufferQuantizationMode
        base.initialize_ub(shape=size, tp_size=parallel.tp, quantization_modes=[modes.NONE if train.fp8.recipe == "none" else modes.FP8],
                           dtype=DTYPES[train.precision], bootstrap_backend="nccl")
        _size[:] = size
    assert _size == size, f"buffers for {_size} stand already, {size} is asked for"


def stop() -> None:
    """Give the buffers back, which hold on to process groups. Collective; nothing where there are none."""
    if _size:
        from transformer_engine.pytorch.module import base

        base.destroy_ub()
        _size.clear()
