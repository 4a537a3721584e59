"""Several machines that start, restart and end together. Node 0 relays; every node, node 0 too, speaks with it over one TCP connection.

    nodes = Nodes(node, num_nodes, ("node0", 29400), seconds=600)
    places = await nodes.gather("start", mine)       # waits until all are there
    values = await nodes.gather("outcome", mine)     # of all nodes by number; None for one that was lost
    nodes.call("failed")                             # to all others at once: nodes.heard["failed"] is set there

A message is a line of JSON. To gather is the only way to agree: a launch begins when all nodes have gathered "start", and what they gather
then is between those that were there. A node whose connection breaks is lost to this launch and may join the next one; so is everybody when
node 0 is. Whoever can reach the port can end the run, as with torch's own rendezvous: keep it inside the cluster.
Left out: a run that goes on without a lost node.
"""

import asyncio
import contextlib
import json
import socket

RETRY_SECONDS = 0.5
CLOSE_SECONDS = 5  # for the last words to reach the other nodes
CALLS = ("failed", "stop", "lost")


class NodesError(ValueError):
    """The nodes cannot come together; the message says why and what to do."""


class Lost(Exception):
    """The connection to node 0 broke; the next launch needs a new one."""


class Alone:
    """The one node of a run on one machine: nothing to agree on."""

    def __init__(self):
        self.heard = {call: asyncio.Event() for call in CALLS}

    async def gather(self, what: str, value) -> list:
        return [value]

    def call(self, what: str) -> None:
        pass

    async def close(self) -> None:
        pass


class Nodes:
    """One node's side. Connects by itself when it gathers "start"."""

    def __init__(self, node: int, num_nodes: int, address: tuple[str, int], seconds: float):
        self.node, self.num_nodes, self.address, self.seconds = node, num_nodes, address, seconds
        self.heard = {call: asyncio.Event() for call in CALLS}
        self._hub, self._writer, self._reading, self._refused = None, None, None, ""
        self._answers: asyncio.Queue = asyncio.Queue()

    async def gather(self, what: str, value) -> list:
        """Every node's value. Raises Lost, or NodesError where they do not come together in time ("start") or do not fit together."""
        if what != "start":
            return await self._gather(what, value)
        try:
            return await asyncio.wait_for(self._start(value), self.seconds)
        except TimeoutError:
            raise NodesError(f"{self._missing()} did not come to {self.address[0]}:{self.address[1]} in {self.seconds:g} s; start launch/supervise.py "
                             "there, or allow more time with --join-seconds") from None

    async def _start(self, value) -> list:
        while True:
            if self._writer is None:
                await self._connect()
            for call in ("failed", "lost"):
                self.heard[call].clear()
            try:
                return await self._gather("start", value)
            except Lost:
                pass

    async def _gather(self, what: str, value) -> list:
        self._send({"what": what, "value": value})
        while True:
            answer = await self._answers.get()
            if answer is None:
                raise self._end()
            if answer["what"] == what:
                return answer["values"]

    def _missing(self) -> str:
        if self._hub is None:
            return "node 0" if self._writer is None else "another node"
        missing = [str(node) for node in range(self.num_nodes) if node not in self._hub.links]
        return f"node{'s' * (len(missing) > 1)} {', '.join(missing)}"

    def call(self, what: str) -> None:
        if self._writer is not None:
            self._send({"call": what})

    async def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._reading is not None:
            self._reading.cancel()
        if self._hub is not None:
            await self._hub.close()

    async def _connect(self) -> None:
        if self.node == 0 and self._hub is None:
            hub = Hub(self.num_nodes)
            await hub.listen(*self.address)
            self._hub = hub
        while True:
            try:
                reader, self._writer = await asyncio.open_connection(*self.address)
                break
            except OSError:  # node 0 is not there yet, or not there again
                await asyncio.sleep(RETRY_SECONDS)
        _keep_alive(self._writer)
        self._answers = asyncio.Queue()
        self._send({"node": self.node, "num_nodes": self.num_nodes})
        self._reading = asyncio.create_task(self._read(reader, self._answers))

    async def _read(self, reader, answers) -> None:
        async for message in _messages(reader):
            if "call" in message:
                self.heard[message["call"]].set()
            elif "refused" in message:
                self._refused = message["refused"]
            else:
                answers.put_nowait(message)
        self._writer = None
        self.heard["lost"].set()
        answers.put_nowait(None)

    def _send(self, message: dict) -> None:
        if self._writer is None:
            raise self._end()
        self._writer.write(_line(message))

    def _end(self) -> Exception:
        """Of the connection. Who was refused must not come again."""
        return NodesError(self._refused) if self._refused else Lost()


class Hub:
    """Node 0's relay."""

    def __init__(self, num_nodes: int):
        self.num_nodes = num_nodes
        self.links: dict[int, asyncio.StreamWriter] = {}
        self._launch: set[int] = set()  # nodes of the launch underway that were not lost
        self._values: dict[str, dict[int, object]] = {}
        self._server, self._talks = None, set()

    async def listen(self, host: str, port: int) -> None:
        # On all interfaces, as torch does: many a machine's own name is a loopback address in its /etc/hosts.
        is_local = host in ("localhost", "::1") or host.startswith("127.")
        try:
            self._server = await asyncio.start_server(self._talk, host if is_local else None, port)
        except OSError as error:
            raise NodesError(f"node 0 cannot listen on port {port}: {error.strerror}; choose another with --master HOST:PORT") from None

    async def close(self) -> None:
        """What was said is delivered first."""
        self._server.close()
        for writer in self.links.values():
            writer.close()
        if self._talks:
            await asyncio.wait(self._talks, timeout=CLOSE_SECONDS)

    async def _talk(self, reader, writer) -> None:
        self._talks.add(asyncio.current_task())
        _keep_alive(writer)
        messages = _messages(reader)
        hello = await anext(messages, {})
        node = hello.get("node")
        refusal = self._refusal(hello)
        if refusal:
            writer.write(_line({"refused": refusal}))
            writer.close()
            return
        if node in self.links:  # its supervisor was started again before the old connection was found dead; or there are two
            self.links[node].write(_line({"refused": f"another supervisor has come as node {node}; give each its own --node-rank"}))
            self.links[node].close()
            self._lose(node)
        self.links[node] = writer
        async for message in messages:
            if "call" in message:
                self._relay(message, but=node)
            else:
                self._values.setdefault(message["what"], {})[node] = message["value"]
                self._answer()
        if self.links.get(node) is writer:
            del self.links[node]
            self._lose(node)

    def _refusal(self, hello: dict) -> str:
        node, num_nodes = hello.get("node"), hello.get("num_nodes")
        if num_nodes != self.num_nodes:
            return f"this node was started with --nnodes {num_nodes}, node 0 with --nnodes {self.num_nodes}"
        return "" if isinstance(node, int) and 0 <= node < self.num_nodes else f"--node-rank {node} is none of 0 to {self.num_nodes - 1}"

    def _lose(self, node: int) -> None:
        for values in self._values.values():
            values.pop(node, None)
        if node in self._launch:
            self._launch.discard(node)
            self._relay({"call": "lost"}, but=node)
        self._answer()

    def _answer(self) -> None:
        """What all have said is told to all. The nodes of a launch are those that were there at its start."""
        for what, values in list(self._values.items()):
            wanted = set(range(self.num_nodes)) if what == "start" else self._launch
            if wanted and wanted <= values.keys():
                del self._values[what]
                if what == "start":
                    self._launch = wanted
                for node in wanted:
                    self.links[node].write(_line({"what": what, "values": [values.get(n) for n in range(self.num_nodes)]}))

    def _relay(self, message: dict, but: int) -> None:
        for node, writer in self.links.items():
            if node != but:
                writer.write(_line(message))


def _line(message: dict) -> bytes:
    return json.dumps(message).encode() + b"\n"


async def _messages(reader):
    """The messages of a connection until it ends, in whatever way."""
    with contextlib.suppress(OSError, ValueError):
        while line := await reader.readline():
            yield json.loads(line)


def _keep_alive(writer) -> None:
    """Find out within half a minute that the machine at the other end has gone."""
    wire = writer.get_extra_info("socket")
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
