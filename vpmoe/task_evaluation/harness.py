"""lm-evaluation-harness: loads tasks, and has it ask a model that answers in Harmony.

The harness makes the question from a document, takes the answer from the text and compares; all of that is in
the task's description. It gets the final message as text and never sees reasoning. Tasks whose answers are
compared by log-likelihood are refused: a model that reasons first has no probability of an answer.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from vpmoe.api.effort import Effort
from vpmoe.data.harmony import SystemMessage
from vpmoe.failure import Permanent
from vpmoe.rollout.task_record import TaskFacts
from vpmoe.task_evaluation.answers import Answer, prompt, read_answer
from vpmoe.task_evaluation.server import Server

HARNESS = f"pkg:pypi/lm-eval@{version('lm-eval')}"

OURS = "vpmoe_arithmetic", "vpmoe_choice", "vpmoe_spelling"
"""Tasks in vpmoe/task_evaluation/tasks."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks of the harness, each of which is answered with a text."""

    loaded: Any
    """As evaluator.evaluate takes them."""
    limit: int | None
    """Number of questions of each that are asked, the first."""
    facts: Mapping[str, TaskFacts]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    system: SystemMessage
    max_tokens: Mapping[Effort, int]
    temperature: float
    seed: int
    concurrency: int
    """Questions that a server has at the same time."""


@dataclass(frozen=True)
class Asked:
    """A question's answer, and whether it was right."""

    answer: Answer
    right: bool


def load_tasks(names: Sequence[str], folders: Sequence[Path], limit: int | None) -> LoadedTasks:
    """Load tasks by name from `folders`, from ours, else from those of the harness.

    Raises Permanent, with the task, if one does not exist, has no data here, or is not for a model that
    reasons.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(files("vpmoe.task_evaluation") / "tasks"), *map(str, folders)]
    for folder in folders:
        if not folder.is_dir():
            raise Permanent(f"--task-dir {folder} is no folder. Name one with descriptions of tasks in YAML.")
    try:
        with _offline():
            manager = TaskManager(include_path=paths, include_defaults=False)
            if any(name not in manager.all_tasks for name in names):
                manager = TaskManager(include_path=paths)  # reads 14,000 files
            unknown = [name for name in names if name not in manager.all_tasks]
            if unknown:
                raise Permanent(
                    f"--task {unknown[0]}: there is no such task. Ours are {', '.join(OURS)}; `lm-eval ls "
                    "tasks` lists those of the harness; --task-dir names a folder with your own."
                )
            loaded: Any = manager.load(list(names))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Permanent(
            f"--task {', '.join(names)}: {type(error).__name__}: {error}. Nothing is downloaded while a "
            "model is evaluated: download the task's dataset before, as `hf download --repo-type dataset "
            "NAME`, or name files in its description."
        ) from error
    facts = {name: _facts(name, task, limit) for name, task in loaded["tasks"].items()}
    return LoadedTasks(loaded, limit, facts)


@contextmanager
def _offline() -> Iterator[None]:
    """Fetch nothing in the block. The variable HF_HUB_OFFLINE is read only when the modules are imported."""
    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _facts(name: str, task: Any, limit: int | None) -> TaskFacts:
    config = task.config
    if config.output_type != "generate_until":
        raise Permanent(
            f"task {name} compares answers by {config.output_type}. A model that reasons first has no "
            "probability of an answer: use a task with output_type generate_until."
        )
    if config.repeats != 1:
        raise Permanent(f"task {name} asks each question {config.repeats} times. Set its repeats to 1.")
    metric = config.metric_list[0]["metric"] if config.metric_list else "exact_match"
    metric = metric if isinstance(metric, str) else metric.__name__  # a function beside the description
    filters = [one["name"] for one in config.filter_list or ()] or ["none"]
    questions = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
    if not questions:
        raise Permanent(f"task {name} has no question. Look at its data.")
    return TaskFacts(
        version=str((config.metadata or {}).get("version", "none")),
        # Of several filters the last: where tasks have several, it is the most lenient about the form.
        metric=f"{metric},{filters[-1]}",
        questions=questions,
    )


def ask_tasks(
    tasks: LoadedTasks, server: Server, effort: Effort, sampling: Sampling
) -> dict[str, list[Asked]]:
    """The answers of a model to each question of each task, at an effort, in the order of the questions.

    Raises Retriable and Permanent as Server does, and Permanent if a task's metric is not right or wrong.
    """
    model = _HarmonyModel(server, effort, sampling)
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(
            sampling.seed
        )  # each time, for the same examples at all efforts and of both models
    found: Any = evaluate(model, tasks.loaded, limit=tasks.limit, bootstrap_iters=0, verbosity="ERROR")
    return {
        name: _asked(name, facts, found["samples"][name], model.answers)
        for name, facts in tasks.facts.items()
    }


def _asked(
    name: str,
    facts: TaskFacts,
    samples: Sequence[Mapping[str, Any]],
    answers: Mapping[tuple[str, int], Answer],
) -> list[Asked]:
    metric, _, chosen = facts.metric.partition(",")
    asked = []
    for sample in sorted(
        (one for one in samples if one["filter"] == chosen), key=lambda one: int(one["doc_id"])
    ):
        value, answer = float(sample[metric]), answers[name, int(sample["doc_id"])]
        if value not in (0.0, 1.0):
            raise Permanent(
                f"task {name}: its metric {metric} is {value} for an answer. Use a task whose first metric "
                "is 1 for a right answer and 0 for a wrong one."
            )
        asked.append(Asked(answer, value == 1.0 and not answer.cut_off))
    if len(asked) != facts.questions:
        raise Permanent(f"task {name}: {len(asked)} of {facts.questions} answers were compared. Look at it.")
    return asked


class _HarmonyModel(LM):  # type: ignore[misc]  # no types
    """A served model at one effort, as the harness asks models."""

    def __init__(self, server: Server, effort: Effort, sampling: Sampling) -> None:
        super().__init__()
        self._server, self._effort, self._sampling = server, effort, sampling
        self._system = replace(sampling.system, effort=effort)
        self.answers: dict[tuple[str, int], Answer] = {}
        """By task and number of the question."""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The final messages, up to the first of the task's stop texts."""
        with ThreadPoolExecutor(self._sampling.concurrency) as pool:
            answers = list(pool.map(self._answer, requests))
        for request, answer in zip(requests, answers, strict=True):
            self.answers[request.task_name, request.doc_id] = answer
        return [
            _until(answer.text, request.args[1].get("until") or ())
            for request, answer in zip(requests, answers, strict=True)
        ]

    def _answer(self, request: Any) -> Answer:
        completion = self._server.complete(
            prompt(self._system, request.args[0]),
            self._sampling.max_tokens[self._effort],
            self._sampling.temperature,
            question_seed(self._sampling.seed, request.task_name, request.doc_id, self._effort),
        )
        return read_answer(completion)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError("load_tasks refuses such tasks")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError("load_tasks refuses such tasks")


def question_seed(seed: int, task: str, question: int, effort: str) -> int:
    """The seed of an answer, 0 … 2³¹ − 1: the same whatever else is asked, and for student and teacher."""
    text = f"{seed}/{task}/{question}/{effort}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4, person=b"vpmoe.tasks").digest()) >> 1


def _until(text: str, stops: str | Sequence[str]) -> str:
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.partition(stop)[0] if stop else text
    return text
