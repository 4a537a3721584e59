"""filter.py: each rule against plain Python written from its paper, what is kept byte for byte, the report, mistakes."""

import json
import os
import re
import sys
from collections import Counter

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings, strategies

from data_tools import filter as filter_tool, quality
from data_tools.blocklist import Addresses, Phrases
from data_tools.manifest import read_manifest
from data_tools.quality import RULES, Document, c4_lines
from engine.data.indexed import DataError

GOOD = (
    "The harbour was quiet that morning, and the boats lay in rows along the wall. An old man came down the steps with a basket, looked at the sky, "
    "and shook his head. He had seen this light before. There would be wind by noon, he said to nobody, and rain to follow it. "
    "Nobody had asked him, but the gulls seemed to listen. Further out a single sail moved slowly towards the open water."
)  # fmt: skip


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": text, "url": f"https://site{i}.example.org/p/{i}"}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def run(*inputs, output, options=()):
    return filter_tool.main(["--input", *map(str, inputs), "--output", str(output), "--quiet", *map(str, options)])


def kept_ids(path):
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def measure(name, text):
    return next(rule for rule in RULES if rule.name == name).measure(Document(text))


def test_thresholds_are_those_of_the_papers():
    """Gopher A.1.1 and table A1; C4 section 2.2, copied from the papers a second time."""
    gopher = {
        "min_words": 50, "max_words": 100_000, "min_mean_word": 3, "max_mean_word": 10, "max_hash_ratio": 0.1, "max_ellipsis_ratio": 0.1,
        "max_bullet_lines": 0.9, "max_ellipsis_lines": 0.3, "min_alphabetic_words": 0.8, "min_stop_words": 2,
        "max_duplicate_lines": 0.3, "max_duplicate_paragraphs": 0.3, "max_duplicate_line_characters": 0.2, "max_duplicate_paragraph_characters": 0.2,
        "max_top_2gram": 0.2, "max_top_3gram": 0.18, "max_top_4gram": 0.16, "max_duplicate_5grams": 0.15, "max_duplicate_6grams": 0.14,
        "max_duplicate_7grams": 0.13, "max_duplicate_8grams": 0.12, "max_duplicate_9grams": 0.11, "max_duplicate_10grams": 0.10,
    }  # fmt: skip
    c4 = {"max_curly_brackets": 0, "max_lorem_ipsum": 0, "min_sentences": 5}
    assert {rule.name: rule.threshold for rule in RULES if rule.group != "length"} == gopher | c4
    assert all((rule.side == "below") == rule.name.startswith("min_") for rule in RULES)


@pytest.mark.parametrize("name, text, value", [
    ("min_words", "one two  three\nfour", 4),
    ("max_mean_word", "a bbb cc", 2),
    ("max_hash_ratio", "#tag and ##more", 1.0),
    ("max_ellipsis_ratio", "wait... for it… now", 0.5),
    ("max_bullet_lines", "- a\n* b\n\n• c\nd", 0.75),
    ("max_ellipsis_lines", "read more...\n\nend.\nso…  \nend", 0.5),
    ("min_alphabetic_words", "a1 22 é -- 东", 0.6),
    ("min_stop_words", "The the, AND with. others", 3),
    ("max_duplicate_lines", "a\nb\n\na\na", 0.5),
    ("max_duplicate_line_characters", "aaa\nb\n\naaa\nc", 3 / 8),
    ("max_duplicate_paragraphs", "a\nb\n\nc\n \na\nb\n\n", 1 / 3),
    ("max_duplicate_paragraph_characters", "ab\n\nc\n\nab", 2 / 5),
    ("max_top_2gram", "a bb a bb a ccc", 6 / 10),
    ("max_top_2gram", "x x x x yy zz", 4 / 8),
    ("max_duplicate_5grams", "a b c d e f A, b c D e gg", 10 / 13),
    ("max_curly_brackets", "{a}}", 3),
    ("max_lorem_ipsum", "Lorem Ipsum lorem  ipsum", 1),
    ("min_sentences", 'One. Two? "Three!" 3.5 four', 3),
    ("max_characters", "é東🚅", 3),
], ids=lambda value: str(value)[:30])  # fmt: skip
def test_what_rules_measure(name, text, value):
    assert measure(name, text) == pytest.approx(value)
    measure(name, "")  # nothing to count is no error


def naive_repetition(words, n):
    """(share of the most frequent n-gram, share of repeated n-grams) of the characters, by marking words."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    total = sum(map(len, words)) or 1

    def covered(chosen):
        marked = {i + k for i, gram in enumerate(grams) if gram in chosen for k in range(n)}
        return sum(len(words[i]) for i in marked) / total

    top = max(counts.values(), default=0)
    return max((covered({gram}) for gram, count in counts.items() if count == top and top > 1), default=0.0), covered({g for g, c in counts.items() if c > 1})


@settings(max_examples=60, deadline=None)
@given(strategies.lists(strategies.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=40))
def test_repetition_is_that_of_plain_python(words):
    text = ", ".join(words)
    for n in (2, 3, 4):
        assert measure(f"max_top_{n}gram", text) == pytest.approx(naive_repetition(words, n)[0])
    for n in (5, 6, 7, 8, 9, 10):
        assert measure(f"max_duplicate_{n}grams", text) == pytest.approx(naive_repetition(words, n)[1])


def test_c4_removes_lines_for_each_reason():
    lines = [
        "A good line stays here.", "", "No end", "Too short.", "Please enable JavaScript to go on.", "Read our Privacy Policy before you go.",
        'He said "yes"', "And so on...",
    ]  # fmt: skip
    text, removed = c4_lines("\n".join(lines), min_words=3)
    assert text == 'A good line stays here.\n\nHe said "yes"'
    assert removed == {"no terminal punctuation": 2, "fewer than 3 words": 1, "javascript": 1, "policy": 1}
    untouched = "One more line.\n\n  And one more.\n"
    assert c4_lines(untouched, 3) == (untouched, Counter())


def test_every_record_is_kept_byte_for_byte_or_rejected_with_its_reason(tmp_path, capsys):
    without_vowels = GOOD.replace("e", "1").replace("a", "1").replace("o", "1")
    texts = [GOOD, GOOD.upper().replace(".", "!"), "short", GOOD + " #tag" * 60, without_vowels, "word " * 80, GOOD + "\n" + GOOD]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines()
    options = ["--rules", "gopher-quality", "gopher-repetition", "--rejected", tmp_path / "r.jsonl"]
    assert run(source, output=tmp_path / "o.jsonl", options=options) == 0
    rejected = [json.loads(line) for line in (tmp_path / "r.jsonl").read_bytes().splitlines()]
    assert (tmp_path / "o.jsonl").read_bytes().splitlines() == lines[:2]
    assert [(entry["line"], entry["rule"], entry["record"]) for entry in rejected] == [
        (3, "min_words", json.loads(lines[2])), (4, "max_hash_ratio", json.loads(lines[3])), (5, "min_stop_words", json.loads(lines[4])),
        (6, "min_stop_words", json.loads(lines[5])), (7, "max_duplicate_lines", json.loads(lines[6])),
    ]  # fmt: skip
    assert rejected[0]["why"] == "min_words: 1 is below 50" and rejected[0]["file"] == source
    out = capsys.readouterr().out
    assert "7 documents in: 2 written, 5 rejected, 0 malformed" in out and f"{source}:3: 1 is below 50: short" in out
    counts = read_manifest(tmp_path / "o.jsonl.manifest.json")["counts"]
    assert counts["rejected_documents"] == {"min_words": 1, "max_hash_ratio": 1, "min_stop_words": 2, "max_duplicate_lines": 1}
    assert counts["rejected_bytes"]["min_words"] == len(lines[2])


def test_rules_are_chosen_and_adjusted_one_by_one(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["a b c", "a b c d e", "a b c d e {", ""])
    for options, kept in [
        ([], [0, 1, 2]),  # the default: only what is empty goes
        (["--set", "min_words=4"], [1, 2]),
        (["--rules", "c4", "--without", "min_sentences"], [0, 1, 3]),
        (["--rules", "max_curly_brackets", "--set", "max_characters=5"], [0, 3]),
        (["--rules", "length", "--without", "length"], [0, 1, 2, 3]),
    ]:
        assert run(source, output=tmp_path / "o.jsonl", options=options) == 0
        assert kept_ids(tmp_path / "o.jsonl") == kept, options


def test_c4_lines_change_the_text_and_nothing_else(tmp_path, capsys):
    text = "One good line is here.\nMenu\nAnother good line is here."
    source = write_jsonl(tmp_path / "a.jsonl", [text, "Just one line here.", "Menu"])
    assert run(source, output=tmp_path / "o.jsonl", options=["--c4-lines"]) == 0
    records = [json.loads(line) for line in (tmp_path / "o.jsonl").read_bytes().splitlines()]
    assert records[0] == {"id": 0, "text": "One good line is here.\nAnother good line is here.", "url": "https://site0.example.org/p/0"}
    assert [record["id"] for record in records] == [0, 1]
    out = capsys.readouterr().out
    assert "2 lines removed: no terminal punctuation" in out and "2 written (1 with lines removed), 1 rejected" in out


def test_language(tmp_path):
    german = "Der Hafen war an diesem Morgen ruhig, und die Boote lagen in Reihen an der Mauer."
    source = write_jsonl(tmp_path / "a.jsonl", [GOOD, german, "Le port était calme ce matin-là, et les bateaux dormaient le long du mur."])
    assert run(source, output=tmp_path / "o.jsonl", options=["--language", "de", "fr"]) == 0
    assert kept_ids(tmp_path / "o.jsonl") == [1, 2]


def test_blocklists(tmp_path):
    (tmp_path / "words.txt").write_text("# comment\nspam\n\nbuy now\n")
    (tmp_path / "hosts.txt").write_text("site3.example.org\nhttps://site4.example.org/p/\n")
    texts = ["spammer", "This is SPAM!", "you can buy,\nnow", "fine", "fine", "fine"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ["--blocklist", tmp_path / "words.txt", "--url-blocklist", tmp_path / "hosts.txt"]
    assert run(source, output=tmp_path / "o.jsonl", options=options) == 0
    assert kept_ids(tmp_path / "o.jsonl") == [0, 5]


@pytest.mark.parametrize("url, entry", [
    ("http://example.com", "example.com"), ("https://www.example.com/x?y=1", "example.com"), ("https://a.b.example.com:80/", "example.com"),
    ("example.com", "example.com"), ("https://notexample.com", None), ("https://example.org", None), ("https://other.net/forum/7", "other.net/forum"),
    ("https://other.net/forums", None), ("https://other.net", None), ("", None), ("http://[", None),
])  # fmt: skip
def test_addresses(url, entry):
    assert Addresses(["example.com", "other.net/forum"]).found(url) == entry


@given(strategies.lists(strategies.sampled_from("abc"), max_size=12))
def test_phrases_are_found_whole(words):
    text = " ".join(words)
    expected = any(re.search(rf"\b{phrase}\b", text) for phrase in ("a b", "c c a"))
    assert (Phrases(["A  b", "c, c a"]).found(text) is not None) == expected


def test_result_does_not_depend_on_workers_and_zst_holds_the_same(tmp_path, monkeypatch):
    texts = [GOOD[i:] + " {" * (i % 3 == 0) for i in range(200)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    options = ["--rules", "gopher-quality", "c4", "--set", "min_sentences=2", "--rejected", tmp_path / "r1.jsonl"]
    assert run(source, output=tmp_path / "one.jsonl", options=options) == 0
    monkeypatch.setattr("data_tools.reader.CHUNK_BYTES", 4096)
    options[-1] = tmp_path / "r2.jsonl"
    assert run(source, output=tmp_path / "two.jsonl.zst", options=[*options, "--workers", "2"]) == 0
    with zstandard.open(tmp_path / "two.jsonl.zst") as file:
        assert file.read() == (tmp_path / "one.jsonl").read_bytes()
    assert (tmp_path / "r1.jsonl").read_bytes() == (tmp_path / "r2.jsonl").read_bytes()
    assert 50 < len(kept_ids(tmp_path / "one.jsonl")) < 150


def test_parquet_rows_are_records(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [GOOD, None, "short"], "n": [1, 2, 3], "tags": [["a"], [], None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert run(tmp_path / "a.parquet", output=tmp_path / "o.jsonl", options=["--rules", "min_words"]) == 1
    assert run(tmp_path / "a.parquet", output=tmp_path / "o.jsonl", options=["--rules", "min_words", "--on-error", "skip"]) == 0
    assert [json.loads(line) for line in (tmp_path / "o.jsonl").read_bytes().splitlines()] == [{"text": GOOD, "n": 1, "tags": ["a"]}]


def test_parquet_rows_that_are_no_utf8(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    bounds, joined = np.array([0, 3, 6, 9], np.int32).tobytes(), b"onex\xffytwo"
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, pyarrow.py_buffer(bounds), pyarrow.py_buffer(joined)])
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"title": column, "text": ["a", "b", "c"]}), tmp_path / "b.parquet")
    assert run(tmp_path / "a.parquet", output=tmp_path / "o.jsonl", options=["--on-error", "skip"]) == 0
    assert "a.parquet:2: not UTF-8: byte 0xff at offset 1" in capsys.readouterr().err
    assert [json.loads(line)["n"] for line in (tmp_path / "o.jsonl").read_bytes().splitlines()] == [1, 3]
    assert run(tmp_path / "b.parquet", output=tmp_path / "o.jsonl") == 0  # of another column what JSON can hold is kept
    assert [json.loads(line)["title"] for line in (tmp_path / "o.jsonl").read_bytes().splitlines()] == ["one", "x\ufffdy", "two"]
    lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 1, 2, 3], pyarrow.int32()), column)
    pyarrow.parquet.write_table(pyarrow.table({"tags": lists, "text": ["a", "b", "c"]}), tmp_path / "c.parquet")
    assert run(tmp_path / "c.parquet", output=tmp_path / "o.jsonl") == 1
    assert "c.parquet: column 'tags', list<element: string>, holds text that is no UTF-8" in capsys.readouterr().err


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert run(source, output=tmp_path / "o.jsonl", options=["--dry-run", "--rejected", tmp_path / "r.jsonl", "--set", "min_words=2"]) == 0
    assert "0 written, 1 rejected" in capsys.readouterr().out and os.listdir(tmp_path) == ["a.jsonl"]


def test_list_rules_needs_no_other_option(capsys):
    assert filter_tool.main(["--list-rules"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(RULES) and "max_duplicate_10grams" in out


@pytest.mark.parametrize("options, code, words", [
    (["--rules", "gofer-quality"], 2, "did you mean 'gopher-quality'"),
    (["--set", "min_word=3"], 2, "did you mean 'min_words'"),
    (["--set", "min_words"], 2, "expected NAME=NUMBER"),
    (["--language", "xx"], 2, "--language xx: py3langid knows"),
    (["--blocklist", "none.txt"], 1, "none.txt"),
    (["--blocklist", "empty.txt"], 1, "empty.txt: no entries"),
    (["--blocklist", "signs.txt"], 1, "'!!' has no letter or digit"),
    (["--rejected", "o.jsonl"], 2, "already the name"),
    (["--output", "o.parquet"], 2, "must end in one of"),
    (["--json-key", "body"], 1, "no key 'body'"),
], ids=lambda value: str(value))  # fmt: skip
def test_mistakes_of_users(tmp_path, capsys, monkeypatch, options, code, words):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "signs.txt").write_text("!!\n")
    assert run("a.jsonl", output="o.jsonl", options=options) == code
    assert words in capsys.readouterr().err and sorted(os.listdir(tmp_path)) == ["a.jsonl", "empty.txt", "signs.txt"]


def test_without_the_language_library_the_cure_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(DataError, match="needs py3langid: pip install"):
        filter_tool._identifier(["en"])


def test_without_zstandard_nothing_is_begun(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    source = write_jsonl(tmp_path / "a.jsonl", ["x"])
    assert run(source, output=tmp_path / "o.jsonl.zst") == 1
    assert "needs zstandard: pip install" in capsys.readouterr().err and os.listdir(tmp_path) == ["a.jsonl"]


def test_repeats_of_shorter_ngrams_are_reused(monkeypatch):
    """A text that repeats no 2-gram is hashed for no longer one."""
    calls = []
    monkeypatch.setattr(quality, "_counted", lambda hashes: calls.append(len(hashes)))
    document = Document("a b c d e f g h i j k l")
    assert [rule.measure(document) for rule in RULES if "gram" in rule.name] == [0.0] * 9 and calls == [11]
