"""Requests to an ASGI application exactly as they are written, which real clients tidy up first."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from starlette.types import ASGIApp

Came = TypeVar("Came")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Client:
    """Asks an application in one event loop, as a browser on this machine would."""

    def __init__(self, app: ASGIApp, runner: asyncio.Runner) -> None:
        self.app = app
        self._runner = runner

    def get(self, target: str, *, method: str = "GET", **headers: str) -> Answer:
        """Ask; headers are given with underscores for their hyphens."""
        return self.run(self.asked(target, method=method, **headers))

    def run(self, coroutine: Coroutine[Any, Any, Came]) -> Came:
        return self._runner.run(coroutine)

    async def asked(self, target: str, *, method: str = "GET", **headers: str) -> Answer:
        raw, _, query = target.partition("?")
        named = {"host": "127.0.0.1:8000"} | {k.replace("_", "-"): v for k, v in headers.items()}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            # As uvicorn makes it of the request line.
            "path": unquote(raw),
            "raw_path": raw.encode("ascii", "replace"),
            "query_string": query.encode("ascii", "replace"),
            "root_path": "",
            "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in named.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start = next(m for m in sent if m["type"] == "http.response.start")
        body = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
        held = {k.decode().lower(): v.decode() for k, v in start["headers"]}
        return Answer(start["status"], held, body)


@contextmanager
def client_of(app: ASGIApp) -> Iterator[Client]:
    with asyncio.Runner() as runner:
        yield Client(app, runner)
