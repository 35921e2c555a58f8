"""Pods as HTTP servers of this process, each at a loopback address of its own: healthy ones, and ones that do
what no pod of ours does.
"""

import asyncio
import contextlib
import itertools
import socket
import struct
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from distill_operator.pod_records import PodAddress

from vpmoe.api.progress import Amount, Progress
from vpmoe.process.launcher import free_port

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ENDLESS = 400 * 2**20
"""Bytes that an endless answer has."""

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def report(step: str = "vanilla", attempt: int = 1, done: int = 1, **more: Any) -> Progress:
    """A progress with `done` parts."""
    fields = {
        "step": step,
        "attempt": attempt,
        "state": "Running",
        "updated": NOW,
        "parts": Amount(done=done, total=9),
    }
    return Progress.model_validate({**fields, **more})


def answer(body: bytes, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """A whole HTTP answer. `length`: what it says of its body, if that is not true."""
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Pods:
    """Starts pods that all use one port."""

    def __init__(self) -> None:
        self.port = free_port()
        self.requests: list[str] = []
        """Names of the pods that were asked, in order."""
        self._addresses = (f"127.0.{block}.{number}" for block in range(1, 250) for number in range(1, 250))
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.close()
        for one in self._sockets:
            one.close()

    async def start(self, handler: Handler, name: str = "") -> PodAddress:
        """A pod whose connections `handler` gets after the request has been read."""
        pod = PodAddress(name or f"pod-{len(self._servers)}", next(self._addresses))

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.requests.append(pod.name)
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                await handler(reader, writer)
                writer.close()

        self._servers.append(await asyncio.start_server(handle, pod.ip, self.port))
        return pod

    async def healthy(self, *progress: Progress, name: str = "") -> PodAddress:
        """A pod that answers with each progress once, and then always with the last."""
        following = itertools.chain(progress, itertools.repeat(progress[-1]))

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answer(next(following).to_json()))

        return await self.start(handler, name)

    async def answering(self, text: bytes, name: str = "") -> PodAddress:
        """A pod that answers with these bytes and closes the connection."""

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(text)
            await writer.drain()

        return await self.start(handler, name)

    async def counting(self, name: str = "") -> PodAddress:
        """A healthy pod that has made another part at each reading."""
        count = itertools.count(1)

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answer(report(done=next(count)).to_json()))

        return await self.start(handler, name)

    # Pods that never give an answer

    async def black_hole(self) -> PodAddress:
        """It accepts connections and sends nothing."""

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        return await self.start(handler)

    def unreachable(self) -> PodAddress:
        """Its network drops every packet: connections are neither accepted nor refused."""
        pod = PodAddress("unreachable", next(self._addresses))
        listener = socket.create_server((pod.ip, self.port), backlog=0)
        self._sockets.append(listener)
        for _ in range(3):  # its queue is full; the kernel drops what comes then
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex((pod.ip, self.port))
            self._sockets.append(one)
        return pod

    def refusing(self) -> PodAddress:
        """Nothing listens."""
        return PodAddress("refusing", next(self._addresses))

    async def dripping(self) -> PodAddress:
        """It sends a valid answer, a byte at a time, forever."""

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for byte in itertools.chain(answer(b"", length=ENDLESS), itertools.repeat(32)):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.01)

        return await self.start(handler)

    async def resetting(self, before: bytes = b"") -> PodAddress:
        """It resets the connection, after these bytes of its answer."""

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(before)
            await writer.drain()
            await asyncio.sleep(0.05 if before else 0)  # a reset also discards what was not read yet
            own = writer.get_extra_info("socket")
            own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

        return await self.start(handler)

    async def endless(self, start: bytes, repeated: bytes) -> PodAddress:
        """It sends `start`, then `repeated` as often as 400 MiB need."""

        async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(start)
            block = repeated * (2**16 // len(repeated))
            for _ in range(ENDLESS // len(block)):
                writer.write(block)
                await writer.drain()

        return await self.start(handler)
