"""GPUs and the wires between them: what a layout has to fit and what its traffic runs over.

    cluster = make_cluster("h100", num_gpus=64)                     # 8 nodes of 8, 400 Gb/s per GPU between them
    make_cluster("h100", 64, network="12.5", memory_gib=94)         # GB/s per GPU; another card of the kind

Bandwidths are one direction. Left out: topologies inside a network (rails, over-subscription).
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property

from engine import metrics
from engine.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. memory_gib: what torch reports as total_memory, a little below the data sheet's figure; memory_gbs: of its HBM or
    GDDR; link_gbs: to another GPU of its node; per_node: GPUs that have such links to each other; network: the usual one between nodes."""

    name: str
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    per_node: int
    network: str

    @cached_property
    def tflops(self) -> float:
        """Dense bf16 peak."""
        return metrics.peak_tflops(self.name)

    @cached_property
    def fp8_tflops(self) -> float | None:
        return metrics.peak_tflops(self.name, fp8=True)


# Memory bandwidth and NVLink from NVIDIA's data sheets (NVLink figures there count both directions; halved here). Cards without NVLink:
# PCIe x16, 64 GB/s (gen 5) or 32 GB/s (gen 4). Nodes are the usual HGX and DGX boxes of 8 where nothing else is said.
# H100 NVL, GH200 and GB200: NVIDIA's figures as others repeat them, its own sheets were not at hand. Memory of these and of B300 as torch's out-of-memory
# errors give it in public issues (93.00, 94.50, 184.31, 267.69 GiB).
GPUS = {gpu.name.lower().replace(" ", "-"): gpu for gpu in (
    Gpu("H100", 79.1, 3350, 450, 8, "ndr"),          # H100 SXM5: 80 GB HBM3, NVLink 4 900 GB/s; DGX H100: 8 x 400 Gb/s
    Gpu("H100 PCIe", 79.1, 2000, 64, 8, "hdr"),      # 80 GB HBM2e
    Gpu("H100 NVL", 93.0, 3900, 64, 8, "ndr"),       # 94 GB HBM3; NVLink's bridge joins two cards, the others of a node have PCIe 5
    Gpu("H200", 139.8, 4800, 450, 8, "ndr"),         # 141 GB HBM3e
    Gpu("H800", 79.1, 3350, 200, 8, "ndr"),          # an H100 with 400 GB/s of NVLink
    Gpu("H20", 95.0, 4000, 450, 8, "ndr"),           # 96 GB HBM3
    Gpu("GH200", 94.5, 4000, 450, 1, "ndr"),         # 96 GB HBM3 (144 GB HBM3e has 4,900 GB/s); one GPU in a superchip, nodes of several: --nodes
    Gpu("B200", 178.0, 8000, 900, 8, "ndr"),         # HGX B200: 180 GB HBM3e, NVLink 5 1,800 GB/s
    Gpu("B300", 267.7, 8000, 900, 8, "xdr"),         # HGX B300: 288 GB HBM3e, NVLink 5; DGX B300: 8 x 800 Gb/s
    Gpu("GB200", 184.3, 8000, 900, 72, "ndr"),       # GB200 NVL72: 13.4 TB HBM3e of 576 TB/s in 72 GPUs, all on one NVLink 5; ConnectX-7 400 Gb/s
    Gpu("A100", 79.1, 2039, 300, 8, "hdr"),          # A100 SXM 80 GB HBM2e, NVLink 3 600 GB/s; DGX A100: 8 x 200 Gb/s. 40 GB: --gpu-memory 39.4
    Gpu("A800", 79.1, 2039, 200, 8, "hdr"),          # an A100 with 400 GB/s of NVLink
    Gpu("L40S", 44.4, 864, 32, 8, "hdr"),            # 48 GB GDDR6
    Gpu("A40", 44.4, 696, 32, 8, "hdr"),             # 48 GB GDDR6
    Gpu("RTX 4090", 23.6, 1008, 32, 8, "100g"),      # 24 GB GDDR6X
)}

# GB/s per GPU and direction.
NETWORKS = {
    "xdr": 100.0,      # InfiniBand XDR, 800 Gb/s for each GPU
    "ndr": 50.0,       # InfiniBand NDR or RoCE, 400 Gb/s for each GPU (DGX H100; Llama 3's clusters, arXiv 2407.21783 sec. 3.3.1)
    "hdr": 25.0,       # InfiniBand HDR, 200 Gb/s for each GPU (DGX A100)
    "efa": 50.0,       # AWS p5: 3,200 Gb/s for a node of 8
    "100g": 1.5625,    # one 100 Gb/s port for a node of 8
    "10g": 0.15625,    # one 10 Gb/s port for a node of 8
}


@dataclass(frozen=True)
class Cluster:
    """num_gpus of one kind, per_node of them in each node. network_gbs: GB/s per GPU between nodes."""

    gpu: Gpu
    num_gpus: int
    network: str
    network_gbs: float

    @property
    def per_node(self) -> int:
        return self.gpu.per_node

    @property
    def num_nodes(self) -> int:
        return -(-self.num_gpus // self.per_node)

    @property
    def nodes(self) -> str:
        return f"{self.num_nodes} nodes of {self.per_node}" if self.num_nodes > 1 else "one node"

    def __str__(self) -> str:
        network = f", {self.network} {self.network_gbs:g} GB/s per GPU between them" * (self.num_nodes > 1)
        return f"{self.num_gpus} x {self.gpu.name} ({self.gpu.memory_gib:g} GiB), {self.nodes}{network}"


def make_cluster(gpu: str, num_gpus: int, num_nodes: int = 0, network: str = "", memory_gib: float = 0) -> Cluster:
    """A cluster by names of GPUS and NETWORKS. num_nodes: 0 fills nodes; network: a name, a number of GB/s per GPU, or "" for the GPU's usual
    one; memory_gib: of each GPU, 0 for the usual. Raises ConfigError."""
    problems, name = [], gpu.lower().replace("_", "-").replace(" ", "-")
    if name not in GPUS:
        raise ConfigError([f"--gpu {gpu} is no GPU known here; known: {', '.join(GPUS)}; name one that is like it, and --gpu-memory"])
    kind = GPUS[name]
    if num_gpus < 1:
        problems.append(f"--gpus {num_gpus}: there must be one or more")
    if num_nodes and (num_gpus % num_nodes or num_nodes < 0):
        problems.append(f"--gpus {num_gpus} cannot be shared evenly by --nodes {num_nodes}")
    elif num_nodes:
        kind = replace(kind, per_node=num_gpus // num_nodes)
    elif num_gpus > kind.per_node and num_gpus % kind.per_node:
        size, whole = kind.per_node, num_gpus // kind.per_node * kind.per_node
        problems.append(f"--gpus {num_gpus} fills no whole number of nodes of {size}; take {whole} or {whole + size}, or say in --nodes how many")
    if not 0 <= memory_gib < float("inf"):
        problems.append(f"--gpu-memory {memory_gib:g} is no size in GiB")
    elif memory_gib:
        kind = replace(kind, memory_gib=memory_gib)
    network = network or kind.network
    speed = _speed(network)
    if speed is None:
        problems.append(f"--network {network} is neither GB/s per GPU nor a network known here; known: {', '.join(NETWORKS)}")
    if problems:
        raise ConfigError(problems)
    return Cluster(kind, num_gpus, network if network in NETWORKS else "network", speed)


def larger(cluster: Cluster, most_times: int) -> list[Cluster]:
    """Clusters of more GPUs of the kind, up to most_times as many, the smallest first: powers of two in a node, a full node, then one node more,
    doublings and powers of two of nodes. Nodes keep their size; where that is no power of two, which few batches divide by, also the one below it."""
    full, num, most = cluster.per_node, cluster.num_gpus, cluster.num_gpus * most_times
    doublings, found = [2**i for i in range(most.bit_length())], {}      # GPUs: in nodes of
    for size in (2 ** (full.bit_length() - 1), full):
        counts = {num // size + 1, *doublings, *(num // size * times for times in doublings)}
        found |= {count * size: size for count in counts if count > 1}
    found |= {more: full for more in (*doublings, full) if more <= full}
    tried = [(more, size) for more, size in sorted(found.items()) if num < more <= max(most, full)]
    return [replace(cluster, num_gpus=more, gpu=replace(cluster.gpu, per_node=size)) for more, size in tried]


def kind_of(device_name: str) -> str:
    """The name in GPUS of what torch calls "NVIDIA H100 80GB HBM3". Raises ConfigError."""
    words = _words(device_name)
    found = [name for name, gpu in GPUS.items() if _words(gpu.name) <= words]
    if not found:
        raise ConfigError([f"{device_name} is no GPU known here; --gpu names one that is like it: {', '.join(GPUS)}"])
    return max(found, key=len)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))      # whole ones: a GB300 is no B300


def _speed(network: str) -> float | None:
    if network in NETWORKS:
        return NETWORKS[network]
    try:
        speed = float(network)
    except ValueError:
        return None
    return speed if 0 < speed < float("inf") else None
