"""Numbers of a plan as text."""

from vpmoe.api.quantities import format_count

UNKNOWN = "–"


def count(value: float | None) -> str:
    """A count with three digits: 1234567 is 1.23M."""
    return UNKNOWN if value is None else format_count(value)


def hours(value: float | None) -> str:
    """Hours with one decimal."""
    if value is None:
        return UNKNOWN
    return "<0.1" if 0 < value < 0.05 else f"{value:,.1f}"


def gigabytes(size: int) -> str:
    """Bytes as GB (10^9) with three digits."""
    return "<0.001" if 0 < size < 500_000 else three_digits(size / 1e9)


def three_digits(value: float) -> str:
    """A number with three digits: 1005.2 is 1,010."""
    return f"{float(f'{value:.3g}'):,.15g}"


def gpus(number: int) -> str:
    """A number of GPUs: "1 GPU", "1,024 GPUs"."""
    return f"{number:,} GPU{'s' * (number != 1)}"
