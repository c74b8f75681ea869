"""Who is let in, and what every answer carries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.responses import PlainTextResponse

from bagscope.heatmaps.review.live.gate import Gate
from tests.heatmaps.review.asgi import Client, client_of

TOKEN = "a-token-of-enough-letters"
SECRET = "42 slides"


@pytest.fixture
def local() -> Iterator[Client]:
    with client_of(Gate(PlainTextResponse(SECRET), None)) as client:
        yield client


@pytest.fixture
def remote() -> Iterator[Client]:
    with client_of(Gate(PlainTextResponse(SECRET), TOKEN, "bagscope_8000")) as client:
        yield client


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8000", "localhost:9", "LocalHost", "[::1]:8000", "[::1]"]
)
def test_this_machine_is_known_by_its_own_names(local: Client, host: str) -> None:
    assert local.get("/", host=host).text == SECRET


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "10.0.0.1:8000", "",
     "[", "[::1", "0.0.0.0", "localhost@evil.example", "127.0.0.1:8000:evil", "évil"],
)  # fmt: skip
def test_a_strange_name_for_this_machine_is_refused(local: Client, host: str) -> None:
    answer = local.get("/", host=host)
    assert answer.status == 403
    assert SECRET not in answer.text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "get"])
def test_nothing_can_be_changed(local: Client, method: str) -> None:
    answer = local.get("/", method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert SECRET not in answer.text


def test_pages_of_other_sites_may_link_but_not_embed(local: Client) -> None:
    for site in ("cross-site", "same-site"):
        for mode in ("no-cors", "cors", "websocket"):
            answer = local.get("/data/cohort.js", sec_fetch_site=site, sec_fetch_mode=mode)
            assert answer.status == 403
        assert local.get("/", sec_fetch_site=site, sec_fetch_mode="navigate").status == 200
    for site in ("same-origin", "none"):
        assert local.get("/", sec_fetch_site=site, sec_fetch_mode="no-cors").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": f"Bearer {TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": "Bearer"},
        {"cookie": "bagscope_8000="},
        {"cookie": f"bagscope_9000={TOKEN}"},
        {"cookie": "bagscope_8000=tökên"},
        {"referer": f"http://x/?token={TOKEN}"},
    ],
)
def test_without_the_token_nothing_is_told(remote: Client, headers: dict[str, str]) -> None:
    for target in ("/", "/a/data/cohort.js", "/nowhere", "/?token=", "/?token=%00", "/?token=%FF"):
        answer = remote.get(target, **headers)
        assert answer.status == 401
        assert answer.text == (
            "This viewer needs its token; open the link that bagscope view printed.\n"
        )
        assert TOKEN not in answer.text


def test_the_token_opens_by_link_by_cookie_and_by_bearer(remote: Client) -> None:
    assert remote.get("/x.jpg", authorization=f"bearer {TOKEN}").text == SECRET
    assert remote.get("/x.jpg", cookie=f"a=b; bagscope_8000={TOKEN}").text == SECRET
    assert remote.get(f"/x.jpg?token={TOKEN}").text == SECRET
    # A strange host is no danger here: a page under that name has no cookie.
    assert remote.get("/", host="pathology.example", authorization=f"Bearer {TOKEN}").status == 200


def test_the_link_sets_a_cookie_that_only_the_viewer_sees(remote: Client) -> None:
    answer = remote.get(f"/abmil/?token={TOKEN}&a=%22%3E%3Cscript%3E")
    assert answer.status == 200
    assert SECRET not in answer.text
    assert TOKEN not in answer.text
    assert "<script" not in answer.text
    assert 'content="0;url=/abmil/?a=%22%3E%3Cscript%3E"' in answer.text
    name, *attributes = answer.headers["set-cookie"].split("; ")
    assert name == f"bagscope_8000={TOKEN}"
    assert {a.lower() for a in attributes} == {"httponly", "path=/", "samesite=strict"}
    # Never on to another host.
    assert "url=/evil.example/" in remote.get(f"//evil.example/?token={TOKEN}").text


def test_every_answer_carries_the_guarding_headers(local: Client, remote: Client) -> None:
    answers = [
        local.get("/"),
        local.get("/", host="evil.example"),
        local.get("/", method="POST"),
        remote.get("/"),
        remote.get(f"/?token={TOKEN}"),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_other_protocols_are_turned_away(local: Client) -> None:
    sent = []

    async def connect() -> None:
        async def receive() -> dict[str, str]:
            return {"type": "websocket.connect"}

        async def send(message: object) -> None:
            sent.append(message)

        await local.app({"type": "websocket", "path": "/", "headers": []}, receive, send)

    local.run(connect())
    assert sent == [{"type": "websocket.close", "code": 1008}]
