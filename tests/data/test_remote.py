"""Corpora behind fsspec: the same tokens as local ones from a memory store and from a web server, also one that fails in every way."""

import http.server
import os
import signal
import threading

import fsspec
import numpy as np
import pytest
import torch
from training import merged

from engine.config import validate
from engine.data import remote
from engine.data.blend import build_pretraining
from engine.data.indexed import DataError, IndexedCorpus, IndexedWriter
from engine.data.pretraining import GPTSamples
from engine.data.storage import open_corpus
from engine.data.text import datasets

BLOCK = 512  # bytes: many blocks in small corpora


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0)
    monkeypatch.setattr(remote, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(remote.open_remote, "__defaults__", (BLOCK,))


def write(prefix, lengths, seed=0):
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(random.integers(0, 1000, size=int(length)))
    return str(prefix)


def upload(prefix, url):
    """Files of a local corpus into the memory store."""
    filesystem = fsspec.filesystem("memory")
    for kind in (".idx", ".bin"):
        with open(prefix + kind, "rb") as file:
            filesystem.pipe_file(url + kind, file.read())
    return url


@pytest.fixture
def memory(tmp_path):
    """A prefix of the memory store that no other test uses, emptied at the end."""
    root = f"memory://{tmp_path.name}-{os.getpid()}"
    yield root
    fsspec.filesystem("memory").rm(root, recursive=True)


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder with ETag and Range. `answers` holds what is done to the next GETs of .bin: None, or a word of Handler.do_GET."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.answers, self.ranges, self.lock = folder, [], [], threading.Lock()
        self.num_deaf = 0  # requests that get no answer at all
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that hung up


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.server.folder / self.path.lstrip("/")
        if self.server.num_deaf > 0:
            self.server.num_deaf -= 1
            self.close_connection = True
            return
        if not path.exists():
            return self.send_error(404)
        data, tag = path.read_bytes(), f'"{path.stat().st_mtime_ns:x}"'
        with self.server.lock:
            how = self.server.answers.pop(0) if with_body and path.suffix == ".bin" and self.server.answers else None
            if with_body and path.suffix == ".bin":
                self.server.ranges.append(self.headers["Range"])
        if how == "503" or how == "403":
            return self.send_error(int(how))
        begin, end = 0, len(data)
        asked = self.headers["Range"] if how != "whole" else None
        if asked:
            begin, last = map(int, asked.removeprefix("bytes=").split("-"))
            end = min(last + 1, len(data))
        if how == "short":
            end -= 7
        self.send_response(206 if asked else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if not with_body:
            return
        if how == "hang up":
            self.wfile.write(data[begin : end - 7])
            self.wfile.flush()
            self.close_connection = True
            return
        if how == "rewrite":
            os.utime(path, ns=(1, 1))
        self.wfile.write(data[begin:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    running = Server(tmp_path)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def samples_of(corpus, num_documents=60):
    return GPTSamples(corpus, np.arange(num_documents), 200, 24, 1, "train")


LENGTHS = np.random.default_rng(8).integers(0, 90, size=60)


# --- the same tokens


@pytest.mark.parametrize("storage", ["mmap", "pread"])
def test_a_memory_store_gives_what_the_disk_gives(tmp_path, memory, storage):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    corpus = open_corpus(upload(local.prefix, f"{memory}/c"), storage, tmp_path / "cache")
    assert corpus.prefix == f"{memory}/c" and len(corpus) == 60 and corpus.num_documents == 60
    assert all(np.array_equal(corpus.get(i), local.get(i)) for i in (7, 3, 59))
    numbers = np.random.default_rng(1).permutation(200)
    ours, expected = samples_of(corpus), samples_of(local)
    ours.announce(numbers[:50])
    for a, b in zip(ours.gather(numbers, segments=True), expected.gather(numbers, segments=True)):
        assert np.array_equal(a, b)
    assert corpus.max_token() == local.max_token()
    assert corpus._blocks.want(np.array([[0, corpus.num_tokens * 2]])) == []  # what was checked once is not asked about again


def test_a_web_server_gives_what_the_disk_gives_and_is_asked_for_each_block_once(tmp_path, server):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    corpus = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    assert server.ranges == []  # opening reads nothing of the .bin
    first, everything = np.arange(3), np.arange(200)
    assert np.array_equal(samples_of(corpus).gather(first), samples_of(local).gather(first))
    some = len(server.ranges)
    assert np.array_equal(samples_of(corpus).gather(everything), samples_of(local).gather(everything))
    begins = [int(r.removeprefix("bytes=").split("-")[0]) for r in server.ranges]
    ends = [int(r.split("-")[1]) + 1 for r in server.ranges]
    assert 0 < some and sum(ends) - sum(begins) == os.path.getsize(local.prefix + ".bin")  # no byte twice
    # The next run finds all of it on the disk.
    again = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    assert np.array_equal(samples_of(again).gather(everything), samples_of(local).gather(everything))
    assert len(server.ranges) == len(begins)


def test_blends_and_splits_take_urls(tmp_path, memory):
    local = [write(tmp_path / f"c{k}", [40] * 50, seed=k) for k in range(3)]
    urls = [upload(prefix, f"{memory}/c{k}") for k, prefix in enumerate(local)]
    for items in (lambda prefixes: prefixes, lambda prefixes: [x for pair in zip(("1", "2", "3"), prefixes) for x in pair]):
        a = build_pretraining(items(local), "90,10", 16, (100, 10, 0), 1, tmp_path / "a")
        b = build_pretraining(items(urls), "90,10", 16, (100, 10, 0), 1, tmp_path / "b")
        for x, y in zip(a[:2], b[:2]):
            expected, tokens = x.gather(np.arange(len(x))), np.zeros((len(y), 17), dtype=np.int64)
            assert np.array_equal(y.gather(np.arange(len(y))), expected)
            y.gather_into(np.arange(len(y)), tokens)
            assert np.array_equal(tokens, expected)


def test_a_configuration_with_phases_takes_urls_and_storage(raw_run, corpus, memory, tmp_path):
    seq_len = raw_run["train"]["seq_len"]
    urls = {name: upload(corpus[name], f"{memory}/{name}") for name in ("train", "valid")}

    def read(prefixes, **data):
        phases = [{"after_tokens": 8 * seq_len, "train": ["1", prefixes["valid"]]}]
        raw = merged(raw_run, {"data": {"train": ["1", prefixes["train"]], "valid": {"held_out": [prefixes["valid"]]}, "phases": phases, **data}})
        train, valid = datasets(validate(raw), 24, 4)
        return [train.batch(np.arange(24))["tokens"], valid["held_out"].batch(np.arange(4))["tokens"]]

    expected = read(corpus)
    for options in (dict(prefixes=urls, cache_dir=str(tmp_path / "cache")), dict(prefixes=corpus, storage="pread")):
        assert all(torch.equal(a, b) for a, b in zip(read(**options), expected))
    assert list((tmp_path / "cache" / "remote").iterdir())


def test_several_requests_run_at_once(tmp_path, memory, monkeypatch):
    """Each request waits for three others: with fewer at a time the barrier breaks."""
    local = IndexedCorpus(write(tmp_path / "c", [256] * 40))
    corpus = open_corpus(upload(local.prefix, f"{memory}/c"), cache_dir=tmp_path / "cache")
    barrier, cat = threading.Barrier(4, timeout=20), fsspec.filesystem("memory").cat_file
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda self, *a, **k: (barrier.wait(), cat(*a, **k))[1])
    monkeypatch.setattr(remote, "RANGE_BYTES", BLOCK)
    corpus._blocks.ensure(np.array([[0, 8 * BLOCK]]))
    assert np.array_equal(corpus.get(5), local.get(5))


# --- a cache that lies


def test_holes_and_damage_in_the_cache_are_fetched_again(tmp_path, server):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    samples_of(open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")).gather(np.arange(200))
    (kept,) = (tmp_path / "cache").glob("remote/*/corpus.bin")
    with open(kept, "r+b") as file:  # a power cut: the checksum reached the disk, the block did not
        file.seek(BLOCK)
        file.write(bytes(BLOCK))
    server.ranges.clear()
    again = samples_of(open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")).gather(np.arange(200))
    assert np.array_equal(again, samples_of(local).gather(np.arange(200)))
    assert server.ranges == [f"bytes={BLOCK}-{2 * BLOCK - 1}"]


def test_a_corpus_written_anew_meets_no_old_blocks(tmp_path, memory):
    upload(write(tmp_path / "old", LENGTHS, seed=1), f"{memory}/c")
    samples_of(open_corpus(f"{memory}/c", cache_dir=tmp_path / "cache")).gather(np.arange(200))
    write(tmp_path / "new", LENGTHS, seed=2)  # the same lengths: only the .bin differs, not even in size
    fsspec.filesystem("memory").pipe_file(f"{memory}/c.bin", (tmp_path / "new.bin").read_bytes())
    new = samples_of(open_corpus(f"{memory}/c", cache_dir=tmp_path / "cache")).gather(np.arange(200))
    assert np.array_equal(new, samples_of(IndexedCorpus(tmp_path / "new")).gather(np.arange(200)))


def reads_in_a_child(samples, expected) -> bool:
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for ever fails
        try:
            os._exit(0 if np.array_equal(samples.gather(np.arange(200)), expected) else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def test_a_forked_child_reads_on(tmp_path, server):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    ours = samples_of(open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache"))
    ours.gather(np.arange(2))
    assert reads_in_a_child(ours, samples_of(local).gather(np.arange(200)))


def test_a_forked_child_does_not_wait_for_its_parents_requests(tmp_path, memory, monkeypatch):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    ours = samples_of(open_corpus(upload(local.prefix, f"{memory}/c"), cache_dir=tmp_path / "cache"))
    gate, parent, cat = threading.Event(), os.getpid(), fsspec.filesystem("memory").cat_file
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", lambda self, *a, **k: (os.getpid() == parent and gate.wait(), cat(*a, **k))[1])
    ours.announce(np.arange(200))
    try:
        assert reads_in_a_child(ours, samples_of(local).gather(np.arange(200)))
    finally:
        gate.set()


# --- a server that fails


@pytest.mark.parametrize("how", ["503", "short", "hang up", "whole"])
def test_a_failing_answer_is_asked_for_again(tmp_path, server, how):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    corpus = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    server.answers[:] = [how] * 5
    assert np.array_equal(corpus.get(7), local.get(7))
    assert server.answers == [] and len(server.ranges) == 6


@pytest.mark.parametrize(
    "how, words",
    [
        ("503", r"cannot be read, 6 tries failed, the last with: .*503.*; check the connection"),
        ("short", r"cannot be read, 6 tries failed, the last with: OSError: bytes \d+ to \d+ were asked for and \d+ bytes came;"),
        ("whole", r"cannot be read, 6 tries failed, .* bytes came; the server knows no ranges; check"),
    ],
    ids=["503", "short", "no ranges"],
)
def test_a_server_that_goes_on_failing_is_one_clear_error(tmp_path, server, how, words):
    write(tmp_path / "c", LENGTHS)
    corpus = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    server.answers[:] = [how] * 6
    with pytest.raises(DataError, match=rf"http://127.0.0.1:\d+/c.bin: {words}"):
        corpus.get(7)
    server.answers.clear()
    assert corpus.get(7).size == LENGTHS[7]  # the server is back: nothing wrong was kept


def test_a_server_that_hangs_up_on_everything_is_asked_again(tmp_path, server):
    local = IndexedCorpus(write(tmp_path / "c", LENGTHS))
    server.num_deaf = 4  # fsspec takes them for a missing file
    corpus = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    assert server.num_deaf == 0 and np.array_equal(corpus.get(7), local.get(7))
    server.num_deaf = 10**6
    with pytest.raises(DataError, match=r"c\.idx: cannot be read, 6 tries failed, the last with: .*, because of ServerDisconnectedError: .*; check the connection"):
        open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")


def test_a_summary_fetches_nothing_of_the_bin(tmp_path, server, capsys, monkeypatch):
    from data_tools import peek

    write(tmp_path / "c", LENGTHS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert peek.main([f"{server.url}/c"]) == 0
    assert f"{len(LENGTHS)} documents, {len(LENGTHS)} sequences, {sum(LENGTHS)} tokens, uint16\n" == capsys.readouterr().out
    assert not any(next((tmp_path / "user").rglob("corpus.blocks")).read_bytes())


def test_a_refusal_is_final(tmp_path, server):
    write(tmp_path / "c", LENGTHS)
    corpus = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    server.answers[:] = ["403"] * 2
    with pytest.raises(DataError, match="c.bin: cannot be read: .*403.*check the prefix and your rights"):
        corpus.get(7)
    assert server.answers == ["403"]


def test_a_file_that_changes_under_us_is_an_error_and_nothing_is_kept(tmp_path, server):
    write(tmp_path / "c", LENGTHS)
    corpus = open_corpus(f"{server.url}/c", cache_dir=tmp_path / "cache")
    server.answers[:] = ["rewrite"]
    with pytest.raises(DataError, match=r"c\.bin: the file was written anew while it was in use"):
        corpus.get(7)
    (marks,) = (tmp_path / "cache").glob("remote/*/corpus.blocks")
    assert not any(marks.read_bytes())


def test_what_cannot_be_opened(tmp_path, memory, server):
    upload(write(tmp_path / "c", LENGTHS), f"{memory}/c")
    for prefix, words in {
        f"{memory}/nothing": "nothing.idx: cannot be read: FileNotFoundError.*PREFIX.idx and PREFIX.bin",
        f"{server.url}/nothing": "nothing.idx: cannot be read: FileNotFoundError",
        f"{memory}/c.idx": f"give the prefix without .idx: {memory}/c$",
        "nosuchstore://b/c": "nosuchstore://b/c.idx: Protocol not known: nosuchstore.*s3://bucket/web",
    }.items():
        with pytest.raises(DataError, match=words):
            open_corpus(prefix, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="cannot write the cache of .*choose a writable data.cache_dir"):
        open_corpus(f"{memory}/c", cache_dir=tmp_path / "c.idx")


def test_a_damaged_remote_index_names_the_address(tmp_path, memory):
    upload(write(tmp_path / "c", LENGTHS), f"{memory}/c")
    fsspec.filesystem("memory").pipe_file(f"{memory}/c.bin", b"12")
    with pytest.raises(DataError, match=rf"{memory}/c: .*corpus.bin: file size is 2, expected"):
        open_corpus(f"{memory}/c", cache_dir=tmp_path / "cache")
