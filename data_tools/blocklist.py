"""Words, phrases and web addresses that a document may not have.

In: files with one entry per line; blank lines and lines that begin with # say nothing. Out: the first entry that a document
holds. Words and phrases are compared whole, in lower case, with white space and punctuation between words set aside. An address
blocks a host with its subdomains (example.com), or what begins like it (example.com/forum).
Left out: patterns; words inside of words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from engine.data.indexed import DataError

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def read_entries(paths: Sequence[str]) -> list[str]:
    """The entries of all files. Raises DataError for files that are not UTF-8 or hold none."""
    entries = []
    for path in paths:
        try:
            with open(path, encoding="utf-8-sig") as file:
                found = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; a blocklist is a text with one entry per line") from None
        if not found:
            raise DataError(f"{path}: no entries; a blocklist is a text with one word, phrase or address per line")
        entries += found
    return entries


class Phrases:
    """Words and phrases; found() is the first of them in a text."""

    def __init__(self, entries: Sequence[str]) -> None:
        split = [(entry, tuple(WORD.findall(entry.lower()))) for entry in entries]
        without = [entry for entry, words in split if not words]
        if without:
            raise DataError(f"blocklist entry {without[0]!r} has no letter or digit, so no word can equal it; remove it")
        self._names = {words: entry for entry, words in split}
        self._lengths = sorted({len(words) for words in self._names})

    def found(self, text: str) -> str | None:
        words = WORD.findall(text.lower())
        for length in self._lengths:
            common = self._names.keys() & set(zip(*(words[k:] for k in range(length))))
            if common:
                return self._names[min(common)]
        return None


class Addresses:
    """Hosts and beginnings of addresses; found() is the entry that blocks an address."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._entries = {_bare(entry): entry for entry in entries}

    def found(self, url: str) -> str | None:
        host, _, path = _bare(url).partition("/")
        parts = host.split(".")
        for begin in range(len(parts)):
            parent = ".".join(parts[begin:])
            steps = path.split("/")
            for end in range(len(steps) + 1):
                entry = self._entries.get("/".join([parent, *steps[:end]]))
                if entry is not None:
                    return entry
        return None


def _bare(url: str) -> str:
    """host/path in lower case, without scheme, user, port, www. and a closing slash."""
    try:
        parts = urlsplit(url.strip() if "//" in url else f"//{url.strip()}")
        host = (parts.hostname or "").removeprefix("www.")
    except ValueError:  # a broken port or bracket: the text as it stands is the best there is
        return url.strip().lower()
    return (host + parts.path.rstrip("/")).lower()
