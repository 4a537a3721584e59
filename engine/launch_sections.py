"""The section of a configuration about the cluster that it is run on.

engine/config.py puts it into RunConfig, launch/slurm/job.py makes a job of it; docs/launch.md walks through one. As there: one field, one
sentence, no torch. Nothing here changes what is computed. engine/slurm/script.py checks it, where it is used.
"""

from typing import Literal

from pydantic import Field

from engine.section import Section


class NodeCheck(Section):
    enabled: bool = True
    """Check every node before the ranks start."""
    min_gpu_free: float = Field(0.95, ge=0, le=1)
    """Share of every GPU's memory that nobody else may have taken."""
    min_memory_gb: float = Field(0, ge=0)
    """Memory that a node must have left."""
    min_disk_gb: float = Field(1, ge=0)
    """Room that the file system of run.dir must have left."""
    min_shm_gb: float = Field(0.1, ge=0)
    """Room that /dev/shm must have left."""
    max_clock_seconds: float = Field(5, gt=0)
    """How far the clock of a node may be from the first node's."""
    timeout_seconds: float = Field(180, gt=0)
    """How long the first node waits for the others' answers, and then for the collective."""


class Slurm(Section):
    nodes: int = Field(1, ge=1)
    """Nodes of the job."""
    gpus_per_node: int = Field(8, ge=0)
    """GPUs of each node, one rank for each; 0 asks for none and starts ranks_per_node CPU ranks."""
    ranks_per_node: int = Field(0, ge=0)
    """CPU ranks on each node, where gpus_per_node is 0."""
    cpus_per_rank: int = Field(0, ge=0)
    """Cores for each rank; 0 leaves that to the cluster."""
    cpu_bind: str = "cores"
    """srun's --cpu-bind, such as cores, rank_ldom, map_ldom:0,0,1,1 or none; empty leaves that to the cluster."""
    time_limit_hours: float = Field(0, ge=0)
    """Time limit of the job; 0 takes the partition's."""
    save_seconds: int = Field(300, ge=0)
    """Seconds before the time limit at which the ranks are told to save and leave; Slurm may do it a minute early. 0: never."""
    job_name: str = ""
    """Empty takes the name of run.dir."""
    account: str = ""
    """Account that is charged."""
    partition: str = ""
    """Partition, or several with commas."""
    qos: str = ""
    """Quality of service."""
    gres: str = ""
    """What --gres asks for, such as gpu:h100:8, on clusters that do not know --gpus-per-node."""
    sbatch: list[str] = []
    """Further options of sbatch, one each, such as --exclusive or --constraint=h100."""
    setup: list[str] = []
    """Lines of shell before anything else, such as module load cuda."""
    env: dict[str, str] = {}
    """Environment variables of the ranks; NCCL's belong here, such as NCCL_IB_HCA, and no secrets, since config.yaml keeps them."""
    network_interface: str = ""
    """Interface that NCCL and gloo meet over, such as ib0; empty leaves the choice to them."""
    python: str = ""
    """Python of the ranks; empty takes .venv/bin/python of this repository, or python in a container."""
    host_python: str = "python3"
    """Python of the batch script, 3.9 or newer, which needs no packages."""
    container: str = ""
    """Image that the ranks run in; empty runs them on the host."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts it: srun --container-image (pyxis with enroot) or apptainer exec."""
    mounts: list[str] = []
    """Further folders that the container sees, HOST:CONTAINER each; this repository, the working folder and run.dir always are."""
    requeue: bool = True
    """Start again near the time limit and after faults (scontrol requeue)."""
    max_restarts: int = Field(3, ge=0)
    """Restarts in a row without a new checkpoint; then the job fails."""
    max_requeues: int = Field(100, ge=0)
    """Restarts in all."""
    check: NodeCheck = NodeCheck()
    """What is looked at before the ranks start."""
