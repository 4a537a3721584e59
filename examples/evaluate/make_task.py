"""Held-out documents -> a small multiple-choice task: which of four lines comes next?

    python examples/evaluate/make_task.py --input examples/quickstart/work/corpus/valid.jsonl --output examples/evaluate/work

An item is some lines of a held-out file, the line that follows, and three lines from elsewhere in the held-out files that are as deeply indented, so that
indentation alone does not decide. Chance is 25%. The same input gives the same items. Written: next_line.jsonl and documents.jsonl (for bits per byte).
"""

import argparse
import json
import random
from pathlib import Path

CONTEXT_LINES, MIN_LENGTH, MAX_LENGTH = 5, 12, 80


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def items(documents: list[str], count: int, seed: int) -> list[dict]:
    """`count` items {context, choices, answer}; places and distractors are drawn by `seed`."""
    draw = random.Random(seed)
    lines = [document.splitlines(keepends=True) for document in documents]
    places = [(d, i) for d, text in enumerate(lines) for i in range(CONTEXT_LINES, len(text)) if MIN_LENGTH <= len(text[i].strip()) <= MAX_LENGTH]
    by_depth: dict[int, list[str]] = {}
    for d, i in places:
        by_depth.setdefault(indentation(lines[d][i]), []).append(lines[d][i])
    found = []
    for d, i in draw.sample(places, min(len(places), 4 * count)):
        line = lines[d][i]
        others = sorted(set(by_depth[indentation(line)]) - {line})
        if len(others) >= 3 and len(found) < count:
            choices = draw.sample(others, 3) + [line]
            draw.shuffle(choices)
            found.append({"context": "".join(lines[d][i - CONTEXT_LINES:i]), "choices": choices, "answer": choices.index(line)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="JSON lines with a key text")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    documents = [json.loads(line)["text"] for line in args.input.read_text(encoding="utf-8").splitlines()]
    args.output.mkdir(parents=True, exist_ok=True)
    chosen = items(documents, args.count, args.seed)
    for name, records in (("next_line", chosen), ("documents", [{"text": document} for document in documents])):
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(chosen)} items and {len(documents)} documents -> {args.output}")


if __name__ == "__main__":
    main()
