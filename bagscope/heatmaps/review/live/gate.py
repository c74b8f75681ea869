"""Who may ask the viewer, and what: checked before any request reaches a route.

Data of patients is behind this gate, and a browser that may ask runs pages of strangers as well:

- Without a token the server answers only requests that name this machine as their host, so that a
  stranger's name that resolves to 127.0.0.1 opens nothing (DNS rebinding).
- Pages of other sites may link here, but not embed anything: the page's data are scripts, which any
  site could otherwise include and read.
- With a token every request carries it: as a cookie, set by the link that the command prints, as a
  query or as a bearer.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

NOTHING = "There is nothing at this address; start at the list of runs, at /."
METHODS = ("GET", "HEAD")
MOST_URL_BYTES = 4 << 10
MOST_HEADER_BYTES = 32 << 10
"""Beside the server's own bound, which counts only what it has to wait for."""
TOKEN_QUERY = "token"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """Lets through what may pass to `app`, refuses the rest with one sentence.

    Attributes:
        app: what lies behind.
        token: that every request must carry; None where only this machine can ask.
        cookie: name of the cookie that carries it.
    """

    app: ASGIApp
    token: str | None
    cookie: str = "bagscope"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        answer = self._refusal(Request(scope)) or self._greeting(Request(scope)) or self.app
        await answer(scope, receive, guarded)

    def _refusal(self, request: Request) -> Response | None:
        headers = request.headers
        if self.token is None and not names_this_machine(headers.get("host", "")):
            return sentence(
                403, "This viewer answers only under localhost or 127.0.0.1; use such an address."
            )
        if request.method not in METHODS:
            allow = {"allow": ", ".join(METHODS)}
            return sentence(405, "This viewer is read-only; ask with GET or HEAD.", allow)
        if (
            len(request.scope.get("raw_path", b"")) + len(request.scope["query_string"])
            > MOST_URL_BYTES
        ):
            return sentence(414, "This address is longer than any of this viewer.")
        if sum(len(name) + len(value) for name, value in headers.raw) > MOST_HEADER_BYTES:
            return sentence(431, "This request has more headers than this viewer reads.")
        if any(letter < " " for letter in request.scope["path"]):
            return sentence(404, NOTHING)
        site = headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and headers.get("sec-fetch-mode") != "navigate":
            return sentence(403, "Pages of other sites may not embed what this viewer serves.")
        if self.token is not None and not self._knows_token(request):
            return sentence(
                401,
                "This viewer needs its token; open the link that bagscope view printed.",
                {"www-authenticate": "Bearer"},
            )
        return None

    def _knows_token(self, request: Request) -> bool:
        assert self.token is not None
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        offered = (
            request.query_params.get(TOKEN_QUERY, ""),
            request.cookies.get(self.cookie, ""),
            bearer.strip() if scheme.lower() == "bearer" else "",
        )
        expected = self.token.encode()
        return any(hmac.compare_digest(one.encode(), expected) for one in offered)

    def _greeting(self, request: Request) -> Response | None:
        """Return, for a link with the token, a page that keeps it as a cookie and goes on.

        A redirect would lose the cookie where the link was followed from another site, as
        browsers count its target as that site's request; and the token would stay in sight.
        """
        query, path = request.query_params, request.scope["path"]
        if self.token is None or TOKEN_QUERY not in query or not path.endswith("/"):
            return None
        rest = urlencode([(k, v) for k, v in query.multi_items() if k != TOKEN_QUERY])
        # Slashes in front would make it the address of another host.
        target = "/" + quote(path.lstrip("/")) + (f"?{rest}" if rest else "")
        answer = HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>bagscope</title>'
            '<link rel="icon" href="data:,">'
            f'<meta http-equiv="refresh" content="0;url={escape(target)}">'
            f'<p><a href="{escape(target)}">Go on to the slides</a></p></html>'
        )
        answer.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", path="/")
        return answer


def sentence(status: int, text: str, headers: dict[str, str] | None = None) -> PlainTextResponse:
    """Return an answer of one sentence."""
    return PlainTextResponse(text + "\n", status_code=status, headers=headers)


def names_this_machine(host: str) -> bool:
    """Tell whether a Host header names this machine itself, at whatever port."""
    name, _, port = host.rpartition(":")
    if not name or not port.isdecimal():
        name = host
    return is_loopback(name.removeprefix("[").removesuffix("]"))


def is_loopback(host: str) -> bool:
    """Tell whether a name or an address can be reached from this machine only."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
