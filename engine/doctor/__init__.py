"""What is installed, what is used instead, and how to get the rest: one screen, in some seconds.

    findings = examine(Path("runs"), say=print)      # a Finding for each line of the screen
    print(screen(findings))
    sys.exit(0 if can_train(findings) else 1)

Nothing but Python's standard library is imported here, so that it answers where nothing else is installed; whatever must be imported to be
known is imported by processes of their own (inside.py), side by side. parts.py holds a function for each part.
Left out: whether a model fits (launch/plan.py), and other nodes than this one (launch/slurm's check of nodes).
"""

import json
import os
import shutil
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from engine.doctor import parts
from engine.doctor.parts import Finding

SIGNS = {"ok": "ok", "instead": "--", "broken": "!!"}


def examine(folder: Path, say: Callable[[str], None] = lambda text: None) -> list[Finding]:
    """Look at everything; folder: where runs will be written. say: hears what is being looked at."""
    say("looking: packages, C++ core, processes that talk, disk (some ten seconds)")
    with ThreadPoolExecutor(max(os.cpu_count() or 1, 2)) as pool:
        torch = pool.submit(parts.torch_build)  # others depend on the GPUs that it finds
        early = [pool.submit(part) for part in (parts.python, parts.packages, parts.megatron, parts.core, parts.extras)]
        build, found = torch.result()
        late = [pool.submit(part, build) for part in (parts.transformer_engine, parts.apex, parts.dali, parts.gloo, parts.nccl)]
        findings = [found, *(future.result() for future in early + late)]
    findings += [parts.disk(folder), parts.shared_memory()]  # alone, for they are measured
    return sorted(findings, key=lambda finding: parts.ORDER.index(finding.name))


def can_train(findings: list[Finding]) -> bool:
    return all(finding.state != "broken" for finding in findings)


def screen(findings: list[Finding]) -> str:
    """A block per finding: sign, name, what was found; below it what is used instead and the command that cures it."""
    width = min(max(shutil.get_terminal_size((110, 0)).columns, 60), 130)
    lines = []
    for finding in findings:
        lines += _wrapped(f"{SIGNS[finding.state]:3}{finding.name:20}", finding.found, width)
        if finding.instead:
            lines += _wrapped(" " * 23, finding.instead, width)
        if finding.cure:
            lines.append(f"{'':23}$ {finding.cure}")  # whole, for it is to be copied
    broken = [finding.name for finding in findings if finding.state == "broken"]
    lines += ["", f"Training cannot run: {', '.join(broken)}" if broken else "Training can run here."]
    return "\n".join(lines)


def _wrapped(start: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False) or [start]


def as_json(findings: list[Finding]) -> str:
    return json.dumps({"can_train": can_train(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)
