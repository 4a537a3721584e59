"""A Slurm cluster on this machine, for as long as a test wants it: munged, slurmctld and three slurmd, all in one folder.

    with Cluster(folder) as cluster:
        job = cluster.command("sbatch", "--parsable", "job.sh")
        assert cluster.ended(job) == "COMPLETED"

Everything listens on the loopback interface. The daemons are children of this process in the foreground and are ended by their ids; nothing
is registered as a service and nothing outside the folder is written. Needs root (slurmd changes users) and the Debian packages that
tests/slurm/install.sh installs. Left out: cgroups, accounting (sacct) and GPUs, so jobs are tracked by their processes alone.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

NODES = ("n1", "n2", "n3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# Nodes that are this machine under several names and so offer more cores than there are. cred_expire is also how long a requeued job waits.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
OverTimeLimit=0
KillWait=30
ReturnToService=2
SlurmdParameters=config_overrides
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
LaunchParameters=use_interactive_step
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=FORCE:4
"""


def missing() -> str:
    """What stops a Slurm from being started here; empty when nothing does."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (make slurm-test installs Slurm on Debian)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin"


class Cluster:
    def __init__(self, folder: Path):
        self.folder, self._daemons = folder, []
        self.env = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        folder = self.folder
        for name in ("state", *NODES):
            (folder / name).mkdir(parents=True, exist_ok=True)
        host, (port, *ports) = socket.gethostname(), _free_ports(1 + len(NODES))
        nodes = "\n".join(f"NodeName={node} NodeAddr=127.0.0.1 NodeHostname={host} Port={own} CPUs=4" for node, own in zip(NODES, ports, strict=True))
        (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, port=port, nodes=nodes))
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid",
                        f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed", "--num-threads=2")
            self.until(lambda: (folder / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            self.until(lambda: self.command("sinfo", "-h", "-N", "-o", "%N %t").split() == [word for node in NODES for word in (node, "idle")], "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        if len(self._daemons) > 1:
            self.command("scancel", "--user=root", check=False)
            self.until(lambda: not self.command("squeue", "-h", check=False), "an empty queue")
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []

    def _start(self, *command: str) -> None:
        output = open(self.folder / f"{command[0]}-{len(self._daemons)}.out", "wb")
        self._daemons.append(subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output))
        output.close()

    def until(self, holds, what: str, seconds: float = 120) -> None:
        """Wait until holds() is true. Raises RuntimeError, also when a daemon dies meanwhile."""
        deadline = time.monotonic() + seconds
        while not holds():
            if dead := [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]:
                raise RuntimeError(f"{', '.join(dead)} ended; see the logs in {self.folder}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} after {seconds:g} s; see the logs in {self.folder}")
            time.sleep(0.5)

    # --- what a person would type ---------------------------------------------------------------------------------------

    def command(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol shows of a job: JobState, Restarts, ExcNodeList, ExitCode ..."""
        return dict(word.split("=", 1) for word in self.command("scontrol", "show", "job", "-o", job).split() if "=" in word)

    def ended(self, job: str, seconds: float = 240) -> str:
        """Wait for a job's last state: COMPLETED, FAILED, CANCELLED ..."""
        moving = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        self.until(lambda: self.job(job)["JobState"] not in moving, f"end of job {job}", seconds)
        return self.job(job)["JobState"]

def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
