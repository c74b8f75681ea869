"""The viewer: a study's runs as pages, from the original slides, until Ctrl-C."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope.errors import ConfigError
from bagscope.pipeline.bundle import SCORES_NAME
from bagscope.pipeline.study import open_study
from bagscope.specs import did_you_mean
from bagscope.wording import counted

if TYPE_CHECKING:
    from bagscope.heatmaps.review.live.gate import Gate
    from bagscope.heatmaps.review.live.readers import SlideReaders
    from bagscope.heatmaps.review.live.served import PageFiles, ServedRun

LOCAL = "127.0.0.1"
RANDOM_TOKEN = "random"
SHORTEST_TOKEN = 16
CACHE_MIB = 256
READERS = 2
_MOST_CONNECTIONS = 256
_MOST_HEADER_BYTES = 16 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRequest:
    """What is to be served, and to whom.

    Attributes:
        study: the study folder.
        run: the only one to show, all that have scores if None.
        host: name or address to listen at.
        port: a free one if 0.
        token: that every request must carry; `RANDOM_TOKEN` for a fresh one; None for a fresh one
            where others than this machine can ask, else for none.
        workers: processes that read slides.
        cache_mib: of pictures that are kept.
        annotations: GeoJSON files, one for each slide, to show.
    """

    study: Path
    run: str | None = None
    host: str = LOCAL
    port: int = 0
    token: str | None = None
    workers: int = READERS
    cache_mib: int = CACHE_MIB
    annotations: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenView:
    """A viewer that listens already, and has yet to answer.

    Attributes:
        url: to open, with the token where there is one.
        runs: that it shows, by name.
    """

    url: str
    runs: Mapping[str, ServedRun]
    listener: socket.socket
    token: str | None
    request: ViewRequest


def open_view(request: ViewRequest) -> OpenView:
    """Find the runs and start to listen.

    Raises:
        ConfigError: no such study or run, nothing to show, a host or port that can't be had.
    """
    _require_extra()
    from bagscope.heatmaps.review.live.gate import is_loopback

    runs = _runs(request)
    if len(runs) == 1:
        # Whatever is wrong with the only one is said here, and not in a browser.
        next(iter(runs.values())).data.cohort_script()
    listener = _listen(request.host, request.port)
    address, port = listener.getsockname()[:2]
    token = request.token
    if token == RANDOM_TOKEN or (token is None and not is_loopback(address)):
        token = secrets.token_urlsafe(24)
    name = socket.gethostname() if address in ("0.0.0.0", "::") else request.host
    host = f"[{name}]" if ":" in name else name
    query = f"?token={token}" if token else ""
    return OpenView(
        url=f"http://{host}:{port}/{query}",
        runs=runs,
        listener=listener,
        token=token,
        request=request,
    )


def serve(view: OpenView) -> None:
    """Answer requests until Ctrl-C."""
    from bagscope.heatmaps.review.live.readers import ReaderLimits, SlideReaders
    from bagscope.heatmaps.review.live.server import Viewer

    port = view.listener.getsockname()[1]
    readers = SlideReaders(ReaderLimits(workers=view.request.workers))
    try:
        viewer = Viewer(view.runs, _page(), readers, cache_mib=view.request.cache_mib)
        # Cookies do not tell ports apart, so the name does.
        _answer(viewer.app(token=view.token, cookie=f"bagscope_{port}"), view.listener, readers)
    except KeyboardInterrupt:
        return  # the usual end of a server
    finally:
        readers.close()
        view.listener.close()


def _answer(app: Gate, listener: socket.socket, readers: SlideReaders) -> None:
    import logging

    import uvicorn
    from anyio import to_thread

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # First of all: nobody is kept waiting for slides that are still being read.
            await to_thread.run_sync(readers.close)
            await super().shutdown(sockets)

    # It has nothing to say that is not said here; faults are logged where they are met.
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,  # addresses hold slide ids, and one of them the token
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_MOST_CONNECTIONS,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        timeout_graceful_shutdown=1,
    )
    Server(config).run(sockets=[listener])


def _require_extra() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"view needs the package {error.name}; install it with pip install 'bagscope[view]'"
        ) from None


def _runs(request: ViewRequest) -> dict[str, ServedRun]:
    """Return the runs and predictions of the study that have scores, by the names of heatmaps."""
    from bagscope.heatmaps.review.live.served import ServedRun
    from bagscope.pipeline.view_run import LiveRun

    if request.token is not None and request.token != RANDOM_TOKEN:
        _require_long(request.token)
    folder = open_study(request.study).folder
    found = {place.parent.name: place.parent for place in folder.glob(f"runs/[!.]*/{SCORES_NAME}")}
    for scores in folder.glob(f"predictions/[!.]*/[!.]*/{SCORES_NAME}"):
        found[f"{scores.parents[1].name}.{scores.parent.name}"] = scores.parent
    slides = {
        name: [path.stem for path in (place / SCORES_NAME).glob("[!.]*.h5")]
        for name, place in sorted(found.items())
    }
    shown = [name for name, own in slides.items() if own]
    if request.run is not None and request.run not in shown:
        raise ConfigError(
            f"{request.study}: has no run {request.run!r} with scores"
            f"{did_you_mean(request.run, shown)}"
        )
    if not shown:
        raise ConfigError(
            f"{request.study}: has no run with scores yet; make one with bagscope train"
        )
    chosen = [name for name in shown if request.run in (None, name)]
    drawn = _annotations(request, {slide_id for name in chosen for slide_id in slides[name]})
    return {
        name: ServedRun(
            name=name, about=counted(len(slides[name]), "slide"), data=LiveRun(found[name], drawn)
        )
        for name in chosen
    }


def _annotations(request: ViewRequest, slide_ids: set[str]) -> Mapping[str, Path]:
    if request.annotations is None:
        return {}
    from bagscope.pipeline.explain_annotations import annotation_files

    return annotation_files(request.annotations, sorted(slide_ids))


def _require_long(token: str) -> None:
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isalnum():
        raise ConfigError(
            f"the token has {len(token)} characters; it must be {SHORTEST_TOKEN} or more letters "
            f"and digits, or {RANDOM_TOKEN!r} for a fresh one"
        )


def _page() -> PageFiles:
    from bagscope.heatmaps.review.folder import INDEX_NAME, page_files
    from bagscope.heatmaps.review.live.served import PageFiles

    files = {name: path.read_bytes() for name, path in page_files().items()}
    index = files.pop(INDEX_NAME)
    return PageFiles(
        index=index,
        assets={name.removeprefix("assets/"): content for name, content in files.items()},
    )


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that others can already connect to.

    Raises:
        ConfigError: the host or the port can't be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError):
        raise ConfigError(f"--host {host}: is no name or address of this machine") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            what = f"--port {port}: is in use; name another, or leave it out for a free one"
        elif error.errno == errno.EACCES:
            what = f"--port {port}: is not for everybody to use; name one from 1024 on"
        else:
            what = f"--host {host}: is no address of this machine ({error.strerror})"
        raise ConfigError(what) from None
    return listener
