"""Records of evaluations with tasks, with results of three efforts, for student and teacher."""

from vpmoe.api.effort import EFFORTS, Effort
from vpmoe.rollout.task_record import Side, TaskEvaluation, TaskFacts, TaskResult

QUESTIONS = 20
TASKS = ("vpmoe_arithmetic", "vpmoe_choice")
RIGHT = {"student": {"low": 4, "medium": 7, "high": 9}, "teacher": {"low": 12, "medium": 16, "high": 19}}
TOKENS = {"low": 30, "medium": 90, "high": 240}
"""Tokens of reasoning of an answer; the teacher's are twice as many."""


def result(side: Side, effort: Effort, right: int, task: str = TASKS[0]) -> TaskResult:
    cut_off = 6 if side == "student" else 1
    return TaskResult(
        side=side,
        task=task,
        effort=effort,
        questions=QUESTIONS,
        right=right,
        validity={"truncated": cut_off, "valid": QUESTIONS - cut_off},
        reasoning_tokens=QUESTIONS * TOKENS[effort] * (2 if side == "teacher" else 1),
        final_tokens=QUESTIONS * 10,
    )


def record(stage: str, *, sides: tuple[Side, ...] = ("student", "teacher")) -> TaskEvaluation:
    return TaskEvaluation(
        run="team/inflight-0a1b2c3d",
        stage=stage,
        harness="pkg:pypi/lm-eval@0.4.13",
        models={side: f"tiny-{side}" for side in sides},
        seed=0,
        temperature=1.0,
        max_tokens={"low": 1024, "medium": 2048, "high": 4096},
        tasks={
            task: TaskFacts(version="1", metric="exact_match,last-number", questions=QUESTIONS)
            for task in TASKS
        },
        results=tuple(
            result(side, effort, RIGHT[side][effort], task)
            for task in TASKS
            for effort in EFFORTS
            for side in sides
        ),
    )
