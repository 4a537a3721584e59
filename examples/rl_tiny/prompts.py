"""The example's data: the sums of examples/align_tiny as bare prompts ("52 - 99 =") with the answer a verifier compares with.

    python examples/rl_tiny/prompts.py --data-dir examples/align_tiny/work/data --output-dir examples/rl_tiny/work/data

prompts.jsonl: sums that the base model has seen as text. held.jsonl: 512 sums that stand in no training file.
"""

import argparse
import json
from pathlib import Path


def pairs(path: Path) -> list[tuple[str, str]]:
    """(question, right answer) of each line of a file of preference pairs or conversations."""
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["prompt"], line["chosen"]) if "prompt" in line else tuple(message["content"] for message in line["messages"]) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, sources in (("prompts", ["pairs"]), ("held", ["chat_held", "pairs_held"])):
        found = [pair for source in sources for pair in pairs(args.data_dir / f"{source}.jsonl")]
        lines = (json.dumps({"prompt": question.split(": ")[-1], "answer": answer}) + "\n" for question, answer in found)
        (args.output_dir / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
