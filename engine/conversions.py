"""What launch/convert.py does: one function for each direction, from its parsed arguments to a draft and the verdict on it.

    verdict = from_hf(args, draft)      # writes `draft`, proves it, says what was proved

Everything runs in one process on one CPU rank; tensors stream, a few in memory at a time. Every function raises a ValueError for what a person must
mend, and then leaves the draft as far as it got.
Left out: names and renaming (the caller's), quantised folders.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

NOT_PROVED = "not proved: logits and greedy tokens were not compared (--no-verify)"


def from_hf(args: argparse.Namespace, draft: Path) -> str:
    """HF_DIR -> the checkpoint `draft`; returns the verdict of the comparison."""
    from engine.hf import FAMILIES
    from engine.hf.convert import cast, run_of
    from engine.hf.export import DTYPES
    from engine.hf.load import open_hf
    from engine.hf.names import rows_from_hf
    from engine.hf.shards import Ahead
    from engine.rows import pieces

    hf, tensors = open_hf(args.source, args.drop_mtp, args.allow_pickle, check_hashes=not args.no_hashes)
    run, adapters, dtype = run_of(hf, tensors, args.source, args.target), {}, DTYPES.get(args.dtype)
    if dtype:
        run = run.model_copy(update={"train": run.train.model_copy(update={"precision": args.dtype})})
    if args.adapter:
        run, adapters = with_adapter(run, args.adapter, args.source)
    checkpoint, family = engine_checkpoints(), FAMILIES[run.model.family]
    pairs = family.pairs(run.model)
    with Ahead(tensors, [name for pair in pairs for name in pair.hf]) as ahead, progress("from-hf", sum(map(tensors.num_bytes, tensors))) as bar:
        kept = ((name, rows) for name, rows in rows_from_hf(pairs, ahead) if name not in adapters)  # an adapter may bring a head of its own
        if dtype:
            kept = ((name, tuple(cast(name, row, dtype) for row in pieces(rows))) for name, rows in kept)
        checkpoint.write_tensors(draft, run, chain(kept, adapters.items()), lambda n: bar.add(num_bytes=n), safe=not args.no_hashes)
    # transformers' weights are rounded as the checkpoint is: the comparison judges the conversion, not the dtype that was asked for.
    return compare(args, run, checkpoint.read_tensors(draft), args.source, args.adapter, dtype)


def to_hf(args: argparse.Namespace, draft: Path) -> str:
    """CKPT_DIR -> the Hugging Face folder `draft`; returns the verdict of the comparison."""
    from engine import hashes
    from engine.hf.convert import Rounded, merge
    from engine.hf.export import export, write_card

    checkpoint = engine_checkpoints()
    folder, run, tensors = stored(args.source, args)
    if args.drop_mtp:
        run = run.model_copy(update={"model": run.model.model_copy(update={"mtp": type(run.model.mtp)()})})
        tensors = tensors.without_mtp()
    dtype = args.dtype or run.train.precision
    if run.lora.rank:
        adapted, (run, tensors) = (run, tensors), merge(run, tensors)
        same_logits(args, "merged weights and adapters", (run, tensors), adapted)
    with progress("to-hf", None) as bar:
        export(run, tensors, draft, dtype, args.tokenizer, args.shard_gb * 1e9, written=lambda n: bar.add(num_bytes=n))
    # Rounded as the folder is: the comparison judges the conversion, not the dtype that was asked for.
    verdict = compare(args, run, Rounded(tensors, dtype), draft)
    write_card(draft, run, args.target.name, checkpoint.read_position(folder).tokens, verdict, folder)
    hashes.write(draft)
    return verdict


def to_peft(args: argparse.Namespace, draft: Path) -> str:
    """CKPT_DIR -> the PEFT folder `draft`; returns the verdict of the comparison, for which the base model is written and read too."""
    import tempfile

    from engine.hf.export import export
    from engine.hf.peft import Unadapted, save_adapter

    _, run, tensors = stored(args.source, args)
    save_adapter(run.model, run.lora, tensors, draft, args.base)
    if args.no_verify:
        return NOT_PROVED
    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        export(run.model_copy(update={"data": type(run.data)()}), Unadapted(tensors), Path(folder) / "base", "fp32")
        return compare(args, run, tensors, Path(folder) / "base", draft)


def mean(streams: list[Iterator[tuple[str, Tensor]]], weights: list[float]) -> Iterator[tuple[str, Tensor]]:
    """The weighted mean of models whose (name, tensor) pairs come in one order, in fp32 and back, a tensor at a time."""
    for pairs in zip(*streams, strict=True):
        (name, first), total = pairs[0], torch.zeros(pairs[0][1].shape, dtype=torch.float32)
        for (_, tensor), weight in zip(pairs, weights):
            total.add_(tensor.float(), alpha=weight / sum(weights))
        yield name, total.to(first.dtype) if first.is_floating_point() else first


def average(args: argparse.Namespace, draft: Path) -> str:
    """Checkpoints (or Hugging Face folders) of one model -> the checkpoint `draft` with the weighted mean of their weights."""
    from engine.config import ConfigError
    from engine.hf.convert import run_of
    from engine.hf import FAMILIES
    from engine.hf.load import open_hf

    are_hf = [(source / "config.json").is_file() for source in args.source]
    weights = args.weights or [1.0] * len(args.source)
    if len(weights) != len(args.source) or not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
        what = f"has {len(weights)} numbers for {len(args.source)} models" if len(weights) != len(args.source) else "is no list of shares"
        raise ConfigError([f"--weights {' '.join(map(str, weights))} {what}; give one for each, finite and 0 or more, not all 0"])
    if any(are_hf) and not all(are_hf):
        raise ConfigError([f"{args.source[are_hf.index(False)]} is no Hugging Face folder and {args.source[are_hf.index(True)]} is one; convert one of them first"])
    checkpoint = engine_checkpoints()
    if all(are_hf):
        opened = [open_hf(source, check_hashes=not args.no_hashes) for source in args.source]
        runs = [run_of(hf, tensors, source, args.target) for (hf, tensors), source in zip(opened, args.source)]
        streams = [FAMILIES[run.model.family].from_hf(run.model, tensors) for run, (_, tensors) in zip(runs, opened)]
    else:
        _, runs, parts = zip(*(stored(source, args) for source in args.source))
        streams = [map(lambda name, part=part: (name, part[name]), parts[0]) for part in parts]
    for source, run in zip(args.source, runs):
        differing = [name for name, value in run.model if name != "size" and value != getattr(runs[0].model, name)] + ["lora"] * (run.lora != runs[0].lora)
        if differing:
            raise ConfigError([f"{source} is another model than {args.source[0]}: {', '.join(differing)} differ; average models of one shape"])
    with progress("average", None) as bar:
        checkpoint.write_tensors(draft, runs[0], mean(streams, weights), lambda n: bar.add(num_bytes=n))
    shares = ", ".join(f"{weight / sum(weights):.4g} x {source}" for weight, source in zip(weights, args.source))
    return f"the mean of {shares}"


def upcycle(args: argparse.Namespace, draft: Path) -> str:
    """A dense checkpoint -> the mixture of experts `draft` whose experts all start as its MLP (arXiv 2212.05055). The weights of the chosen
    experts sum to 1, so it computes what the dense model computes, whatever the router says: that is compared."""
    from engine.config import ConfigError, Model

    checkpoint = engine_checkpoints()
    _, run, tensors = stored(args.source, args)
    if run.model.moe.num_experts or run.lora.rank or run.model.family not in UPCYCLED:
        what = "has experts already" if run.model.moe.num_experts else "has adapters" if run.lora.rank else f"is of family {run.model.family}"
        raise ConfigError([f"{args.source} {what}; upcycling takes merged dense models of {', '.join(UPCYCLED)}"])
    if not 2 <= args.top_k <= args.num_experts:  # the weight of one expert alone would be 1 whatever the router says, which then learns nothing
        raise ConfigError([f"--top-k {args.top_k} of --num-experts {args.num_experts}: choose at least 2 and at most all of them"])
    moe = {"num_experts": args.num_experts, "top_k": args.top_k, "softmax_after_top_k": True}
    dense = run.model.model_dump()
    sparse = run.model_copy(update={"model": Model.model_validate(dense | {"family": UPCYCLED[run.model.family], "size": "custom", "moe": dense["moe"] | moe})})
    with progress("upcycle", None) as bar:
        checkpoint.write_tensors(draft, sparse, _upcycled(sparse.model, tensors, args.seed), lambda n: bar.add(num_bytes=n))
    return same_logits(args, "the mixture and the dense model", (sparse, checkpoint.read_tensors(draft)), (run, tensors))


UPCYCLED = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
"""The family of a mixture whose experts are MLPs of a family."""


def _upcycled(model, tensors: Mapping[str, Tensor], seed: int) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for name in tensors:
        layer, mlp, rest = name.partition(".mlp.")
        if not mlp:
            yield name, tensors[name]
            continue
        if rest == "linear_fc1.weight":
            router = torch.randn(model.moe.num_experts, model.hidden_size, generator=generator) * model.init_std
            yield f"{layer}.mlp.router.weight", router.to(tensors[name].dtype)
        matrix = tensors[name]
        for expert in range(model.moe.num_experts):
            yield f"{layer}.mlp.experts.local_experts.{expert}.{rest}", matrix


def from_megatron(args: argparse.Namespace, draft: Path) -> str:
    """A torch_dist checkpoint that Megatron-LM or Megatron-Bridge wrote of a GPTModel -> the checkpoint `draft`.

    --config says what model it is, since what such a checkpoint says of itself is a pickle; every tensor's name and shape is checked against that.
    Its padding of the vocabulary is exchanged for ours, and its optimizer state stays behind."""
    checkpoint = engine_checkpoints()
    run = _without_corpora(args.config)
    source = _megatron_folder(args.source)
    tensors = _foreign_tensors(checkpoint, source, run.model)
    with progress("from-megatron", None) as bar:
        checkpoint.write_tensors(draft, run, _with_our_padding(run.model, tensors), lambda n: bar.add(num_bytes=n))
    return f"{len(tensors)} tensors of {source}, of the names and shapes that {args.config} describes; logits were not compared, for nothing else here can run that folder"


def _without_corpora(config: Path):
    """The run of a configuration in which data.train may be empty, since nothing is trained here."""
    from engine.config import read_yaml, validate

    raw = read_yaml(config, [])
    data = raw.get("data") or {}
    if not isinstance(data, dict) or data.get("train"):
        return validate(raw)
    run = validate(raw | {"data": data | {"train": ["none"]}})
    return run.model_copy(update={"data": run.data.model_copy(update={"train": []})})


def _foreign_tensors(checkpoint, source: Path, model):
    from engine.mcore.stream import ForeignMetadata

    try:
        return checkpoint.Tensors(source, model)
    except checkpoint.CheckpointError as error:
        if not isinstance(error.__cause__, ForeignMetadata):
            raise
        raise checkpoint.CheckpointError(f"{source}: {error.__cause__}. Another program or version wrote it; it is not read, for a pickle may run code. "
                                         "Load it where it was written and save it again as torch_dist with weights alone") from None


def _megatron_folder(path: Path) -> Path:
    """The folder with .metadata: `path`, or what its latest_checkpointed_iteration.txt says."""
    from engine.mcore.saving import TRACKER, CheckpointError

    if (path / ".metadata").is_file():
        return path
    if (path / TRACKER).is_file():
        step = (path / TRACKER).read_text().strip()
        folder = path / (f"iter_{int(step):07d}" if step.isdecimal() else "release" if step == "release" else "")
        if (folder / ".metadata").is_file():
            return folder
    raise CheckpointError(f"{path} is no torch_dist checkpoint of Megatron: neither .metadata nor a {TRACKER} that leads to one")


def _with_our_padding(model, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    from engine.hf.names import pad_rows

    for name in tensors:
        tensor = tensors[name]
        if name in ("embedding.word_embeddings.weight", "output_layer.weight") and tensor.shape[0] >= model.vocab_size:
            tensor = pad_rows(model.padded_vocab_size, tensor[:model.vocab_size])
        yield name, tensor


def with_adapter(run, folder: Path, base: Path):
    """(run with its `lora` section, engine name -> tensor) of a PEFT folder, for the model in `base`; says so when it was made for another."""
    from engine.hf.peft import load_adapter, other_base

    if named := other_base(folder, base):
        print(f"warning: {folder} says that it adapts {named}, and {base} bears another name; on other weights than its own an adapter means nothing, "
              "and no comparison can tell", file=sys.stderr)
    lora, adapters = load_adapter(folder, run.model)
    return run.model_copy(update={"lora": lora}), adapters


def stored(source: Path, args: argparse.Namespace):
    """(folder, run, tensors) of a checkpoint whose every byte is the one that was written, unless args.no_hashes trusts them. Starts the rank."""
    from engine import run_folder

    checkpoint = engine_checkpoints()
    if (source / "config.json").is_file():
        raise checkpoint.CheckpointError(f"{source} is a Hugging Face folder; from-hf makes a checkpoint of it")
    folder = run_folder.find(source, check=False)  # not an older one in silence, should the newest be damaged
    if folder is None:
        raise checkpoint.CheckpointError(f"{source} holds no complete checkpoint; name a run's checkpoints folder, or one iter_ folder in it")
    if not args.no_hashes and (found := run_folder.problems(folder, strict=False)):
        raise checkpoint.CheckpointError(f"{folder} is damaged: {'; '.join(found)}; name an older checkpoint, or take it as it is with --no-hashes")
    return folder, checkpoint.read_config(folder), checkpoint.read_tensors(folder)


def engine_checkpoints():
    """engine.mcore.checkpoint, on one CPU rank; the rank comes first, for megatron must not be imported before it."""
    from engine.mcore import topology

    topology.start_single()
    from engine.mcore import checkpoint

    return checkpoint


def progress(what: str, total_bytes: int | None):
    """A bar, or lines in a log, with MB/s."""
    from data_tools.progress import Progress

    return Progress(what, total_bytes)


def compare(args: argparse.Namespace, run, tensors, folder: Path, adapter: Path | None = None, rounded: torch.dtype | None = None) -> str:
    """The engine's logits and greedy tokens against those of transformers on `folder`, with PEFT's adapter in the folder `adapter` if there
    is one. Prints a table and returns a sentence; raises HFError above the tolerance. rounded: transformers' weights go through this dtype."""
    if args.no_verify:
        return NOT_PROVED
    from engine.hf.verify import Verdict, answers, questions, transformers_network
    from engine.mcore.build import single_rank_network

    rows = questions(run.model, run.data.tokenizer.removeprefix("hf:"))
    # One after the other, so that memory holds one of the two.
    theirs = answers(transformers_network(folder, adapter, getattr(args, "allow_pickle", False), rounded), rows)
    ours = answers(single_rank_network(run, tensors), rows)
    verdict = Verdict(ours, theirs, args.tolerance)
    sentence = verdict.check()
    print(verdict.table())
    return sentence


def same_logits(args: argparse.Namespace, who: str, one, other) -> str:
    """A sentence; refuses two (run, tensors) that the engine computes other logits from."""
    if args.no_verify:
        return NOT_PROVED
    from engine.hf.verify import agreement, prompts
    from engine.mcore.build import single_rank_logits

    tokens = prompts(one[0].model)
    ours, theirs = (single_rank_logits(run, tensors, tokens) for run, tensors in (one, other))
    return agreement(ours, theirs, args.tolerance, who)
