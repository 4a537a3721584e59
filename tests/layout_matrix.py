"""Any layout to any layout: what one layout saved, another loads bit for bit and trains on as one rank would.

    python tests/layout_matrix.py [--write docs/layouts.md] [--only WORDS]      # every pair of layouts of each model

A layout trains SAVED_AT steps and saves. Another loads that folder; then every number in its live weights, fp32 masters and moments is compared
with the number that the folder holds under that name and place, found by engine/mcore/stream.py, which loads nothing. So is what the
first layout kept in memory. Two more steps must give the losses and gradient norms of one rank that never stopped.
tests/test_layout_matrix.py asserts PAIRS, in which each axis changes both ways.
"""

import argparse
import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import parity_table  # noqa: E402
from parity_table import DENSE, GPT_OSS, LATENT, LIMIT, MOE, SP  # noqa: E402

SAVED_AT, STEPS = 1, 3
MODELS = {
    "tied": {**DENSE, "tie_embeddings": True, "qkv_bias": True},
    "moe": {**MOE, "moe": {**MOE["moe"], "dense_layers": [2]}},
    "latent-moe": {**LATENT, "moe": dict(num_experts=4, top_k=2, ffn_hidden_size=48, shared_expert_ffn_hidden_size=32, first_dense_layers=1)},
    "biased-moe": GPT_OSS,
    "critic": {**DENSE, "head": "scalar"},
    "lora": DENSE,
}
SECTIONS = {"lora": {"lora": {"rank": 4, "dora": True}}}
LAYOUTS = {
    "1": (1, {}),
    "dp2": (2, {}),
    "dp2 zero1": (2, dict(zero1=True)),
    "tp2": (2, dict(tp=2, **SP)),
    "pp2": (2, dict(pp=2)),
    "pp2 vpp2": (2, dict(pp=2, vpp=2)),
    "pp2 3+1": (2, dict(pp=2, pp_layers=[3, 1])),
    "cp2 zero1": (2, dict(cp=2, zero1=True)),
    "tp2 pp2": (4, dict(tp=2, **SP, pp=2)),
    "tp2 dp2 zero1": (4, dict(tp=2, **SP, zero1=True)),
    "pp2 vpp2 dp2 zero1": (4, dict(pp=2, vpp=2, zero1=True, overlap_grad_reduce=True, overlap_param_gather=True)),
    "tp4": (4, dict(tp=4, **SP)),
    "ep2": (2, dict(ep=2)),
    "ep2 zero1": (2, dict(ep=2, zero1=True)),
    "tp2 etp1": (2, dict(tp=2, **SP, etp=1)),
    "tp2 etp1 ep2": (2, dict(tp=2, **SP, etp=1, ep=2)),
    "cp2 ep2": (2, dict(cp=2, ep=2)),
    "tp2 ep2 zero1": (4, dict(tp=2, **SP, ep=2, zero1=True)),
    "tp2 etp1 ep2 pp2 zero1": (4, dict(tp=2, **SP, etp=1, ep=2, pp=2, zero1=True)),
}
FEW = ("1", "tp2", "pp2", "dp2 zero1")
SQUARES = {
    ("tied", "fp32"): (*FEW, "dp2", "pp2 vpp2", "pp2 3+1", "cp2 zero1", "tp4", "tp2 pp2", "pp2 vpp2 dp2 zero1"),
    ("tied", "bf16"): (*FEW, "cp2 zero1", "pp2 vpp2 dp2 zero1"),
    ("moe", "fp32"): (*FEW, "ep2", "tp2 etp1", "tp2 etp1 ep2", "cp2 ep2", "tp2 ep2 zero1", "tp2 etp1 ep2 pp2 zero1"),
    ("latent-moe", "bf16"): (*FEW, "ep2", "ep2 zero1", "tp2 etp1 ep2", "tp2 etp1 ep2 pp2 zero1"),
    ("biased-moe", "fp32"): ("1", "ep2", "tp2 etp1", "tp2 etp1 ep2", "tp2 etp1 ep2 pp2 zero1"),  # experts with biases are not split over etp
    ("critic", "fp32"): FEW,
    ("lora", "fp32"): FEW,
}


@dataclass(frozen=True)
class Pair:
    """One cell: a model in a precision, the layout that saves and the one that loads."""

    model: str
    precision: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.model} {self.precision}: {self.old} -> {self.new}"


def pairs(model: str, precision: str, *changes: tuple[str, str]) -> list[Pair]:
    return [Pair(model, precision, old, new) for old, new in changes]


PAIRS = [
    *pairs("tied", "fp32", ("1", "tp2"), ("tp2", "1"), ("1", "pp2 vpp2"), ("pp2 vpp2", "pp2 3+1"), ("pp2 3+1", "pp2 vpp2"), ("pp2 3+1", "1"),
           ("1", "cp2 zero1"), ("cp2 zero1", "1"), ("cp2 zero1", "dp2 zero1"), ("dp2 zero1", "tp2 pp2"), ("tp2 pp2", "dp2 zero1")),
    *pairs("tied", "bf16", ("1", "dp2 zero1"), ("dp2 zero1", "1"), ("dp2 zero1", "pp2 vpp2 dp2 zero1")),
    *pairs("moe", "fp32", ("1", "ep2"), ("ep2", "tp2"), ("tp2", "tp2 etp1"), ("tp2 etp1", "1"), ("1", "tp2 ep2 zero1"), ("tp2 ep2 zero1", "ep2")),
    *pairs("latent-moe", "bf16", ("pp2", "tp2 etp1 ep2 pp2 zero1"), ("tp2 etp1 ep2 pp2 zero1", "ep2 zero1")),
    *pairs("biased-moe", "fp32", ("1", "tp2 etp1 ep2"), ("tp2 etp1 ep2", "1")),
    *pairs("critic", "fp32", ("pp2", "tp2")),
    *pairs("lora", "fp32", ("tp2", "dp2 zero1")),
]


# --- on the ranks --------------------------------------------------------------------------------------------------------


def network(model: str, precision: str, layout: str):
    """(the network of a layout on this rank, a function step -> (loss, gradient norm) that trains one)."""
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role

    num_ranks, parallel = LAYOUTS[layout]
    sections = {"model": MODELS[model], **SECTIONS.get(model, {})}
    run = parity_table.config("dense", parallel, {"precision": precision, "micro_batch": 2}, num_ranks, sections)
    place = topology.start(run)
    found = ParallelModel(run, place, parity_table.CountTokens(), "policy", Role(head=run.model.head))

    def train(step: int) -> tuple[float, float]:
        loss = found.forward_backward(parity_table.batches(run, place.dp_rank, place.dp, step)).loss
        return loss, found.step(lr=1e-3, number=step + 1)

    return found, train


def train_through(model: str, precision: str):
    """One rank that never stops: (loss, gradient norm) of every step."""
    _, train = network(model, precision, "1")
    return [train(step) for step in range(STEPS)]


def save(model: str, precision: str, layout: str, folder: str):
    """Train SAVED_AT steps and save below `folder`; `compared` with what was written."""
    from engine.mcore import checkpoint

    found, train = network(model, precision, layout)
    for step in range(SAVED_AT):
        train(step)
    return compared(found, checkpoint.save(found, folder, checkpoint.Position(SAVED_AT, 8 * SAVED_AT, 512 * SAVED_AT)))


def load(model: str, precision: str, layout: str, folders: list[str]):
    """For each checkpoint: (`compared` after loading it, (loss, gradient norm) of the steps behind it)."""
    from engine.mcore import checkpoint

    found, train = network(model, precision, layout)
    answers = []
    for folder in folders:
        position = checkpoint.load(found, checkpoint.find(folder))
        assert position == checkpoint.Position(SAVED_AT, 8 * SAVED_AT, 512 * SAVED_AT)
        answers.append((compared(found, checkpoint.find(folder)), [train(step) for step in range(SAVED_AT, STEPS)]))
    return answers


def compared(found, folder: Path):
    """What this rank holds against the folder: (updates taken, [what differs], {key: boxes (offset, sizes) of it that are here})."""
    import torch
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from engine.mcore import checkpoint, optim_state, stream
    from engine.mcore.build import sharded_tensors

    found.gather_weights()
    state = checkpoint._model_state(found)
    state["optimizer"] = optim_state.describe(found, state)["parts"]
    apply_factories(state)
    metadata, wrong, here = stream.read_metadata(folder), [], {}
    for shard in sharded_tensors(state):
        offset, sizes = tuple(shard.global_offset), tuple([1] * shard.prepend_axis_num + list(shard.local_shape))
        stored = stream.read(folder, metadata, shard.key, offset, sizes).view(shard.data.shape)
        if stored.dtype != shard.data.dtype or not torch.equal(stored, shard.data):
            wrong.append(f"{shard.key} at {offset}")
        here.setdefault(shard.key, set()).add((offset, sizes))
    return optim_state._step(found.optimizer), wrong, here


# --- what came back ------------------------------------------------------------------------------------------------------


class Matrix:
    """Runs cells; what a layout saved, and what one rank does, is made once. folder: where checkpoints go."""

    def __init__(self, folder: str | Path):
        self.folder, self._through, self._saved = Path(folder), {}, {}

    def loaded(self, cells: list[Pair]) -> dict[Pair, float]:
        """Cells of one model, precision and new layout -> the largest relative difference of a loss or norm. Raises AssertionError where a
        number differs from the stored one, or is on no rank."""
        import ranks

        (key,) = {(cell.model, cell.precision) for cell in cells}
        (new,) = {cell.new for cell in cells}
        num_ranks, _ = LAYOUTS[new]
        folders = [self._save(*key, cell.old) for cell in cells]
        by_rank = ranks.run(num_ranks, load, *key, new, folders)
        return {cell: self._check(str(cell), folder, key, answers) for cell, folder, answers in zip(cells, folders, zip(*by_rank))}

    def _check(self, name: str, folder: str, key, answers) -> float:
        check_whole(name, folder, [answer for answer, _ in answers])
        if key not in self._through:
            import ranks

            self._through[key] = ranks.run(1, train_through, *key)[0][SAVED_AT:]
        return max(abs(a - b) / abs(b) for _, steps in answers for ours, theirs in zip(steps, self._through[key]) for a, b in zip(ours, theirs))

    def _save(self, model: str, precision: str, layout: str) -> str:
        import ranks

        key = (model, precision, layout)
        if key not in self._saved:
            folder = str(self.folder / "-".join(key).replace(" ", "-"))
            num_ranks, _ = LAYOUTS[layout]
            check_whole(f"{model} {precision}: saved by {layout}", folder, ranks.run(num_ranks, save, *key, folder))
            self._saved[key] = folder
        return self._saved[key]


def check_whole(name: str, folder: str, by_rank) -> None:
    """No number differs, and together the ranks hold every number of every stored tensor."""
    import numpy as np

    from engine.mcore import checkpoint, stream

    wrong = [f"{what} on rank {rank}" for rank, (_, found, _) in enumerate(by_rank) for what in found]
    assert not wrong, f"{name}: {len(wrong)} differ from what is stored: {', '.join(wrong[:4])}"
    assert {step for step, _, _ in by_rank} == {SAVED_AT}, f"{name}: the optimizer has taken {[step for step, _, _ in by_rank]} steps"
    stored = {key: tuple(entry.size) for key, entry in stream.read_metadata(checkpoint.find(folder)).state_dict_metadata.items() if hasattr(entry, "size")}
    for key, size in stored.items():
        here = np.zeros(size, bool)
        for _, _, boxes in by_rank:
            for offset, sizes in boxes.get(key, ()):
                here[tuple(slice(o, o + n) for o, n in zip(offset, sizes))] = True
        assert here.all(), f"{name}: {(~here).sum()} numbers of {key} are on no rank"


def grouped(cells: list[Pair]) -> list[list[Pair]]:
    """Cells that one start of the ranks answers: those of one model, precision and new layout."""
    of = lambda cell: (cell.model, cell.precision, cell.new)  # noqa: E731
    return [list(group) for _, group in itertools.groupby(sorted(cells, key=of), of)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", help="also write the tables to this Markdown file")
    parser.add_argument("--only", default="", help="models whose name contains this")
    args = parser.parse_args()
    lines, worst, num_cells, start = [], 0.0, 0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        for (model, precision), layouts in SQUARES.items():
            if args.only not in model:
                continue
            matrix, found = Matrix(folder), {}
            for new in layouts:
                found |= matrix.loaded([Pair(model, precision, old, new) for old in layouts])
                print(f"{model} {precision}: all -> {new}, {time.time() - start:.0f} s", flush=True)
            worst, num_cells = max([worst, *(found.values() if precision == "fp32" else [])]), num_cells + len(found)
            lines += ["", f"## {model}, {precision}", "", "| saved by | " + " | ".join(layouts) + " |", "| --- |" + " --- |" * len(layouts)]
            lines += [f"| {old} | " + " | ".join(f"{found[Pair(model, precision, old, new)]:.0e}" for new in layouts) + " |" for old in layouts]
            if args.write:
                Path(args.write).write_text(HEADER + "\n".join(lines) + "\n")
    print(*lines, sep="\n")
    print(f"{num_cells} pairs of layouts in {time.time() - start:.0f} s, largest difference in fp32 {worst:.1e}")
    return 0 if worst < LIMIT else 1


HEADER = f"""# Layouts: what one saved, any other loads

Each cell: a run in the layout of its row saved after {SAVED_AT} steps and one in the layout of its column loaded that. In all of them every
number of the weights, the fp32 masters and both of AdamW's moments was bit-equal to the stored one, and so was the number of updates.
The figure is the largest relative difference of the losses and gradient norms of the next {STEPS - SAVED_AT} steps from one rank that never
stopped; in bf16 it is the rounding of bf16 between layouts, the same as without a checkpoint. Written by `python tests/layout_matrix.py --write docs/layouts.md`;
`tests/test_layout_matrix.py` asserts a part.

| model | what is in it |
| --- | --- |
| tied | dense, embeddings shared by the first and the last pp rank, norms of queries and keys, biases in QKV |
| moe | 4 experts, top 2, a shared expert; one of four layers dense |
| latent-moe | latent attention (MLA), the first layer dense, 4 experts, a shared one |
| biased-moe | experts with biases, attention with sinks (gpt-oss) |
| critic | dense with a scalar head |
| lora | dense with DoRA's adapters, of which alone moments are kept |

`3+1`: layers on the two pp ranks.
"""

if __name__ == "__main__":
    sys.exit(main())
