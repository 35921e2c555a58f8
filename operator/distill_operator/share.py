"""How much of a whole run is done, as one percentage for people."""

from vpmoe.api import DistillRun, Stage
from vpmoe.api.run import PREPROCESS, RESCORE
from vpmoe.api.status import Status

FIXED = {PREPROCESS: 0.05, RESCORE: 0.05}
"""What these steps count for where the run has them; the stages share the rest by their tokens."""


def share(run: DistillRun, status: Status) -> str:
    """Done part of the whole run as a percentage, rounded down: 100% is for a finished run."""
    planned = sum(stage.tokens for stage in run.spec.stages)
    done = sum(_tokens_done(stage, status) for stage in run.spec.stages) / planned
    fixed = {name: part for name, part in FIXED.items() if name in run.steps()}
    whole = sum(part * _parts_done(name, status) for name, part in fixed.items()) + (1 - sum(fixed.values())) * done
    return f"{min(99, int(100 * whole))}%"


def _parts_done(name: str, status: Status) -> float:
    step = status.of(name)
    if step is None:
        return 0.0
    return 1.0 if step.state == "Succeeded" else (step.parts_done or 0) / max(step.parts_total or 1, 1)


def _tokens_done(stage: Stage, status: Status) -> int:
    step = status.of(stage.name)
    if step is None:
        return 0
    return stage.tokens if step.state == "Succeeded" else min(step.tokens_done or 0, stage.tokens)
