"""Convert between a Hugging Face folder and a checkpoint of the engine, and prove it by comparing logits.

    python launch/convert.py from-hf HF_DIR CKPT_DIR      safetensors -> a checkpoint that checkpoint.load takes
    python launch/convert.py to-hf CKPT_DIR HF_DIR        a checkpoint -> a folder that transformers loads
    python launch/convert.py to-peft CKPT_DIR PEFT_DIR --base NAME     a checkpoint's adapters -> a folder that PEFT loads
    python launch/convert.py average DIR ... --output CKPT_DIR         the weighted mean of models of one shape
    python launch/convert.py upcycle CKPT_DIR NEW_CKPT_DIR             dense -> mixture of experts, the same function at first
    python launch/convert.py from-megatron MEGATRON_DIR CKPT_DIR --config RUN.yaml

Which families there are, and what of them is refused: docs/models.md. A reward model is transformers' ...ForSequenceClassification with one
label, both ways. Adapters (lora.*) are merged by to-hf; from-hf takes some along with --adapter PEFT_DIR.

Tensors stream from one side to the other, a few in memory at a time. The result is written under another name; then it is read again,
the engine's logits and greedy tokens are compared with transformers' on a few prompts (fp32, one CPU process), and only then does it
get its name; above the tolerance it stays as NAME.failed. Memory must hold the model once in fp32 for the comparison; --no-verify leaves it out, and says so.
Exit codes: 0 done, 1 the conversion or the comparison failed, 2 usage or configuration, 130 interrupted (then nothing is left behind).
Left out: quantised folders.
"""

import argparse
import math
import os
import signal
import sys
from pathlib import Path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    from_hf = commands.add_parser("from-hf", help="Hugging Face folder -> checkpoint")
    from_hf.add_argument("source", metavar="HF_DIR", type=Path, help="folder with config.json and safetensors")
    from_hf.add_argument("target", metavar="CKPT_DIR", type=Path, help="checkpoint to write; must not exist")
    from_hf.add_argument("--adapter", metavar="PEFT_DIR", type=Path, help="a LoRA or DoRA adapter of this model, kept apart from its weights")
    from_hf.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin where there is no safetensors file (tensors alone)")
    from_hf.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the checkpoint; default: as in HF_DIR")
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
    average = commands.add_parser("average", help="the mean of several checkpoints or Hugging Face folders -> checkpoint")
    average.add_argument("source", metavar="DIR", nargs="+", type=Path, help="checkpoints or Hugging Face folders of one model")
    average.add_argument("--output", dest="target", metavar="CKPT_DIR", type=Path, required=True, help="checkpoint to write; must not exist")
    average.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per model; their sum does not matter (default: equal)")
    upcycle = commands.add_parser("upcycle", help="dense checkpoint -> mixture of experts that starts as the same function")
    upcycle.add_argument("source", metavar="CKPT_DIR", type=Path, help="a run's checkpoints folder, or one iter_ folder of it")
    upcycle.add_argument("target", metavar="NEW_CKPT_DIR", type=Path, help="checkpoint to write; must not exist")
    upcycle.add_argument("--num-experts", type=int, default=8, help="experts per layer, each a copy of the MLP (default 8)")
    upcycle.add_argument("--top-k", type=int, default=2, help="experts per token (default 2)")
    upcycle.add_argument("--seed", type=int, default=1234, help="of the router's weights")
    from_megatron = commands.add_parser("from-megatron", help="torch_dist checkpoint of Megatron-LM or -Bridge -> checkpoint")
    from_megatron.add_argument("source", metavar="MEGATRON_DIR", type=Path, help="its folder with latest_checkpointed_iteration.txt, or one iter_ folder")
    from_megatron.add_argument("target", metavar="CKPT_DIR", type=Path, help="checkpoint to write; must not exist")
    from_megatron.add_argument("--config", metavar="YAML", type=Path, required=True, help="a run's configuration whose model section is this model")
    from_hf.add_argument("--no-hashes", action="store_true",
                         help="neither check HF_DIR's files against its hashes.json, nor make one for CKPT_DIR and wait for the disk")
    for command in (to_hf, to_peft, average, upcycle):
        command.add_argument("--no-hashes", action="store_true", help="do not check every byte of the source against its hashes.json")
    for command in (from_hf, to_hf):
        command.add_argument("--drop-mtp", action="store_true", help="leave out modules that predict further tokens (DeepSeek-V3)")
    for command in (from_hf, to_hf, to_peft, upcycle):
        command.add_argument("--tolerance", type=float, default=1e-4,
                             help="largest difference of logits, as a share of the largest logit (default 1e-4)")
        command.add_argument("--no-verify", action="store_true", help="do not compare with transformers; the result is then not proved")
    args = parser.parse_args(argv)
    for source in args.source if isinstance(args.source, list) else [args.source]:
        if not os.path.isdir(source):  # not Path's, which raise where a folder on the way is closed to this user
            parser.error(f"there is no folder {source}, or none that this user may enter")
    if getattr(args, "adapter", None) and not os.path.isdir(args.adapter):
        parser.error(f"there is no folder {args.adapter}")
    if os.path.exists(args.target):
        parser.error(f"{args.target} exists already; name another folder or remove it")
    _check_writable(parser, args.target)
    if not all(0 < number < math.inf for number in (getattr(args, "tolerance", 1), getattr(args, "shard_gb", 1))):
        parser.error("--tolerance and --shard-gb must be positive and finite")
    if args.command == "to-hf" and args.public and not args.upload:
        parser.error("--public says who sees what --upload REPO uploads; name the repository")
    return args


def _check_writable(parser: argparse.ArgumentParser, target: Path) -> None:
    parent = next(path for path in target.absolute().parents if os.path.exists(path))
    if not os.path.isdir(parent):
        parser.error(f"{parent} is no folder, so {target} cannot be made")
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=True):
        parser.error(f"{parent} may not be written to by this user, so {target} cannot be made; name another folder or change its permissions")


def sibling(target: Path, suffix: str) -> Path:
    """A fresh path beside `target`; what an earlier attempt left there goes."""
    import shutil

    path = target.with_name(f"{target.name}.{suffix}")
    if path.exists():
        shutil.rmtree(path)
    return path


def settle(convert, args: argparse.Namespace) -> str:
    """Convert into a draft and give it the target's name; what fails is put aside as NAME.failed, and an interrupt leaves nothing."""
    draft = sibling(args.target, "unverified")
    try:
        verdict = convert(args, draft)
    except KeyboardInterrupt:
        sibling(args.target, "unverified")
        raise
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
        from engine import conversions

        verdict = settle(getattr(conversions, args.command.replace("-", "_")), args)
    except KeyboardInterrupt:
        print(f"interrupted; {args.target} was not written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:  # people's mistakes; anything else is ours and keeps its traceback
        from engine.config import ConfigError

        is_usage = isinstance(error, ConfigError)  # its text is a list, which begins on a line of its own
        print("\n".join([*(["error:", str(error)] if is_usage else [f"error: {error}"]), *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 2 if is_usage else 1
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
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, ValueError, KeyboardInterrupt) as error:
        print(f"error: {args.target} is complete, but was not uploaded to {args.upload}: {error or type(error).__name__}\n"
              f"repeat with: hf upload {args.upload} {args.target}", file=sys.stderr)
        return 1
    print(f"uploaded to {args.upload}")
    return 0


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
