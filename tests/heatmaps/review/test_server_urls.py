"""No address leads out of the study, and none makes the viewer stumble."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagscope.heatmaps.review.live.reader import FactsWanted, SlideFacts, Wanted
from bagscope.heatmaps.review.live.readers import Reading, SlideReaders
from bagscope.heatmaps.review.pyramid import Picture
from tests.heatmaps.review.asgi import Client, client_of
from tests.heatmaps.review.served_runs import PAGE, made_viewer

PICTURE = Picture(width=100_000, height=60_000, downsample=1.0, x_l0=0, y_l0=0)
JPEG = b"a picture of the slide"
SAYS = {
    200: (PAGE.index, *PAGE.assets.values(), JPEG, b"bagscope.cohort", b"bagscope.slide"),
    307: (b"",),
    404: (b"There is nothing at this address; start at the list of runs, at /.\n",),
}
ESCAPES = [
    "/abmil/assets/../../../../etc/passwd",
    "/abmil/assets/..%2f..%2f..%2fetc%2fpasswd",
    "/abmil/assets/%2e%2e/%2e%2e/etc/passwd",
    "/abmil/assets/%252e%252e%252fetc%252fpasswd",
    "/abmil/assets/..%5c..%5cetc%5cpasswd",
    "/abmil/assets/%00",
    "/abmil/assets/app.css%00.js",
    "/abmil/assets//etc/passwd",
    "/abmil/assets/%2Fetc%2Fpasswd",
    "/abmil/assets/%c0%ae%c0%ae/%c0%ae%c0%ae/etc/passwd",
    "/abmil/assets/%ff",
    "/abmil/assets/",
    "/abmil/slides/../cohort.csv",
    "/abmil/slides/%2e%2e/slide.js",
    "/abmil/slides/a%2f..%2fa/slide.js",
    "/abmil/slides/a%00/slide.js",
    "/abmil/slides/A/slide.js",
    "/abmil/slides/a/tiles/..%2f7.jpg",
    "/abmil/slides/a/tiles/%2e%2e/7.jpg",
    "/abmil/slides/a/picture_files/../slide.js",
    "/abmil/slides/a/picture_files/16/0_0.jpg/../../../../etc/passwd",
    "/abmil/slides/a/picture_files/%31%36/0_0.jpg%0a",
    "/abmil/slides/a/picture_files/1٦/0_0.jpg",
    "/..",
    "/../etc/passwd",
    "/%2e%2e%2fetc%2fpasswd",
    "//etc/passwd",
    "/file:///etc/passwd",
    "/abmil/..",
    "/runs/abmil/scores/a.h5",
    "/abmil/cohort.csv",
    "/abmil/data/../cohort.csv",
    "/.git/config",
    "*",
    "http://127.0.0.1/",
]
OUT_OF_RANGE = [
    "17/197_0",
    "17/0_118",
    "17/196_118",
    "18/0_0",
    "99/0_0",
    "100/0_0",
    "-1/0_0",
    "17/-1_0",
    "17/9999999_9999999",
    "17/99999999999999999999_0",
    "17/0x1_0",
    "17/1e1_0",
    "17/1.0_0",
    "17/ 1_0",
    "17/+1_0",
    "0/1_0",
    "17/0_0.png",
]


class InstantReaders:
    """Answers as workers would, about one large slide."""

    def ask(self, wanted: Wanted) -> Future[Reading]:
        future: Future[Reading] = Future()
        facts = SlideFacts(width_l0=100_000, height_l0=60_000, mpp=0.25, picture=PICTURE)
        if isinstance(wanted, FactsWanted):
            future.set_result(Reading(jpeg=b"", whole=True, facts=facts))
        else:
            future.set_result(Reading(jpeg=JPEG, whole=True, facts=None))
        return future


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    readers = cast(SlideReaders, InstantReaders())
    viewer = made_viewer({"a": Path("/data/a.svs")}, readers)
    with client_of(viewer.app(token=None)) as made:
        yield made


@pytest.mark.parametrize("target", ESCAPES)
def test_no_spelling_leads_out_of_the_study(client: Client, target: str) -> None:
    answer = client.get(target)
    assert answer.status == 404
    assert answer.body in SAYS[404]


@pytest.mark.parametrize("place", OUT_OF_RANGE)
def test_a_tile_beyond_the_slide_is_nothing(client: Client, place: str) -> None:
    name = place if place.endswith(".png") else f"{place}.jpg"
    answer = client.get(f"/abmil/slides/a/picture_files/{name}")
    assert (answer.status, answer.body) == (404, *SAYS[404])


def test_the_last_tile_of_a_huge_slide_is_there(client: Client) -> None:
    columns, rows = PICTURE.tile_counts(PICTURE.last_level)
    last = f"/abmil/slides/a/picture_files/{PICTURE.last_level}/{columns - 1}_{rows - 1}.jpg"
    assert client.get(last).body == JPEG


PARTS = st.one_of(
    st.sampled_from(
        ["abmil", "assets", "slides", "data", "a", "app.css", "cohort.js", "slide.js", "thumb.jpg",
         "picture_files", "tiles", "16", "0_0.jpg", "7.jpg", "..", "%2e%2e", "%2f", "%00", ""]
    ),
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="?"), max_size=8),
    st.lists(st.integers(0, 255), max_size=4).map(lambda b: "".join(f"%{one:02x}" for one in b)),
    st.builds("{}_{}.jpg".format, st.integers(-2, 10**9), st.integers(-2, 10**9)),
)  # fmt: skip


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PARTS, max_size=7), query=st.sampled_from(["", "?", "?token=x", "?a=%ff"]))
def test_any_address_is_answered_with_what_is_served_or_with_nothing(
    client: Client, parts: list[str], query: str
) -> None:
    answer = client.get("/" + "/".join(parts) + query)
    assert answer.status in SAYS
    assert answer.body.startswith(SAYS[answer.status])
    if answer.status == 307:
        assert answer.headers["location"] == "abmil/"
