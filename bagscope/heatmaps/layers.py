"""Everything that can be drawn of a slide: layers, and the colours that a run's slides share.

usual         the scores on the scale that is usual for their kind, of each class there is one of
contribution  what tiles add to each class's logit
rollout       where the weight came from through all layers, of models with layers of attention
disagreement  how far the members are apart on the usual scale: their standard deviation there
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bagscope.errors import ArtifactError
from bagscope.heatmaps.bag_scores import bag_scores, member_bag_scores
from bagscope.heatmaps.choices import ScaleName, Shows
from bagscope.heatmaps.colours import ColourScale, shared_scale, usual_range
from bagscope.heatmaps.scores import Column, disagreement, on_scale, scales_for
from bagscope.mil.score_file import ScoreFile

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerKind:
    """What a layer shows, on every slide of a run.

    Attributes:
        scale: that its numbers are on.
        shows: the mean over the members, or how far they are apart.
        column: whose numbers they are.
    """

    scale: ScaleName
    shows: Shows
    column: Column

    @property
    def id(self) -> str:
        """Return a name that no other layer of the run has: "ratio", "disagreement-ratio-tumor"."""
        parts = [*([self.shows] if self.shows == "disagreement" else []), self.scale]
        return "-".join([*parts, *([self.column.name] if self.column.name else [])])


ROLLOUT = LayerKind(scale="rollout", shows="score", column=Column(name="", index=0))
"""The same for all classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Numbers of a slide's tiles, ready to be drawn.

    Attributes:
        kind: what they are.
        values: (n,) one per tile.
        colours: the run's.
    """

    kind: LayerKind
    values: Array
    colours: ColourScale

    @property
    def title(self) -> str:
        """Return what the numbers are, and whose."""
        return self.colours.title + (f": {self.class_name}" if self.class_name else "")

    @property
    def meaning(self) -> str:
        """Return how to read a number."""
        return self.colours.meaning

    @property
    def class_name(self) -> str:
        """Return whose numbers they are; empty where they are the same for all classes."""
        return self.kind.column.name


def score_columns(names: tuple[str, ...]) -> tuple[Column, ...]:
    """Return what can be drawn of columns: each class, or all columns together."""
    if len(names) == 1:
        return (Column(name="", index=0),)
    if all(name.isdigit() for name in names):
        return (Column(name="", index=None),)
    return tuple(Column(name=name, index=place) for place, name in enumerate(names))


def layer_kinds(file: ScoreFile, task: str | None) -> tuple[LayerKind, ...]:
    """Return the layers that a score file has, the usual scale's first.

    Args:
        file: of a slide.
        task: of the model's only target; None where it is not known or there are several.
    """
    usual = scales_for(file.score_kind, task)[0]
    columns = score_columns(file.score_names)
    kinds = [LayerKind(scale=usual, shows="score", column=column) for column in columns]
    if file.contributions is not None:
        kinds += [
            LayerKind(scale="contribution", shows="score", column=column)
            for column in contribution_columns(file)
        ]
    if file.rollout is not None:
        kinds.append(ROLLOUT)
    if has_disagreement(file):
        kinds += [LayerKind(scale=usual, shows="disagreement", column=one) for one in columns]
    return tuple(kinds)


def contribution_columns(file: ScoreFile) -> tuple[Column, ...]:
    """Return the logits that tiles add to; the only one has no name."""
    names = file.contribution_names
    alone = len(names) == 1
    return tuple(Column(name="" if alone else name, index=i) for i, name in enumerate(names))


def has_disagreement(file: ScoreFile) -> bool:
    """Return whether several members answered, whose own scores are known."""
    return file.member_scores is not None and len(file.member_scores) > 1


def layer_values(
    file: ScoreFile, kind: LayerKind, beside: Mapping[str, ScoreFile], task: str | None
) -> Array:
    """Return one number per tile (n,).

    Args:
        file: of the slide.
        kind: a layer, also on scales that are not the usual one.
        beside: the files of its bag's other slides, by slide.
        task: of the model's only target.

    Raises:
        ArtifactError: the file has no such numbers, or ones that are not finite.
    """
    if kind.scale == "contribution":
        return _contributions(file, kind)
    if kind.scale == "rollout":
        return _rollout(file)
    if kind.shows == "score":
        bag = bag_scores(file, beside)
        return _on_scale(file, file.scores, kind, bag, task)
    if file.member_scores is None or not has_disagreement(file):
        raise ArtifactError(
            f"{file.slide_id}: {_lacking(file)}, so nothing is known of disagreement"
        )
    bags = member_bag_scores(file, beside)
    pairs = zip(file.member_scores, bags, strict=True)
    return disagreement(np.stack([_on_scale(file, own, kind, bag, task) for own, bag in pairs]))


def layer_colours(
    files: Mapping[str, ScoreFile],
    task: str | None,
    *,
    kinds: tuple[LayerKind, ...] | None = None,
) -> dict[LayerKind, ColourScale]:
    """Return the colours of a run's layers, in their order.

    The classes of a scale share theirs, so that a switch of class changes no colour's meaning. A
    slide whose numbers can't be used has no say.

    Args:
        files: of all slides of the run.
        task: of the model's only target.
        kinds: of layers; all that there are if None.
    """
    if kinds is None:
        kinds = tuple(
            dict.fromkeys(kind for file in files.values() for kind in layer_kinds(file, task))
        )
    ranges: dict[tuple[ScaleName, Shows], list[tuple[float, float]]] = {
        (kind.scale, kind.shows): [] for kind in kinds
    }
    for file in files.values():
        there = {(kind.scale, kind.shows) for kind in layer_kinds(file, task)}
        for kind in kinds:
            key = (kind.scale, kind.shows)
            if key in there:
                ranges[key] += _ranges(file, kind, files, task)
    score_kind = next(iter(files.values())).score_kind
    colours = {
        (scale, shows): shared_scale(scale, score_kind, found, shows=shows)
        for (scale, shows), found in ranges.items()
    }
    return {kind: colours[kind.scale, kind.shows] for kind in kinds}


def layers_of(
    file: ScoreFile,
    beside: Mapping[str, ScoreFile],
    colours: Mapping[LayerKind, ColourScale],
    task: str | None,
) -> tuple[Layer, ...]:
    """Return the layers of one slide; those that it lacks are left out.

    Args:
        file: of the slide.
        beside: the files of its bag's other slides, by slide.
        colours: of the run (see `layer_colours`).
        task: of the model's only target.

    Raises:
        ArtifactError: scores that are no finite numbers.
    """
    there = set(layer_kinds(file, task))
    return tuple(
        Layer(kind=kind, values=layer_values(file, kind, beside, task), colours=scale)
        for kind, scale in colours.items()
        if kind in there
    )


def _contributions(file: ScoreFile, kind: LayerKind) -> Array:
    if file.contributions is None:
        why = (
            "its scores are of an older bagscope; predict anew"
            if file.faithfulness is None
            else "the model's logits are no sum over tiles"
        )
        raise ArtifactError(f"{file.slide_id}: has no contributions: {why}")
    if not np.isfinite(file.contributions).all():
        raise ArtifactError(
            f"{file.slide_id}: has contributions that are no finite numbers; ask the model again "
            "with --overwrite"
        )
    index = kind.column.index
    assert index is not None, "every logit has a column of its own"
    return file.contributions[:, index].astype(np.float64)


def _rollout(file: ScoreFile) -> Array:
    if file.rollout is None:
        raise ArtifactError(
            f"{file.slide_id}: has no rollout; its model has no layers of attention to be rolled "
            "out, or its scores are of an older bagscope (predict anew)"
        )
    if not np.isfinite(file.rollout).all():
        raise ArtifactError(
            f"{file.slide_id}: has a rollout that is no finite numbers; ask the model again with "
            "--overwrite"
        )
    return file.rollout.astype(np.float64)


def _on_scale(
    file: ScoreFile,
    own: NDArray[np.floating],
    kind: LayerKind,
    bag: NDArray[np.floating],
    task: str | None,
) -> Array:
    return on_scale(own, file.score_kind, kind.scale, kind.column, bag_scores=bag, task=task)


def _lacking(file: ScoreFile) -> str:
    if file.member_scores is None:
        return "its scores are of an older bagscope, which kept the mean alone (predict anew)"
    return f"one model alone answered, {file.members[0]}"


def _ranges(
    file: ScoreFile, kind: LayerKind, files: Mapping[str, ScoreFile], task: str | None
) -> Iterator[tuple[float, float]]:
    try:
        yield usual_range(layer_values(file, kind, files, task))
    except ArtifactError:
        return
