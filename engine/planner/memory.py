"""Bytes of every pp rank of a layout, by part; the largest decides whether it fits.

    needs = memory_of(run, world_size, "te")        # {pp rank: Memory}
    fullest(needs)                                  # (pp rank, Memory) of the largest

The peak of a rank is taken when its pipeline is full: all micro-batches in flight (1F1B, or interleaved with vpp), and one layer or the loss in
its backward pass. Weights are exact (weights.py), what autograd saves follows each tensor (activations.py); temporaries of the backward pass,
what CUDA and NCCL take, and fragmentation are estimates (constants.py).
"""

from dataclasses import dataclass

from engine.loss_memory import BLOCK_BYTES, CHUNK_BYTES
from engine.planner import constants as c
from engine.planner.activations import Saved
from engine.planner.weights import alike, chunks, count_kinds, learning, weights


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. workspace: temporaries of the backward pass; runtime: CUDA and NCCL; margin: fragmentation."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    runtime: int
    margin: int

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return dict(vars(self))


def fullest(needs: dict[int, Memory]) -> tuple[int, Memory]:
    return max(needs.items(), key=lambda rank: rank[1].total)


def memory_of(run, world_size: int, backend: str) -> dict[int, Memory]:
    """Of the pp ranks that may need the most: the first of each sort, on a GPU. Within one all ranks are alike but for rounding."""
    saved = Saved(run, backend)
    return {rank: _rank(run, world_size, backend, rank, saved) for rank in alike(run)}


def micro_batches(run, world_size: int) -> int:
    """Micro-batches of one dp rank in a step."""
    p = run.parallel
    return max(run.train.global_batch // (run.train.micro_batch * (world_size // (p.tp * p.pp * p.cp))), 1)


def in_flight(pp: int, vpp: int, pp_rank: int, num_microbatches: int) -> list[int]:
    """Forward passes of each chunk whose backward pass has not begun, at their most (arXiv 2104.04473, sec. 2.2; megatron's schedules.py)."""
    if vpp == 1:
        return [min(pp - pp_rank, num_microbatches)]
    passes = min(2 * (pp - pp_rank - 1) + (vpp - 1) * pp + 1, num_microbatches * vpp)
    counts = [0] * vpp
    for i in range(passes):      # pp micro-batches through one chunk, then through the next
        counts[i // pp % vpp] += 1
    return counts


def _rank(run, world_size: int, backend: str, pp_rank: int, saved: Saved) -> Memory:
    p, own = run.parallel, chunks(run)[pp_rank]
    held = weights(run, world_size, pp_rank)
    counts = in_flight(p.pp, p.vpp, pp_rank, micro_batches(run, world_size))
    activations = sum(count * saved.chunk(chunk) for count, chunk in zip(counts, own))
    logits = saved.logits if own[-1].is_last else 0
    workspace = _workspace(run, saved, own, backend)
    axes = sum(size > 1 for size in (p.tp, p.pp, p.cp, p.ep, world_size // (p.tp * p.pp * p.cp)))
    copies = held.copies + (saved.bytes * sum(learning(run, pp_rank)) if run.tune.l2_to_init else 0)      # and the weights it is pulled to
    tensors = (held.parameters + copies, held.gradients, held.optimizer, activations, logits, workspace)
    return Memory(*tensors, c.RUNTIME_BYTES + axes * c.COMMUNICATOR_BYTES, int(c.FRAGMENTATION_SHARE * sum(tensors)))


def _workspace(run, saved: Saved, own, backend: str) -> int:
    """Temporaries at the worst moment of a backward pass: of one layer, or of the loss."""
    model, p, h = run.model, run.parallel, run.model.hidden_size
    layer = max((_layer_workspace(run, saved, backend, *kind) for kind in count_kinds(model, own)), default=0)
    loss = 0
    if own[-1].is_last and model.head == "tokens":
        # Next tokens and all further ones are two products with one matrix: the first one's gradients wait for the second one's.
        ids = model.padded_vocab_size // p.tp
        for rows, knows in saved.losses:
            loss += (rows + (0 if saved.is_early(rows, knows) else ids)) * h * saved.bytes
        chunk = min(saved.tokens * ids * saved.bytes, CHUNK_BYTES["cuda"])
        loss += max(chunk * 8 // saved.bytes, BLOCK_BYTES["cuda"] + chunk * 4 // saved.bytes if any(saved.is_early(*of) for of in saved.losses) else 0)
    return max(layer, loss)


def _layer_workspace(run, saved: Saved, backend: str, is_moe: bool, is_windowed: bool) -> int:
    model, p, h = run.model, run.parallel, run.model.hidden_size
    rows, width = saved.tokens, model.ffn_hidden_size // p.tp
    if is_moe:
        rows, width = saved.expert_rows, model.moe_ffn_hidden_size // p.expert_tp
    # Gradients of an MLP's inside and of both its ends; the residual stream's; what sequence parallel or the dispatcher gathers.
    total = (rows * (3 if model.gated else 2) * width + 2 * rows * h + 2 * saved.stream * h + 2 * saved.tokens * h) * saved.bytes
    if backend == "torch":
        total += (1 + model.gated) * width * h * saved.bytes      # a weight's gradient before it is added to the buffer; te adds it in the product
    recompute = run.train.recompute
    if recompute == "full":
        total += saved.whole_layer(is_moe, is_windowed)
    return total + (saved.core(is_windowed) if recompute == "selective" else 0)
