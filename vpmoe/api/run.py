"""DistillRun: a run read from a file or from the API server, validated, with every default set.

It does not include the status, which is in status.py.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import ConfigDict, Field, ValidationError

from vpmoe.api.base import ApiModel, TextPattern
from vpmoe.api.invalid import Invalid, problems
from vpmoe.api.runtime import Role
from vpmoe.api.spec import MUTABLE, MUTABLE_RUNTIME, Spec
from vpmoe.api.stages import Stage
from vpmoe.api.text import read_yaml

GROUP, VERSION, KIND, PLURAL = "vpmoe.dev", "v1alpha1", "DistillRun", "distillruns"
API_VERSION = f"{GROUP}/{VERSION}"

PREPROCESS, RESCORE = "preprocess", "rescore"
"""Steps that do not belong to a stage."""
SAMPLER, TEACHER, EVALUATE = "sampler", "teacher", "evaluate"
"""Suffixes of a stage's other steps, as in <stage>-sampler. A stage's name has no hyphen and is none of
these."""
STEP_NAME = 25
"""Longest name of a step in characters: 16 of a stage, a hyphen, and evaluate."""

RUN_NAME = TextPattern(
    r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?",
    "must be at most 30 lowercase letters, digits and hyphens, from a letter to a letter or digit (pod names "
    "start "
    "with it)",
    max_length=30,
)


class RunMetadata(ApiModel):
    """The fields of metadata that a run uses. All others are ignored."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    name: Annotated[str, RUN_NAME]
    """The run's name, at most 30 characters."""
    namespace: Annotated[str, Field(min_length=1, max_length=63)] = "default"
    """The namespace of the run and of its child objects."""
    uid: Annotated[str, Field(min_length=8, max_length=64)] | None = None
    """The object's uid in the cluster; None for a run from a file."""


class DistillRun(ApiModel):
    """Distills a student from a teacher: preprocesses a dataset, then trains the student in one or more
    stages."""

    api_version: Literal["vpmoe.dev/v1alpha1"]
    """vpmoe.dev/v1alpha1."""
    kind: Literal["DistillRun"]
    """DistillRun."""
    metadata: RunMetadata
    """Name and namespace."""
    spec: Spec
    """The specification of the run."""

    @classmethod
    def parse(cls, written: Any, source: str = "DistillRun") -> Self:
        """A run from the mapping of a file or of an API object. Raises Invalid, which lists every problem."""
        if not isinstance(written, dict):
            raise Invalid(
                [
                    f"a DistillRun is a mapping with apiVersion, kind, metadata and spec, not "
                    f"{type(written).__name__}"
                ],
                source,
            )
        body = {key: value for key, value in written.items() if key != "status"}
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise Invalid(problems(error, body), source) from None

    @cached_property
    def _config(self) -> dict[str, Any]:
        spec = self.spec.model_dump(mode="json", by_alias=True)
        spec = {field: value for field, value in spec.items() if field not in MUTABLE}
        spec["runtime"] = {
            field: value for field, value in spec["runtime"].items() if field not in MUTABLE_RUNTIME
        }
        return {"apiVersion": self.api_version, "kind": self.kind, "spec": spec}

    def config(self) -> dict[str, Any]:
        """The configuration: every default set, mutable fields left out. `parse` accepts it with metadata
        added."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    @cached_property
    def config_hash(self) -> str:
        """SHA-256, 64 hex digits, of the configuration as canonical JSON: sorted keys, no spaces, UTF-8."""
        text = json.dumps(self._config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """The configuration with metadata: the run file that the operator gives to jobs."""
        metadata = self.metadata.model_dump(mode="json", exclude_none=True)
        config = self.config()
        return {
            "apiVersion": config["apiVersion"],
            "kind": config["kind"],
            "metadata": metadata,
            "spec": config["spec"],
        }

    @property
    def uid8(self) -> str:
        """First 8 characters of the uid, or of the configuration's hash if there is no uid. Part of the run's
        folder name."""
        return (self.metadata.uid or self.config_hash)[:8]

    def stage(self, name: str) -> Stage:
        """The stage with that name. Raises KeyError, which lists the stages of the run."""
        for stage in self.spec.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.spec.stages)
        raise KeyError(f"{name} is not a stage of {self.metadata.name}, which has {known}")

    def steps(self) -> tuple[str, ...]:
        """Names of the run's steps in order: preprocess, rescore if a stage needs it, then those of each
        stage."""
        rescore = (RESCORE,) if any(stage.needs_rescoring for stage in self.spec.stages) else ()
        return (PREPROCESS, *rescore, *(step for stage in self.spec.stages for step in self.steps_of(stage)))

    def steps_of(self, stage: Stage) -> tuple[str, ...]:
        """Names of a stage's steps in order. The training step has the stage's name.

        If the stage samples, its sampler and teacher steps run beside the training step. If the evaluation
        measures completions or a canary, the step evaluate follows.
        """
        evaluation = self.spec.evaluation
        beside = (f"{stage.name}-{SAMPLER}", f"{stage.name}-{TEACHER}") if stage.samples else ()
        after = (f"{stage.name}-{EVALUATE}",) if evaluation.completions or evaluation.canary else ()
        return (*beside, stage.name, *after)

    def stage_of(self, step: str) -> Stage | None:
        """The stage of a step; None for preprocess and rescore. Raises KeyError if the run has no such
        step."""
        if step not in self.steps():
            raise KeyError(
                f"{step} is not a step of {self.metadata.name}, which has {', '.join(self.steps())}"
            )
        return None if step in (PREPROCESS, RESCORE) else self.stage(step.partition("-")[0])

    def role(self, step: str) -> Role:
        """The role of a step's pods. Raises KeyError if the run has no such step."""
        stage = self.stage_of(step)
        if stage is None:
            return "preprocess" if step == PREPROCESS else "rescore"
        roles: dict[str, Role] = {"": "train", SAMPLER: "sampler", TEACHER: "teacher", EVALUATE: "evaluate"}
        return roles[step.partition("-")[2]]

    def needs(self, step: str) -> tuple[str, ...]:
        """The steps that must have succeeded before this step can start. Raises KeyError if the run has no
        such step.

        A stage starts after the stage before it has been evaluated. The steps of a stage that samples start
        together. Rescoring needs the dataset only and runs beside Vanilla stages, which do not use the
        teacher's GPUs. All other stages wait for rescoring: Rescored for the scores, TeacherForced and
        OnPolicy for the GPUs. Steps that run at the same time therefore never need more than teacher.gpus +
        student.gpus.
        """
        stage, role = self.stage_of(step), self.role(step)
        if stage is None:
            return () if role == "preprocess" else (PREPROCESS,)
        if role == "evaluate":
            return self.steps_of(stage)[:-1]
        position = self.spec.stages.index(stage)
        before = self.steps_of(self.spec.stages[position - 1]) if position else (PREPROCESS,)
        last = before[-1:] if self.role(before[-1]) == "evaluate" else before
        waits = RESCORE in self.steps() and stage.needs_teacher
        return (*last, RESCORE) if waits else last


def load_run(path: str | Path) -> DistillRun:
    """The run in a YAML or JSON file. Raises Invalid, which lists every problem, or OSError if the file is
    unreadable."""
    try:
        return DistillRun.parse(read_yaml(Path(path).read_text(encoding="utf-8")), source=str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid([f"is not YAML: {error}"], str(path)) from None
