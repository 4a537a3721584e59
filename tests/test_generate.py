"""Drawing answers: tokens and log-probabilities against transformers and against scoring, every layout against one rank, and the sampler
against numpy in float64.

Left out: the command (test_generate_command.py) and speed (benchmarks/generate.py).
"""

import numpy as np
import pytest
import ranks
from training import merged

from engine.sampling import Sampling, Text

VOCAB, SEQ, NEW = 61, 64, 12
RAW = {
    "run": {"dir": "unused", "device": "cpu", "seed": 5},
    # A std of 0.2 makes logits that differ by tenths, so that rounding decides nothing, and that are small, so that it stays below 1e-5.
    "model": {"family": "llama", "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2,
              "vocab_size": VOCAB, "init_std": 0.2},
    "data": {"train": ["unused"]},
    "train": {"seq_len": SEQ, "global_batch": 16, "steps": 100, "precision": "fp32"},
}
MOE = {"model": {"family": "mixtral", "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}}}
GPT2 = {"model": {"family": "gpt2", "num_query_groups": 0, "max_position": SEQ}}
LATENT = {"model": {"family": "deepseek_v3", "num_query_groups": 0,
                    "mla": {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
                    "moe": {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 24, "shared_expert_ffn_hidden_size": 24, "first_dense_layers": 1,
                            "num_groups": 4, "group_top_k": 2}}}
GEMMA2 = {"model": {"family": "gemma2", "head_dim": 10, "query_pre_attn_scalar": 7, "attention_softcap": 2.0, "logits_softcap": 3.0, "sliding_window": 6}}
SP = {"sequence_parallel": True}
RANDOM = dict(max_new_tokens=NEW, temperature=0.8, seed=3)


def prompts(num=7, longest=23, seed=0) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens, of which two have equal lengths."""
    random = np.random.RandomState(seed)
    lengths = [longest, 1, 9, 9, *random.randint(1, longest, max(num - 4, 0))][:num]
    return [random.randint(0, VOCAB, length).tolist() for length in lengths]


def build(raw, world_size=1, train=False):
    """On a rank: a ParallelModel."""
    from engine.config import validate
    from engine.mcore import topology
    from engine.mcore.run import ParallelModel
    from engine.stage import Role
    from parity_table import CountTokens

    run = validate(raw, world_size)
    return ParallelModel(run, topology.start(run), CountTokens(), "policy", Role(train=train))


def as_tuples(answers) -> list[tuple]:
    return [(answer.tokens, answer.logps, answer.reason) for answer in answers]


def same(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for row, ((tokens, logps, reason), (tokens2, logps2, reason2)) in enumerate(zip(ours, theirs)):
        assert tokens == tokens2 and reason == reason2, f"row {row}: {tokens} ({reason}), not {tokens2} ({reason2})"
        assert np.allclose(logps, logps2, rtol=0, atol=tolerance), f"row {row}: log p differ by {np.abs(np.subtract(logps, logps2)).max():.1e}"


# --- transformers --------------------------------------------------------------------------------------------------------


def theirs(network, prompt, num_new, **kwargs):
    import torch

    found = network.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=num_new,
                             do_sample=False, pad_token_id=0, eos_token_id=None, **kwargs)
    return found[0, len(prompt):].tolist()


SCALINGS = {
    "llama3": {"kind": "llama3", "factor": 4.0, "original_max_position": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"kind": "dynamic", "factor": 3.0, "original_max_position": 24},
    "yarn": {"kind": "yarn", "factor": 4.0, "original_max_position": 16},
    "longrope": {"kind": "longrope", "factor": 2.0, "original_max_position": 24, "short_factor": [1.0, 1.1, 1.2, 1.5],
                 "long_factor": [1.0, 2.0, 3.0, 4.0]},
}
MODELS = {
    "llama": {},
    "tied": {"model": {"tie_embeddings": True, "qkv_bias": True, "head_dim": 10, "vocab_pad_multiple": 128}},
    "gpt2": GPT2,
    "mixtral": MOE,
    "window": merged(MOE, {"model": {"sliding_window": 6}}),
    "deepseek_v3": LATENT,
    "gemma2": GEMMA2,
    "gemma3": {"model": {**GEMMA2["model"], "family": "gemma3", "qk_norm": True, "attention_softcap": 0.0, "rope_local_theta": 100.0,
                         "sliding_window_freq": 2}},
    "gpt_oss": {"model": {"family": "gpt_oss", "sliding_window": 6, "rope_scaling": {"kind": "none"}, "head_dim": 8, "num_query_groups": 2,
                          "moe": {"num_experts": 4, "top_k": 2}}},
    "mistral": {"model": {"family": "mistral", "sliding_window": 6, "head_dim": 10}},
    "qwen2": {"model": {"family": "qwen2", "sliding_window": 6, "full_attention_layers": 2}},
    "qwen3": {"model": {"family": "qwen3", "head_dim": 6}},
    "qwen3 moe": {"model": {"family": "qwen3_moe", "moe": {**MOE["model"]["moe"], "softmax_after_top_k": False, "dense_layers": [1]}}},
    "phi3": {"model": {"family": "phi3", "rope_percent": 0.75}},
    "phi3 longrope": {"model": {"family": "phi3", "max_position": SEQ, "rope_scaling": {**SCALINGS["longrope"], "original_max_position": 32}}},
    "olmo2": {"model": {"family": "olmo2"}},
    **{kind: {"model": {"rope_scaling": scaling, "max_position": SEQ}} for kind, scaling in SCALINGS.items()},
}


def against_transformers(folder):
    """On a rank: for each model and penalty (ours, transformers') greedy answers of prompts of several lengths, ours in one batch with
    caches that grow."""
    import torch
    from transformers import AutoModelForCausalLM

    from engine.hf.export import export
    from engine.mcore import build as builder
    from engine.mcore import generate, kv_cache

    grown = (kv_cache, "GROWTH", 5), (generate, "READ_AT_ONCE", 40)      # several rounds of both
    kept = [getattr(module, name) for module, name, _ in grown]
    for module, name, value in grown:
        setattr(module, name, value)
    found = {}
    for name, change in MODELS.items():
        model = build(merged(RAW, change))
        network = builder.bare(model.chunks[0])
        own = {name: value.detach() for name, value in network.named_parameters()}
        own |= {name: value.copy_(torch.linspace(-0.1, 0.1, len(value))) for name, value in network.named_buffers() if name.endswith("expert_bias")}
        export(model.run, own, f"{folder}/{name}", "fp32")
        network = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float32)
        for penalty in (1.0, 1.7) if name == "llama" else (1.0,):
            num_new = 30 if "rope_scaling" in change.get("model", {}) else NEW
            ours = model.generate(prompts(), Sampling(num_new, temperature=0.0, repetition_penalty=penalty))
            found[name, penalty] = ([answer.tokens for answer in ours],
                                    [theirs(network, prompt, num_new, repetition_penalty=penalty) for prompt in prompts()])
    for (module, name, _), value in zip(grown, kept):
        setattr(module, name, value)
    return found


@pytest.fixture(scope="module")
def greedy_answers(tmp_path_factory):
    return ranks.run(1, against_transformers, str(tmp_path_factory.mktemp("hf")))[0]


@pytest.mark.parametrize("model", MODELS)
def test_greedy_answers_are_those_of_transformers(greedy_answers, model):
    """Also where an answer grows past the length at which a scaling of RoPE changes."""
    ours, reference = greedy_answers[model, 1.0]
    assert ours == reference
    assert len({tuple(tokens) for tokens in ours}) > 3, "the network says the same whatever it is asked"


def test_a_repetition_penalty_is_that_of_transformers(greedy_answers):
    ours, reference = greedy_answers["llama", 1.7]
    assert ours == reference and ours != greedy_answers["llama", 1.0][0]


# --- layouts -------------------------------------------------------------------------------------------------------------


def drawn(raw, world_size, shares, samplings, **kwargs):
    """On a rank: (numbers of this replica's prompts, an answer for each, per sampling). shares: prompts of each replica."""
    model = build(raw, world_size)
    place = model.topology
    first = sum(shares[:place.dp_rank])
    rows = range(first, first + shares[place.dp_rank])
    some = prompts(sum(shares))[first:rows.stop]
    return list(rows), [as_tuples(model.generate(some, Sampling(**sampling), **kwargs)) for sampling in samplings]


MODES = [dict(max_new_tokens=NEW, temperature=0.0), {**RANDOM, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
         {**RANDOM, "stop_tokens": (3, 17, 40)}]
_one_rank: dict = {}


def on_one_rank(change, num):
    key = str((change, num))
    if key not in _one_rank:
        _one_rank[key] = ranks.run(1, drawn, merged(RAW, change), 1, [num], MODES)[0][1]
    return _one_rank[key]


@pytest.mark.parametrize("change, layout, num_ranks, shares", [
    ({}, {}, 2, [4, 3]),
    ({}, {}, 2, [0, 7]),
    ({}, {"tp": 2, **SP}, 2, [7]),
    ({"model": {"tie_embeddings": True}}, {"tp": 2}, 2, [7]),
    ({"model": {"family": "olmo2"}}, {"tp": 2, **SP}, 2, [7]),
    ({}, {"pp": 2}, 2, [7]),
    ({"model": {"tie_embeddings": True}}, {"pp": 2, "vpp": 2}, 2, [7]),
    ({}, {"cp": 2}, 2, [7]),
    ({}, {"cp": 2}, 2, [1]),
    (GPT2, {"tp": 2, **SP}, 2, [3]),
    ({"model": {"sliding_window": 6}}, {"cp": 2}, 2, [7]),
    (LATENT, {"tp": 2, **SP, "etp": 1, "ep": 2}, 2, [7]),
    (GEMMA2, {"tp": 2}, 2, [5]),
    (MOE, {"ep": 2}, 2, [5, 2]),
    (MOE, {"ep": 2}, 2, [0, 7]),
    (MOE, {"cp": 2, "ep": 2}, 2, [3]),
    (MOE, {"tp": 2, **SP, "etp": 1, "ep": 2}, 2, [7]),
    ({}, {"tp": 2, **SP, "pp": 2}, 4, [7]),
    (MOE, {"ep": 2, "pp": 2, "vpp": 2}, 4, [6, 1]),
], ids=str)
def test_layouts_draw_what_one_rank_draws(change, layout, num_ranks, shares):
    """Every rank has the answers of its replica, and those of one replica are equal to the bit."""
    reference = on_one_rank(change, sum(shares))
    found = ranks.run(num_ranks, drawn, merged(RAW, change, {"parallel": layout}), num_ranks, shares, MODES)
    assert sorted({row for rows, _ in found for row in rows}) == list(range(sum(shares)))
    for mode, whole in enumerate(reference):
        for rows, answers in found:
            same(answers[mode], [whole[row] for row in rows])
            assert answers[mode] == next(other[mode] for other_rows, other in found if other_rows == rows)


def test_modes_differ_and_rows_stop():
    greedy, filtered, stopping = on_one_rank({}, 7)
    assert [tokens for tokens, _, _ in greedy] != [tokens for tokens, _, _ in filtered]
    reasons = [reason for _, _, reason in stopping]
    assert set(reasons) == {"stop", "length"}
    for tokens, logps, reason in stopping:
        assert len(logps) == len(tokens) <= NEW
        assert (tokens[-1] in (3, 17, 40)) == (reason == "stop") and not set(tokens[:-1]) & {3, 17, 40}


# --- one rank ------------------------------------------------------------------------------------------------------------


def in_batches(raw, sampling, keys):
    """On a rank: answers of all prompts at once, two at a time, alone, backwards; and what on_token heard."""
    model, asked, heard = build(raw), prompts(), []
    sampling = Sampling(**sampling)
    found = [as_tuples(model.generate(asked, sampling, keys, on_token=lambda *what: heard.append(what)))]
    found.append(as_tuples(model.generate(asked, sampling, keys, batch=2)))
    found.append([as_tuples(model.generate([prompt], sampling, [key]))[0] for prompt, key in zip(asked, keys)])
    found.append(as_tuples(model.generate(asked[::-1], sampling, keys[::-1]))[::-1])
    return found, heard


@pytest.mark.parametrize("change", [{}, GPT2, {**MOE, "model": {**MOE["model"], "moe": {**MOE["model"]["moe"], "capacity_factor": 1.0,
                                                                                       "pad_to_capacity": True}}},
                                    {"model": {"rope_scaling": SCALINGS["dynamic"], "max_position": 64}}],
                         ids=["llama", "gpt2", "moe with capacity", "dynamic"])
def test_a_row_does_not_feel_the_others(change):
    (whole, *others), heard = ranks.run(1, in_batches, merged(RAW, change), {**RANDOM, "stop_tokens": (3, 17, 40)}, [5, 0, 99, 5, 7, 1, 2**40])[0]
    for other in others:
        same(other, whole)
    for row, (tokens, _, _) in enumerate(whole):
        assert [token for number, token in heard if number == row] == tokens


def with_keys_and_seeds():
    """On a rank: answers of equal prompts under keys and seeds."""
    model = build(RAW)

    def tokens(keys, seed):
        return [answer.tokens for answer in model.generate([[1, 2, 3]] * 4, Sampling(**{**RANDOM, "seed": seed}), keys)]

    return tokens(None, 3), tokens([0, 1, 2, 3], 3), tokens([2, 2, 0, 7], 3), tokens(None, 4)


def test_keys_and_seeds_decide():
    default, numbered, others, reseeded = ranks.run(1, with_keys_and_seeds)[0]
    assert default == numbered and len({tuple(tokens) for tokens in default}) == 4
    assert others[0] == others[1] == default[2] and others[2] == default[0] and others[3] not in default
    assert not {tuple(tokens) for tokens in reseeded} & {tuple(tokens) for tokens in default}


def against_score(raw, sampling):
    """On a rank: pairs (log p of generate, of score) for each answer, where score divides by the same temperature."""
    import torch

    from engine.mcore.build import bare

    model = build(raw)
    for chunk in model.chunks:
        bare(chunk).temperature = sampling["temperature"] or 1.0
    asked, compared = prompts(), []
    for prompt, answer in zip(asked, model.generate(asked, Sampling(**sampling))):
        text = torch.tensor([prompt + answer.tokens])
        mask = (torch.arange(text.size(1) - 1) >= len(prompt) - 1).float()[None]
        batch = dict(tokens=text[:, :-1], labels=text[:, 1:], loss_mask=mask, position_ids=torch.arange(text.size(1) - 1)[None])
        compared.append((answer.logps, model.score([batch])[0][0, len(prompt) - 1:].tolist()))
    return compared


@pytest.mark.parametrize("change", [{}, GPT2, MOE, {"model": {"rope_scaling": SCALINGS["yarn"]}},
                                    {"lora": {"rank": 4, "dora": True}}], ids=["llama", "gpt2", "moe", "yarn", "lora"])
@pytest.mark.parametrize("sampling", [{**RANDOM, "top_k": 5, "repetition_penalty": 1.5}, dict(max_new_tokens=NEW, temperature=0.0)], ids=["drawn", "greedy"])
def test_log_probabilities_are_those_of_training(change, sampling):
    for ours, scored in ranks.run(1, against_score, merged(RAW, {"model": {"vocab_pad_multiple": 128}}, change), sampling)[0]:
        assert len(ours) == NEW and np.allclose(ours, scored, rtol=0, atol=1e-5)


def in_bf16():
    """On a rank: answers in bf16, and the log p of the same tokens by score."""
    return against_score(merged(RAW, {"train": {"precision": "bf16"}}), dict(max_new_tokens=NEW, temperature=0.0))


def test_bf16_agrees_within_its_rounding():
    for ours, scored in ranks.run(1, in_bf16)[0]:
        assert np.allclose(ours, scored, rtol=0, atol=0.1)      # logits of some 10, 2^-8 each


def between_steps(raw, world_size, does_generate):
    """On a rank: losses of training with a round of answers after each step, what the modules were set to, and the last answers."""
    import torch
    from parity_table import batches

    from engine.mcore.build import bare

    model = build(raw, world_size, train=True)
    losses, answers = [], None

    def state():
        return [(module.training, type(module), "forward" in vars(module), getattr(module, "sequence_parallel", None),
                 vars(model.config)["sequence_parallel"]) for chunk in model.chunks for module in chunk.modules()]

    for step in range(3):
        losses.append(model.forward_backward(batches(model.run, model.topology.dp_rank, model.topology.dp, step)).loss)
        model.step(1e-2)
        before = state()
        if does_generate:
            answers = as_tuples(model.generate(prompts(), Sampling(**RANDOM)))
            assert state() == before and torch.is_grad_enabled() and model.chunks[0].training
            assert not any(tensor.is_inference() for chunk in model.chunks for tensor in bare(chunk).state_dict(keep_vars=True).values() if tensor is not None)
    return losses, answers


@pytest.mark.parametrize("layout, num_ranks", [
    ({}, 1), ({"zero1": True, "overlap_grad_reduce": True, "overlap_param_gather": True}, 2), ({"tp": 2, **SP, "zero1": True}, 2)], ids=str)
def test_answers_between_steps_leave_training_as_it_was(layout, num_ranks):
    raw = merged(RAW, {"model": {"vocab_size": 251}, "parallel": layout, "train": {"recompute": "full", "micro_batch": 2}})
    plain, mixed = (ranks.run(num_ranks, between_steps, raw, num_ranks, flag) for flag in (False, True))
    assert [losses for losses, _ in plain] == [losses for losses, _ in mixed]
    whole = ranks.run(1, between_steps, merged(raw, {"parallel": {name: 1 if type(value) is int else False for name, value in layout.items()}}), 1, True)
    for _, answers in mixed:      # with the weights of the last step, also where they are still to be gathered
        own = [(tokens, reason) for tokens, _, reason in whole[0][1]]
        assert num_ranks == 2 and layout.get("tp") is None or [(tokens, reason) for tokens, _, reason in answers] == own


def stopped_by_text():
    """On a rank: texts of answers drawn as bytes, with stops and without."""
    from data_tools.tokenizer import load_tokenizer

    model = build(merged(RAW, {"model": {"vocab_size": 257}}))
    decode = load_tokenizer("bytes").decode
    found = []
    for stops in ((), ("A", "th"), ("zz",)):
        answers = model.generate([[7]] * 40, Sampling(40, temperature=3.0, stop_texts=stops), decode=decode)
        found.append([(decode(answer.tokens), answer.reason) for answer in answers])
    return found


def test_texts_stop_answers():
    free, stopped, unheard = ranks.run(1, stopped_by_text)[0]
    assert unheard == [(text, "stop" if "zz" in text else "length") for text, _ in free]
    cut = [min((text.find(stop) + len(stop) for stop in ("A", "th") if stop in text), default=None) for text, _ in free]
    assert 3 < sum(end is not None for end in cut) < 40
    assert [text for text, _ in stopped] == [text[:end] for (text, _), end in zip(free, cut)]
    assert [reason for _, reason in stopped] == ["length" if end is None else "stop" for end in cut]


def refused(raw, world_size, which):
    """On a rank: what generate says of prompts that replica 0 has."""
    model = build(raw, world_size)
    wrong = {"empty": [[1], []], "foreign": [[1], [VOCAB]], "long": [[1] * (SEQ - NEW), [1] * (SEQ - NEW + 1)], "text": [[1]]}[which]
    sampling = Sampling(NEW, temperature=0.0, stop_texts=("x",) if which == "text" else ())
    try:
        model.generate(wrong if model.topology.dp_rank == 0 else [[1]], sampling)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("which, words", [("empty", "prompt 1 is empty"), ("foreign", f"prompt 1 holds ids outside the vocabulary of {VOCAB}"),
                                          ("long", f"prompt 1 has {SEQ - NEW + 1} tokens and max_new_tokens is {NEW}"), ("text", "need `decode`")])
def test_every_replica_refuses_what_one_cannot_answer(which, words):
    said = ranks.run(2, refused, merged(RAW, GPT2), 2, which)
    assert all(words in sentence for sentence in said), said


def with_broken_weights(world_size):
    """On a rank: what generate says when a weight is NaN."""
    import torch

    model = build(merged(RAW, {"parallel": {"pp": 2}}), world_size)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.fill_(float("nan"))
    try:
        model.generate([[1]], Sampling(NEW))
    except ValueError as error:
        return str(error)


def test_no_token_is_drawn_from_what_is_no_number():
    assert all("not finite" in sentence for sentence in ranks.run(2, with_broken_weights, 2))


# --- the sampler ---------------------------------------------------------------------------------------------------------


def draws(logits, seen, sampling, num):
    """On a rank: tokens and log p of `num` rows with these logits, under keys 0, 1, 2, ..."""
    import torch

    from engine.mcore.sample import draw, uniforms

    rows = torch.tensor(logits, dtype=torch.float32).expand(num, -1)
    mask = None if seen is None else torch.zeros(rows.shape, dtype=torch.bool).index_fill(1, torch.tensor(seen), True)
    tokens, logps = draw(rows, mask, Sampling(1, **sampling), uniforms(sampling.get("seed", 0), list(range(num)), 0))
    return tokens.numpy(), logps.numpy()


def filtered(logits, seen, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=0) -> np.ndarray:
    """The probabilities that the words of engine/sampling.py say, token by token in float64."""
    z = np.array(logits, dtype=np.float64)
    for token in seen or ():
        z[token] = z[token] / repetition_penalty if z[token] > 0 else z[token] * repetition_penalty
    p = np.exp(z / temperature - (z / temperature).max())
    ranked = sorted(range(len(p)), key=lambda token: -p[token])
    kept = ranked[:top_k] if top_k else ranked
    mass, total, few = 0.0, p[kept].sum(), []
    for token in kept:
        if mass >= top_p * total:
            break
        few.append(token)
        mass += p[token]
    few = [token for token in few if p[token] >= min_p * p.max()]
    out = np.zeros_like(p)
    out[few] = p[few] / p[few].sum()
    return out


@pytest.mark.parametrize("sampling", [
    {}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"repetition_penalty": 2.0},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.4, "seed": 9}, {"top_p": 1e-9}, {"top_k": 1},
], ids=str)
def test_tokens_are_drawn_from_the_filtered_distribution(sampling):
    from scipy.stats import chi2

    logits, seen, num = [1.1, -0.3, 2.0, 0.2, -1.5, 0.9, 1.4, -0.8, 0.4, -2.5], [2, 4, 6], 20000
    seen = seen if "repetition_penalty" in sampling else None
    tokens, logps = ranks.run(1, draws, logits, seen, sampling, num)[0]
    wanted = filtered(logits, seen, **sampling)
    counts = np.bincount(tokens, minlength=len(wanted))
    assert not counts[wanted == 0].any()
    kept = wanted > 0
    statistic = ((counts[kept] - num * wanted[kept]) ** 2 / (num * wanted[kept])).sum()
    assert statistic <= chi2.ppf(0.999, kept.sum() - 1) if kept.sum() > 1 else counts[kept] == num
    z = np.array(logits) / sampling.get("temperature", 1.0)
    assert np.allclose(logps, (z - np.log(np.exp(z).sum()))[tokens], atol=1e-6)      # before penalty and filters


def test_the_most_probable_token_is_the_lowest_of_equals():
    tokens, logps = ranks.run(1, draws, [0.0, 3.0, 1.0, 3.0], None, {"temperature": 0.0}, 5)[0]
    assert (tokens == 1).all() and np.allclose(logps, 3 - np.log(1 + 2 * np.exp(3) + np.exp(1)), atol=1e-6)
    tokens, _ = ranks.run(1, draws, [0.0, 3.0, 1.0, 3.0], [1, 3], {"temperature": 0.0, "repetition_penalty": 4.0}, 5)[0]
    assert (tokens == 2).all()


def hashed(seed, keys, place):
    from engine.mcore.sample import uniforms

    return uniforms(seed, keys, place).tolist()


def splitmix64(state: int) -> int:
    """In Python's integers, as Steele, Lea and Flood print it."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_random_numbers_are_a_hash_of_seed_key_and_place():
    assert splitmix64(0) == 0xE220A8397B1DCDAF      # the published first output for seed 0
    keys = [0, 1, 2**63, 2**64 - 1]
    for seed, place in ((0, 0), (1234, 7), (2**64 - 1, 10**6)):
        wanted = [(splitmix64(splitmix64(splitmix64(seed) ^ key) ^ place) >> 11) / 2**53 for key in keys]
        assert ranks.run(1, hashed, seed, keys, place)[0] == wanted


def cumulative_edge():
    """On a rank: the tokens at the greatest random number below 1 and at 0, where first and last ids cannot be drawn."""
    import torch

    from engine.mcore.sample import draw

    logits = torch.tensor([[-40.0, 2.0, 1.0, 0.5, -40.0]] * 2)
    return draw(logits, None, Sampling(1, min_p=0.01), np.array([0.0, 1 - 2.0**-53]))[0].tolist()


def test_what_is_left_out_is_never_drawn():
    assert ranks.run(1, cumulative_edge)[0] == [1, 3]


# --- text ----------------------------------------------------------------------------------------------------------------


def test_text_appears_in_whole_characters():
    decode = lambda ids: bytes(ids).decode("utf-8", errors="replace")  # noqa: E731
    text, said = Text(decode), []
    for byte in "aé€🙂b".encode():
        said.append(text.add(byte))
    assert [part for part in said if part] == list("aé€🙂b") and text.text == "aé€🙂b"
    assert text.add(0xE2) == "" and text.rest() == "\ufffd" and text.text == "aé€🙂b\ufffd"


def test_text_keeps_what_a_tokenizer_says_of_neighbours():
    """A tokenizer that drops the space before the first word, as SentencePiece does."""
    words = ["▁one", "▁two", "s", "▁three"]
    decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").lstrip(" ")  # noqa: E731
    text = Text(decode)
    assert [text.add(i) for i in range(4)] == ["one", " two", "s", " three"]


def test_a_stop_may_be_spread_over_tokens_and_is_found_once():
    text = Text(lambda ids: "".join("ab#c"[i] for i in ids))
    assert [text.completes(i, ("##", "ba")) for i in (0, 1, 2, 3, 2)] == [False] * 5
    assert text.completes(2, ("##", "ba")) and not text.completes(0, ("##", "ba")) and text.text == "ab#c##a"
