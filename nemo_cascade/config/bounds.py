"""What a single value of a config may be. Every refusal is `key: what is wrong`; whoever reads the file names it.

A key that is still missing passes: OmegaConf builds defaults before it looks for missing values, and says so itself.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from nemo_cascade.types import UserError

_SECRET = re.compile(
    r"[^=]*(key|token|secret|passw|credential|signature|\bauth|\bsig\b|\bcode\b|\bpwd\b)[^=]*=."
    r"|[^=]*=(bearer |sk-|hf_|nvapi-)",
    re.IGNORECASE,
)  # a pair of a query


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


def no_secret(key: str, url: str, instead: str = "") -> None:
    """Refuse an address that holds a password or a key, without repeating it: addresses are written to every
    config.yaml and read aloud in errors. `instead` says where a key belongs.
    """
    found = "a user name or password before its @ (an @ of a path is written %40)" if "@" in url else ""
    if any(_SECRET.match(unquote(pair)) for pair in re.split("[?#&;]", url)[1:]):
        found = "a key in its query"
    if found:
        raise UserError(f"{key}: holds {found}, which would be written to every config.yaml; take it out{instead}")


def web_address(key: str, url: str, instead: str = "") -> None:
    """Refuse what is no http address, and one that holds a secret."""
    no_secret(key, url, instead)
    try:
        parts = urlsplit(url.strip())
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        named = False
    if not named:
        raise UserError(f"{key}: must start with http:// or https:// and name a host, as in http://localhost:8000")


def _absent(value: object) -> bool:
    return value is None or isinstance(value, str)
