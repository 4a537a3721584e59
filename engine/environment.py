"""What CUDA, NCCL and Transformer Engine read from the environment when they start, chosen by the configuration.

    apply(run)            # on a GPU, before CUDA starts; a value that is set already stays
    in_effect()           # the variables of this kind that are set, for env.json

Where each value comes from: docs/performance.md. Left out: what a cluster's network wants (NCCL_IB_HCA, NCCL_SOCKET_IFNAME), which is
the user's environment or slurm.env, and CUDA_DEVICE_MAX_CONNECTIONS=32 for Blackwell, whose presence is not known before CUDA starts.
"""

import os

PREFIXES = ("CUBLAS_", "CUDA_", "NCCL_", "NVTE_", "PYTORCH_ALLOC", "PYTORCH_CUDA_", "TORCH_NCCL_", "UB_")


def wanted(run) -> dict[str, str]:
    """Variables and their values for a RunConfig on GPUs."""
    p = run.parallel
    found = {
        # Tensors in a collective are kept alive by a list, not by their stream, which would hold their memory for longer.
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        "NCCL_NVLS_ENABLE": str(int(p.nvls)),
    }
    if p.tp > 1 or p.cp > 1:
        # One queue to the device: communication then starts before the product that is to hide it. GPUs before Blackwell need it.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if p.pp > 1 and p.p2p_chunk_kib:
        found["NCCL_P2P_NET_CHUNKSIZE"] = str(1024 * p.p2p_chunk_kib)
    if (p.overlap_grad_reduce or p.overlap_param_gather) and p.norm_sm_margin:
        # Its norms wait until every SM is theirs, and with them all that follows waits for the collective beside them.
        found |= {f"NVTE_{way}_LAYERNORM_SM_MARGIN": str(p.norm_sm_margin) for way in ("FWD", "BWD")}
    if run.train.cuda_graphs:
        found["NCCL_GRAPH_REGISTER"] = "0"  # megatron asks for it beside expandable segments, where buffers that NCCL registered may move
    if run.train.fp8.recipe == "delayed":
        # Without it Transformer Engine refuses the scales in a checkpoint, which it pickles; it is given none but those that safe_load.py pickled.
        found["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
    if run.run.deterministic:
        # NVLS: sums in the switch come in no fixed order.
        found |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "NCCL_ALGO": "^NVLS"}
    return found


def apply(run) -> None:
    """Set what is wanted and not set yet."""
    for name, value in wanted(run).items():
        os.environ.setdefault(name, value)


def in_effect() -> dict[str, str]:
    """What is set now, whoever set it."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(PREFIXES)}
