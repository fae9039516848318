"""What every table of the configuration is made of: checked numbers, and values as text."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

LARGEST_SEED = 2**63 - 1
NUM_TIMESTEPS = 1000
"""Training steps of every schedule; dmd2_core has it too, but takes seconds to import."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """The values that a number may take: `low` to `high`, without an end where it is open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """False for NaN and infinities as well."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"greater than {self.low}" if self.open_low else f"at least {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.open_high else 'at most'} {self.high}"


def number(default: Any = MISSING, **bounds: Any) -> Any:
    """A field whose number, or each of whose numbers, must lie within `Bounds(**bounds)`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A TOML table; checks its numbers against their bounds."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            bounds = item.metadata.get("bounds")
            if bounds is None or value is None:
                continue
            for number in value if isinstance(value, tuple) else (value,):
                if not bounds.holds(number):
                    which = "each of its numbers" if isinstance(value, tuple) else "it"
                    raise ValueError(
                        f"{self.section}.{item.name} is {show_value(value)}; "
                        f"set {which} to {bounds}."
                    )


def show_value(value: Any) -> str:
    """A value as the user would write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    return str(list(value)) if isinstance(value, tuple) else repr(value)
