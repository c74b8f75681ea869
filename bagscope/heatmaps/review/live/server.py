"""The viewer's addresses: those of the static bundle, answered from the slides themselves.

    /                                               the runs, or the only one
    /<run>/                                         the page
    /<run>/assets/<name>                            its files
    /<run>/data/cohort.js                           the table of slides
    /<run>/slides/<key>/slide.js                    a slide's scores
    /<run>/slides/<key>/thumb.jpg
    /<run>/slides/<key>/picture_files/<level>/<column>_<row>.jpg
    /<run>/slides/<key>/tiles/<name>.jpg            of the gallery

Every name in an address is looked up among those of the runs, of a run's slides and of the page's
files, and none is ever made part of a path, so there is no address that leads out of the study.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Hashable, Mapping
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from bagscope.errors import BagscopeError, SlideError, in_one_line
from bagscope.heatmaps.review.live.byte_cache import ByteCache
from bagscope.heatmaps.review.live.gate import NOTHING, Gate, sentence
from bagscope.heatmaps.review.live.reader import (
    FactsWanted,
    SlideAt,
    SlideFacts,
    ThumbWanted,
    TileWanted,
)
from bagscope.heatmaps.review.live.readers import TooBusy
from bagscope.heatmaps.review.live.run_list import run_list
from bagscope.heatmaps.review.pyramid import unreadable_tile

if TYPE_CHECKING:
    from bagscope.heatmaps.review.live.reader import Wanted
    from bagscope.heatmaps.review.live.readers import Reading, SlideReaders
    from bagscope.heatmaps.review.live.served import PageFiles, ServedRun

_Made = TypeVar("_Made")
_log = logging.getLogger(__name__)

CACHE_MIB = 256.0
_THREADS = 2
_RETRY_S = 2
_TILE = re.compile(r"(\d{1,2})/(\d{1,7})_(\d{1,7})\.jpg", re.ASCII)
_SCRIPT = "text/javascript"
_JPEG = "image/jpeg"
_TYPES = {".css": "text/css", ".js": _SCRIPT, ".txt": "text/plain", ".svg": "image/svg+xml"}
_KEPT_BY_BROWSER = "private, no-cache"
"""Kept, but asked for again: the next viewer on this port may show other slides."""

_NO_PICTURE = "This picture can't be read from its slide."
_NO_DATA = "The data of this page can't be put together; the terminal of the viewer says why."
_BUSY = "The viewer is reading as much as it may; ask again in a moment."
_OWN_FAULT = "The viewer met a fault of its own; its terminal says more."


class _Partly(Exception):
    """A picture that could be read in part only."""

    def __init__(self, jpeg: bytes) -> None:
        super().__init__()
        self.jpeg = jpeg


class Viewer:
    """Answers requests about several runs; lives in one event loop.

    Args:
        runs: to serve, in the order of the list.
        page: the page's files.
        readers: who reads slides.
        cache_mib: of pictures and scripts that are kept.
    """

    def __init__(
        self,
        runs: Mapping[str, ServedRun],
        page: PageFiles,
        readers: SlideReaders,
        *,
        cache_mib: float = CACHE_MIB,
    ) -> None:
        self._runs = runs
        self._page = page
        self._readers = readers
        self.cache = ByteCache(round(cache_mib * (1 << 20)))
        self._places: dict[tuple[str, str], SlideAt | None] = {}
        self._facts: dict[SlideAt, SlideFacts] = {}
        self._being_made: dict[Hashable, asyncio.Task[bytes]] = {}
        self._threads = anyio.CapacityLimiter(_THREADS)
        # Of this viewer only: at the same address tomorrow may lie another slide.
        self._etag = f'"{secrets.token_hex(8)}"'

    def app(self, *, token: str | None, cookie: str = "bagscope") -> Gate:
        """Return the application, behind its gate.

        Args:
            token: that every request must carry; None where only this machine can ask.
            cookie: name of the cookie that carries it.
        """
        slide = "/{run}/slides/{key}"
        routes: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/": self._front,
            "/assets/{name}": self._front_asset,
            "/{run}": self._to_page,
            "/{run}/": self._index,
            "/{run}/assets/{name}": self._asset,
            "/{run}/data/cohort.js": self._cohort,
            f"{slide}/slide.js": self._slide,
            f"{slide}/thumb.jpg": self._thumb,
            f"{slide}/picture_files/{{tile:path}}": self._tile,
            f"{slide}/tiles/{{name}}": self._gallery_tile,
        }

        inner = Starlette(
            routes=[Route(path, handler) for path, handler in routes.items()],
            exception_handlers={
                HTTPException: _nothing_here,
                TooBusy: _too_busy,
                SlideError: _no_picture,
                BagscopeError: _no_data,
                Exception: _own_fault,
            },
        )
        inner.router.redirect_slashes = False
        return Gate(inner, token, cookie)

    # --- the page ---------------------------------------------------------------------------

    async def _front(self, request: Request) -> Response:
        if len(self._runs) == 1:
            return RedirectResponse(f"{next(iter(self._runs))}/")
        return Response(run_list(self._runs.values()), media_type="text/html")

    async def _front_asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = self._page.assets.get(name)
        if content is None:
            raise HTTPException(404)
        kind = _TYPES.get(name[name.rfind(".") :], "application/octet-stream")
        return self._not_modified(request) or self._kept(content, kind)

    async def _to_page(self, request: Request) -> Response:
        return RedirectResponse(f"{self._run_of(request).name}/")

    async def _index(self, request: Request) -> Response:
        self._run_of(request)
        return Response(self._page.index, media_type="text/html")

    async def _asset(self, request: Request) -> Response:
        self._run_of(request)
        return await self._front_asset(request)

    # --- data -------------------------------------------------------------------------------

    async def _cohort(self, request: Request) -> Response:
        run = self._run_of(request)

        async def make() -> bytes:
            return await self._in_thread(run.data.cohort_script)

        return Response(await self._made_once((run.name, ""), make), media_type=_SCRIPT)

    async def _slide(self, request: Request) -> Response:
        run, key, at = await self._slide_of(request)
        facts = None
        if at is not None:
            try:
                facts = await self._facts_of(at)
            except SlideError as error:
                _log.warning("%s: shown without its slide: %s", key, in_one_line(error))

        async def make() -> bytes:
            return await self._in_thread(partial(run.data.slide_script, key, facts))

        # The slide may be there again when it is next asked for, hence the last part of the name.
        script = await self._made_once((run.name, key, facts is None), make)
        return Response(script, media_type=_SCRIPT)

    # --- pictures ---------------------------------------------------------------------------

    async def _thumb(self, request: Request) -> Response:
        _, _, at = await self._slide_of(request)
        if at is None:
            raise HTTPException(404)
        return await self._picture(request, ThumbWanted(slide=at))

    async def _tile(self, request: Request) -> Response:
        _, _, at = await self._slide_of(request)
        address = _TILE.fullmatch(request.path_params["tile"])
        if address is None or at is None:
            raise HTTPException(404)
        level, column, row = (int(number) for number in address.groups())
        picture = (await self._facts_of(at)).picture
        if not picture.has(level, column, row):
            raise HTTPException(404)
        try:
            return await self._picture(
                request, TileWanted(slide=at, level=level, column=column, row=row)
            )
        except SlideError as error:
            _log.warning("tile %d/%d_%d: %s", level, column, row, in_one_line(error))
            # An error would leave the coarser level's pixels in its place, as if they were all.
            stripes = unreadable_tile(picture, level, column, row)
            return Response(stripes, media_type=_JPEG)

    async def _gallery_tile(self, request: Request) -> Response:
        run, key, _ = await self._slide_of(request)
        name = request.path_params["name"]
        wanted = await self._in_thread(partial(run.data.gallery_tile, key, name))
        if wanted is None:
            raise HTTPException(404)
        return await self._picture(request, wanted)

    async def _picture(self, request: Request, wanted: Wanted) -> Response:
        unchanged = self._not_modified(request)
        if unchanged:
            return unchanged

        async def make() -> bytes:
            reading = await self._read(wanted)
            if not reading.whole:
                raise _Partly(reading.jpeg)
            return reading.jpeg

        try:
            return self._kept(await self._made_once(wanted, make), _JPEG)
        except _Partly as partly:
            # Not kept anywhere: what can't be read now may be read later.
            return Response(partly.jpeg, media_type=_JPEG)

    # --- what they stand on -----------------------------------------------------------------

    def _run_of(self, request: Request) -> ServedRun:
        run = self._runs.get(request.path_params["run"])
        if run is None:
            raise HTTPException(404)
        return run

    async def _slide_of(self, request: Request) -> tuple[ServedRun, str, SlideAt | None]:
        run, key = self._run_of(request), request.path_params["key"]
        if (run.name, key) not in self._places:
            try:
                at = await self._in_thread(partial(run.data.slide_at, key))
            except KeyError:
                raise HTTPException(404) from None
            self._places[run.name, key] = at
        return run, key, self._places[run.name, key]

    async def _facts_of(self, at: SlideAt) -> SlideFacts:
        if at not in self._facts:
            facts = (await self._read(FactsWanted(slide=at))).facts
            assert facts is not None, "facts were asked for"
            self._facts[at] = facts
        return self._facts[at]

    async def _read(self, wanted: Wanted) -> Reading:
        return await asyncio.wrap_future(self._readers.ask(wanted))

    async def _in_thread(self, make: Callable[[], _Made]) -> _Made:
        return await anyio.to_thread.run_sync(make, limiter=self._threads)

    async def _made_once(self, key: Hashable, make: Callable[[], Awaitable[bytes]]) -> bytes:
        """Return what is kept, or being made for somebody else, or make it."""
        kept = self.cache.get(key)
        if kept is not None:
            return kept

        async def make_and_keep() -> bytes:
            try:
                content = await make()
            finally:
                del self._being_made[key]
            self.cache.put(key, content)
            return content

        if key not in self._being_made:
            self._being_made[key] = asyncio.create_task(make_and_keep())
        return await asyncio.shield(self._being_made[key])

    def _kept(self, content: bytes, kind: str) -> Response:
        headers = {"cache-control": _KEPT_BY_BROWSER, "etag": self._etag}
        return Response(content, media_type=kind, headers=headers)

    def _not_modified(self, request: Request) -> Response | None:
        if self._etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers={"etag": self._etag})
        return None


# --- what went wrong, in a sentence -------------------------------------------------------------


async def _nothing_here(request: Request, error: Exception) -> Response:
    return sentence(404, NOTHING)


async def _too_busy(request: Request, error: Exception) -> Response:
    return sentence(503, _BUSY, {"retry-after": str(_RETRY_S)})


async def _no_picture(request: Request, error: Exception) -> Response:
    _log.warning("%s", in_one_line(error))
    return sentence(404, _NO_PICTURE)


async def _no_data(request: Request, error: Exception) -> Response:
    _log.warning("%s", in_one_line(error))
    return sentence(404, _NO_DATA)


async def _own_fault(request: Request, error: Exception) -> Response:
    _log.error("fault of the viewer's own", exc_info=error)
    return sentence(500, _OWN_FAULT)
