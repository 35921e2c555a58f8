"""DistillRun: a whole run, read from a file or from what an API server returns, validated and with every default filled in.

Status is not part of it (status.py); nor is anything that a run becomes in a cluster or a bucket.
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
from vpmoe.api.stages import OnPolicy, Rescored, Stage, Vanilla
from vpmoe.api.text import read_yaml

GROUP, VERSION, KIND, PLURAL = "vpmoe.dev", "v1alpha1", "DistillRun", "distillruns"
API_VERSION = f"{GROUP}/{VERSION}"

PREPROCESS, RESCORE = "preprocess", "rescore"
"""Steps that belong to no stage."""
SAMPLER, TEACHER, EVALUATE = "sampler", "teacher", "evaluate"
"""A stage's steps beside the one that trains: <stage>-<this>. A stage's name has no hyphen, nor is it one of these."""
STEP_NAME = 25
"""Longest name of a step, in characters: a stage's sixteen, a hyphen, and evaluate."""

RUN_NAME = TextPattern(
    r"[a-z]([-a-z0-9]{0,28}[a-z0-9])?",
    "must be at most 30 lowercase letters, digits and hyphens, from a letter to a letter or digit (pod names start with it)",
    max_length=30,
)


class RunMetadata(ApiModel):
    """The part of a run's metadata that its configuration depends on; everything else that an object may carry is left out."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="ignore")

    name: Annotated[str, RUN_NAME]
    """The run's name, at most 30 characters."""
    namespace: Annotated[str, Field(min_length=1, max_length=63)] = "default"
    """The namespace that the run's children live in."""
    uid: Annotated[str, Field(min_length=8, max_length=64)] | None = None
    """The object's identity in its cluster; None where a run is made by hand."""


class DistillRun(ApiModel):
    """Distils a student from a teacher: preprocesses a data set, then trains the student through one or more stages."""

    api_version: Literal["vpmoe.dev/v1alpha1"]
    """vpmoe.dev/v1alpha1."""
    kind: Literal["DistillRun"]
    """DistillRun."""
    metadata: RunMetadata
    """Name and namespace."""
    spec: Spec
    """What to distil from what, on what, and how."""

    @classmethod
    def parse(cls, written: Any, source: str = "DistillRun") -> Self:
        """A run from the mapping of its file or of an API server's answer. Invalid names everything that is wrong with it."""
        if not isinstance(written, dict):
            raise Invalid(
                [
                    f"a DistillRun is a mapping with apiVersion, kind, metadata and spec, not {type(written).__name__}"
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
        """The run's configuration with every default filled in, without what may change while it runs. Parsing it gives it again."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    @cached_property
    def config_hash(self) -> str:
        """sha256, 64 hex, of the configuration as canonical JSON: keys sorted, no spaces, UTF-8."""
        text = json.dumps(self._config, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def document(self) -> dict[str, Any]:
        """The configuration with the metadata that it belongs to: what jobs are given as their run file."""
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
        """First 8 characters of the uid, or of the configuration's hash where there is no uid: part of the run's folder in the bucket."""
        return (self.metadata.uid or self.config_hash)[:8]

    def stage(self, name: str) -> Stage:
        """The stage of that name. KeyError names the stages that there are."""
        for stage in self.spec.stages:
            if stage.name == name:
                return stage
        raise KeyError(
            f"{name} is no stage of {self.metadata.name}: it has {', '.join(stage.name for stage in self.spec.stages)}"
        )

    def steps(self) -> tuple[str, ...]:
        """The run's steps in order: preprocess, rescore where a stage is Rescored, then each stage's (steps_of)."""
        rescore = (RESCORE,) if any(isinstance(stage, Rescored) for stage in self.spec.stages) else ()
        return (PREPROCESS, *rescore, *(step for stage in self.spec.stages for step in self.steps_of(stage)))

    def steps_of(self, stage: Stage) -> tuple[str, ...]:
        """A stage's steps in order. Its own name is the step that trains. An OnPolicy stage's sampler and teacher are at work beside it,
        and where completions or a canary are to be measured, evaluate follows."""
        evaluation = self.spec.evaluation
        beside = (f"{stage.name}-{SAMPLER}", f"{stage.name}-{TEACHER}") if isinstance(stage, OnPolicy) else ()
        after = (f"{stage.name}-{EVALUATE}",) if evaluation.completions or evaluation.canary else ()
        return (*beside, stage.name, *after)

    def stage_of(self, step: str) -> Stage | None:
        """The stage that a step belongs to; None for preprocess and rescore. KeyError where the run has no such step."""
        if step not in self.steps():
            raise KeyError(f"{step} is no step of {self.metadata.name}: it has {', '.join(self.steps())}")
        return None if step in (PREPROCESS, RESCORE) else self.stage(step.partition("-")[0])

    def role(self, step: str) -> Role:
        """What the pods of a step do. KeyError where the run has no such step."""
        stage = self.stage_of(step)
        if stage is None:
            return "preprocess" if step == PREPROCESS else "rescore"
        roles: dict[str, Role] = {"": "train", SAMPLER: "sampler", TEACHER: "teacher", EVALUATE: "evaluate"}
        return roles[step.partition("-")[2]]

    def needs(self, step: str) -> tuple[str, ...]:
        """The steps that must have succeeded before this one may start. KeyError where the run has no such step.

        Each stage goes on from the one before, once that has been evaluated; the steps of an OnPolicy stage start together. Rescoring
        needs the data set alone, and a Vanilla stage leaves the teacher's GPUs idle: so the two run side by side. Stages of every other
        kind wait for rescoring: a Rescored one for its scores, a TeacherForced or OnPolicy one for the GPUs. What may be alive at once
        thus never asks for more than teacher.gpus + student.gpus.
        """
        stage, role = self.stage_of(step), self.role(step)
        if stage is None:
            return () if role == "preprocess" else (PREPROCESS,)
        if role == "evaluate":
            return self.steps_of(stage)[:-1]
        position = self.spec.stages.index(stage)
        before = self.steps_of(self.spec.stages[position - 1]) if position else (PREPROCESS,)
        last = before[-1:] if self.role(before[-1]) == "evaluate" else before
        waits = RESCORE in self.steps() and not isinstance(stage, Vanilla)
        return (*last, RESCORE) if waits else last


def load_run(path: str | Path) -> DistillRun:
    """The run in a YAML or JSON file. Invalid names everything that is wrong with it, OSError what keeps the file from being read."""
    try:
        return DistillRun.parse(read_yaml(Path(path).read_text(encoding="utf-8")), source=str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid([f"is not YAML: {error}"], str(path)) from None
