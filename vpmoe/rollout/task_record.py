"""The record of `vpmoe evaluate`: how many answers to benchmark tasks were right, of student and teacher.

It is written to tasks/<stage>.json of the run, and replaced by a later evaluation of that stage. It holds no
time: the same models asked again, with the same numbers in vLLM, give the same bytes.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, computed_field, model_validator

from vpmoe.api import DistillRun
from vpmoe.api.base import Record
from vpmoe.api.effort import Effort
from vpmoe.failure import Permanent
from vpmoe.rollout.evaluation_record import valid_share
from vpmoe.rollout.validity import TRUNCATED, VALIDITIES
from vpmoe.storage import Bucket, StorageError, paths

Count = Annotated[int, Field(ge=0)]
Side = Literal["student", "teacher"]

NORMAL_95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


class TaskFacts(Record):
    """What a task is."""

    model_config = ConfigDict(extra="forbid")

    version: str
    """Of its description. Do not compare figures of different versions."""
    metric: str
    """Metric and filter of the harness by which an answer is right."""
    questions: Annotated[int, Field(ge=1)]


class TaskResult(Record):
    """The answers of one model to one task at one effort."""

    side: Side
    task: str
    effort: Effort
    questions: Annotated[int, Field(ge=1)]
    right: Count
    """An answer that was cut off is wrong."""
    validity: dict[str, Count]
    """Number of completions by validity (validity.VALIDITIES)."""
    reasoning_tokens: Count
    """Tokens of all completions that are not of a final message, headers included."""
    final_tokens: Count
    """Tokens of their final messages, headers included."""

    @model_validator(mode="after")
    def _counts_each_question(self) -> Self:
        if self.right > self.questions or sum(self.validity.values()) != self.questions:
            raise ValueError("right and validity do not count as many answers as there are questions")
        if unknown := self.validity.keys() - set(VALIDITIES):
            raise ValueError(f"validity counts {', '.join(sorted(unknown))}, which is none of {VALIDITIES}")
        return self

    # Written for other readers of the file; we compute them again.

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.questions

    @computed_field  # type: ignore[prop-decorator]
    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson), with the questions as a sample of many."""
        return wilson(self.right, self.questions)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cut_off(self) -> int:
        """Number of answers that ended at the limit of tokens."""
        return self.validity.get(TRUNCATED, 0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def valid_share(self) -> float:
        """Share of completions that are valid Harmony."""
        return valid_share(self.validity)


class TaskEvaluation(Record):
    """An evaluation with benchmark tasks."""

    model_config = ConfigDict(extra="forbid")

    run: str | None = None
    """namespace/name-uid8; None if it was made without a run."""
    stage: str | None = None
    """Stage after which the student was served, as the user says."""
    harness: str
    """Package URL of the harness."""
    models: dict[Side, str]
    """Names under which the models were served."""
    seed: int
    temperature: float
    max_tokens: dict[Effort, int]
    """Longest completion at each effort."""
    tasks: dict[str, TaskFacts]
    results: tuple[TaskResult, ...]
    """By task, effort and side."""

    def of(self, side: Side, effort: str, task: str) -> TaskResult | None:
        """A result; None if this was not asked."""
        wanted = (side, effort, task)
        return next((one for one in self.results if (one.side, one.effort, one.task) == wanted), None)


def wilson(right: int, questions: int) -> tuple[float, float]:
    """95 % confidence interval of a share.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927). Unlike
    the mean ± 1.96 standard errors it stays within 0 and 1 and has a width at 0 and at 1.
    """
    share, square = right / questions, NORMAL_95**2 / questions
    centre = share + square / 2
    spread = NORMAL_95 * math.sqrt(share * (1 - share) / questions + square / (4 * questions))
    # Exactly 0 and 1 at the ends, where rounding would leave a little.
    low = (centre - spread) / (1 + square) if right else 0.0
    high = (centre + spread) / (1 + square) if right < questions else 1.0
    return low, high


def load_task_evaluations(run: DistillRun, bucket: Bucket) -> Mapping[str, TaskEvaluation]:
    """The evaluations with tasks of a run, by stage in order.

    Raises Permanent if one is malformed, StorageError.
    """
    found = {}
    for stage in run.spec.stages:
        key = paths.task_evaluation(run, stage.name)
        try:
            found[stage.name] = TaskEvaluation.model_validate(bucket.get_json(key))
        except ValidationError as error:
            raise Permanent(
                f"{bucket.url(key)}: {error.errors()[0]['msg']}. It was altered, or written by another "
                "version; delete it, and evaluate again."
            ) from error
        except StorageError as error:
            if error.reason != "Missing":
                raise
    return found
