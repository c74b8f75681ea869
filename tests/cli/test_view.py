"""`bagscope view` as a user meets it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from bagscope.errors import ConfigError
from bagscope.heatmaps.review.live.reader import SlideFacts
from bagscope.heatmaps.review.pyramid import Picture
from bagscope.pipeline.view import ViewRequest, open_view
from tests.cli.conftest import Ran, files_of
from tests.heatmaps.made_run import made_study, write_scores

Command = Callable[..., Ran]
TOKEN = "abcdefgh12345678"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two runs, one of them with scores for three slides, one of which moved."""
    folder = tmp_path_factory.mktemp("view") / "study"
    run = made_study(folder)
    rng = np.random.default_rng(0)
    for slide_id in "abc":
        write_scores(run, slide_id, special.log_softmax(rng.normal(0, 2, (12, 1)), axis=0))
    (folder / "slides" / "c.svs").rename(folder / "elsewhere.svs")
    (folder / "runs" / "unfinished" / "scores").mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def viewer(study: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A viewer in a process of its own, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bagscope", "view", str(study), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert told["runs"] == ["abmil"]
    match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", told["url"])
    assert match is not None
    yield process, int(match[1])
    if process.poll() is None:
        process.kill()
        process.communicate()


def asked(port: int, target: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def script(body: bytes) -> dict[str, object]:
    match = re.fullmatch(rb"bagscope\.\w+\((.*)\);\n", body)
    assert match is not None
    data: dict[str, object] = json.loads(match[1])
    return data


def test_a_run_is_served_and_nothing_of_the_study_is_changed(
    viewer: tuple[subprocess.Popen[str], int], study: Path
) -> None:
    _, port = viewer
    before = files_of(study)
    assert asked(port, "/")[0] == 307
    status, page = asked(port, "/abmil/")
    assert status == 200
    for name in re.findall(rb'(?:src|href)="(assets/[^"]+)"', page):
        assert asked(port, f"/abmil/{name.decode()}")[0] == 200
    cohort = script(asked(port, "/abmil/data/cohort.js")[1])
    assert cohort["live"] is True
    slides = {slide["key"]: slide["thumb"] for slide in cohort["slides"]}  # type: ignore[attr-defined]
    assert slides == {"a": "slides/a/thumb.jpg", "b": "slides/b/thumb.jpg", "c": None}
    told = script(asked(port, "/abmil/slides/a/slide.js")[1])
    picture = told["picture"]
    assert isinstance(picture, dict)
    assert (picture["width"], picture["height"], picture["downsample"]) == (512, 384, 1.0)
    assert asked(port, "/abmil/slides/a/picture_files/9/0_0.jpg")[1].startswith(b"\xff\xd8")
    images = [tile["image"] for tile in told["gallery"]]  # type: ignore[attr-defined]
    assert images
    for image in {*images, "slides/a/thumb.jpg"}:
        assert asked(port, f"/abmil/{image}")[1].startswith(b"\xff\xd8"), image
    moved = script(asked(port, "/abmil/slides/c/slide.js")[1])
    assert moved["picture"] is None
    assert "can't be read" in str(moved["notes"])
    assert files_of(study) == before


def test_no_answer_says_where_the_study_lies(
    viewer: tuple[subprocess.Popen[str], int], study: Path
) -> None:
    _, port = viewer
    targets = ["/abmil/data/cohort.js", *(f"/abmil/slides/{key}/slide.js" for key in "abc")]
    for target in (*targets, "/abmil/slides/c/thumb.jpg", "/nowhere", "/unfinished/"):
        _, body = asked(port, target)
        for secret in (str(study), str(study.parent), "/slides/c.svs", socket.gethostname()):
            assert secret.encode() not in body


def test_requests_that_no_browser_sends_are_refused(
    viewer: tuple[subprocess.Popen[str], int],
) -> None:
    _, port = viewer
    line = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s\r\n"
    requests = {
        line % (b"/abmil/assets/../../../cohort.csv", b""): b"404",
        line % (b"/abmil/slides/a/../../../../cohort.csv", b""): b"404",
        line % (b"/abmil/slides/%2e%2e%2f%2e%2e/slide.js", b""): b"404",
        line % (b"/abmil/slides/a/picture_files/9/999999_0.jpg", b""): b"404",
        line % (b"/abmil/\xff", b""): b"400",
        line % (b"/" + b"a" * (5 << 10), b""): b"414",
        line % (b"/abmil/", b"X: " + b"a" * (40 << 10) + b"\r\n"): b"431",
        b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n": b"403",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n": (
            b"405"
        ),
        b"nonsense\r\n\r\n": b"400",
    }
    for request, status in requests.items():
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.split(b" ")[1] == status, request[:80]
        assert b"Traceback" not in answer
        assert b"slide_id" not in answer
    assert asked(port, "/abmil/")[0] == 200


def test_what_was_drawn_is_shown_in_the_slide_s_own_frame(study: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    square = [[[10, 20], [110, 20], [110, 120], [10, 120], [10, 20]]]
    far = [[[x + 9_000, y] for x, y in square[0]]]
    for slide_id, rings in (("a", square), ("b", far), ("c", square)):
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"classification": {"name": "Tumor", "color": [200, 0, 0]}},
        }
        (drawn / f"{slide_id}.geojson").write_text(json.dumps(feature))
    opened = open_view(ViewRequest(study=study, run="abmil", annotations=drawn))
    opened.listener.close()
    data = opened.runs["abmil"].data
    picture = Picture(width=500, height=380, downsample=1.0, x_l0=12.0, y_l0=4.0)
    facts = SlideFacts(width_l0=512, height_l0=384, mpp=0.5, picture=picture)
    (shown,) = script(data.slide_script("a", facts))["annotations"]  # type: ignore[misc]
    assert shown["class"] == "Tumor"
    # QuPath, whose file this is, counts from the corner of the scanned area.
    shifted = {(x + 12, y + 4) for x, y in square[0]}
    assert {tuple(point) for point in shown["polygons"][0][0]} == shifted
    outside = script(data.slide_script("b", facts))
    assert outside["annotations"] == []
    assert "every region of b.geojson lies outside the slide" in str(outside["notes"])
    assert str(tmp_path) not in str(outside)
    assert script(data.slide_script("c", None))["annotations"] == []
    (drawn / "a.geojson").rename(drawn / "x.geojson")
    for slide_id in "bc":
        (drawn / f"{slide_id}.geojson").unlink()
    with pytest.raises(ConfigError, match="has no file of the slides asked about"):
        open_view(ViewRequest(study=study, run="abmil", annotations=drawn))


def test_ctrl_c_ends_it_at_once_and_quietly(
    viewer: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = viewer
    # A browser keeps its connections.
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET /abmil/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.recv(65536)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert time.monotonic() - started < 10
    assert process.returncode == 0
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "c.svs" not in line] == []


def test_what_can_t_be_served_is_said_in_one_sentence(
    bagscope: Command, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = bagscope("view", study, "--port", port)
    assert ran.code == 2
    assert f"--port {port}: is in use; name another" in ran.err
    for arguments, said in (
        ((tmp_path / "none",), "no study here"),
        ((study, "abml"), "has no run 'abml' with scores (did you mean 'abmil'?)"),
        ((study, "../runs/abmil"), "has no run '../runs/abmil' with scores"),
        ((study, "unfinished"), "has no run 'unfinished' with scores"),
        ((study, "--token", "short"), "it must be 16 or more letters and digits"),
        ((study, "--host", "a..b"), "is no name or address of this machine"),
        ((study, "--host", "192.0.2.1"), "is no address of this machine"),
    ):
        ran = bagscope("view", *arguments)
        assert (ran.code, said in ran.err) == (2, True), ran.err
        assert "short" not in ran.err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ran = bagscope("view", study)
    assert ran.code == 2
    assert "pip install 'bagscope[view]'" in ran.err


def test_others_than_this_machine_need_a_token(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    for host in ("0.0.0.0", "0.0.0.0", "127.0.0.1", "localhost"):
        opened = open_view(ViewRequest(study=study, run="abmil", host=host))
        opened.listener.close()
        tokens.append(opened.token)
        assert opened.url.endswith(f"/?token={opened.token}" if opened.token else "/")
    assert tokens[0] is not None
    assert len(tokens[0]) >= 32
    assert tokens[0] != tokens[1]
    assert tokens[2:] == [None, None]
    for token, given in (("random", None), (TOKEN, TOKEN)):
        opened = open_view(ViewRequest(study=study, token=token))
        opened.listener.close()
        assert opened.token is not None
        assert given in (None, opened.token)
    with pytest.raises(ConfigError, match="16 or more letters and digits"):
        open_view(ViewRequest(study=study, token="a token with spaces"))
