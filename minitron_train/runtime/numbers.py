"""Formatting of numbers for messages and tables."""

import math


def count(value: int) -> str:
    """134515008 -> "134,515,008"."""
    return f"{value:,}"


def short(value: float) -> str:
    """134515008 -> "134.5 M"; 1000000 -> "1 M"; small numbers keep three digits."""
    for limit, divisor, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / divisor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.3g}"


def tiny(value: float) -> str:
    """0.000025 -> "2.5e-5", as learning rates are written."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def percent(share: float, digits: int = 1) -> str:
    """0.67 -> "67.0 %"."""
    return f"{share * 100:.{digits}f} %"


def perplexity(value: float | None) -> str:
    """18.2134 -> "18.21", 312.4 -> "312.4", 51234.5 -> "51,234"."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    return f"{value:,.2f}" if value < 100 else f"{value:,.1f}" if value < 10000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """611 -> "10 min 11 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
