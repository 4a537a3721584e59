"""What corpora hold: documents, tokens, how long documents are, the greatest id; a table, JSON, a picture of the lengths.

  python data_tools/stats.py work/web_text_document work/code_text_document --histogram work/lengths.png
  python data_tools/stats.py 'work/*.idx' --json

In: prefixes of corpora (or globs of their .idx files). Out: a line for each and one for all of them, on stdout.
The lengths come from the .idx; only the greatest id reads every token (--quick leaves it out). Left out: what the text says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from data_tools.cli import run_tool

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stats.py", description="Count what corpora hold.")
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="corpora (paths without .bin/.idx, or globs of .idx files)")
    parser.add_argument("--histogram", metavar="FILE", help="draw the lengths of documents as a PNG, PDF or SVG")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quick", action="store_true", help="do not read the tokens: no greatest id")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


def stats(args: argparse.Namespace) -> None:
    import numpy as np

    from data_tools.progress import Progress
    from engine.data.indexed import IndexedCorpus

    corpora = [IndexedCorpus(prefix) for prefix in _prefixes(args.prefix)]
    rows, all_lengths = [], []
    with Progress("stats", sum(corpus.num_tokens * corpus.dtype.itemsize for corpus in corpora), args.quiet) as progress:
        for corpus in corpora:
            lengths = document_lengths(corpus)
            max_token = None if args.quick else corpus.max_token()
            rows.append({"corpus": corpus.prefix, "dtype": corpus.dtype.name, "sequences": len(corpus), **summary(lengths), "greatest_id": max_token})
            all_lengths.append(lengths)
            progress.add(corpus.num_tokens * corpus.dtype.itemsize, lengths.size, corpus.num_tokens)
    joined = np.concatenate(all_lengths)
    if len(rows) > 1:
        greatest = None if args.quick else max(row["greatest_id"] for row in rows)
        total = {"corpus": "all", "dtype": "", "sequences": sum(row["sequences"] for row in rows), **summary(joined), "greatest_id": greatest}
    else:
        total = None
    if args.histogram:
        _draw(args.histogram, [row["corpus"] for row in rows], all_lengths)
    if args.json:
        print(json.dumps({"corpora": rows, "all": total or rows[0] | {"corpus": "all"}}))
    else:
        _print_table(rows + ([total] if total else []))


def _prefixes(given: Sequence[str]) -> list[str]:
    import glob

    from engine.data.indexed import DataError

    found: list[str] = []
    for text in given:
        matches = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
        if not matches:
            raise DataError(f"{text}: no file matches; a glob names the .idx files of corpora")
        found += dict.fromkeys(match.removesuffix(".idx").removesuffix(".bin") for match in matches)
    return found


def document_lengths(corpus):
    """int64 [num_documents]: tokens of each document."""
    import numpy as np

    ends = np.zeros(len(corpus) + 1, np.int64)
    np.cumsum(corpus.sequence_lengths, out=ends[1:])
    return np.diff(ends[np.array(corpus.document_indices)])


def summary(lengths) -> dict:
    """Counts, and lengths of documents in tokens."""
    import numpy as np

    if lengths.size == 0:
        return {"documents": 0, "tokens": 0, "empty": 0, "mean": 0.0, "min": 0, **{f"p{p}": 0 for p in PERCENTILES}, "max": 0}
    # "inverted_cdf": a length that occurs, so that it reads as one
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist()
    return {
        "documents": int(lengths.size), "tokens": int(lengths.sum()), "empty": int((lengths == 0).sum()), "mean": round(float(lengths.mean()), 2),
        "min": int(lengths.min()), **{f"p{p}": int(value) for p, value in zip(PERCENTILES, percentiles)}, "max": int(lengths.max()),
    }  # fmt: skip


def _print_table(rows: list[dict]) -> None:
    names = [name for name in rows[0] if name != "greatest_id" or rows[0][name] is not None]
    cells = [[f"{row[name]:,}" if isinstance(row[name], int | float) else str(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(line, widths))).rstrip())


def _draw(path: str, names: list[str], lengths: list) -> None:
    """One line for each corpus: the share of its documents in each range of lengths, ranges growing by a factor."""
    import os

    import matplotlib

    matplotlib.use("agg")
    import numpy as np
    from matplotlib import pyplot

    longest = max((int(each.max()) for each in lengths if each.size), default=1)
    edges = np.unique(np.geomspace(1, max(2, longest + 1), 60).round())
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, each in zip(names, lengths):
        counts, _ = np.histogram(each, np.concatenate([[0], edges]))
        axes.stairs(counts / max(1, each.size), np.concatenate([[0.5], edges]), label=f"{name} ({each.size:,} documents)")
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="share of documents")
    axes.legend()
    temporary = f"{path}.tmp{os.path.splitext(path)[1]}"
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    except ValueError as error:  # a suffix that is no picture format
        from data_tools.cli import UsageError

        raise UsageError(f"--histogram {path}: {error}") from None
    finally:
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), stats, argv)


if __name__ == "__main__":
    sys.exit(main())
