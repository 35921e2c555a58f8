"""Numbers and times of a run in the words of its views. Pure."""

from datetime import datetime

from vpmoe.follow.run_view import RunView, StepView

UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))


def amount(number: float) -> str:
    """Three digits of a count, such as 1.23B; whole below 1000."""
    for suffix, size in UNITS:
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """A time in at most two units, such as 3h12m."""
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole // 3_600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{whole % 60:02}s" if minutes else f"{whole}s"


def time_of(record: RunView | StepView, now: datetime) -> str:
    """How long it has taken until now or its end; empty if it has not started."""
    return (
        clock(max(0.0, ((record.finished or now) - record.started).total_seconds())) if record.started else ""
    )


def work_done(step: StepView) -> str:
    """How much of its work a step has done, such as 450M of 1B tokens; empty if that is not known."""
    if step.unit == "windows":
        return f"{step.done} windows"
    if step.total is None:
        return ""
    if step.unit == "tokens":
        return f"{amount(step.done)} of {amount(step.total)} tokens"
    return f"{step.done} of {step.total}"


def figures(view: RunView, now: datetime) -> list[tuple[str, str]]:
    """Name and value of what is measured of the run; only what is known."""
    left = (view.eta - now).total_seconds() if view.eta else None
    found = {
        "speed": f"{view.tokens_per_second:,.0f} tokens/s" if view.tokens_per_second is not None else "",
        "loss": f"{view.loss:.4g}" if view.loss is not None else "",
        "held-out loss": ", ".join(f"{span} {value:.4g}" for span, value in view.held_out.items()),
        "validity": f"{view.validity:.0%}" if view.validity is not None else "",
        "time": time_of(view, now),
        "ETA": (f"{view.eta:%Y-%m-%d %H:%M} UTC" if view.eta else "")
        + (f", in {clock(left)}" if left is not None and left > 0 else ""),
    }
    return [(name, value) for name, value in found.items() if value]
