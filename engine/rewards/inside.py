"""Runs inside the sandbox of engine/rewards/programs.py: one process with the answer's program, one with the tests of it.

    python -s -P -S inside.py FD          FD: a file with the job as JSON; the standard library alone, since nothing else is in the sandbox

The process shuts itself in, then plays one of three roles:
  main      runs a program as a script on its stdin;
  program   runs a program as a module, then answers requests about its names on a socket;
  tests     runs the tests; what they call is asked of the program's process.
So a program never shares a process with what judges it: it gets arguments and gives results, and cannot read the tests or the verdict
or change what the tests compare with. Results of plain types arrive as copies (None, bool, numbers, str, bytes, lists, tuples, sets,
dicts, arrays as lists). Anything else stays with the program, and the tests hold a Remote, which equals no value of the tests. Names of
builtins and of standard modules are never taken from the program.
Left out: functions of the tests as arguments, exceptions and operators that the program defines.
"""

import builtins
import ctypes
import json
import keyword
import math
import operator
import os
import resource
import signal
import socket
import sys
import types

# linux/sched.h, linux/mount.h, linux/prctl.h
NEW_USER, NEW_OTHERS = 0x10000000, 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000      # mount, pid, net, ipc, uts
READ_ONLY, NO_SUID, NO_DEV, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
KEPT = 8 | 1024 | 2048      # noexec, noatime, nodiratime: statvfs has the same bits, and a remount must repeat them
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, CAPABILITY_VERSION_3 = 1, 38, 0x20080522
NOBODY = 65534
FILE_BYTES = 16 << 20
RESERVED = {*dir(builtins), *sys.stdlib_module_names, *keyword.kwlist}


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        job = json.load(file)
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    if job["root"]:
        enter(job["root"], job["visible"])
    sys.path += job["packages"]
    limit(size + (job["memory_mib"] << 20), math.ceil(job["seconds"]) + 1)
    os.write(job["ready"], b"1")
    os.close(job["ready"])
    if job["role"] == "main":
        exec(compile(job["source"], "answer.py", "exec"), {"__name__": "__main__", "__builtins__": builtins})
    elif job["role"] == "program":
        play_program(job["source"], Channel(job["channel"]))
    else:
        os.write(job["verdict"], json.dumps(play_tests(job["source"], Channel(job["channel"]))).encode())


# --- shutting oneself in ----------------------------------------------------------------------------------------------


def libc(name: str, *args) -> None:
    """A function of the C library that answers -1 when it fails. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def enter(root: str, visible: list) -> None:
    """Returns in a child without privileges that is process 1 of new namespaces and sees the folders in `visible`, read only, and an
    empty /tmp. The caller waits for it outside and ends as it ends. Raises OSError where the machine does not allow this."""
    uid, gid = os.geteuid(), os.getegid()
    is_mapped = False
    try:
        libc("unshare", NEW_OTHERS)      # root: the child becomes nobody
    except PermissionError:
        libc("unshare", NEW_OTHERS | NEW_USER)      # others: they are nobody inside
        is_mapped = True
        for file, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as target:
                target.write(line)
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", root, "tmpfs", NO_SUID | NO_DEV, f"size={FILE_BYTES},mode=755")
    for path in visible:
        show(path, root + path)
    os.makedirs(f"{root}/tmp", exist_ok=True)      # it is there where the packages lie below /tmp
    os.chmod(f"{root}/tmp", 0o777)
    os.chroot(root)      # the kernel makes no new user namespace for a process in one, which might lead out
    os.chdir("/tmp")
    child = os.fork()
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    if not is_mapped:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    libc("capset", (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
    libc("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)      # after setuid, which clears it


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    libc("mount", source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None)


def show(path: str, target: str) -> None:
    """The folder `path`, or the link, at `target`, where nothing can be written."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    os.makedirs(target, exist_ok=True)
    mount(path, target, flags=BIND)
    mount(path, target, flags=BIND | REMOUNT | READ_ONLY | NO_SUID | NO_DEV | os.statvfs(target).f_flag & KEPT)


def limit(memory: int, seconds: int) -> None:
    """One process of one thread, with so many bytes of address space and seconds of processor time, small files and no core."""
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, FILE_BYTES),
                       (resource.RLIMIT_NPROC, 1), (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


# --- values on the way ------------------------------------------------------------------------------------------------


class Channel:
    """Messages as lines of JSON. Raises EOFError when the other side has gone."""

    def __init__(self, descriptor: int) -> None:
        self._file = socket.socket(fileno=descriptor).makefile("rwb")

    def send(self, message) -> None:
        self._file.write(json.dumps(message).encode() + b"\n")
        self._file.flush()

    def receive(self):
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the program has ended")
        return json.loads(line)


def encode(value, number_of):
    """A value as JSON; number_of(value) is asked for what is not plain."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 53 else {"int": hex(value)}      # decimal digits are limited
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__ if type(value) is bytearray else "bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[encode(k, number_of), encode(v, number_of)] for k, v in dict.items(value)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            items = [encode(item, number_of) for item in kind.__iter__(value)]
            return items if kind is list else {kind.__name__: items}
    if not isinstance(value, type | Remote) and hasattr(value, "tolist"):      # numpy
        return encode(value.tolist(), number_of)
    return {"object": number_of(value)}


def decode(message, object_of):
    """The value of a message; whoever sent it, only plain values and object_of(number) come out. Raises ValueError, TypeError."""
    if isinstance(message, list):
        return [decode(item, object_of) for item in message]
    if not isinstance(message, dict):
        return message
    (kind, content), = message.items()
    if kind == "object":
        return object_of(int(content))
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {decode(k, object_of): decode(v, object_of) for k, v in content}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](decode(item, object_of) for item in content)


# --- the program's side -----------------------------------------------------------------------------------------------

OPERATIONS = {"call": lambda f, args, named: f(*args, **named), "getattr": getattr, "setattr": setattr, "getitem": operator.getitem,
              "setitem": operator.setitem, "len": len, "iter": iter, "next": next, "bool": bool, "str": str, "repr": repr, "eq": operator.eq}


def play_program(source: str, channel: Channel) -> None:
    held = {}

    def number_of(value) -> int:
        held[id(value)] = value
        return id(value)

    def begin():
        module = types.ModuleType("program")
        sys.modules["program"] = module
        exec(compile(source, "answer.py", "exec"), module.__dict__)
        return {"value": {name: encode(value, number_of) for name, value in module.__dict__.items() if not name.startswith("__")}}

    def answer(request):
        target, args, named = (decode(part, held.__getitem__) for part in (request["target"], request["args"], request["named"]))
        operation = OPERATIONS[request["operation"]]
        value = operation(target, args, named) if request["operation"] == "call" else operation(target, *args)
        return {"value": encode(value, number_of), "args": [encode(args, number_of), encode(named, number_of)]}

    channel.send(guarded(begin))
    while True:
        try:
            request = channel.receive()
        except EOFError:
            return
        channel.send(guarded(lambda request=request: answer(request)))


def guarded(act):
    """act(), or the nearest builtin exception of what it raised: SystemExit must not end the process."""
    try:
        return act()
    except BaseException as error:
        name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")
        try:
            return {"raised": [name, str(error)]}
        except Exception:
            return {"raised": [name, ""]}


# --- the tests' side --------------------------------------------------------------------------------------------------


def play_tests(source: str, channel: Channel) -> dict:
    """{"passed": true}, {"failed": why}, or {"broken": why} for tests that are no Python."""
    try:
        code = compile(source, "tests.py", "exec")
    except (SyntaxError, ValueError) as error:
        return {"broken": str(error)}
    try:
        values = {name: decode(value, lambda number: Remote(channel, number)) for name, value in result_of(channel.receive()).items()
                  if name.isidentifier() and not name.startswith("__") and name not in RESERVED}
        exec(code, {"__name__": "tests", **values})
    except BaseException as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    return {"passed": True}


def result_of(reply: dict):
    """The value of a reply. Raises what it says was raised, by a builtin class."""
    if "raised" not in reply:
        return reply["value"]
    name, text = reply["raised"]
    kind = getattr(builtins, str(name), None)
    is_ordinary = isinstance(kind, type) and issubclass(kind, Exception)
    try:
        error = kind(str(text)) if is_ordinary else RuntimeError(f"{name}: {text}")
    except TypeError:      # UnicodeDecodeError and kin take more
        error = ValueError(str(text))
    raise error


class Remote:
    """An object of the program. What it does is the program's word, so no value of the tests equals it or can be compared with it."""

    def __init__(self, channel: Channel, number: int) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_number", number)

    def _ask(self, operation: str, args=(), named=None):
        named = named or {}
        target, *parts = (encode(part, number_of_remote) for part in (self, list(args), named))
        self._channel.send({"operation": operation, "target": target, "args": parts[0], "named": parts[1]})
        reply = self._channel.receive()
        value = decode(result_of(reply), self._other)
        if operation == "call":
            args_after, named_after = (decode(part, self._other) for part in reply["args"])
            for old, new in [*zip(args, args_after), *((named[name], named_after[name]) for name in named)]:
                change_in_place(old, new)
        return value

    def _other(self, number: int) -> "Remote":
        return Remote(self._channel, number)

    def __call__(self, *args, **named):
        return self._ask("call", args, named)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", (name,))

    def __setattr__(self, name, value):
        self._ask("setattr", (name, value))

    def __getitem__(self, key):
        return self._ask("getitem", (key,))

    def __setitem__(self, key, value):
        self._ask("setitem", (key, value))

    def __len__(self):
        return self._ask("len")

    def __iter__(self):
        found = self._ask("iter")
        return found if isinstance(found, Remote) else iter(found)

    def __next__(self):
        return self._ask("next")

    def __bool__(self):
        return self._ask("bool") is True

    def __str__(self):
        return self._ask("str")

    def __repr__(self):
        return self._ask("repr")

    def __eq__(self, other):
        return self._ask("eq", (other,)) is True if isinstance(other, Remote) else NotImplemented


def number_of_remote(value) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"the tests pass a {type(value).__name__} to the program, which takes plain values and its own objects")


def change_in_place(old, new) -> None:
    """Programs may change a list, dict or set that they are given."""
    if type(old) is not type(new):
        return
    if isinstance(old, list | bytearray):
        old[:] = new
    elif isinstance(old, dict | set):
        old.clear()
        old.update(new)


if __name__ == "__main__":
    main()
