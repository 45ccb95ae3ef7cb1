"""What a single value of a config may be. Every refusal is `key: what is wrong`; whoever reads the file names it.

A key that is still missing passes: OmegaConf builds defaults before it looks for missing values, and says so itself.
"""

from __future__ import annotations

from nemo_cascade.types import UserError


def choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value outside `choices`, naming the key."""
    if value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(choices)}")


def at_least(key: str, value: float | None, low: float) -> None:
    """Refuse a number below `low` (or no number at all, nan), naming the key. None and a missing value pass."""
    if not _absent(value) and not value >= low:
        raise UserError(f"{key}: {value} is below {low}")


def above(key: str, value: float | None, low: float) -> None:
    """Refuse a number that is not above `low`, naming the key."""
    if not _absent(value) and not value > low:
        raise UserError(f"{key}: {value} is not above {low}")


def share(key: str, value: float) -> None:
    """Refuse what is no share, naming the key."""
    if not _absent(value) and not 0.0 <= value <= 1.0:
        raise UserError(f"{key}: {value} is outside [0, 1]")


def nucleus(key: str, value: float) -> None:
    """Refuse a top-p that keeps no token, naming the key."""
    if not 0.0 < value <= 1.0:
        raise UserError(f"{key}: {value} is outside (0, 1]; use 1 to keep every token")


def interval(low_key: str, low: float, high_key: str, high: float) -> None:
    """Refuse bounds that hold nothing between them."""
    at_least(low_key, low, 0.0)
    at_least(high_key, high, low)


def _absent(value: object) -> bool:
    return value is None or isinstance(value, str)
