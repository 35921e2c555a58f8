"""A run as lines of text, for pipes and files: whole, or only what has changed. Pure."""

from collections.abc import Iterator
from datetime import datetime

from vpmoe.follow.run_view import ACTIVE, RunView, StepView
from vpmoe.follow.words import figures, time_of, work_done

PERCENT_OF_A_LINE = 10
"""A step gets a new line when its share passes a multiple of this many per cent."""


def whole(view: RunView, now: datetime) -> list[str]:
    """All that is known of the run, one fact a line."""
    return [
        f"run: {view.namespace}/{view.name}",
        f"phase: {view.phase}",
        *(f"{name}: {value}" for name, value in _facts(view) if value),
        *(f"{name}: {value}" for name, value in figures(view, now)),
        *(line for step in view.steps for line in _step(step, now)),
    ]


def changes(view: RunView, before: RunView | None, now: datetime) -> list[str]:
    """What is new since `before`, each line with the time: the headline, and steps that have changed their
    state or have got on."""
    known = {step.name: step for step in before.steps} if before else {}
    lines = []
    if before is None or (view.phase, view.message) != (before.phase, before.message):
        lines.append(f"{view.phase} {view.progress}".rstrip() + f": {view.message}")
        lines += [view.remedy] if view.remedy else []
    new = set(view.warnings) - set(before.warnings if before else ())
    lines += [f"{warning.reason}: {warning.message}" for warning in view.warnings if warning in new]
    for step in view.steps:
        earlier = known.get(step.name)
        if step.state != "Pending" and (earlier is None or _stand(step) != _stand(earlier)):
            lines.append(_summary(step, now))
    return [f"{now:%H:%M:%SZ} {line}" for line in lines]


def _stand(step: StepView) -> tuple[str, int, int]:
    return step.state, step.attempt, int(100 * step.share) // PERCENT_OF_A_LINE


def _facts(view: RunView) -> Iterator[tuple[str, str]]:
    yield "progress", view.progress
    yield "message", view.message
    yield "remedy", view.remedy
    for warning in view.warnings:
        yield "warning", f"{warning.reason}: {warning.message}"
        yield "remedy", warning.remedy
    yield "folder", view.folder
    yield "model", view.model


def _step(step: StepView, now: datetime) -> Iterator[str]:
    yield _summary(step, now)
    if step.message and step.state in ACTIVE:
        yield f"  {step.message}"
    for pod in step.pods:
        yield f"  pod {pod.name}: {pod.state}" + (f" on {pod.node}" if pod.node else "")


def _summary(step: StepView, now: datetime) -> str:
    parts = [
        step.state,
        f"{int(100 * step.share)}%" if step.total is not None or step.state == "Succeeded" else "",
        work_done(step),
        f"attempt {step.attempt}" if step.attempt else "",
        time_of(step, now),
    ]
    return f"step {step.name}: {', '.join(part for part in parts if part)}"
