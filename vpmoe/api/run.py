"""DistillRun: a run read from a file or from the API server, validated, with every default set.

It does not include the status, which is in status.py.
"""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import ConfigDict, Field, PrivateAttr, ValidationError

from vpmoe.api.base import STORED, ApiModel, TextPattern
from vpmoe.api.invalid import Invalid, not_utf8, problems
from vpmoe.api.runtime import Role
from vpmoe.api.spec import MUTABLE, Spec
from vpmoe.api.stages import Stage
from vpmoe.api.student import RescoreSpec, UpcycleSpec
from vpmoe.api.text import read_yaml
from vpmoe.api.training import CheckpointPolicy, TrainingSpec

GROUP, VERSION, KIND, PLURAL = "vpmoe.dev", "v1alpha1", "DistillRun", "distillruns"
API_VERSION = f"{GROUP}/{VERSION}"

INIT, PREPROCESS, RESCORE = "init", "preprocess", "rescore"
RUN_ROLES: dict[str, Role] = {INIT: "init", PREPROCESS: "preprocess", RESCORE: "rescore"}
"""Steps that do not belong to a stage, and their roles."""
SAMPLER, TEACHER, VALIDITY, EVALUATE = "sampler", "teacher", "validity", "evaluate"
EXPORT, REPORT = "export", "report"
"""Suffixes of a stage's other steps, as in <stage>-sampler. A stage's name has no hyphen and is none of
these."""
BESIDE_TRAINER = (SAMPLER, TEACHER, VALIDITY)
"""Suffixes of the steps that run while the stage trains."""
MOST_BYTES = 3 << 19
"""Largest file of a run: etcd's limit of an object, 1.5 MiB."""
STEP_NAME = 25
"""Longest name of a step in characters: 16 of a stage, a hyphen, and evaluate."""

HASHED_RUNTIME = {
    "backend": "PyTorchJob",
    "stalledAfter": "15m",
    "resources": {},
    "serviceAccountName": "",
    "imagePullSecrets": [],
    "nodeSelector": {},
    "tolerations": [],
    "priorityClassName": "",
    "queueName": "",
}
"""What the configuration's hash has in the place of spec.runtime, which is no part of it: the defaults of the
time when it was. So the hash of a run with a default runtime, and the folder of one that was started by hand,
stay what they were. Never changes."""
NEWER_TRAINING = ("maxCollapsedSteps",)
"""Fields of spec.training that the configuration has only if they do not have their default. So runs that
started when there was no such field keep their hash, and their jobs, of whichever version, can read the
configuration."""


def needs_gpus(step: str) -> bool:
    """Whether the pods of the step of that name have GPUs."""
    return step not in (INIT, PREPROCESS) and not step.endswith((f"-{EXPORT}", f"-{REPORT}"))


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
    _recorded_hash: str | None = PrivateAttr(None)

    @classmethod
    def parse(cls, written: Any, source: str = "DistillRun", *, stored: bool = False) -> Self:
        """A run from the mapping of a file or of an API object. Raises Invalid, which lists every problem.

        `stored`: it was applied before, perhaps to an earlier version; rules for new runs are not checked.
        """
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
            run = cls.model_validate(body, context=STORED if stored else None)
        except ValidationError as error:
            raise Invalid(problems(error, body), source) from None
        # of the run and not of `body`, in which aliases may repeat a text without end
        if found := list(not_utf8(run.model_dump(by_alias=True))):
            raise Invalid(found, source)
        return run

    @cached_property
    def _config(self) -> dict[str, Any]:
        spec = self.spec.model_dump(mode="json", by_alias=True)
        left_out = {*MUTABLE, "runtime"}
        if self._exports_by_default:
            left_out.add("export")
        if self.spec.rescore == RescoreSpec():
            left_out.add("rescore")
        spec = {field: value for field, value in spec.items() if field not in left_out}
        defaults = TrainingSpec().model_dump(mode="json", by_alias=True)
        spec["training"] = {
            field: value
            for field, value in spec["training"].items()
            if field not in NEWER_TRAINING or value != defaults[field]
        }
        if self.spec.training.checkpoint.interval == CheckpointPolicy().interval:
            del spec["training"]["checkpoint"]["interval"]  # as NEWER_TRAINING
        return {"apiVersion": self.api_version, "kind": self.kind, "spec": spec}

    @property
    def _exports_by_default(self) -> bool:
        """Whether the last stage is exported and no other.

        Then the configuration does not say so: runs that started when there was no export keep their hash,
        and their jobs, of whichever version, can read the configuration.
        """
        return self.spec.export.stages == (self.spec.stages[-1].name,)

    def config(self) -> dict[str, Any]:
        """The configuration: every default set but those of export, rescore, NEWER_TRAINING and
        training.checkpoint.interval, without runtime and the fields that can always change. `parse` accepts
        it with metadata added."""
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    @cached_property
    def config_hash(self) -> str:
        """SHA-256, 64 hex digits, of the configuration as canonical JSON: sorted keys, no spaces, UTF-8.

        Of a run that has started: the hash that was recorded then, if it is known (`with_recorded_hash`).
        """
        if self._recorded_hash is not None:
            return self._recorded_hash
        hashed = {**self._config, "spec": {**self._config["spec"], "runtime": HASHED_RUNTIME}}
        text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_recorded_hash(self, recorded: str) -> Self:
        """This run with the configuration's hash that was recorded when its first step started.

        A later version may compute another one, because it knows more fields or hashes fewer. Whatever a run
        writes and compares has one hash for its whole life. Raises ValueError if it is not 64 hex digits.
        """
        if re.fullmatch(r"[0-9a-f]{64}", recorded) is None:
            raise ValueError(f"{recorded!r} is not the hash of a configuration: 64 lowercase hex digits")
        run = self.model_copy()
        run.__dict__.pop("config_hash", None)
        run._recorded_hash = recorded
        return run

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

    @property
    def identity(self) -> str:
        """namespace/name-uid8: differs from that of every other run, also of the same name."""
        return f"{self.metadata.namespace}/{self.metadata.name}-{self.uid8}"

    @property
    def folder(self) -> str:
        """The run's folder in the bucket, below spec.storage.prefix."""
        return f"runs/{self.identity}"

    @property
    def upcycle(self) -> UpcycleSpec | None:
        """The dense model that the student begins with, if any."""
        init = self.spec.student.init
        return init.upcycle if init is not None else None

    def stage(self, name: str) -> Stage:
        """The stage with that name. Raises KeyError, which lists the stages of the run."""
        for stage in self.spec.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in self.spec.stages)
        raise KeyError(f"{name} is not a stage of {self.metadata.name}, which has {known}")

    def steps(self) -> tuple[str, ...]:
        """Names of the run's steps in order: init if the student begins with a dense model, preprocess,
        rescore if a stage needs it, those of each stage and its report, then the exports and the last
        report."""
        stages = self.spec.stages
        init = (INIT,) if self.upcycle is not None else ()
        rescore = (RESCORE,) if any(stage.needs_rescoring for stage in stages) else ()
        reports = {
            stage.name: (f"{stage.name}-{REPORT}",) if self.spec.runtime.report else () for stage in stages
        }
        return (
            *init,
            PREPROCESS,
            *rescore,
            *(step for stage in stages[:-1] for step in (*self.steps_of(stage), *reports[stage.name])),
            *self.steps_of(stages[-1]),
            *self._exports,
            *reports[stages[-1].name],
        )

    @property
    def optional_steps(self) -> tuple[str, ...]:
        """Names of the steps that spec.runtime adds or leaves out, also after the run has started: the
        reports."""
        return tuple(f"{stage.name}-{REPORT}" for stage in self.spec.stages)

    @property
    def _exports(self) -> tuple[str, ...]:
        stages = self.spec.stages
        return tuple(f"{stage.name}-{EXPORT}" for stage in stages if stage.name in self.spec.export.stages)

    def steps_of(self, stage: Stage) -> tuple[str, ...]:
        """Names of a stage's steps in order, without its export and its report. The training step has the
        stage's name.

        If the stage samples, its sampler and teacher steps run beside the training step. If its stop requires
        a validity that nothing else measures, the step validity does. If the evaluation measures completions
        or a canary, the step evaluate follows.
        """
        evaluation = self.spec.evaluation
        beside: tuple[str, ...] = ()
        if stage.samples:
            beside = (f"{stage.name}-{SAMPLER}", f"{stage.name}-{TEACHER}")
        elif self.measures_validity(stage):
            beside = (f"{stage.name}-{VALIDITY}",)
        after = (f"{stage.name}-{EVALUATE}",) if evaluation.completions or evaluation.canary else ()
        return (*beside, stage.name, *after)

    def measures_validity(self, stage: Stage) -> bool:
        """Whether the stage has the step validity, which measures its checkpoints while it trains."""
        return stage.needs_measured_validity and self.spec.evaluation.completions > 0

    def serves_trainer(self, step: str) -> bool:
        """Whether the step runs beside a training step, and has nothing to do when that has succeeded."""
        return step.partition("-")[2] in BESIDE_TRAINER

    def stage_of(self, step: str) -> Stage | None:
        """The stage of a step; None for init, preprocess and rescore. Raises KeyError if the run has no such
        step."""
        if step not in self.steps():
            raise KeyError(
                f"{step} is not a step of {self.metadata.name}, which has {', '.join(self.steps())}"
            )
        return None if step in RUN_ROLES else self.stage(step.partition("-")[0])

    def role(self, step: str) -> Role:
        """The role of a step's pods. Raises KeyError if the run has no such step."""
        if self.stage_of(step) is None:
            return RUN_ROLES[step]
        roles: dict[str, Role] = {
            "": "train",
            SAMPLER: "sampler",
            TEACHER: "teacher",
            VALIDITY: "evaluate",
            EVALUATE: "evaluate",
            EXPORT: "export",
            REPORT: "report",
        }
        return roles[step.partition("-")[2]]

    def needs(self, step: str) -> tuple[str, ...]:
        """The steps that must have succeeded before this step can start. Raises KeyError if the run has no
        such step.

        A stage starts after the stage before it has been evaluated, the first after init and preprocess,
        which run side by side. The steps of a stage that samples start together. Rescoring needs the dataset
        only and runs beside Vanilla stages, which do not use the teacher's GPUs. All other stages wait for
        rescoring: Rescored for the scores, TeacherForced and OnPolicy for the GPUs. So does the step
        validity, which takes one of these GPUs: beside a Vanilla stage it may start later than the stage.
        If rescoring takes GPUs of the student too (rescore.gpus), Vanilla stages wait for it as well. So
        steps that run at the same time never need more than teacher.gpus + student.gpus. Exports start when
        all other steps but the last report have succeeded, so that the run has no use for its GPUs any more.
        A stage's report follows the stage, that of the last stage the exports; nothing waits for it.
        """
        stage, role = self.stage_of(step), self.role(step)
        if stage is None:
            return (PREPROCESS,) if role == "rescore" else ()
        if role == "evaluate" and not self.serves_trainer(step):
            return self.steps_of(stage)[:-1]
        if role == "export":
            return self._last_steps(self.spec.stages[-1])
        if role == "report":
            return (stage is self.spec.stages[-1] and self._exports) or self._last_steps(stage)
        position = self.spec.stages.index(stage)
        last = self._last_steps(self.spec.stages[position - 1]) if position else self._first_steps
        waits = RESCORE in self.steps() and (
            stage.needs_teacher or role == "evaluate" or self.spec.rescores_first
        )
        return (*last, RESCORE) if waits else last

    @property
    def _first_steps(self) -> tuple[str, ...]:
        """The steps after which the first stage may start."""
        return tuple(step for step in self.steps() if step in (INIT, PREPROCESS))

    def _last_steps(self, stage: Stage) -> tuple[str, ...]:
        """The steps of a stage after which what follows may start."""
        steps = self.steps_of(stage)
        return steps[-1:] if self.role(steps[-1]) == "evaluate" else steps


def load_run(path: str | Path) -> DistillRun:
    """The run in a YAML or JSON file. Raises Invalid, which lists every problem, or OSError if the file is
    unreadable.

    One with a uid comes from a cluster, as the file that the operator gives to jobs: the cluster has accepted
    it, perhaps by the rules of an earlier version.
    """
    with Path(path).open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Invalid([f"is larger than {MOST_BYTES} bytes, the most that a cluster stores"], str(path))
    try:
        written = read_yaml(content.decode())
        return DistillRun.parse(written, source=str(path), stored=_has_uid(written))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Invalid([f"is not YAML: {error}"], str(path)) from None


def _has_uid(written: Any) -> bool:
    metadata = written.get("metadata") if isinstance(written, dict) else None
    return isinstance(metadata, dict) and metadata.get("uid") is not None
