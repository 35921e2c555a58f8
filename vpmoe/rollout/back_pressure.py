"""Back-pressure: adjustments that shorten or ease the rollouts of a stage whose trainer waits too long for
them.

Adjustments are made one at a time, in a fixed order. Each is an object, rollouts/<stage>/turn-000001.json,
written once by the trainer before it publishes the version that the first affected window is sampled from, so
the sampler of a window sees every adjustment that applies to it. The trainer decides when to adjust
(vpmoe.trainer.onpolicy.starvation).
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import ConfigDict, Field

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.storage import Bucket, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.storage.records import load_record

AdjustedSetting = Literal["maxTokens", "effort", "teacher"]

ADJUSTMENTS: tuple[AdjustedSetting, ...] = ("maxTokens", "maxTokens", "effort", "effort", "teacher")
"""The settings that are adjusted, in order. maxTokens: multiply every completion limit by 3/4. effort: move
half of the prompts at high effort to medium. teacher: change nothing, advise to set teacher.gpus to 2."""


class Adjustment(Record):
    """One adjustment of a setting."""

    model_config = ConfigDict(extra="forbid")

    number: int
    """From 1. ADJUSTMENTS[number − 1] is the setting."""
    window: int
    """The first window that it applies to."""
    setting: AdjustedSetting = Field(validation_alias="knob", serialization_alias="knob")
    waiting: float
    """Share of its time for which the trainer had waited."""


def applies_to(adjustments: Sequence[Adjustment], window: int) -> tuple[Adjustment, ...]:
    """The adjustments that apply to a window."""
    return tuple(adjustment for adjustment in adjustments if adjustment.window <= window)


def read_adjustments(bucket: Bucket, run: DistillRun, stage: str) -> list[Adjustment]:
    """All adjustments of a stage so far, in order."""
    prefix = paths.turn(run, stage, 0).removesuffix("000000.json")
    return [load_record(bucket, found.key, Adjustment) for found in bucket.list(prefix)]


def write_adjustment(
    bucket: Bucket, run: DistillRun, stage: str, adjustment: Adjustment, metadata: dict[str, str]
) -> bool:
    """Write an adjustment unless one of its number exists; returns whether the object now has this
    content."""
    key = paths.turn(run, stage, adjustment.number)
    return bucket.create(key, json_bytes(adjustment.dump()), metadata)
