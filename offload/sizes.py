"""Sizes as people write them: `8GiB`, `500MB`, `50%`."""

from __future__ import annotations

import re
from decimal import Decimal

from tiers import UsageError

_UNITS = {
    "": 1, "B": 1,
    "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_LARGEST = 1 << 60
_NUMBER = r"([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})"
_SIZE = re.compile(rf" *{_NUMBER} *([A-Za-z]*) *")
_PERCENT = re.compile(rf" *{_NUMBER} *% *")


def parse_size(text: str | int, *, of: int | None = None, flag: str = "size") -> int:
    """Bytes meant by `text`; `of` is what a percentage refers to. Raises `UsageError`, naming `flag`."""
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise UsageError(f"{flag}: {text!r} is not a size; write for example 8GiB")
    if isinstance(text, int):
        shown, size = (str(text) if abs(text) < _LARGEST else "the size"), text
    else:
        shown = repr(text if len(text) < 60 else text[:56] + "...")
        percent = _PERCENT.fullmatch(text)
        if percent is not None:
            if of is None:
                raise UsageError(f"{flag}: a percentage is not possible here; write for example 8GiB")
            share = Decimal(percent[1])
            if not 0 < share <= 100:
                raise UsageError(f"{flag}: {shown} is not a percentage above 0 and up to 100")
            return max(1, int(of * share / 100))
        if text.strip().endswith("%"):
            raise UsageError(f"{flag}: {shown} is not a percentage above 0 and up to 100")
        match = _SIZE.fullmatch(text)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise UsageError(f"{flag}: {shown} is not a size; write for example 8GiB, 500MB or 50%")
        size = int(Decimal(match[1]) * unit)
    if size <= 0:
        raise UsageError(f"{flag}: {shown} is not above zero")
    if size >= _LARGEST:
        raise UsageError(f"{flag}: {shown} is larger than any machine")
    return size


def parse_part(text: str | int | None, *, flag: str) -> int | float | None:
    """Bytes, or the share above 0 and up to 1 that a percentage means, as a float. Raises `UsageError`."""
    if text is None:
        return None
    size = parse_size(text, of=_LARGEST, flag=flag)
    return size / _LARGEST if isinstance(text, str) and _PERCENT.fullmatch(text) else size


def parse_rate(text: str, *, flag: str) -> float:
    """Bytes per second meant by `text` (`8GB`, `8GB/s`). Raises `UsageError`."""
    return float(parse_size(str(text).strip().removesuffix("/s"), flag=flag))


def parse_budget(given: str | int | None) -> int | float | None:
    """Tokens (an int) or a share of all tokens (a float) meant by `--kv-budget`. Raises `UsageError`."""
    if given is None:
        return None
    if isinstance(given, str) and (percent := _PERCENT.fullmatch(given)) is not None:
        share = float(percent[1]) / 100
        if 0 < share <= 1:
            return share
    else:
        try:
            if not isinstance(given, bool) and int(given) > 0:
                return int(given)
        except ValueError:
            pass
    raise UsageError(f"--kv-budget: {str(given)[:60]!r} is neither a number of tokens nor a percentage up to 100%")


def format_size(n: float) -> str:
    """Binary units with three digits: `4.50 GiB`, `812 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or abs(n) >= 100 else f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def ceil_mib(n: int) -> str:
    """A size that parses back to at least `n`, in whole MiB, for messages that tell what to write."""
    return f"{-(-n // (1 << 20))}MiB"
