"""Every exception that bagscope raises on purpose.

    BagscopeError
    ├── ConfigError              wrong usage or configuration: exit code 2
    │   └── CohortError          the cohort table: names row, column and value
    ├── SlideError               one slide can't be used: that slide fails, the others go on
    │   ├── UnsupportedSlide     no backend opens the file
    │   ├── SpacingError         no believable pixel size
    │   └── ReadError            pixels that could not be read
    ├── ArtifactError            a file of ours that can't be used
    │   ├── SchemaError          its content is not what its schema says
    │   └── FingerprintMismatch  made from another slide or with other settings
    ├── EncoderUnavailable       weights or a package missing
    └── WorkerError              the process that worked on a slide came to a bad end
        ├── WorkerDied           killed, or a native library crashed
        ├── WorkerTimeout        took longer than allowed
        └── WorkerOutOfMemory    grew beyond its ceiling

A message says what, where, the value seen and what to do next, in one sentence:
"a.svs: no pixel size (looked at openslide.mpp-x, tiff.XResolution); pass --mpp, or add an mpp
column."
"""

from __future__ import annotations


class BagscopeError(Exception):
    """Something went wrong that the user can understand and act on."""


class ConfigError(BagscopeError):
    """The command line, a study file or a spec asks for something that can't be done."""


class CohortError(ConfigError):
    """The cohort table, or a table joined to it, is not usable as it stands."""


class SlideError(BagscopeError):
    """One slide can't be used."""


class UnsupportedSlide(SlideError):
    """No backend recognises the file as a slide."""


class SpacingError(SlideError):
    """The slide states no believable pixel size, or not one that the request can use."""


class ReadError(SlideError):
    """Pixels of the slide could not be read."""


class ArtifactError(BagscopeError):
    """An artefact can't be used."""


class SchemaError(ArtifactError):
    """An artefact's content is not what its schema promises."""


class FingerprintMismatch(ArtifactError):
    """An artefact exists, but was made from other inputs or with other settings."""


class EncoderUnavailable(BagscopeError):
    """An encoder's weights, or the package that builds it, are not at hand."""


class WorkerError(BagscopeError):
    """The process that worked on a slide came to a bad end."""


class WorkerDied(WorkerError):
    """The worker was killed, or a native library crashed it."""


class WorkerTimeout(WorkerError):
    """The slide took longer than allowed."""


class WorkerOutOfMemory(WorkerError):
    """The worker grew beyond its memory ceiling."""


def first_line(error: BaseException, *, longest: int | None = None) -> str:
    """Return the first line of what an error says, else its class, cut at `longest` letters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]


def in_one_line(error: BaseException) -> str:
    """Return all that an error says with its line ends made spaces, else its class."""
    return " ".join(str(error).split()) or type(error).__name__
