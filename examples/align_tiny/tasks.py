"""The example's data: arithmetic from reasoning-gym as plain text, conversations and preference pairs, with a held-out part of each.

    python examples/align_tiny/tasks.py --output-dir examples/align_tiny/work/data

text.jsonl                   plain sums, for pretraining
chat.jsonl chat_held.jsonl   the same kind of sums asked and answered, for SFT
pairs.jsonl pairs_held.jsonl a right answer against a wrong one that looks like it, for the reward model and DPO
No sum of a held-out file stands in any other file.
"""

import argparse
import json
import random
from pathlib import Path

import reasoning_gym

LINES_PER_DOCUMENT = 12
SIZES = {"text": 9000, "chat": 4000, "chat_held": 256, "pairs": 8000, "pairs_held": 256}


def sums(count: int, seed: int) -> list[tuple[str, str, str]]:
    """(question, sum, answer) of `count` different sums of two numbers of one or two digits."""
    found, data = {}, reasoning_gym.create_dataset("chain_sum", size=8 * count, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2)
    for entry in data:
        expression = entry["question"].split(": ")[-1].removesuffix(" =")
        assert data.score_answer(entry["answer"], entry) == 1.0
        found.setdefault(expression, (entry["question"], expression, entry["answer"]))
        if len(found) == count:
            return list(found.values())
    raise SystemExit(f"reasoning-gym has only {len(found)} different sums of this kind, {count} are needed")


def wrong(answer: str, rng: random.Random) -> str:
    """A number that a careless pupil might say: one digit off, a carry forgotten, or the wrong sign."""
    value = int(answer)
    choices = {value + 1, value - 1, value + 10, value - 10, -value, int(answer[::-1]) if value >= 0 else -value + 1} - {value}
    return str(rng.choice(sorted(choices)))


def write(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    everything = sums(SIZES["text"], seed=7)
    rng.shuffle(everything)
    held = {name: everything[i * 256:(i + 1) * 256] for i, name in enumerate(("chat_held", "pairs_held"))}
    known = everything[512:]
    documents = [rng.sample(known, LINES_PER_DOCUMENT) for _ in range(SIZES["text"])]
    write(args.output_dir / "text.jsonl", ({"text": "".join(f"{expression} = {answer}\n" for _, expression, answer in d)} for d in documents))
    for name, chosen in (("chat", rng.sample(known, SIZES["chat"])), ("chat_held", held["chat_held"])):
        write(args.output_dir / f"{name}.jsonl", ({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
                                                  for question, _, answer in chosen))
    for name, chosen in (("pairs", rng.sample(known, SIZES["pairs"])), ("pairs_held", held["pairs_held"])):
        write(args.output_dir / f"{name}.jsonl", ({"prompt": question, "chosen": answer, "rejected": wrong(answer, rng)}
                                                  for question, _, answer in chosen))


if __name__ == "__main__":
    main()
