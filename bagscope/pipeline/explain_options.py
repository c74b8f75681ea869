"""What can be asked of an explanation; imports nothing heavy, so that a command's help is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from bagscope.artifacts import Json
from bagscope.errors import ConfigError
from bagscope.specs import did_you_mean

Method = Literal[
    "necessity", "sufficiency", "dose", "search", "leave-one-out", "gradients", "rollout",
    "faithfulness", "agreement",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
SHARES = (0.01, 0.05, 0.1, 0.2)
"""Of the tiles, hottest first, that are taken out, kept alone and transplanted."""
DOSES = (0, 1, 2, 4, 8)
CONTROLS = 20
"""Random draws beside each effect; the least p-value is 1 in 21."""
SEARCH_SHARE = 0.01
FEWEST_ROUNDS, MOST_ROUNDS = 10, 200
MOST_TILE_PASSES = 20_000_000
"""Tiles that a model without a closed form may be shown by a method that nobody named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainOptions:
    """How slides are explained.

    Attributes:
        target: that is asked about; the model's first one if None.
        class_name: whose probability is explained; the predicted class of each slide if None.
        methods: what is done; all, but for what would take too long, if None.
        shares: of the tiles, hottest first.
        dose_share: of the tiles that dose–response repeats.
        rounds: of the greedy searches; a share of the tiles if None.
        controls: random draws beside each effect.
        annotation_classes: that count in annotations; all if None.
        seed: of all draws.
        table: format of the table of tiles.
    """

    target: str | None = None
    class_name: str | None = None
    methods: tuple[Method, ...] | None = None
    shares: tuple[float, ...] = SHARES
    dose_share: float = 0.05
    rounds: int | None = None
    controls: int = CONTROLS
    annotation_classes: tuple[str, ...] | None = None
    seed: int = 0
    table: Literal["csv", "parquet"] = "csv"

    @property
    def wanted(self) -> tuple[Method, ...]:
        """Return the methods, in the order in which they are done."""
        return METHODS if self.methods is None else self.methods

    def fields(self) -> dict[str, Json]:
        """Return what a fingerprint is made of."""
        return {
            "target": self.target,
            "class": self.class_name,
            "methods": None if self.methods is None else sorted(self.methods),
            "shares": list(self.shares),
            "dose_share": self.dose_share,
            "rounds": self.rounds,
            "controls": self.controls,
            "annotation_classes": None
            if self.annotation_classes is None
            else sorted(self.annotation_classes),
            "seed": self.seed,
            "table": self.table,
        }


def require_options(options: ExplainOptions) -> None:
    """Refuse options out of their range.

    Raises:
        ConfigError: names the option and its value.
    """
    for name in options.wanted:
        if name not in METHODS:
            raise ConfigError(f"--methods: no method {name!r}{did_you_mean(name, METHODS)}")
    if not options.wanted:
        raise ConfigError(f"--methods names none; choose of {', '.join(METHODS)}")
    for option, values in (("--shares", options.shares), ("--dose-share", (options.dose_share,))):
        bad = [value for value in values if not 0 < value < 1]
        if bad or not values:
            shown = f"has {bad[0]:g}" if bad else "is empty"
            raise ConfigError(f"{option} {shown}; write shares above 0 and below 1, as 0.01,0.05")
    if options.rounds is not None and options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}; it must be 1 or more")
    if options.controls < 1:
        raise ConfigError(f"--controls is {options.controls}; it must be 1 or more")
