"""Convert between a Hugging Face folder and a checkpoint of the engine, and prove it by comparing logits.

    python launch/convert.py from-hf HF_DIR CKPT_DIR      safetensors -> a checkpoint that checkpoint.load takes
    python launch/convert.py to-hf CKPT_DIR HF_DIR        a checkpoint -> a folder that transformers loads
    python launch/convert.py to-peft CKPT_DIR PEFT_DIR --base NAME     a checkpoint's adapters -> a folder that PEFT loads

Which families there are, and what of them is refused: docs/models.md. A reward model is transformers' ...ForSequenceClassification with one
label, both ways. Adapters (lora.*) are merged by to-hf; from-hf takes some along with --adapter PEFT_DIR.

The result is written under another name, the engine's logits are compared with transformers' on a few prompts (fp32, one CPU
process), and only then does it get its name; above the tolerance it stays as NAME.failed. One process converts; memory must hold
the model twice in fp32 for the comparison.
Exit codes: 0 done, 1 the conversion or the comparison failed, 2 usage or configuration.
Left out: parallel conversion, and quantised folders.
"""

import argparse
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    from_hf = commands.add_parser("from-hf", help="Hugging Face folder -> checkpoint")
    from_hf.add_argument("source", metavar="HF_DIR", type=Path, help="folder with config.json and safetensors")
    from_hf.add_argument("target", metavar="CKPT_DIR", type=Path, help="checkpoint to write; must not exist")
    from_hf.add_argument("--adapter", metavar="PEFT_DIR", type=Path, help="a LoRA or DoRA adapter of this model, kept apart from its weights")
    from_hf.add_argument("--drop-mtp", action="store_true",
                         help="leave out modules that predict further tokens (DeepSeek-V3), which the engine does not train")
    to_hf = commands.add_parser("to-hf", help="checkpoint -> Hugging Face folder")
    to_hf.add_argument("source", metavar="CKPT_DIR", type=Path, help="a run's checkpoints folder, or one iter_ folder of it")
    to_hf.add_argument("target", metavar="HF_DIR", type=Path, help="folder to write; must not exist")
    to_hf.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; default: the run's train.precision")
    to_hf.add_argument("--tokenizer", metavar="DIR", type=Path, help="copy the tokenizer from here, not from data.tokenizer")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file in GB (default 5)")
    to_peft = commands.add_parser("to-peft", help="adapters of a checkpoint -> PEFT folder")
    to_peft.add_argument("source", metavar="CKPT_DIR", type=Path, help="a run's checkpoints folder, or one iter_ folder of it")
    to_peft.add_argument("target", metavar="PEFT_DIR", type=Path, help="folder to write; must not exist")
    to_peft.add_argument("--base", metavar="NAME", required=True, help="Hugging Face name or folder of the model that the adapters are for")
    for command in (from_hf, to_hf, to_peft):
        command.add_argument("--tolerance", type=float, default=1e-4,
                             help="largest difference of logits, as a share of the largest logit (default 1e-4)")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        parser.error(f"there is no folder {args.source}")
    if getattr(args, "adapter", None) and not args.adapter.is_dir():
        parser.error(f"there is no folder {args.adapter}")
    if args.target.exists():
        parser.error(f"{args.target} exists already; name another folder or remove it")
    if args.tolerance <= 0 or (args.command == "to-hf" and args.shard_gb <= 0):
        parser.error("--tolerance and --shard-gb must be positive")
    return args


def from_hf(args: argparse.Namespace, draft: Path) -> str:
    """HF_DIR -> the checkpoint `draft`; returns the verdict of the comparison."""
    from engine.hf import FAMILIES
    from engine.hf.convert import run_of
    from engine.hf.load import mtp_prefixes, open_hf

    hf, tensors = open_hf(args.source, args.drop_mtp)
    run, adapters = run_of(hf, tensors, args.source, args.target), {}
    if args.adapter:
        run, adapters = with_adapter(run, args.adapter)
    checkpoint = engine_checkpoints()
    checkpoint.write_tensors(draft, run, dict(FAMILIES[run.model.family].from_hf(run.model, tensors)) | adapters)
    return compare(run, checkpoint.read_tensors(draft), args.source, args.tolerance, args.adapter, mtp_prefixes(hf))


def to_hf(args: argparse.Namespace, draft: Path) -> str:
    """CKPT_DIR -> the Hugging Face folder `draft`; returns the verdict of the comparison."""
    from engine.hf.convert import Rounded, merge
    from engine.hf.export import export, write_card

    checkpoint = engine_checkpoints()
    run, tensors = checkpoint.read_config(args.source), checkpoint.read_tensors(args.source)
    dtype = args.dtype or run.train.precision
    if run.lora.rank:
        adapted, (run, tensors) = (run, tensors), merge(run, tensors)
        same_logits("merged weights and adapters", (run, tensors), adapted, args.tolerance)
    export(run, tensors, draft, dtype, args.tokenizer, args.shard_gb * 1e9)
    # Rounded as the folder is: the comparison judges the conversion, not the dtype that was asked for.
    verdict = compare(run, Rounded(tensors, dtype), draft, args.tolerance)
    tokens = checkpoint.read_position(checkpoint.find(args.source)).tokens
    write_card(draft, run, args.target.name, tokens, verdict)
    return verdict


def to_peft(args: argparse.Namespace, draft: Path) -> str:
    """CKPT_DIR -> the PEFT folder `draft`; returns the verdict of the comparison, for which the base model is written and read too."""
    import tempfile

    from engine.hf.export import export
    from engine.hf.peft import Unadapted, save_adapter

    checkpoint = engine_checkpoints()
    run, tensors = checkpoint.read_config(args.source), checkpoint.read_tensors(args.source)
    save_adapter(run.model, run.lora, tensors, draft, args.base)
    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        export(run.model_copy(update={"data": type(run.data)()}), Unadapted(tensors), Path(folder) / "base", "fp32")
        return compare(run, tensors, Path(folder) / "base", args.tolerance, draft)


def with_adapter(run, folder: Path):
    """(run with its `lora` section, engine name -> tensor) of a PEFT folder."""
    from engine.hf.peft import load_adapter

    lora, adapters = load_adapter(folder, run.model)
    return run.model_copy(update={"lora": lora}), adapters


def engine_checkpoints():
    """engine.mcore.checkpoint, on one CPU rank; the rank comes first, for megatron must not be imported before it."""
    from engine.mcore import topology

    topology.start_single()
    from engine.mcore import checkpoint

    return checkpoint


def compare(run, tensors, folder: Path, tolerance: float, adapter: Path | None = None, without: tuple[str, ...] = ()) -> str:
    """The engine's logits against those of transformers on `folder`, with PEFT's adapter in the folder `adapter` if there is one.
    without: beginnings of names in the folder that neither of them loads."""
    from engine.hf.convert import in_fp32
    from engine.hf.peft import peft_logits
    from engine.hf.verify import agreement, prompts, transformers_logits
    from engine.mcore.build import single_rank_logits

    tokens = prompts(run.model)
    theirs = peft_logits(folder, adapter, tokens) if adapter else transformers_logits(folder, tokens, without)
    return agreement(single_rank_logits(in_fp32(run), tensors, tokens), theirs, tolerance)


def same_logits(who: str, one, other, tolerance: float) -> None:
    """Refuse two (run, tensors) that the engine computes other logits from."""
    from engine.hf.convert import in_fp32
    from engine.hf.verify import agreement, prompts
    from engine.mcore.build import single_rank_logits

    tokens = prompts(one[0].model)
    ours, theirs = (single_rank_logits(in_fp32(run), tensors, tokens) for run, tensors in (one, other))
    agreement(ours, theirs, tolerance, who)


def sibling(target: Path, suffix: str) -> Path:
    """A fresh path beside `target`; what an earlier attempt left there goes."""
    import shutil

    path = target.with_name(f"{target.name}.{suffix}")
    if path.exists():
        shutil.rmtree(path)
    return path


def settle(convert, args: argparse.Namespace) -> str:
    """Convert into a draft and give it the target's name; what fails half-way is put aside as NAME.failed."""
    draft = sibling(args.target, "unverified")
    try:
        verdict = convert(args, draft)
    except BaseException as error:
        if draft.exists():
            failed = sibling(args.target, "failed")
            draft.rename(failed)
            error.add_note(f"the unproved result is kept as {failed}")
        raise
    draft.rename(args.target)
    return verdict


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        verdict = settle({"from-hf": from_hf, "to-hf": to_hf, "to-peft": to_peft}[args.command], args)
    except (ValueError, OSError) as error:  # people's mistakes; anything else is ours and keeps its traceback
        from engine.config import ConfigError

        print("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{args.target}: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
