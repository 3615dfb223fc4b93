"""Numbers as people read them: shares in percent, bytes, seconds, epsilon; what is missing becomes a dash."""

import math
import time
from decimal import ROUND_CEILING, Decimal

MISSING = "–"


def percent(share: float | None) -> str:
    """0.931 -> "93.1 %"."""
    return MISSING if share is None else f"{100 * share:.1f} %"


def points(share: float, against: float) -> str:
    """How far `share` lies above `against`, in percentage points: "−3.0 points"."""
    difference = round(100 * (share - against), 1)
    return "equal" if difference == 0 else f"{difference:+.1f} points".replace("-", "−")


def size(count: float | None) -> str:
    """Bytes in decimal units: 1240 -> "1.2 kB"."""
    if count is None:
        return MISSING
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float | None) -> str:
    """Seconds: "850 ms", "4.2 s", "2 min 31 s", "3 h 05 min", "2 d 04 h"."""
    if seconds is None:
        return MISSING
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms" if seconds else "0 s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = whole // 60
    return (
        f"{minutes // 60} h {minutes % 60:02} min"
        if minutes < 2880
        else f"{minutes // 1440} d {minutes // 60 % 24:02} h"
    )


def moment(seconds: float) -> str:
    """Seconds since 1970, to the next full minute: "2026-03-01 14:05 UTC"."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(math.ceil(seconds / 60) * 60))


def micros(microseconds: float | None) -> str:
    """Microseconds of one call: "12.3 µs", "4.6 ms"."""
    if microseconds is None:
        return MISSING
    return f"{microseconds:.1f} µs" if microseconds < 999.95 else f"{microseconds / 1000:.1f} ms"


def epsilon(value: float | None) -> str:
    """Rounded up, never down: what is printed is never less than what was spent."""
    if value is None or not math.isfinite(value):
        return MISSING if value is None else "∞"
    step = Decimal("0.01") if value >= 0.1 else Decimal("0.0001")
    return str(Decimal(repr(float(value))).quantize(step, ROUND_CEILING))


def number(value: float | None) -> str:
    """Four significant digits, thousands apart: 12345 -> "12,345", 0.81234 -> "0.8123", 3e-7 -> "3.0e-07"."""
    if value is None:
        return MISSING
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:,.4g}"


def fixed(value: float | None, digits: int) -> str:
    """So many decimals, for a column of numbers that are compared."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def scientific(value: float | None) -> str:
    """0.00222 -> "2.2e-03"."""
    return MISSING if value is None else f"{value:.1e}"


def printable(text: str) -> str:
    """Text from a client, safe to show on a terminal: control characters could move its cursor."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)
