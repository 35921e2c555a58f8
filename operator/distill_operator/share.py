"""How much of a whole run is done, as one percentage for people."""

from collections.abc import Mapping

from vpmoe.api import DistillRun, Stage
from vpmoe.api.runtime import Role
from vpmoe.api.status import Status

FIXED: Mapping[Role, float] = {"preprocess": 0.05, "rescore": 0.05, "evaluate": 0.01}
"""What each step of these roles counts for; the stages share the rest by their tokens."""


def share(run: DistillRun, status: Status) -> str:
    """Done part of the whole run as a percentage, rounded down: 100% is for a finished run."""
    planned = sum(stage.tokens for stage in run.spec.stages)
    done = sum(_tokens_done(stage, status) for stage in run.spec.stages) / planned
    fixed = {step: FIXED[role] for step in run.steps() if (role := run.role(step)) in FIXED}
    whole = (
        sum(part * _parts_done(name, status) for name, part in fixed.items())
        + (1 - sum(fixed.values())) * done
    )
    return f"{min(99, int(100 * whole))}%"


def _parts_done(name: str, status: Status) -> float:
    step = status.step_status(name)
    if step is None:
        return 0.0
    return 1.0 if step.state == "Succeeded" else (step.parts_done or 0) / max(step.parts_total or 1, 1)


def _tokens_done(stage: Stage, status: Status) -> int:
    step = status.step_status(stage.name)
    if step is None:
        return 0
    return stage.tokens if step.state == "Succeeded" else min(step.tokens_done or 0, stage.tokens)
