"""Asks a student, and its teacher beside it, the questions of tasks at every effort: makes the record."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from vpmoe.api.effort import EFFORTS, Effort
from vpmoe.rollout.task_record import Side, TaskEvaluation, TaskResult
from vpmoe.task_evaluation.harness import HARNESS, Asked, LoadedTasks, Sampling, ask_tasks
from vpmoe.task_evaluation.server import Server


def evaluate_tasks(
    tasks: LoadedTasks,
    servers: Mapping[Side, Server],
    sampling: Sampling,
    say: Callable[[str], None],
    *,
    run: str | None = None,
    stage: str | None = None,
) -> TaskEvaluation:
    """Ask all questions of each model at each effort of `sampling.max_tokens`.

    Raises Retriable and Permanent as ask_tasks does.
    """
    results: list[TaskResult] = []
    efforts: list[Effort] = [effort for effort in EFFORTS if effort in sampling.max_tokens]
    for effort in efforts:
        for side, server in servers.items():
            for task, asked in ask_tasks(tasks, server, effort, sampling).items():
                results.append(count(side, task, effort, asked))
                say(summary(results[-1]))
    results.sort(key=lambda one: (one.task, efforts.index(one.effort), one.side))
    return TaskEvaluation(
        run=run,
        stage=stage,
        harness=HARNESS,
        models={side: server.model for side, server in servers.items()},
        seed=sampling.seed,
        temperature=sampling.temperature,
        max_tokens=dict(sampling.max_tokens),
        tasks=dict(tasks.facts),
        results=tuple(results),
    )


def count(side: Side, task: str, effort: Effort, asked: Sequence[Asked]) -> TaskResult:
    """The result of a task's answers; at least one."""
    return TaskResult(
        side=side,
        task=task,
        effort=effort,
        questions=len(asked),
        right=sum(one.right for one in asked),
        validity=dict(sorted(Counter(one.answer.validity for one in asked).items())),
        reasoning_tokens=sum(one.answer.reasoning_tokens for one in asked),
        final_tokens=sum(one.answer.final_tokens for one in asked),
    )


def summary(result: TaskResult) -> str:
    """A result in a line."""
    low, high = result.interval
    reasoning, final = result.reasoning_tokens / result.questions, result.final_tokens / result.questions
    return (
        f"{result.task}, {result.effort} effort, {result.side}: {result.accuracy:.1%} right ({result.right} "
        f"of {result.questions}; {low:.1%} to {high:.1%} with 95 % confidence), {result.cut_off} cut off, "
        f"{result.valid_share:.1%} valid, {reasoning:.0f} tokens of reasoning and {final:.0f} of answer"
    )
