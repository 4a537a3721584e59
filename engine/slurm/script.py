"""A job script of Slurm from a configuration: its section `slurm`, and the layout that the ranks must fit.

    text = render(request)                              # Request(config, overrides, ...)

The text is launch/slurm/job.sh.jinja, filled in; it can be read, kept and submitted by hand. Left out: heterogeneous jobs.
"""

import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from engine.checks import cross_checks
from engine.config import ConfigError, RunConfig, load_config
from engine.stages import ALIGN

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "launch" / "slurm" / "job.sh.jinja"


@dataclass(frozen=True)
class Request:
    """One job, or a series of jobs that go on where the last one stopped. run: validated for the ranks that the nodes hold.

    chain: the number of jobs by --dependency, array: by --array; 0 is one job that requeues itself.
    """

    config: Path
    overrides: tuple[str, ...]
    run: RunConfig
    chain: int = 0
    array: int = 0

    @property
    def run_dir(self) -> Path:
        return Path(self.run.run.dir).absolute()


def request(config: str, overrides: list[str], chain: int = 0, array: int = 0) -> Request:
    """Read and check a configuration for the cluster that it names. Raises ConfigError, with every mistake."""
    run = load_config(config, overrides)
    if mistakes := [*problems(run), *cross_checks(run, run.slurm.nodes * ranks_per_node(run.slurm))]:
        raise ConfigError(mistakes)
    return Request(Path(config).absolute(), tuple(overrides), run, chain, array)


def ranks_per_node(slurm) -> int:
    """Ranks on each node. Raises ConfigError where the section names none, or two numbers."""
    if slurm.gpus_per_node and slurm.ranks_per_node not in (0, slurm.gpus_per_node):
        raise ConfigError([f"slurm.ranks_per_node({slurm.ranks_per_node}) is not slurm.gpus_per_node({slurm.gpus_per_node}), but every GPU has one "
                           "rank; leave ranks_per_node out, or set gpus_per_node=0 for CPU ranks"])
    if not slurm.gpus_per_node and not slurm.ranks_per_node:
        raise ConfigError(["slurm.gpus_per_node=0 asks for CPU ranks; set slurm.ranks_per_node to how many each node has"])
    return slurm.gpus_per_node or slurm.ranks_per_node


def problems(run):
    """What is wrong with the section slurm, one sentence each."""
    slurm = run.slurm
    if slurm.gpus_per_node and run.run.device == "cpu":
        yield f"run.device=cpu, but slurm.gpus_per_node({slurm.gpus_per_node}) asks for GPUs; set it to 0 and slurm.ranks_per_node to the CPU ranks of a node"
    if not slurm.gpus_per_node and run.run.device == "cuda":
        yield "run.device=cuda, but slurm.gpus_per_node=0 asks for no GPU; set it to the GPUs of a node"
    if slurm.gres and not slurm.gpus_per_node:
        yield f"slurm.gres={slurm.gres} asks for GPUs, but slurm.gpus_per_node=0 starts CPU ranks; set gpus_per_node to the GPUs of a node"
    if 0 < _seconds(slurm) <= slurm.save_seconds:
        yield (f"slurm.time_limit_hours({slurm.time_limit_hours:g}) is {_seconds(slurm)} s, and slurm.save_seconds({slurm.save_seconds}) asks the ranks to "
               "leave before they have begun; raise the one or lower the other")
    for name in slurm.env:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"slurm.env has {name!r}, which is no name of an environment variable"
    for line in slurm.sbatch:
        if not line.startswith("-") or "\n" in line:
            yield f"slurm.sbatch has {line!r}, which is no option of sbatch; write it as --constraint=h100"
    for mount in slurm.mounts:
        if ":" not in mount or "," in mount:
            yield f"slurm.mounts has {mount!r}; write HOST:CONTAINER, one mount each"
    written = {f"slurm.{name}": getattr(slurm, name) for name in ("job_name", "account", "partition", "qos", "gres")}
    for key, value in {"run.dir": run.run.dir, **written}.items():
        if re.search(r'[\n"%\\]', value):
            yield f"{key}={value!r} cannot stand in an #SBATCH line; use no quotes, backslashes, percent signs or line breaks"


def render(asked: Request) -> str:
    """The text of the job script."""
    from jinja2 import Environment, StrictUndefined

    run, slurm = asked.run, asked.run.slurm
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters.update(quote=lambda value: shlex.quote(str(value)), option=_option)
    working_dir, per_node = str(Path.cwd()), ranks_per_node(slurm)
    seen = dict.fromkeys((str(ROOT), working_dir, str(asked.run_dir)))
    return jinja.from_string(TEMPLATE.read_text()).render(
        run=run,
        slurm=slurm,
        config=asked.config,
        layout=_layout(run, slurm.nodes * per_node),
        job_name=slurm.job_name or asked.run_dir.name,
        ranks_per_node=per_node,
        time_limit=_clock(_seconds(slurm)) if slurm.time_limit_hours else "",
        requeue=_then(asked) == "requeue",
        then=_then(asked),
        array=asked.array,
        chain=f"chain-{time.time_ns():x}" if asked.chain else "",
        root=str(ROOT),
        working_dir=working_dir,
        run_dir=str(asked.run_dir),
        pyxis=bool(slurm.container) and slurm.container_runtime == "pyxis",
        apptainer=bool(slurm.container) and slurm.container_runtime == "apptainer",
        mounts=[*(f"{folder}:{folder}" for folder in seen), *slurm.mounts],
        python=slurm.python or ("python" if slurm.container else str(ROOT / ".venv" / "bin" / "python")),
        command="align.py" if run.stage in ALIGN else "pretrain.py",
        arguments=[str(asked.config), *asked.overrides],
    )


def submit(asked: Request, say=print) -> list[str]:
    """Keep the script as run.dir/slurm/job.sh and hand it to sbatch. Returns the ids of the jobs. Raises ValueError with sbatch's words."""
    path = write(asked, asked.run_dir / "slurm" / "job.sh")
    jobs = []
    for _ in range(asked.chain or 1):
        after = [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        try:
            done = subprocess.run(["sbatch", "--parsable", *after, str(path)], capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError("there is no sbatch here; run this where jobs are submitted, or print the script without --submit") from None
        sys.stderr.write(done.stderr)
        if done.returncode:
            raise ValueError(f"sbatch has refused {path}" + (f"; of the chain, {', '.join(jobs)} are submitted" if jobs else ""))
        jobs.append(done.stdout.strip().split(";")[0])
        say(f"submitted {jobs[-1]}" + (f" after {jobs[-2]}" if after else "") + f": {path}")
    return jobs


def write(asked: Request, path: Path) -> Path:
    """Write the script, and make the folder of its output, without which Slurm fails a job in silence."""
    for folder in (path.parent, asked.run_dir / "slurm"):
        folder.mkdir(parents=True, exist_ok=True)
    path.write_text(render(asked))
    path.chmod(0o755)
    return path


def _then(asked: Request) -> str:
    """What follows an attempt that can be gone on with: a requeue, the next job of the series, or nothing."""
    if asked.chain or asked.array:
        return "next"
    return "requeue" if asked.run.slurm.requeue else "nothing"


def _layout(run, world_size: int) -> str:
    p = run.parallel
    rest = f"-EP({p.ep})" if p.ep > 1 else ""
    return f"TP({p.tp})-PP({p.pp})-CP({p.cp})-DP({world_size // (p.tp * p.pp * p.cp)}){rest} of {world_size} ranks on {run.slurm.nodes} nodes"


def _seconds(slurm) -> int:
    return round(slurm.time_limit_hours * 3600)


def _clock(seconds: int) -> str:
    """Slurm's D-HH:MM:SS."""
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24}-{hours % 24:02d}:{minutes:02d}:{seconds:02d}"


def _option(value) -> str:
    """A value of an #SBATCH line."""
    return f'"{value}"' if re.search(r"\s|#", str(value)) else str(value)
