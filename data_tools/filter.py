"""Keeps the documents that pass rules of quality, length, language and blocklists; counts what each rule removes, and shows some.

  python data_tools/filter.py --input 'crawl/*.jsonl.zst' --output work/clean.jsonl.zst --rejected work/rejected.jsonl.zst \\
      --rules gopher-quality gopher-repetition --language en --set min_words=20 --without max_bullet_lines
  python data_tools/filter.py --list-rules

Rules are tried in the order of the list, and a document goes by the first that it breaks. Kept records are copied byte for byte;
only --c4-lines changes texts, by removing lines. --dry-run counts and writes nothing.

In: JSON lines, Parquet or text. Out: one file of whole records, maybe one of rejected ones with their reasons, a manifest.
Left out: classifiers and perplexity; duplicates across documents (dedup.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from data_tools.cli import UsageError, positive, run_tool
from data_tools.options import add_text_options, fraction

NUM_EXAMPLES = 3  # of each rule
EXAMPLE_CHARACTERS = 90
LANGUAGE_CHARACTERS = 1000  # the identifier reads so many from the beginning: it is slow, and more change its answer seldom


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="filter.py", description="Keep the documents that pass rules of quality.")
    add_text_options(parser)
    parser.add_argument("--rules", nargs="+", default=["length"], metavar="NAME", help="groups or single rules: length, gopher-quality, gopher-repetition, c4, ...")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="groups or rules to leave out")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=NUMBER", help="thresholds; a rule that is named here is used")
    parser.add_argument("--list-rules", action=_ListRules, help="print all rules with their thresholds, and end")
    parser.add_argument("--c4-lines", action="store_true", help="remove lines without terminal punctuation, with few words, javascript or policies from the texts")
    parser.add_argument("--c4-words", type=positive, default=3, metavar="N", help="fewest words of a line (default: 3)")
    parser.add_argument("--language", nargs="+", default=[], metavar="CODE", help="keep these languages (ISO 639-1, such as en de); needs py3langid")
    parser.add_argument("--language-confidence", type=fraction, default=0.5, metavar="P", help="least probability of the language (default: 0.5)")
    parser.add_argument("--blocklist", nargs="+", default=[], metavar="FILE", help="remove documents that hold a word or phrase of these files")
    parser.add_argument("--url-blocklist", nargs="+", default=[], metavar="FILE", help="remove documents from these hosts or addresses")
    parser.add_argument("--url-key", default="url", metavar="KEY", help="the key that holds a document's address (default: url)")
    parser.add_argument("--rejected", metavar="FILE", help="write what is removed, with the reason")
    parser.add_argument("--dry-run", action="store_true", help="count, write nothing")
    return parser


class _ListRules(argparse.Action):
    """Prints the rules; --input and --output are not needed then."""

    def __init__(self, **fields) -> None:
        super().__init__(nargs=0, **fields)

    def __call__(self, parser, *_) -> None:
        from data_tools.quality import RULES

        for rule in RULES:
            print(f"{rule.group:18} {rule.name:36} removes {rule.side} {rule.threshold:g} ({rule.meaning})")
        parser.exit()


def chosen_rules(rules: Sequence[str], without: Sequence[str], settings: Sequence[str]) -> list:
    """The rules that are used, in the order of the list, with their thresholds. Raises UsageError for unknown names."""
    from data_tools.quality import GROUPS, RULES

    thresholds = dict(map(_setting, settings))
    names = {rule.name for rule in RULES}
    for name in [*rules, *without]:
        if name not in names and name not in GROUPS:
            raise UsageError(f"there is no rule {name!r}{_nearest(name, [*names, *GROUPS])}; --list-rules prints them all")
    for name in thresholds:
        if name not in names:
            raise UsageError(f"--set {name}: there is no such rule{_nearest(name, names)}; --list-rules prints them all")
    used = []
    for rule in RULES:
        is_named = rule.name in rules or rule.group in rules or rule.name in thresholds
        if is_named and rule.name not in without and rule.group not in without:
            used.append(replace(rule, threshold=thresholds.get(rule.name, rule.threshold)))
    return used


def _setting(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise UsageError(f"--set {text}: expected NAME=NUMBER, for example min_words=20") from None


def _nearest(name: str, names) -> str:
    import difflib

    near = difflib.get_close_matches(name, sorted(names), 1)
    return f", did you mean {near[0]!r}?" if near else ""


@dataclass
class Judged:
    """A block's records: what stays, what goes and why."""

    kept: list[bytes] = field(default_factory=list)
    rejected: list[tuple[str, str, object]] = field(default_factory=list)  # (rule, why, Record)
    problems: list = field(default_factory=list)
    removed_lines: Counter = field(default_factory=Counter)
    num_edited: int = 0
    num_bytes: int = 0


class Judge:
    """Judges blocks; one per process."""

    def __init__(self, args: argparse.Namespace) -> None:
        from data_tools.blocklist import Addresses, Phrases, read_entries

        self.args = args
        self.rules = chosen_rules(args.rules, args.without, args.set)
        self.phrases = Phrases(read_entries(args.blocklist)) if args.blocklist else None
        self.addresses = Addresses(read_entries(args.url_blocklist)) if args.url_blocklist else None
        self.identify = _identifier(args.language) if args.language else None

    def __call__(self, block) -> Judged:
        from data_tools.records import records_of, with_text

        records, problems = records_of(block, self.args.json_key)
        judged = Judged(problems=problems, num_bytes=block.num_bytes)
        for record in records:
            text = record.text
            if self.args.c4_lines:
                from data_tools.quality import c4_lines

                text, removed = c4_lines(text, self.args.c4_words)
                judged.removed_lines += removed
            fault = self._fault(record, text)
            if fault is not None:
                judged.rejected.append((*fault, record))
            elif text is record.text:
                judged.kept.append(record.raw)
            else:
                judged.kept.append(with_text(record.raw, self.args.json_key, text))
                judged.num_edited += 1
        return judged

    def _fault(self, record, text: str) -> tuple[str, str] | None:
        """(rule, why) of the first rule that a document breaks."""
        from data_tools.quality import Document

        document = Document(text)
        for rule in self.rules:
            value = rule.measure(document)
            if rule.breaks(value):
                return rule.name, f"{rule.name}: {value:.4g} is {rule.side} {rule.threshold:g}"
        if self.addresses is not None and (entry := self.addresses.found(_url(record.raw, self.args.url_key))):
            return "url-blocklist", f"url-blocklist: {entry}"
        if self.phrases is not None and (entry := self.phrases.found(text)):
            return "blocklist", f"blocklist: {entry}"
        if self.identify is not None:
            language, confidence = self.identify(text[:LANGUAGE_CHARACTERS])
            if language not in self.args.language or confidence < self.args.language_confidence:
                return "language", f"language: {language} with probability {confidence:.2f}"
        return None


def _url(raw: bytes, key: str) -> str:
    url = json.loads(raw).get(key)
    return url if isinstance(url, str) else ""


def _identifier(languages: Sequence[str]):
    """text -> (language, probability)."""
    from data_tools.files import need

    langid = need("py3langid.langid", "--language names languages")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    unknown = [code for code in languages if code not in identifier.labels]
    if unknown:
        raise UsageError(f"--language {unknown[0]}: py3langid knows {' '.join(sorted(identifier.labels))}")
    return identifier.classify


class Report:
    """Counts of what went in and out, and examples of what each rule removed."""

    def __init__(self) -> None:
        self.num_kept = self.num_malformed = self.num_edited = 0
        self.documents, self.bytes, self.removed_lines = Counter(), Counter(), Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, judged: Judged) -> None:
        self.num_kept += len(judged.kept)
        self.num_malformed += len(judged.problems)
        self.num_edited += judged.num_edited
        self.removed_lines += judged.removed_lines
        for rule, why, record in judged.rejected:
            self.documents[rule] += 1
            self.bytes[rule] += len(record.raw)
            examples = self.examples.setdefault(rule, [])
            if len(examples) < NUM_EXAMPLES:
                start = " ".join(record.text[: 2 * EXAMPLE_CHARACTERS].split())[:EXAMPLE_CHARACTERS]
                examples.append(f"{record.path}:{record.line}: {why.partition(': ')[2]}: {start}")

    def counts(self) -> dict:
        return {
            "documents_in": self.num_kept + self.documents.total() + self.num_malformed, "written": self.num_kept,
            "rejected": self.documents.total(), "malformed": self.num_malformed, "edited": self.num_edited,
            "rejected_documents": dict(self.documents), "rejected_bytes": dict(self.bytes), "removed_lines": dict(self.removed_lines),
        }  # fmt: skip

    def __str__(self) -> str:
        counts = self.counts()
        total = max(1, counts["documents_in"])
        lines = [f"{'rule':36} {'documents':>10} {'share':>7} {'MB':>9}"] if self.documents else []
        for rule, count in self.documents.most_common():
            lines.append(f"{rule:36} {count:10,} {count / total:7.2%} {self.bytes[rule] / 1e6:9.2f}")
            lines += [f"    {example}" for example in self.examples[rule]]
        lines += [f"{count:,} lines removed: {reason}" for reason, count in self.removed_lines.most_common()]
        changed = f" ({self.num_edited} with lines removed)" if self.removed_lines else ""
        lines.append(
            f"{counts['documents_in']} documents in: {self.num_kept} written{changed}, {counts['rejected']} rejected, {self.num_malformed} malformed"
        )
        return "\n".join(lines)


def filter_documents(args: argparse.Namespace) -> None:
    from data_tools.manifest import write_manifest
    from data_tools.progress import Progress
    from data_tools.reader import expand, read_blocks
    from data_tools.records import RecordWriter, check_output, report_problems, total_size
    from data_tools.workers import map_in_order

    paths = expand(args.input, args.format)
    check_output(args.output, paths)
    if args.rejected:
        check_output(args.rejected, [*paths, args.output], "--rejected")
    judge = Judge(args)  # all options are judged before any work is done
    report = Report()
    writes_rejected = args.rejected and not args.dry_run
    kept = nullcontext() if args.dry_run else RecordWriter(args.output)
    rejected = RecordWriter(args.rejected) if writes_rejected else nullcontext()
    with Progress("filter", total_size(paths), args.quiet) as progress, kept, rejected:
        make, arguments = (lambda: judge, ()) if args.workers == 1 else (Judge, (args,))
        for judged in map_in_order(make, arguments, read_blocks(paths, args.format), args.workers):
            report_problems(judged.problems, args.on_error, report.num_malformed)
            report.add(judged)
            for raw in () if args.dry_run else judged.kept:
                kept.write(raw)
            for rule, why, record in judged.rejected if writes_rejected else ():
                rejected.write(_rejection(rule, why, record))
            progress.add(judged.num_bytes, len(judged.kept) + len(judged.rejected))
    print(report)
    if args.dry_run:
        print("nothing was written (--dry-run)")
        return
    inputs = [*paths, *args.blocklist, *args.url_blocklist]
    outputs = [args.output, args.rejected] if args.rejected else [args.output]
    write_manifest(args.output, "filter", vars(args), inputs, outputs, report.counts())
    print(args.output)


def _rejection(rule: str, why: str, record) -> bytes:
    """{"rule", "why", "file", "line", "record"}; the record as it was, byte for byte."""
    import orjson

    head = orjson.dumps({"rule": rule, "why": why, "file": record.path, "line": record.line})
    return head[:-1] + b',"record":' + record.raw + b"}"


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(build_parser(), filter_documents, argv)


if __name__ == "__main__":
    sys.exit(main())
