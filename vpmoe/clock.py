"""The current time in UTC, in the forms that records use."""

from datetime import UTC, datetime


def now() -> datetime:
    """The current time, timezone-aware, in UTC."""
    return datetime.now(UTC)


def now_to_second() -> datetime:
    """The current time without its fraction of a second, as timestamps of Kubernetes objects are."""
    return now().replace(microsecond=0)


def timestamp() -> str:
    """The current time as RFC 3339 in UTC, to the second."""
    return now().strftime("%Y-%m-%dT%H:%M:%SZ")
