"""Programs in answers: honest ones pass their tests, cheats do not, and nothing of any is left on the machine."""

import os
import sysconfig
import tempfile
from pathlib import Path

import psutil
import pytest

from engine.online_sections import RewardPart
from engine.rewards import Item, RewardError, Scorer, programs
from engine.rewards.programs import Sandbox, program_of


@pytest.fixture(scope="module")
def is_closed():
    if problem := programs.probe():
        pytest.skip(f"no namespaces here: {problem}")
    return True


def part(**options):
    return RewardPart(**{"kind": "code", "key": "tests", "seconds": 8, "memory_mib": 256, **options})


def scores(answers_and_tests, **options):
    with Scorer([part(**options)]) as scorer:
        return [row["code"] for row in scorer.score([Item("Write it.", answer, {"tests": tests}) for answer, tests in answers_and_tests])]


# --- honest programs --------------------------------------------------------------------------------------------------

HONEST = {
    "function": ("def add(a, b): return a + b", "assert add(1, 2) == 3\nassert add('a', b='b') == 'ab'"),
    "fenced": ("Here it is:\n```python\ndef bad(): pass\n```\nno, better:\n```py\ndef one():\n    return 1\n```\nDone.", "assert one() == 1"),
    "class": ("class Stack:\n    def __init__(self, *items): self.items = list(items)\n    def push(self, x): self.items.append(x); return self\n"
              "    def __len__(self): return len(self.items)\n    def __getitem__(self, k): return self.items[k]",
              "s = Stack(1)\ns.push(2).push((3, None))\nassert len(s) == 3 and s[2] == (3, None) and s.items == [1, 2, (3, None)]\n"
              "s.items = []\nassert not s"),
    "in place": ("def fix(xs, d, s): xs.sort(); d['k'] = xs[0]; s.add(7)",
                 "xs, d, s = [3, 1, 2], {}, {1}\nfix(xs, d, s=s)\nassert xs == [1, 2, 3] and d == {'k': 1} and s == {1, 7}"),
    "raises": ("class Own(KeyError): pass\ndef f(x):\n    if x: raise ValueError('no')\n    raise Own('x')",
               "for x, kind in ((1, ValueError), (0, KeyError)):\n    try: f(x)\n    except kind: continue\n    assert False"),
    "types": ("import collections, enum\nclass E(enum.IntEnum): A = 3\nP = collections.namedtuple('P', 'x y')\n"
              "def f(): return [None, True, 2**70, -1.5, 'é\\ud800', b'\\x00', 1j, (1,), {2}, frozenset({3}), {(1, 2): [4]}, E.A, P(1, 2), "
              "collections.Counter('aab'), float('inf')]",
              "assert f() == [None, True, 2**70, -1.5, 'é\\ud800', b'\\x00', 1j, (1,), {2}, frozenset({3}), {(1, 2): [4]}, 3, (1, 2), "
              "{'a': 2, 'b': 1}, float('inf')]\nassert type(f()[1]) is bool and type(f()[7]) is tuple"),
    "long integer": ("import math\nf = math.factorial", "import math\nassert f(3000) == math.factorial(3000)"),
    "generator": ("def count(n):\n    for k in range(n): yield k", "assert list(count(4)) == [0, 1, 2, 3]\nassert next(iter(count(1))) == 0"),
    "numpy": ("import numpy as np\ndef f(n): return np.arange(n) / 2", "assert f(3) == [0.0, 0.5, 1.0]"),
    "value": ("ANSWER = 42\nif __name__ == '__main__': raise SystemExit", "assert ANSWER == 42"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 0", "assert P(1) == P(1) and P(1) != P(2) and P(5).x == 5"),
    "script": ("n = int(input())\nprint(n * 2, end=' ')", [["3\n", "6\n"], ["-4", "-8"]]),
    "lines": ("import sys\nfor line in sys.stdin: print(line.strip()[::-1], '  ')", [["ab\ncd\n", "ba\ndc"], ["", ""]]),
}
WRONG = {
    "value": ("def add(a, b): return a - b", "assert add(1, 2) == 3"),
    "second test": ("def f(x): return 1", "assert f(1) == 1\nassert f(2) == 2"),
    "no such name": ("def g(): return 1", "assert f() == 1"),
    "no Python": ("def f(:", "assert f() == 1"),
    "bool of a type": ("def f(): return (1, 2)", "assert f() == [1, 2]"),
    "empty": ("", "assert f() == 1"),
    "second pair": ("print(6)", [["3", "6"], ["4", "8"]]),
    "fails afterwards": ("print(6)\nraise ValueError", [["3", "6"]]),
    "exit code": ("print(6)\nimport sys\nsys.exit(3)", [["3", "6"]]),
    "other lines": ("print('6\\n7')", [["3", "6 7"]]),
}


def test_honest_programs_pass(is_closed):
    assert dict(zip(HONEST, scores(HONEST.values()))) == dict.fromkeys(HONEST, 1.0)


def test_wrong_programs_do_not(is_closed):
    assert dict(zip(WRONG, scores(WRONG.values()))) == dict.fromkeys(WRONG, 0.0)


def test_the_last_block_is_the_program():
    assert program_of("x = 1") == "x = 1"
    assert program_of("```python\na\n```\ntext\n  ```\nb\nc\n  ```\n") == "b\nc\n"
    assert program_of("```python\nnever closed") == "```python\nnever closed"


# --- cheats -----------------------------------------------------------------------------------------------------------

EVERYWHERE = "import os\nfor fd in range(64):\n    for text in (b'{\"passed\": true}', b'{\"value\": true, \"args\": [[], {\"dict\": []}]}\\n'):\n" \
             "        try: os.write(fd, text)\n        except OSError: pass\n"
CHEATS = {
    "prints": "print('passed')\nprint('{\"passed\": true}')\ndef f(x): return 0",
    "os._exit": "import os\nos._exit(0)",
    "os._exit in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "SystemExit in the call": "def f(x): raise SystemExit(0)",
    "kills": "import os, signal\nfor pid in (1, 2, 0, -1, os.getppid()):\n    try: os.kill(pid, signal.SIGKILL)\n"
             "    except OSError: pass\ndef f(x): return 0",
    "equal to all": "class A:\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef f(x): return A()",
    "an int equal to all": "class A(int):\n    __eq__ = lambda *_: True\n    __hash__ = int.__hash__\ndef f(x): return A(0)",
    "a list equal to all": "class A(list):\n    __eq__ = lambda *_: True\ndef f(x): return A()",
    "a class pretended": "class A:\n    __class__ = int\n    __eq__ = __lt__ = __le__ = __sub__ = __rsub__ = __abs__ = lambda *_: "
                         "True\ndef f(x): return A()",
    "builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.abs = lambda x: 0\nbuiltins.all = lambda x: True\ndef f(x): return 0",
    "names of builtins": "def abs(x): return 0\ndef all(x): return True\ndef range(*x): return []\nclass AssertionError: pass\ndef f(x): return 0",
    "names of modules": "class math:\n    isclose = lambda *_: True\ndef f(x): return 0",
    "hidden names": "__builtins__ = {}\n__name__ = 'x'\n__debug__x = 1\ndef f(x): return 0",
    "frames": "import gc, sys\nfor o in gc.get_objects():\n    if isinstance(o, dict):\n        for k in list(o):\n"
              "            if isinstance(k, str) and k in ('passed', 'failed', 'tests'): o[k] = True\nframe = sys._getframe()\nwhile frame:\n"
              "    frame.f_globals['guarded'] = lambda act: {'value': {'passed': True}}\n    frame = frame.f_back\ndef f(x): return 0",
    "descriptors": EVERYWHERE + "def f(x): return 0",
    "descriptors in the call": "def f(x):\n" + "".join(f"    {line}\n" for line in EVERYWHERE.splitlines()) + "    return 0",
    "files": "import glob, os\nfound = [open(p).read() for p in glob.glob('/tmp/**', recursive=True) + glob.glob('/proc/*/cmdline') if "
             "os.path.isfile(p)]\n"
             "def f(x): return int(found[0])",
    "forged reply": "import json, sys\nmain = sys.modules['__main__']\n"
                    "main.json.dumps = lambda m: '{\"value\": {\"object\": 1}, \"args\": [[], {\"dict\": []}]}'\n"
                    "def f(x): return 0",
    "forged names": "import sys, json\nplain = json.dumps\nsys.modules['__main__'].json.dumps = lambda m: plain({'value': "
                    "{'__builtins__': {'dict': []}, "
                    "'abs': 0, 'f': 0, 'x y': 1}})\ndef f(x): return 0",
    "deep reply": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "long reply": "def f(x): return 'x' * 10**8",
    "argument turned": "def f(x): return x",
    "truth": "class A:\n    __bool__ = lambda s: True\n    __len__ = lambda s: 1\n    __iter__ = lambda s: iter(())\ndef f(x): return A()",
    "settrace": "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = lambda *a: None\nimport atexit\natexit.register(print)\n"
                "def f(x): return 0",
}
TESTS = "import math\nassert abs(f(2.0) - 5.0) < 1e-6\nassert math.isclose(f(3.0), 10.0) and all(f(k) == k * k + 1 for k in range(5))"


def test_cheats_score_nothing(is_closed):
    sources = {"honest": "def f(x): return x * x + 1", **CHEATS}
    found = dict(zip(sources, scores([(source, TESTS) for source in sources.values()])))
    assert found == {"honest": 1.0, **dict.fromkeys(CHEATS, 0.0)}


def test_cheats_score_nothing_where_any_equality_is_asked(is_closed):
    found = dict(zip(CHEATS, scores([(source, "assert f(7) == 50") for source in CHEATS.values()])))
    assert found == dict.fromkeys(CHEATS, 0.0)


def test_an_object_that_says_yes_is_no_value(is_closed):
    yes = ("class A:\n    __eq__ = __ne__ = __contains__ = __lt__ = lambda *_: True\n    __iter__ = lambda s: iter(())\n    __hash__ = None\n"
           "def f(): return A()")
    for test in ("assert f() == 3", "assert 3 == f()", "assert f() < 3", "assert 3 in f()", "assert f() in [3]", "assert [f()] == [3]",
                 "assert isinstance(f(), int)"):
        assert scores([(yes, test)]) == [0.0], test


def test_names_that_tests_rely_on_are_their_own(is_closed):
    wrong = "def f(x): return 0\n"
    pairs = [(wrong + "def abs(x): return 0", "assert abs(f(2) - 5) < 1e-6"),
             (wrong + "def all(x): return True", "assert all(f(k) == k for k in (1, 2))"),
             (wrong + "def range(*n): return []", "for k in range(1, 3): assert f(k) == k"), (wrong + "AssertionError = print", "assert f(1) == 1"),
             (wrong + "class math:\n    isclose = lambda *_: True", "assert math.isclose(f(2), 5)"),
             (wrong + "__builtins__ = __import__ = 3", "assert f(1)")]
    assert scores(pairs) == [0.0] * len(pairs)


# --- the sandbox ------------------------------------------------------------------------------------------------------


def printed(source, **options):
    """What a script in a closed sandbox prints."""
    with tempfile.TemporaryFile() as stdout:
        with Sandbox(8, 256, **options)._process({"role": "main", "source": source}, [], stdout=stdout) as process:
            process.wait(8)
        stdout.seek(0)
        return stdout.read().decode()


def test_a_program_is_nobody_and_sees_nothing(is_closed, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("SECRET", "secret")
    found = printed(f"""
import os, socket, ctypes
def attempt(act):
    try: return act() or 'done'
    except Exception as error: return type(error).__name__
print(os.getuid(), os.getgid(), os.getgroups(), os.getpid(), os.getcwd(), os.listdir('/tmp'))
print(sorted(os.environ))
print(attempt(lambda: open({str(tmp_path / 'secret')!r}).read()), attempt(lambda: os.listdir('/proc')), attempt(lambda: os.listdir('/etc')))
print(attempt(lambda: open('/usr/x', 'w')), attempt(lambda: open(os.__file__, 'a')), attempt(lambda: open('/tmp/x', 'w').write('')))
print(attempt(lambda: socket.create_connection(('127.0.0.1', 9), 1)), socket.if_nameindex())
print(attempt(lambda: os.setuid(0)), attempt(lambda: os.chroot('/tmp')), ctypes.CDLL(None).unshare(0x10000000), attempt(lambda: os.kill(2, 9)))
print(attempt(lambda: open('/tmp/big', 'wb').write(bytes(17 << 20))), attempt(lambda: bytearray(400 << 20)))
print(open('/tmp/x', 'w').fileno(), [fd for fd in range(3, 64) if attempt(lambda: os.fstat(fd)) != 'OSError'])
""").splitlines()
    packages = Path(sysconfig.get_path("purelib"))      # visible, read only, and maybe below /tmp
    in_tmp = [packages.relative_to("/tmp").parts[0]] if packages.is_relative_to("/tmp") else []
    assert found[0] == f"65534 65534 [] 1 /tmp {in_tmp}"
    assert found[1] == str(sorted(programs.ENVIRONMENT)) or found[1] == str(sorted([*programs.ENVIRONMENT, "LC_CTYPE"]))
    assert found[2] == "FileNotFoundError FileNotFoundError FileNotFoundError"
    assert found[3] in ("OSError OSError done", "OSError PermissionError done")
    assert found[4] in ("OSError [(1, 'lo')]", "ConnectionRefusedError [(1, 'lo')]")
    assert found[5].split()[1:] == ["PermissionError", "-1", "ProcessLookupError"] and found[5].split()[0] in ("PermissionError", "OSError")
    assert found[6] == "OSError MemoryError"
    assert found[7] == "3 []"


def test_processes_and_threads_are_refused(is_closed):
    with open("/proc/self/status") as file:
        capabilities = int(next(line for line in file if line.startswith("CapEff")).split()[1], 16)
    if os.geteuid() == 0 and not capabilities >> 21 & 1:
        pytest.skip("root without CAP_SYS_ADMIN: the kernel exempts it from the limit of processes")
    found = printed("import os, threading\nfor act in (os.fork, threading.Thread(target=print).start):\n    try: act(); print('done')\n"
                    "    except (OSError, RuntimeError): print('refused')")
    assert found == "refused\nrefused\n"


def test_what_takes_too_long_is_ended_and_leaves_nothing(is_closed, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(programs.ENVIRONMENT, "MARK", str(tmp_path))
    ignores = "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
    loops = ["while True: pass", "import time\ntime.sleep(1000)", ignores + "while True: time.sleep(1)", "while True: print('x' * 10**6)",
             "import os\nos.setsid()\nwhile True: pass", "x = []\nwhile True: x.append(bytearray(10**6))"]
    assert scores([(loop, tests) for loop in loops for tests in ("assert True is False", [["", ""]])], seconds=0.5) == [0.0] * 2 * len(loops)
    left = [process for process in psutil.process_iter(["environ"]) if (process.info["environ"] or {}).get("MARK") == str(tmp_path)]
    assert not left and not list(tmp_path.iterdir())


def test_runs_know_nothing_of_each_other(is_closed):
    script = "import os\nprint(os.path.exists('/tmp/x'))\nopen('/tmp/x', 'w')"
    assert scores([(script, [["", "False"]] * 3)] * 3, workers=3) == [1.0] * 3


def test_order_is_kept_when_several_run_at_once(is_closed):
    pairs = [(f"import time\ntime.sleep({0.3 if k % 2 else 0})\ndef f(): return {k}", f"assert f() == {k if k % 3 else -1}") for k in range(7)]
    assert scores(pairs, workers=3) == [float(k % 3 > 0) for k in range(7)]


def test_one_time_for_all_pairs(is_closed):
    slow = ("import time\ntime.sleep(0.4)\nprint(1)", [["", "1"]] * 4)
    assert scores([slow], seconds=1.0) == [0.0]
    assert scores([slow], seconds=30) == [1.0]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tests, sentence", [
    ("assert ((", "tests: the tests are no Python ('(' was never closed"), ("", "tests: it holds no tests"), (None, "tests: it holds no tests"),
    ([], "tests: it holds no tests"), ([["1"]], "tests: it holds no tests"), ([[1, "1"]], "tests: it holds no tests")])
def test_tests_that_are_none(is_closed, tests, sentence):
    with Scorer([part(name="unit")]) as scorer, pytest.raises(RewardError) as error:
        scorer.score([Item("Fine.", "x = 1", {"tests": "assert x == 1"}), Item("Write it.", "x = 1", {"tests": tests})])
    assert str(error.value).startswith("reward unit failed for answer 1 (prompt 'Write it.', answer 'x = 1'): " + sentence)


def test_without_namespaces_it_is_refused(monkeypatch):
    monkeypatch.setattr(programs, "probe", lambda: "unshare: Operation not permitted")
    with pytest.raises(ValueError, match=r"rewards.0: kind code .*\(unshare: Operation not permitted\).*allow_unsandboxed: true"):
        Scorer([part()])


def test_a_sandbox_that_fails_later_is_told(is_closed, monkeypatch):
    with Scorer([part()]) as scorer:
        monkeypatch.setattr(programs, "_visible", lambda _: ["/nowhere"])
        with pytest.raises(RewardError, match="reward code could not start a sandbox: .*mount: No such file or directory"):
            scorer.score([Item("Write it.", "x = 1", {"tests": "assert x == 1"})])


def test_unsandboxed_has_limits_and_leaves_nothing(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(programs, "probe", lambda: "unshare: Operation not permitted")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answers = [HONEST["function"], WRONG["value"], HONEST["script"], ("while True: pass", "assert True"), ("x = bytearray(400 << 20)", [["", ""]])]
    assert scores(answers, allow_unsandboxed=True, seconds=2) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert "run without namespaces" in caplog.text and not list(tmp_path.iterdir())
