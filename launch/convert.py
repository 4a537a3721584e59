"""Convert between a Hugging Face folder and a checkpoint of the engine, and prove it by comparing logits.

    python launch/convert.py from-hf HF_DIR CKPT_DIR      safetensors -> a checkpoint that checkpoint.load takes
    python launch/convert.py to-hf CKPT_DIR HF_DIR        a checkpoint -> a folder that transformers loads
    python launch/convert.py to-peft CKPT_DIR PEFT_DIR --base NAME     a checkpoint's adapters -> a folder that PEFT loads

Adapters (lora.*) are merged by to-hf; from-hf takes some along with --adapter PEFT_DIR.

Tensors stream from one side to the other, a few in memory at a time. The result is written under another name; then it is read again,
the engine's logits and greedy tokens are compared with transformers' on a few prompts (fp32, one CPU process), and only then does it
get its name; above the tolerance it stays as NAME.failed. Memory must hold the model once in fp32 for the comparison; --no-verify leaves it out, and says so.
Exit codes: 0 done, 1 the conversion or the comparison failed, 2 usage or configuration.
Left out: quantised folders.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path


NOT_PROVED = "not proved: logits and greedy tokens were not compared (--no-verify)"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    from_hf = commands.add_parser("from-hf", help="Hugging Face folder -> checkpoint")
    from_hf.add_argument("source", metavar="HF_DIR", type=Path, help="folder with config.json and safetensors")
    from_hf.add_argument("target", metavar="CKPT_DIR", type=Path, help="checkpoint to write; must not exist")
    from_hf.add_argument("--adapter", metavar="PEFT_DIR", type=Path, help="a LoRA or DoRA adapter of this model, kept apart from its weights")
    from_hf.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin where there is no safetensors file (tensors alone)")
    from_hf.add_argument("--no-hashes", action="store_true", help="do not read HF_DIR's files once more to check them against its hashes.json")
    to_hf = commands.add_parser("to-hf", help="checkpoint -> Hugging Face folder")
    to_hf.add_argument("source", metavar="CKPT_DIR", type=Path, help="a run's checkpoints folder, or one iter_ folder of it")
    to_hf.add_argument("target", metavar="HF_DIR", type=Path, help="folder to write; must not exist")
    to_hf.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; default: the run's train.precision")
    to_hf.add_argument("--tokenizer", metavar="DIR", type=Path, help="copy the tokenizer from here, not from data.tokenizer")
    to_hf.add_argument("--shard-gb", type=float, default=5.0, help="largest weight file in GB (default 5)")
    to_hf.add_argument("--upload", metavar="REPO", help="when proved, upload the folder to this repository of the Hugging Face hub (private unless --public)")
    to_hf.add_argument("--public", action="store_true", help="let everybody see what --upload uploads")
    to_peft = commands.add_parser("to-peft", help="adapters of a checkpoint -> PEFT folder")
    to_peft.add_argument("source", metavar="CKPT_DIR", type=Path, help="a run's checkpoints folder, or one iter_ folder of it")
    to_peft.add_argument("target", metavar="PEFT_DIR", type=Path, help="folder to write; must not exist")
    to_peft.add_argument("--base", metavar="NAME", required=True, help="Hugging Face name or folder of the model that the adapters are for")
    for command in (from_hf, to_hf, to_peft):
        command.add_argument("--tolerance", type=float, default=1e-4,
                             help="largest difference of logits, as a share of the largest logit (default 1e-4)")
        command.add_argument("--no-verify", action="store_true", help="do not compare with transformers; the result is then not proved")
    args = parser.parse_args(argv)
    if not args.source.is_dir():
        parser.error(f"there is no folder {args.source}")
    if getattr(args, "adapter", None) and not args.adapter.is_dir():
        parser.error(f"there is no folder {args.adapter}")
    if args.target.exists():
        parser.error(f"{args.target} exists already; name another folder or remove it")
    if args.tolerance <= 0 or (args.command == "to-hf" and args.shard_gb <= 0):
        parser.error("--tolerance and --shard-gb must be positive")
    if args.command == "to-hf" and args.public and not args.upload:
        parser.error("--public says who sees what --upload REPO uploads; name the repository")
    return args


def from_hf(args: argparse.Namespace, draft: Path) -> str:
    """HF_DIR -> the checkpoint `draft`; returns the verdict of the comparison."""
    from engine.hf import FAMILIES
    from engine.hf.convert import run_of
    from engine.hf.load import open_hf
    from engine.hf.shards import Ahead

    hf, tensors = open_hf(args.source, args.allow_pickle, check_hashes=not args.no_hashes)
    run, adapters = run_of(hf, tensors, args.source, args.target), {}
    if args.adapter:
        run, adapters = with_adapter(run, args.adapter)
    checkpoint, family = engine_checkpoints(), FAMILIES[run.model.family]
    names = [name for pair in family.pairs(run.model) for name in pair.hf]
    with Ahead(tensors, names) as ahead, progress("from-hf", sum(map(tensors.num_bytes, tensors))) as bar:
        checkpoint.write_tensors(draft, run, chain(family.from_hf(run.model, ahead), adapters.items()), lambda n: bar.add(num_bytes=n))
    return compare(args, run, checkpoint.read_tensors(draft), args.source, args.adapter)


def to_hf(args: argparse.Namespace, draft: Path) -> str:
    """CKPT_DIR -> the Hugging Face folder `draft`; returns the verdict of the comparison."""
    from engine import hashes
    from engine.hf.convert import Rounded, merge
    from engine.hf.export import export, write_card

    checkpoint = engine_checkpoints()
    run, tensors = checkpoint.read_config(args.source), checkpoint.read_tensors(args.source)
    dtype = args.dtype or run.train.precision
    if run.lora.rank:
        adapted, (run, tensors) = (run, tensors), merge(run, tensors)
        if not args.no_verify:
            same_logits("merged weights and adapters", (run, tensors), adapted, args.tolerance)
    with progress("to-hf", None) as bar:
        export(run, tensors, draft, dtype, args.tokenizer, args.shard_gb * 1e9, written=lambda n: bar.add(num_bytes=n))
    # Rounded as the folder is: the comparison judges the conversion, not the dtype that was asked for.
    verdict = compare(args, run, Rounded(tensors, dtype), draft)
    folder = checkpoint.find(args.source)
    write_card(draft, run, args.target.name, checkpoint.read_position(folder).tokens, verdict, folder)
    hashes.write(draft)
    return verdict


def to_peft(args: argparse.Namespace, draft: Path) -> str:
    """CKPT_DIR -> the PEFT folder `draft`; returns the verdict of the comparison, for which the base model is written and read too."""
    import tempfile

    from engine.hf.export import export
    from engine.hf.peft import Unadapted, save_adapter

    checkpoint = engine_checkpoints()
    run, tensors = checkpoint.read_config(args.source), checkpoint.read_tensors(args.source)
    save_adapter(run.model, run.lora, tensors, draft, args.base)
    if args.no_verify:
        return NOT_PROVED
    with tempfile.TemporaryDirectory(dir=draft.parent) as folder:
        export(run.model_copy(update={"data": type(run.data)()}), Unadapted(tensors), Path(folder) / "base", "fp32")
        return compare(args, run, tensors, Path(folder) / "base", draft)


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


def progress(what: str, total_bytes: int | None):
    """A bar, or lines in a log, with MB/s."""
    from data_tools.progress import Progress

    return Progress(what, total_bytes)


def compare(args: argparse.Namespace, run, tensors, folder: Path, adapter: Path | None = None) -> str:
    """The engine's logits and greedy tokens against those of transformers on `folder`, with PEFT's adapter in the folder `adapter` if there
    is one. Prints a table and returns a sentence; raises HFError above the tolerance."""
    if args.no_verify:
        return NOT_PROVED
    from engine.hf.convert import in_fp32
    from engine.hf.verify import Verdict, answers, questions, transformers_network
    from engine.mcore.build import single_rank_network

    rows = questions(run.model, run.data.tokenizer.removeprefix("hf:"))
    # One after the other, so that memory holds one of the two.
    theirs = answers(transformers_network(folder, adapter, getattr(args, "allow_pickle", False)), rows)
    ours = answers(single_rank_network(in_fp32(run), tensors), rows)
    verdict = Verdict(ours, theirs, args.tolerance)
    sentence = verdict.check()
    print(verdict.table())
    return sentence


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
    return upload(args) if getattr(args, "upload", None) else 0


def upload(args: argparse.Namespace) -> int:
    """The finished folder to the hub, under the account that `hf auth login` or HF_TOKEN names."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        hub = HfApi()
        hub.create_repo(args.upload, private=not args.public, exist_ok=True)
        hub.upload_folder(repo_id=args.upload, folder_path=args.target, commit_message=f"Upload {args.target.name}")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, ValueError) as error:
        print(f"error: {args.target} is complete, but was not uploaded to {args.upload}: {error}\n"
              f"repeat with: hf upload {args.upload} {args.target}", file=sys.stderr)
        return 1
    print(f"uploaded to {args.upload}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
