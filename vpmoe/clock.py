"""The current time in UTC, in the two forms that records use."""

from datetime import UTC, datetime


def now() -> datetime:
    """The current time, timezone-aware, in UTC."""
    return datetime.now(UTC)


def timestamp() -> str:
    """The current time as RFC 3339 in UTC, to the second."""
    return now().strftime("%Y-%m-%dT%H:%M:%SZ")
