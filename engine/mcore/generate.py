"""Draw answers from a network on the grid of ranks it trains on: prompts are read once, then one token per row and pass.

    answers = generate(model, prompts, Sampling(max_new_tokens=64), keys)      # ParallelModel.generate; see engine/sampling.py

Prompts are those of this replica, token ids of any lengths; every tp, pp and cp rank of it calls with the same ones and gets the same answers.
How each axis takes part: tp ranks hold their heads and their share of the logits, which are gathered for the last place alone; pp ranks hand
the hidden states on, and the last one decides; cp ranks hold the same weights, so each draws a share of the rows from whole sequences; dp
replicas work by themselves, unless experts are spread over them: then each goes on with a row of no meaning until the last is done.
Sequence parallelism, FP8, an expert's limit of tokens and torch.compile are off meanwhile: one token does not split, few tokens suit no
kernel of FP8, and no row's answer may depend on how many others there are.
Rows that are done leave the batch. One rank decides every token and tells the others, so that rounding never parts them.
Left out: filling the places of rows that are done with further prompts, several pipeline batches in flight, speculation.
"""

import itertools
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from engine.mcore import kv_cache
from engine.mcore.build import DTYPES, bare
from engine.mcore.forward_only import Turn, forward_only, run_layers
from engine.mcore.sample import draw, uniforms
from engine.rope import BY_LENGTH, attention_factor, inverse_frequencies
from engine.sampling import Generated, Sampling, Text
from engine.stage_sections import RopeScaling

READ_AT_ONCE = 8192  # tokens of prompts in one pass, padding included, unless one prompt alone is longer


def generate(model, prompts: list[list[int]], sampling: Sampling, keys: list[int] | None = None, decode: Callable[[list[int]], str] | None = None,
             on_token: Callable[[int, int], None] | None = None, batch: int = 0) -> list[Generated]:
    """One answer for each prompt, in their order. Collective over all ranks; a replica may have no prompts.

    model: a ParallelModel with the head for tokens. keys: what tells rows with equal prompts apart (Sampling.seed); None numbers the rows of all
    replicas, one replica after the other. decode: text of token ids, for stop_texts. on_token(row, token): called as tokens are drawn; over cp,
    rows of the other ranks follow when all are whole. batch: rows of a replica that are decoded at once, longest prompts first; 0 all.
    Raises ValueError on all ranks for prompts that are empty, not of the vocabulary, or too long for learned positions, and for logits
    that are not finite.
    """
    assert model.run.model.head == "tokens", "a network with a scalar head has no tokens to draw"
    first = _agreed(model.topology, len(prompts), _problem(model.run, prompts, sampling, decode))
    keys = list(range(first, first + len(prompts))) if keys is None else keys
    model.gather_weights()
    t = model.topology
    rows = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))[t.cp_rank::t.cp]
    size = -(-batch // t.cp) or max(len(rows), 1)
    answers: dict[int, Generated] = {}
    with forward_only(model) as attentions:
        decoder = _Decoder(model, attentions, sampling, decode, on_token)
        for begin in range(0, len(rows), size):
            some = rows[begin:begin + size]
            answers |= zip(some, decoder.answer(some, [prompts[row] for row in some], [keys[row] for row in some]))
        decoder.wait_for_others()
    if t.cp > 1:
        answers = _from_all_cp_ranks(answers, t.cp, on_token)
    return [answers[row] for row in range(len(prompts))]


def _problem(run, prompts, sampling: Sampling, decode) -> str:
    """What is wrong with the prompts, empty if nothing is."""
    if sampling.stop_texts and decode is None:
        return "stop_texts need `decode`, which turns token ids into text"
    room = run.model.max_position or run.train.seq_len
    for number, prompt in enumerate(prompts):
        if not prompt:
            return f"prompt {number} is empty; begin it with at least one token, such as the tokenizer's begin of text"
        if not 0 <= min(prompt) <= max(prompt) < run.model.vocab_size:
            return f"prompt {number} holds ids outside the vocabulary of {run.model.vocab_size}; was another tokenizer used?"
        if run.model.position == "learned" and len(prompt) + sampling.max_new_tokens > room:
            return (f"prompt {number} has {len(prompt)} tokens and max_new_tokens is {sampling.max_new_tokens}, but the model's learned positions "
                    f"end at {room} (model.max_position); shorten the prompt or lower max_new_tokens")
    return ""


def _agreed(topology, num_prompts: int, problem: str) -> int:
    """How many prompts the replicas before this one have. Raises ValueError on every rank for the first problem that any has."""
    found = [(num_prompts, problem)]
    if topology.dp > 1:
        found = [None] * topology.dp
        dist.all_gather_object(found, (num_prompts, problem), group=mpu.get_data_parallel_group())
    for _, said in found:
        if said:
            raise ValueError(said)
    return sum(number for number, _ in found[:topology.dp_rank])


def _from_all_cp_ranks(own: dict[int, Generated], cp: int, on_token) -> dict[int, Generated]:
    parts = [None] * cp
    dist.all_gather_object(parts, own, group=mpu.get_context_parallel_group())
    whole = {row: answer for part in parts for row, answer in part.items()}
    if on_token:
        for row in sorted(whole.keys() - own.keys()):
            for token in whole[row].tokens:
                on_token(row, token)
    return whole


class _Decoder:
    """One network and one way to draw from it."""

    def __init__(self, model, attentions, sampling: Sampling, decode, on_token):
        self.model, self.topology, self.attentions = model.run.model, model.topology, attentions
        self.sampling, self.decode, self.on_token = sampling, decode, on_token
        self.networks = [bare(chunk) for chunk in model.chunks]
        self.dtype = DTYPES[model.run.train.precision]
        self.has_rope = self.model.position == "rope"
        self.local = None  # frequencies of layers that see the sliding window alone, where they have their own
        if self.has_rope and self.model.rope_local_theta:
            self.local = inverse_frequencies(self.model.rope_local_theta, self.model.rope_dims, RopeScaling(), 0)[0].to(self.topology.device)
        self._frequencies_at: dict[int, torch.Tensor] = {}
        t = self.topology
        self.num_together = t.tp * t.pp  # ranks that work on the same rows
        self.decides = t.tp_rank == 0 and t.pp_rank == t.pp - 1
        moe = self.model.moe
        self.in_lockstep = bool(moe.num_experts) and t.ep * t.etp > t.tp  # experts are spread over replicas or cp ranks

    # --- a batch of rows ---------------------------------------------------------------------------------------------

    def answer(self, rows: list[int], prompts: list[list[int]], keys: list[int]) -> list[Generated]:
        """The answers of prompts that are decoded together, longest first. rows: their numbers, for on_token."""
        self._begin(prompts)
        answers = [Generated([], [], "length") for _ in prompts]
        texts = [Text(self.decode) for _ in prompts] if self.sampling.stop_texts and self.decides else None
        seen = self._seen(prompts) if self.sampling.repetition_penalty != 1 and self.decides else None
        here = list(range(len(prompts)))  # which prompt stands at each place of the batch
        logits = self._read(prompts)
        for number in range(self.sampling.max_new_tokens):
            randoms = uniforms(self.sampling.seed, [keys[i] for i in here], number)
            drawn = self._decided(logits, seen, randoms, texts and [texts[i] for i in here])
            done = []
            for place, (token, logp, stops) in enumerate(zip(*drawn)):
                answer = answers[here[place]]
                answer.tokens.append(int(token))
                answer.logps.append(logp)
                if stops:
                    answer.reason = "stop"
                    done.append(place)
                if self.on_token:
                    self.on_token(rows[here[place]], int(token))
            if len(done) == len(here) or number == self.sampling.max_new_tokens - 1:
                return answers
            tokens = [int(token) for token in drawn[0]]
            if done:
                order = self.rows.leave(done, self.caches)
                here, tokens = [here[place] for place in order], [tokens[place] for place in order]
                seen = None if seen is None else seen[order]
            if seen is not None:
                seen[range(len(here)), tokens] = True
            logits = self._go_on(tokens)
            if outgrown := self._outgrown():
                logits = self._read_again(outgrown, [prompts[here[place]] + answers[here[place]].tokens for place in outgrown], logits)

    def wait_for_others(self) -> None:
        """Where experts are spread over replicas, take part in their passes until all are done."""
        while self.in_lockstep and self._is_anyone_working(False):
            self._begin([[0]])
            self.rows.reading = [[0]]
            self._pass(torch.zeros(1, 1, dtype=torch.long), [1])

    def _is_anyone_working(self, am_i: bool) -> bool:
        flag = torch.tensor(int(am_i), device=self.topology.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mpu.get_data_parallel_group(with_context_parallel=True))
        return bool(flag)

    def _begin(self, prompts: list[list[int]]) -> None:
        """Empty caches for these prompts and their answers."""
        lengths = [len(prompt) for prompt in prompts]
        self.rows = kv_cache.Rows(lengths, max(lengths) + self.sampling.max_new_tokens, self.topology.device)
        self.caches = [kv_cache.LayerCache(self.rows) for _ in self.attentions]
        for attention, cache in zip(self.attentions, self.caches):
            attention.cache = cache

    def _seen(self, prompts: list[list[int]]) -> torch.Tensor:
        """bool [b, vocab]: the tokens that a prompt holds."""
        seen = torch.zeros(len(prompts), self.model.vocab_size, dtype=torch.bool)
        for row, prompt in zip(seen, prompts):
            row[prompt] = True
        return seen.to(self.topology.device)

    # --- passes -------------------------------------------------------------------------------------------------------

    def _read(self, prompts: list[list[int]]) -> torch.Tensor | None:
        """Let the prompts pass, some at a time, equal neighbours once. Logits fp32 [b, vocab] at the last token of each, on the last pp rank."""
        places = [list(equal) for _, equal in itertools.groupby(range(len(prompts)), lambda place: prompts[place])]
        found, begin = [], 0
        while begin < len(places):
            longest = len(prompts[places[begin][0]])
            self.rows.reading = places[begin:begin + max(1, READ_AT_ONCE // longest)]
            some = [prompts[equal[0]] for equal in self.rows.reading]
            tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in some])
            found.append(self._working_pass(tokens, [len(prompt) for prompt in some]))
            begin += len(some)
        self.rows.reading = None
        if found[0] is None:
            return None
        return torch.cat(found).repeat_interleave(torch.tensor([len(equal) for equal in places], device=found[0].device), 0)

    def _go_on(self, tokens: list[int]) -> torch.Tensor | None:
        """One more token of each row. Logits as of _read."""
        logits = self._working_pass(torch.tensor(tokens)[:, None], [self.rows.end + 1 - start for start in self.rows.starts])
        self.rows.end += 1
        return logits

    def _outgrown(self) -> list[int]:
        """Places of rows that have just become longer than what LongRoPE's short factors are for. transformers takes the long ones for all
        their tokens from then on in Phi-3, and for the new ones alone in other families."""
        scaling = self.model.rope_scaling
        if self.model.family != "phi3" or scaling.kind != "longrope":
            return []
        return [place for place, start in enumerate(self.rows.starts) if self.rows.end - start == scaling.original_max_position + 1]

    def _read_again(self, places: list[int], texts: list[list[int]], logits: torch.Tensor | None) -> torch.Tensor | None:
        """Keep new keys of the rows at these places, whose texts are equally long. `logits` with theirs replaced."""
        at_once = max(1, READ_AT_ONCE // len(texts[0]))
        for begin in range(0, len(places), at_once):
            some = places[begin:begin + at_once]
            self.rows.reading = [[place] for place in some]
            found = self._working_pass(torch.tensor(texts[begin:begin + at_once]), [len(texts[0])] * len(some))
            if logits is not None:
                logits[some] = found
        self.rows.reading = None
        return logits

    def _working_pass(self, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor | None:
        if self.in_lockstep:
            self._is_anyone_working(True)
        return self._pass(tokens, lengths)

    def _pass(self, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor | None:
        """tokens int64 [b, s], lengths: tokens of each row including these, without the padding behind them. Logits as of _read."""
        device = self.topology.device
        tokens, ends = tokens.to(device), torch.tensor(lengths, device=device)
        if self.rows.reading is None:
            positions = (ends - 1)[:, None]  # [b, 1]
        else:
            positions = torch.arange(tokens.size(1), device=device)[None]  # [1, s]
        turn = self._turn(positions.t(), lengths) if self.has_rope else None
        local = turn if self.local is None else Turn.of(positions.t()[..., None, None] * self.local, 1.0, self.dtype)
        hidden = None
        for network in self.networks:
            if network.pre_process:
                hidden = network.embedding(input_ids=tokens, position_ids=positions)
            elif self.topology.pp > 1:
                hidden = self._received(tokens.shape)
            hidden = run_layers(network, hidden, turn, local)  # [s, b, h]
            if not network.post_process:
                dist.send(hidden.contiguous(), mpu.get_pipeline_model_parallel_next_rank(), group=mpu.get_pipeline_model_parallel_group())
        if not self.networks[-1].post_process:
            return None
        last = hidden[-1] if self.rows.reading is None else hidden[ends - 1, torch.arange(len(lengths), device=device)]
        return self._logits(self.networks[-1], last)

    def _received(self, shape) -> torch.Tensor:
        """Hidden states [s, b, h] from the pp rank before this one."""
        b, s = shape
        hidden = torch.empty(s, b, self.model.hidden_size, dtype=self.dtype, device=self.topology.device)
        dist.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank(), group=mpu.get_pipeline_model_parallel_group())
        return hidden

    def _turn(self, positions: torch.Tensor, lengths: list[int]) -> Turn:
        """What rotary embedding does at positions [s, b or 1]. Where frequencies depend on the length, it is that of each row so far."""
        scaling = self.model.rope_scaling
        by_length = scaling.kind in BY_LENGTH
        frequencies = torch.stack([self._frequencies(length) for length in lengths])[:, None] if by_length else self._frequencies(0)
        angles = positions[..., None, None] * frequencies  # [s, b or 1, 1, r / 2], fp32
        return Turn.of(angles, attention_factor(scaling), self.dtype)

    def _frequencies(self, length: int) -> torch.Tensor:
        """fp32 [r / 2] for rows of this length."""
        if length not in self._frequencies_at:
            dims = 2 * self.networks[0].rotary_pos_emb.inv_freq.numel()
            found, _ = inverse_frequencies(self.model.rope_theta, dims, self.model.rope_scaling, length)
            self._frequencies_at[length] = found.to(self.topology.device)
        return self._frequencies_at[length]

    def _logits(self, network, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [b, h] -> fp32 [b, vocab], gathered over tp, without the padding of the vocabulary."""
        tied = network.shared_embedding_or_output_weight() if network.share_embeddings_and_output_weights else None
        logits = network.output_layer(hidden[None], weight=tied)[0][0]
        if self.topology.tp > 1:
            parts = [torch.empty_like(logits) for _ in range(self.topology.tp)]
            dist.all_gather(parts, logits.contiguous(), group=mpu.get_tensor_model_parallel_group())
            logits = torch.cat(parts, dim=-1)
        return logits[:, :self.model.vocab_size].float()

    # --- deciding -----------------------------------------------------------------------------------------------------

    def _decided(self, logits, seen, randoms, texts: list[Text] | None) -> tuple[list, list, list]:
        """(tokens, their log p, does the row end here), a number for each row, the same on all ranks that work on these rows."""
        if self.decides:
            tokens, logps = (x.tolist() for x in draw(logits, seen, self.sampling, randoms))
            stops = [token in self.sampling.stop_tokens for token in tokens]
            if texts is not None:
                completed = [text.completes(token, self.sampling.stop_texts) for text, token in zip(texts, tokens)]
                stops = [one or other for one, other in zip(stops, completed)]
            drawn = tokens, logps, stops
        if self.num_together > 1:
            told = torch.tensor(drawn, dtype=torch.float64) if self.decides else torch.empty(3, len(randoms), dtype=torch.float64)
            told = told.to(self.topology.device)
            group = mpu.get_model_parallel_group()
            source = dist.get_process_group_ranks(group)[self.topology.tp * (self.topology.pp - 1)]  # tp is the faster axis
            dist.broadcast(told, src=source, group=group)
            drawn = told.tolist()
        if not all(map(_is_finite, drawn[1])):
            raise ValueError("the network's logits are not finite, so no token can be drawn; look at the checkpoint's weights")
        return drawn


def _is_finite(number: float) -> bool:
    return abs(number) < float("inf")
