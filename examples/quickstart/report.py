"""Loss curve of a run, beside what a model without context could reach.

    python examples/quickstart/report.py RUN --train-data PREFIX --valid-data PREFIX [--output FILE]

Reads RUN/metrics.jsonl; prints the curve as text and saves RUN/loss.png. The yardstick is the unigram cross-entropy: token
frequencies are counted on the training corpus, add-one smoothed, and scored on every held-out token, in nats per token. A
validation loss below it means the model uses the tokens before; one above it means it has not even learned the frequencies.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")  # no display needed
from matplotlib import pyplot  # noqa: E402

from engine.data.indexed import IndexedCorpus  # noqa: E402


def read_metrics(file: Path) -> tuple[dict[int, float], dict[str, dict[int, float]]]:
    """({step: training loss}, {validation set: {step: loss}}); of a step run twice, after a resume, the later line counts."""
    train, valid = {}, {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        if "valid_loss" in row:
            valid.setdefault(row["split"], {})[row["step"]] = row["valid_loss"]
        elif "loss" in row:
            train[row["step"]] = row["loss"]
    return train, valid


def token_counts(prefix: str, vocab_size: int) -> np.ndarray:
    """How often each token id occurs in a corpus. int64 [vocab_size]"""
    corpus = IndexedCorpus(prefix)
    counts = np.zeros(vocab_size, np.int64)
    for i in range(len(corpus)):
        counts += np.bincount(corpus.get(i), minlength=vocab_size)
    return counts


def unigram_cross_entropy(train_counts: np.ndarray, held_out_counts: np.ndarray) -> float:
    """-mean log p(token) over the held-out tokens, nats; p = (count in train + 1) / (tokens in train + vocab_size)."""
    log_p = np.log(train_counts + 1) - np.log(train_counts.sum() + len(train_counts))
    return float(-(held_out_counts * log_p).sum() / held_out_counts.sum())


def draw(train: dict[int, float], unigram: float, width: int = 72, height: int = 14) -> str:
    """The training loss, averaged over each column's steps, as text; the dashed row is the unigram cross-entropy."""
    steps, losses = np.array(list(train)), np.array(list(train.values()))
    columns = [part.mean() for part in np.array_split(losses, min(width, len(losses)))]
    top, bottom = max(*columns, unigram), min(*columns, unigram)
    scale = (height - 1) / max(top - bottom, 1e-9)
    unigram_row = round((top - unigram) * scale)
    grid = [["-" if row == unigram_row else " "] * len(columns) for row in range(height)]
    for x, loss in enumerate(columns):
        grid[round((top - loss) * scale)][x] = "*"
    labels = [f"{top - row / scale:7.2f} |" for row in range(height)]
    lines = [label + "".join(cells) for label, cells in zip(labels, grid)]
    axis = f"{'step':>7} +{steps.min():<{max(len(columns) - 8, 1)}}{steps.max():>8}"
    return "\n".join([*lines, axis])


def save_png(file: Path, train, valid, unigram: float) -> None:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(list(train), list(train.values()), linewidth=1, label="training")
    for name, losses in valid.items():
        axes.plot(list(losses), list(losses.values()), "o-", label=f"validation: {name}")
    axes.axhline(unigram, color="grey", linestyle="--", label="unigram cross-entropy, held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--train-data", required=True, help="prefix of the training .bin/.idx")
    parser.add_argument("--valid-data", required=True, help="prefix of the held-out .bin/.idx")
    parser.add_argument("--output", type=Path, help="also write the text here")
    args = parser.parse_args()

    train, valid = read_metrics(args.run / "metrics.jsonl")
    if not train or not valid:
        raise SystemExit(f"{args.run}/metrics.jsonl has {len(train)} training and {len(valid)} validation lines; both are needed")
    vocab_size = yaml.safe_load((args.run / "config.yaml").read_text())["model"]["vocab_size"]
    unigram = unigram_cross_entropy(token_counts(args.train_data, vocab_size), token_counts(args.valid_data, vocab_size))

    text = [draw(train, unigram), ""]
    for name, losses in valid.items():
        step = max(losses)
        text.append(f"validation loss ({name}), step {step}:".ljust(46) + f"{losses[step]:.4f} nats per token")
    text.append("unigram cross-entropy of the held-out files:".ljust(46) + f"{unigram:.4f} nats per token")
    print("\n".join(text))
    save_png(args.run / "loss.png", train, valid, unigram)
    print(f"curve: {args.run / 'loss.png'}")
    if args.output:
        args.output.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
