"""What one rank keeps between steps: parameters, gradients and optimizer state, to the byte as megatron lays them out.

    kept = weights(run, world_size, pp_rank=0)           # Weights(parameters, gradients, optimizer), bytes; of the first dp rank
    chunks(run)[pp_rank]                                 # the layers of each model chunk, and whether it begins or ends the model

Parameters are listed in the order in which megatron's modules name them (engine/mcore/build.py makes them), because with zero1 the padding
of the flat buffers, and what each dp rank owns of them, depend on it (megatron's param_and_grad_buffer.py). tests/planner compares the sums
with what CPU ranks allocate. Under Transformer Engine modules are fused and the order of some small tensors differs: sums are the same but for padding.
Modules for further tokens (engine/mcore/mtp.py) stand behind the last layer, with an embedding of their own where the chunk does not begin the model.
Left out: tune.freeze (frozen parts are counted as if they learned), buffers that are no parameters (the router's bias, RoPE's periods).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from engine import adapters, metrics

ADAM_STEP_BYTES = 4      # torch's AdamW counts steps in one fp32 scalar per tensor
BUCKET = 40_000_000      # elements; megatron's default, or a million for each dp rank if that is more


@dataclass(frozen=True)
class Chunk:
    """A model chunk of one pp rank: layers [first, last), the embedding if it begins the model; if it ends it final norm, modules for further tokens
    and output."""

    first: int
    last: int
    is_first: bool
    is_last: bool

    @property
    def layers(self) -> range:
        return range(self.first, self.last)


@dataclass(frozen=True)
class Parameter:
    """One tensor of one rank. is_expert: reduced over the experts' own dp group; is_alone: in a bucket of its own; is_matrix: of a linear layer."""

    numel: int
    is_matrix: bool = False
    is_expert: bool = False
    is_alone: bool = False
    learns: bool = True


@dataclass(frozen=True)
class Weights:
    """Bytes. parameters and gradients include the padding of their flat buffers; copies: of FP8 matrices, made anew in every step."""

    parameters: int
    gradients: int
    optimizer: int
    copies: int = 0


def chunks(run) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of every pp rank."""
    p, layers = run.parallel, run.model.num_layers
    return _chunks(tuple(p.pp_layers) or (layers // (p.pp * p.vpp),) * (p.pp * p.vpp), p.pp)


@lru_cache(maxsize=1024)
def _chunks(sizes: tuple[int, ...], pp: int):
    ends = list(accumulate(sizes))
    made = [Chunk(end - size, end, i == 0, i == len(sizes) - 1) for i, (size, end) in enumerate(zip(sizes, ends))]
    return tuple(tuple(made[rank::pp]) for rank in range(pp))


def spread(layers: int, num_chunks: int, further: int = 0) -> list[int]:
    """parallel.pp_layers for layers that do not divide evenly: the chunks at both ends, which hold the embedding and the loss, are the first to have
    one less (as in Llama 3, arXiv 2407.21783, sec. 3.3.2). Empty where they divide evenly. Modules for further tokens count as layers of the last chunk,
    and so may what the output is worth (worth_of_output), as far as that leaves it one of its own."""
    missing = -(layers + further) % num_chunks
    sizes = [-(-(layers + further) // num_chunks)] * num_chunks
    for i in range(missing):
        sizes[-1 - i // 2 if i % 2 else i // 2] -= 1
    sizes[-1] -= further
    if sizes[-1] < 1:
        return spread(layers, num_chunks, further - 1)
    return sizes if len(set(sizes)) > 1 else []


def worth_of_output(model, seq_len: int) -> int:
    """How many layers the output products (next token and further ones) are worth in FLOPs, rounded: what they weigh on the last chunk."""
    if model.head != "tokens":
        return 0
    output = 6 * (1 + model.mtp.num_learning) * model.hidden_size * model.padded_vocab_size
    layers = metrics.flops_per_token(model, seq_len, causal=True) - output
    return round(output * (model.num_layers + model.mtp.num_learning) / layers)


@lru_cache(maxsize=64)
def _layer_kinds(model) -> tuple[tuple[bool, bool], ...]:
    """Of every layer: is it a mixture of experts, does it see a sliding window?"""
    return tuple(zip(model.moe_layers, model.window_layers))


def count_kinds(model, own: tuple[Chunk, ...]) -> dict[tuple[bool, bool], int]:
    """How many layers of each kind these chunks compute, those in modules for further tokens among them."""
    return _count_kinds(_Key(model), own)


@lru_cache(maxsize=4096)
def _count_kinds(model, own):
    kinds = _layer_kinds(model)
    found = Counter(kinds[i] for chunk in own for i in chunk.layers)
    if own[-1].is_last and model.mtp.num_learning:
        found[kinds[-1]] += model.mtp.num_learning
    return found


def alike(run) -> list[int]:
    """The first pp rank of each sort: with the same layers in its chunks, and the same ends. Its pipeline fills the most."""
    return _alike(_Key(run.model), chunks(run))


@lru_cache(maxsize=4096)
def _alike(model, ranks) -> list[int]:
    found = {}
    for rank, own in enumerate(ranks):
        sort = tuple((tuple(_count_kinds(model, (chunk,)).items()), chunk.is_first, chunk.is_last) for chunk in own)
        found.setdefault(sort, rank)
    return list(found.values())


def weights(run, world_size: int, pp_rank: int = 0, dp_rank: int = 0, expert_dp_rank: int = 0) -> Weights:
    """Of the rank at these places of its axes; dp_rank counts the dp * cp ranks over which dense gradients are reduced."""
    p = run.parallel
    dp, expert_dp = world_size // (p.tp * p.pp), world_size // (p.expert_tp * p.ep * p.pp)
    has_buckets = p.overlap_grad_reduce and pp_rank == 0      # of its first chunk; megatron leaves the others whole
    return _weights(_Key(run.model), _Key(run.lora), (p.tp, p.expert_tp, p.ep, p.pp), chunks(run)[pp_rank], run.train.seq_len, run.train.precision,
                    run.train.fp8, run.optim.precision_aware, p.zero1, max(BUCKET, 1_000_000 * (dp // p.cp)) if has_buckets else math.inf,
                    ((False, dp, dp_rank), (True, expert_dp, expert_dp_rank)))


@lru_cache(maxsize=4096)
def _weights(model, lora, split, own, seq_len, precision, fp8, low, zero1, bucket_size, groups) -> Weights:
    element = 4 if precision == "fp32" else 2
    sums = [0, 0, 0, 0]
    for i, chunk in enumerate(own):
        parameters = _chunk_parameters(model, lora, *split, chunk, seq_len)
        matrices = sum(parameter.numel for parameter in parameters if parameter.is_matrix)
        sums[0] += element * sum(parameter.numel for parameter in parameters if not parameter.learns)
        for is_expert, dp, rank in groups:
            group = tuple((x.numel, x.is_alone) for x in parameters if x.learns and x.is_expert == is_expert)
            numel, share, num_tensors = _flat(group, dp, zero1, math.inf if i else bucket_size, rank)
            sums[0] += element * numel
            sums[1] += (2 if low else 4) * numel
            sums[2] += share * ((4 if element == 2 else 0) + (4 if low else 8)) + num_tensors * ADAM_STEP_BYTES
        if fp8.recipe != "none":
            # One byte for each of the two products a matrix takes part in; with fp8.params they are all there is of it.
            sums[3] += 2 * matrices
            sums[0] -= element * matrices if fp8.params else 0
    return Weights(*sums)


@lru_cache(maxsize=4096)
def _flat(sizes: tuple[tuple[int, bool], ...], dp: int, zero1: bool, bucket_size: float, rank: int) -> tuple[int, int, int]:
    """megatron's flat buffer of these tensors: (its elements, those of which this dp rank keeps optimizer state, in how many tensors)."""
    if not zero1:
        numel = sum(size for size, _ in sizes)
        return numel, numel, len(sizes)
    padded, buckets, start, begin, places = math.lcm(dp, 128), [], 0, 0, []

    def close(end: int) -> int:
        nonlocal places
        end = -(-end // padded) * padded
        buckets.append((begin, end, places))
        places = []
        return end

    for size, is_alone in reversed(sizes):      # roughly the order in which gradients come
        start = -(-start // 64) * 64
        if is_alone and places:
            start = begin = close(start)
        places.append((start, start + size))
        start += size
        if start - begin >= bucket_size or is_alone:
            start = begin = close(start)
    end = close(start) if places else start
    own = num = 0
    for first, last, within in buckets:
        share = (last - first) // dp
        low, high = first + rank * share, first + (rank + 1) * share
        parts = [min(b, high) - max(a, low) for a, b in within]
        own, num = own + sum(x for x in parts if x > 0), num + sum(x > 0 for x in parts)
    return end, own, num


def learning(run, pp_rank: int = 0) -> tuple[int, int]:
    """Elements of one rank that learn: dense ones, and those reduced over the experts' own dp group."""
    p = run.parallel
    return _learning(_Key(run.model), _Key(run.lora), p.tp, p.expert_tp, p.ep, p.pp, chunks(run)[pp_rank], run.train.seq_len)


def least(run, world_size: int) -> int:
    """Bytes that the fullest rank needs at the very least, quickly: parameters, gradients, and its share of optimizer state, without padding."""
    p = run.parallel
    shares = (world_size // (p.tp * p.pp), world_size // (p.expert_tp * p.ep * p.pp)) if p.zero1 else (1, 1)
    element, low = 4 if run.train.precision == "fp32" else 2, run.optim.precision_aware
    always, shared = (1 if run.train.fp8.params else element) + (2 if low else 4), (4 if element == 2 else 0) + (4 if low else 8)
    return max(sum(int(numel * (always + shared / share)) for numel, share in zip(learning(run, rank), shares)) for rank in alike(run))


@lru_cache(maxsize=4096)
def _learning(model, lora, tp, expert_tp, ep, pp, own, seq_len) -> tuple[int, int]:
    found = [x for chunk in own for x in _chunk_parameters(model, lora, tp, expert_tp, ep, pp, chunk, seq_len) if x.learns]
    return tuple(sum(x.numel for x in found if x.is_expert == is_expert) for is_expert in (False, True))


@lru_cache(maxsize=4096)
def _chunk_parameters(model, lora, tp: int, expert_tp: int, ep: int, pp: int, chunk: Chunk, seq_len: int) -> tuple[Parameter, ...]:
    sizes, h = _Sizes(model, lora, tp, expert_tp, ep), model.hidden_size
    vocabulary = model.padded_vocab_size // tp * h
    is_tied, further = model.tie_embeddings and model.head == "tokens", model.mtp.num_learning
    embedding = Parameter(vocabulary, is_alone=(is_tied or further > 0) and pp > 1, learns=sizes.base)
    found = []
    if chunk.is_first:
        found.append(embedding)
        if model.position == "learned":
            found.append(Parameter((model.max_position or seq_len) * h, learns=sizes.base))
    elif chunk.is_last and further:
        found.append(embedding)      # a copy
    for layer in chunk.layers:
        found += sizes.layer(_layer_kinds(model)[layer][0])
    if chunk.is_last:
        found += sizes.norm(h)
        found += sizes.further_module() * model.mtp.num_layers
        if model.head == "scalar":
            found.append(Parameter(h))
        elif not is_tied or pp > 1 and not further:      # tied to the copy, it has no matrix of its own
            found.append(Parameter(vocabulary, is_alone=is_tied, learns=sizes.base))
    return tuple(found)


class _Key:
    """A section as a key of a cache: the same object is the same key. Sections are frozen, but hold lists."""

    def __init__(self, section):
        self._section = section

    def __getattr__(self, name):
        return getattr(self._section, name)

    def __eq__(self, other):
        return self._section is other._section

    def __hash__(self):
        return id(self._section)


class _Sizes:
    """Parameters of layers, split over tp and expert tp."""

    def __init__(self, model, lora, tp: int, expert_tp: int, ep: int):
        self.model, self.lora, self.tp, self.expert_tp, self.ep = model, lora, tp, expert_tp, ep
        self.base = not lora.rank      # does the network below the adapters learn?
        self.has_own_group = ep > 1 or expert_tp != tp      # build.py, _mark_experts
        self._layers = {}

    def layer(self, is_moe: bool) -> list[Parameter]:
        if is_moe not in self._layers:
            model, place = self.model, self.model.norm_place
            before, behind = (self.norm(model.hidden_size) if place in where else [] for where in (("pre", "both"), ("post", "both")))
            self._layers[is_moe] = [*before, *self._attention(), *behind, *before, *(self._moe() if is_moe else self._mlp(model.ffn_hidden_size)), *behind]
        return self._layers[is_moe]

    def further_module(self) -> list[Parameter]:
        """A module for a further token: norms of the embedding and of the hidden states, what joins them, a layer of the last one's kind, a norm."""
        model, norm = self.model, self.norm(self.model.hidden_size)
        joined = Parameter(model.hidden_size // self.tp * 2 * model.hidden_size, True, learns=self.base)
        found = [*norm, *norm, joined, *self.layer(model.moe_layers[-1]), *norm]
        if model.mtp.num_learning:
            return found
        return [replace(parameter, learns=False) for parameter in found if self.base or not parameter.learns]      # they have no adapters

    def norm(self, width: int) -> list[Parameter]:
        return [Parameter(width, learns=self.base)] * (1 if self.model.norm == "rmsnorm" else 2)

    def linear(self, name: str, rows: int, cols: int, bias: bool = False, is_expert: bool = False) -> list[Parameter]:
        """A linear layer's weight, bias and adapters: rows and cols of this rank."""
        own = is_expert and self.has_own_group
        found = [Parameter(rows * cols, True, own, learns=self.base)]
        if bias:
            found.append(Parameter(rows, False, own, learns=self.base))
        for part, part_rows in self._parts(name, rows):
            found += [Parameter(self.lora.rank * cols, False, own), Parameter(part_rows * self.lora.rank, False, own)]
            found += [Parameter(part_rows, False, own)] * self.lora.dora
        return found

    def _parts(self, name: str, rows: int):
        if not self.lora.rank or not adapters.parts_of(name, self.model):
            return []
        block = adapters.block_of(name, self.model, rows)
        return [(part, rows * size // sum(block.values())) for part, size in block.items() if part in self.lora.targets]

    def _attention(self) -> list[Parameter]:
        model, tp = self.model, self.tp
        if model.is_latent:
            return self._latent()
        h, d = model.hidden_size, model.head_size
        q, kv = model.num_attention_heads * d // tp, model.kv_heads * d // tp
        sinks = [Parameter(model.num_attention_heads // tp, learns=self.base)] * model.attention_sinks
        norms = []
        if model.qk_norm:
            norms = [*self.norm(d), *self.norm(d)] if model.qk_norm_width == "head" else [*self.norm(q), *self.norm(kv)]
        return [*sinks, *self.linear("linear_proj", h, q, model.linear_bias),
                *self.linear("linear_qkv", q + 2 * kv, h, model.qkv_bias or model.linear_bias), *norms]

    def _latent(self) -> list[Parameter]:
        model, mla, heads, h = self.model, self.model.mla, self.model.num_attention_heads // self.tp, self.model.hidden_size
        found = self.linear("linear_proj", h, heads * mla.v_head_dim)
        if mla.q_lora_rank:
            found += [Parameter(mla.q_lora_rank * h, True, learns=self.base), *self.norm(mla.q_lora_rank),
                      Parameter(heads * model.head_size * mla.q_lora_rank, True, learns=self.base)]
        else:
            found += [Parameter(heads * model.head_size * h, True, learns=self.base)]
        return [*found, Parameter((mla.kv_lora_rank + mla.qk_rope_head_dim) * h, True, learns=self.base), *self.norm(mla.kv_lora_rank),
                Parameter(heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank, True, learns=self.base)]

    def _mlp(self, width: int, bias: bool | None = None) -> list[Parameter]:
        model, bias, local = self.model, self.model.linear_bias if bias is None else bias, width // self.tp
        return [*self.linear("linear_fc1", (1 + model.gated) * local, model.hidden_size, bias), *self.linear("linear_fc2", model.hidden_size, local, bias)]

    def _moe(self) -> list[Parameter]:
        model, h = self.model, self.model.hidden_size
        width, num = model.moe_ffn_hidden_size // self.expert_tp, model.moe.num_experts
        router = [Parameter(num * h, learns=self.base)] + [Parameter(num, learns=self.base)] * model.linear_bias
        bias, rows = model.linear_bias, (1 + model.gated) * width
        expert = [*self.linear("linear_fc1", rows, h, bias, True), *self.linear("linear_fc2", h, width, bias, True)]
        shared = self._mlp(model.moe.shared_expert_ffn_hidden_size, False) if model.moe.shared_expert_ffn_hidden_size else []
        return [*router, *expert * (num // self.ep), *shared]
