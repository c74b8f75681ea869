"""The model bundle: every member of a run, its final model, and all that predicting needs.

    model.bagscope/
      bundle.json                what the models are of, and which one answers by default
      members/<name>/            member.json, member.safetensors: a member per fold and seed
      final/                     the same, refitted on all patients, where there is one
      complete.json              every file's hash, written last

Nothing in it names a path, a host or a patient.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from bagscope import artifacts
from bagscope.artifacts import Json
from bagscope.errors import ConfigError, SchemaError
from bagscope.mil.cases import Per
from bagscope.mil.feature_origin import FeatureOrigin
from bagscope.mil.member import FACTS_NAME, WEIGHTS_NAME, Member, load_member
from bagscope.mil.targets import TargetSpec

BUNDLE_NAME = "model.bagscope"
DESCRIPTION_NAME = "bundle.json"
FINAL_NAME = "final"
SCHEMA_VERSION = 1
_MEMBERS = "members"

Choice = Literal["ensemble", "final", "all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberPlace:
    """Whose fold a member was tested on; of the final model, nobody's."""

    name: str
    repeat: int = 0
    fold: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A loaded bundle.

    Attributes:
        run: name of the run that it was made by.
        default: what answers where nothing is asked for: the final model where there is one, else
            the ensemble of the members.
        per: what a case is.
        origin: of the features that it was trained on.
        places: of the members and then of the final model.
        members: by name, the final one as "final".
        fingerprint: of the whole bundle.
    """

    path: Path
    run: str
    default: Choice
    per: Per
    origin: FeatureOrigin
    places: tuple[MemberPlace, ...]
    members: Mapping[str, Member]
    fingerprint: str

    @property
    def targets(self) -> tuple[TargetSpec, ...]:
        """Return what the models predict, with the classes."""
        return next(iter(self.members.values())).targets

    def chosen(self, choice: Choice | None = None) -> tuple[MemberPlace, ...]:
        """Return the members that are to answer.

        Raises:
            ConfigError: the final model is asked for, and there is none.
        """
        choice = choice or self.default
        if choice == "final" and FINAL_NAME not in self.members:
            raise ConfigError(
                f"{self.path}: holds no final model; make one with bagscope train --final, or ask "
                "for --members ensemble"
            )
        if choice == "final":
            return tuple(place for place in self.places if place.name == FINAL_NAME)
        return tuple(place for place in self.places if place.name != FINAL_NAME)


def write_bundle(
    path: Path,
    *,
    run: str,
    per: Per,
    origin: FeatureOrigin,
    members: Sequence[tuple[MemberPlace, Path]],
    final: Path | None = None,
) -> bool:
    """Write a bundle of finished members; return whether it is new.

    Args:
        path: of the bundle; one that is there and holds something else is replaced.
        run: name of the run.
        per: what a case is.
        origin: of the features.
        members: each with its folder.
        final: folder of the final model.

    Raises:
        SchemaError: a member that is not finished, or damaged.
    """
    folders = {place.name: folder for place, folder in members}
    if final is not None:
        folders[FINAL_NAME] = final
    loaded = {name: load_member(folder) for name, folder in folders.items()}
    description = {
        "schema_version": SCHEMA_VERSION,
        "run": run,
        "default": "final" if final is not None else "ensemble",
        "per": per,
        "features": origin.to_json(),
        "members": [
            {"name": p.name, "repeat": p.repeat, "fold": p.fold, "seed": p.seed} for p, _ in members
        ],
        "has_final": final is not None,
        "models": {name: _described(member) for name, member in loaded.items()},
    }
    hashes = {
        name: artifacts.sha256_of_file(folder / FACTS_NAME) for name, folder in folders.items()
    }
    fields: dict[str, Json] = {"stage": "bundle", "description": description, "members": hashes}
    if _is_same(path, fields):
        return False
    with artifacts.atomic_folder(path, fields, replace=True) as temporary:
        for name, folder in folders.items():
            target = temporary / FINAL_NAME if name == FINAL_NAME else temporary / _MEMBERS / name
            target.mkdir(parents=True)
            for file in (WEIGHTS_NAME, FACTS_NAME):
                shutil.copyfile(folder / file, target / file)
                artifacts.step("member-copied")
        artifacts.write_json(temporary / DESCRIPTION_NAME, description)
    return True


def find_bundle(place: Path) -> Path:
    """Return the bundle that is meant by a path: itself, or that of a run folder.

    Raises:
        ConfigError: there is none.
    """
    for path in (place, place / BUNDLE_NAME):
        if path.name.endswith(".bagscope") and path.is_dir():
            return path
        if artifacts.is_complete(path):
            return path
    raise ConfigError(
        f"{place}: no model there; give a {BUNDLE_NAME} folder, or a run that has come to its end"
    )


def load_bundle(path: Path) -> Bundle:
    """Read a bundle; every file is compared with its hash first.

    Raises:
        SchemaError: incomplete, changed since it was written, or of a newer bagscope.
    """
    record = artifacts.read_complete(path)
    if faults := artifacts.folder_faults(path):
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise SchemaError(f"{faults[0]}{more}; get the bundle anew")
    description = artifacts.read_json(path / DESCRIPTION_NAME)
    version = description["schema_version"]
    if version > SCHEMA_VERSION:
        raise SchemaError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that "
            "this bagscope reads; update bagscope"
        )
    places = [MemberPlace(**place) for place in description["members"]]
    members = {place.name: load_member(path / _MEMBERS / place.name) for place in places}
    if description["has_final"]:
        places.append(MemberPlace(name=FINAL_NAME))
        members[FINAL_NAME] = load_member(path / FINAL_NAME)
    return Bundle(
        path=path,
        run=description["run"],
        default=cast(Choice, description["default"]),
        per=cast(Per, description["per"]),
        origin=FeatureOrigin.from_json(description["features"]),
        places=tuple(places),
        members=members,
        fingerprint=record["fingerprint"],
    )


def _described(member: Member) -> dict[str, Json]:
    """Return what people want to know of a member without opening its files."""
    aggregator = member.recipe.aggregator
    return {
        "aggregator": {"name": aggregator.name, "options": dict(aggregator.options)},
        "targets": {
            target.name: {"task": target.task, "classes": list(target.classes)}
            for target in member.targets
        },
        "temperatures": dict(member.temperatures),
        "uncalibrated": dict(member.uncalibrated),
        "thresholds": dict(member.thresholds),
        "unchosen": dict(member.unchosen),
        "seed": member.seed,
        "epoch": member.epoch,
        "ood_false_alarm_rate": None if member.ood is None else member.ood.false_alarm_rate,
    }


def _is_same(path: Path, fields: Mapping[str, Json]) -> bool:
    try:
        same = artifacts.read_complete(path)["fingerprint"] == artifacts.fingerprint(fields)
        return bool(same and not artifacts.folder_faults(path))
    except SchemaError:
        return False
