"""Back-pressure: what is asked of the sampler when the trainer starves, a little less at each turn of a knob, in one fixed order.

A turn is an object, rollouts/<stage>/turn-000001.json, written once by the trainer before it publishes the version that the first window
it holds for is sampled from; so whoever samples a window meets every turn that it has to heed. When to turn is the trainer's business.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes

Knob = Literal["maxTokens", "effort", "teacher"]

ORDER: tuple[Knob, ...] = ("maxTokens", "maxTokens", "effort", "effort", "teacher")
"""What each turn does. maxTokens: every bound of a completion to three quarters. effort: half of the prompts at high effort go to medium.
teacher: nothing but the advice to set teacher.gpus to 2."""


class Adjustment(Record):
    """One turn of a knob."""

    model_config = ConfigDict(extra="forbid")

    number: int
    """From 1: ORDER[number − 1] is what it does."""
    window: int
    """The first window that it holds for."""
    knob: Knob
    waiting: float
    """Share of its time for which the trainer had waited."""


def heeded(turns: Sequence[Adjustment], window: int) -> tuple[Adjustment, ...]:
    """Those of all turns that hold for a window."""
    return tuple(turn for turn in turns if turn.window <= window)


def read(bucket: Bucket, run: DistillRun, stage: str) -> list[Adjustment]:
    """All turns so far, in order."""
    prefix = paths.turn(run, stage, 0).removesuffix("000000.json")
    return [Adjustment.model_validate(bucket.get_json(found.key)) for found in bucket.list(prefix)]


def write(bucket: Bucket, run: DistillRun, stage: str, turn: Adjustment, metadata: dict[str, str]) -> bool:
    """Write a turn unless there is one of its number; whether it now stands there."""
    return bucket.create(paths.turn(run, stage, turn.number), json_bytes(turn.dump()), metadata)
