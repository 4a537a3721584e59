"""Let a model write: python launch/generate.py CHECKPOINT_OR_HF_DIR --prompt "def main():" [key=value ...]

    --prompt TEXT                              goes on with a text, as the tokens are drawn
    --prompts FILE.jsonl --output FILE.jsonl   answers each line, {"prompt": TEXT} or {"messages": [...]}, which comes out with `answer` and `reason`
    neither                                    reads lines from the terminal until it ends (Ctrl-D)
    --chat                                     a text is what a user says: the chat template stands around it, and the terminal's lines are one conversation

Sizes, tokenizer and chat template are those of the checkpoint or the Hugging Face folder; key=value changes them, and says over how many ranks
the model is spread: torchrun --nproc-per-node 2 launch/generate.py CHECKPOINT --prompt TEXT parallel.tp=2. What is drawn depends on --seed, not on
the layout. An answer ends with the end of document, with what ends a turn of the chat template, or with a --stop.
Exit codes: 0 done, 1 error, 2 usage or configuration.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from omegaconf import OmegaConf

from engine.cli import ERROR, guarded, say
from engine.foreign import written_config
from engine.run_folder import find


def number(kind, low, high=float("inf"), above=False):
    """A converter for argparse: a number of this kind in low..high; above: greater than low."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high or above and value == low:
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {low}{f' and at most {high}' if high < 2**53 else ''}")
        return value

    convert.__name__ = kind.__name__
    return convert


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="CHECKPOINT_OR_HF_DIR")
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--prompts", metavar="FILE.jsonl")
    parser.add_argument("--output", metavar="FILE.jsonl")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256)
    parser.add_argument("--temperature", type=number(float, 0), default=1.0, help="0 takes the most probable token (default 1)")
    parser.add_argument("--top-k", type=number(int, 0), default=0, help="draw among this many tokens; 0 among all (default)")
    parser.add_argument("--top-p", type=number(float, 0, 1, above=True), default=1.0, help="draw among the fewest tokens of this probability (default 1)")
    parser.add_argument("--min-p", type=number(float, 0, 1), default=0.0, help="draw among tokens this probable beside the best (default 0)")
    parser.add_argument("--repetition-penalty", type=number(float, 0, above=True), default=1.0, help="1 is off (default)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text that ends the answer; may be given several times")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--samples", type=number(int, 1), default=1, help="answers to each prompt")
    parser.add_argument("--batch", type=number(int, 0), default=64, help="answers that are drawn at once on each replica; 0 all (default 64)")
    parser.add_argument("--tokenizer", metavar="SPEC", help="another than the model's: hf:DIR, sentencepiece:FILE, tiktoken:FILE or bytes")
    parser.add_argument("--template", metavar="NAME", help="another chat template than the model's, as chat.template")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.prompt is not None and args.prompts:
        parser.error("--prompt and --prompts do not go together")
    if bool(args.prompts) != bool(args.output):
        parser.error("--prompts and --output go together")
    if args.prompts and not Path(args.prompts).is_file():
        parser.error(f"there is no file {args.prompts}")
    if args.output and Path(args.output).exists():
        parser.error(f"{args.output} exists already; name another file or remove it")
    if "" in args.stop:
        parser.error("--stop is empty; an answer would end before it began")
    args.checkpoint = find(args.model)
    args.is_hf = args.checkpoint is None and (Path(args.model) / "config.json").is_file()
    if args.checkpoint is None and not args.is_hf:
        parser.error(f"{args.model} holds neither a complete checkpoint (iter_*/metadata.json) nor a Hugging Face model (config.json)")
    return args


def sections(args) -> dict:
    """The configuration to draw with: the model, what it was trained to read, and nothing of how it was trained."""
    if args.is_hf:
        from engine.hf.convert import run_of
        from engine.hf.load import open_hf

        raw = run_of(*open_hf(args.model, drop_mtp=True), args.model, "unused").model_dump()
    else:
        raw = written_config(args.checkpoint)
    data = {"train": ["unused"], "tokenizer": args.tokenizer or raw["data"]["tokenizer"]}
    if not args.tokenizer:
        data["eod_id"] = raw["data"]["eod_id"]
    batch = 16 * int(os.environ.get("WORLD_SIZE", 1))  # a multiple that suits every layout; drawing has no global batch
    train = {name: raw["train"][name] for name in ("seq_len", "precision", "backend")}
    return {
        "run": {**raw["run"], "dir": "unused"},
        "model": raw["model"],
        "lora": raw["lora"],
        "data": data,
        "train": {**train, "global_batch": batch, "steps": 0},
        "chat": {**raw["chat"], **({"template": args.template} if args.template else {})},
        "checkpoint": {} if args.is_hf else {"load": str(args.checkpoint)},
    }


def main() -> int:
    args = parse()

    def act(run) -> None:
        from engine.write import Writer, answer_file, answer_prompt, converse, read_lines

        lines = read_lines(args.prompts) if args.prompts else []
        writer = Writer(run, args, any("messages" in line for line in lines))
        if args.prompts:
            answer_file(writer, lines, args.output)
        elif args.prompt is not None:
            answer_prompt(writer, args.prompt)
        else:
            converse(writer)

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        try:
            config.write_text(OmegaConf.to_yaml(OmegaConf.create(sections(args))))
        except (ValueError, OSError) as error:  # a folder that is not whole, or another kind of model
            return say(f"error: {error}", ERROR)
        return guarded(str(config), args.overrides, act)


if __name__ == "__main__":
    sys.exit(main())
