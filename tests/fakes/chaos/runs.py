"""Runs with scripts: what their pods do, what a user does to them, and how they must end."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Act = Literal[
    "delete child",
    "delete child, not its pods",
    "delete pod",
    "evict pod",
    "suspend",
    "resume",
    "raise attempts",
    "raise interruptions",
    "delete run",
]
"""What a user does. The first four are done to the step that the script names, when its attempt runs."""


@dataclass(frozen=True)
class Script:
    """One run."""

    name: str
    spec: dict[str, Any]
    phase: Literal["Succeeded", "Failed", "Deleted", "Queued"] = "Succeeded"
    """How it must end."""
    reason: str = ""
    """Of its condition Failed or Stalled; empty: any."""
    attempts: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    """The number of attempts of a step, or those that are right. 1 for steps that are not named."""
    acts: tuple[tuple[Act, str, int], ...] = ()
    """In order: what, the step and the attempt that must run, or must have been reached."""

    def manifest(self, namespace: str) -> dict[str, Any]:
        return {
            "apiVersion": "vpmoe.dev/v1alpha1",
            "kind": "DistillRun",
            "metadata": {"name": self.name, "namespace": namespace},
            "spec": self.spec,
        }


VANILLA = {"name": "vanilla", "kind": "Vanilla", "tokens": 1000000}
RESCORED = {"name": "rescored", "kind": "Rescored", "tokens": 1000000}
ONPOLICY = {"name": "onpolicy", "kind": "OnPolicy", "tokens": 1000000, "require": {"validity": 0}}
BESIDE = "onpolicy-sampler: seconds=600; onpolicy-teacher: seconds=600"
"""They end when the trainer has succeeded."""


def spec(hollow: str, gpus: int = 1, **changes: Any) -> dict[str, Any]:
    """A spec whose pods do what `hollow` says (hollow_node.scripted)."""
    runtime = changes.pop("runtime", {})
    return {
        "dataset": {"source": "s3://none/*.parquet", "maxLength": 512, "workers": 1},
        "teacher": {"model": "s3://models/none", "gpus": 0},
        "student": {"shape": "tiny", "gpus": gpus},
        "training": {"sequenceLength": 512, "globalBatchTokens": 65536},
        "stages": [VANILLA],
        "evaluation": {"completions": 0},
        "export": {"stages": []},
        "storage": {"endpoint": "http://none:9000", "bucket": "none"},
        "runtime": {
            "backend": "Job",
            "report": False,
            "env": [{"name": "HOLLOW", "value": hollow}],
            **runtime,
        },
        **changes,
    }


def scripts(seed: int, count: int) -> list[Script]:
    """So many runs: each kind about equally often, the order and the details by the seed."""
    rng = random.Random(f"runs {seed}")
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    rng.shuffle(kinds)
    return [
        kind(f"r{number}-{kind.__name__.strip('_').replace('_', '-')}", rng)
        for number, kind in enumerate(kinds)
    ]


def _times(rng: random.Random) -> str:
    """How long pods take to start, to run and to stop."""
    start, seconds = rng.uniform(0, 0.3), rng.uniform(0.1, 1.0)
    return f"start={start:.2f} seconds={seconds:.2f} stop={rng.choice((0, 0.2, 1.5))}"


def _gpus(rng: random.Random) -> int:
    return rng.choice((1, 1, 2, 4))


def plain(name: str, rng: random.Random) -> Script:
    export = {"stages": ["vanilla"]}
    return Script(name, spec(_times(rng), _gpus(rng), dataset=_dataset(rng), export=export))


def _dataset(rng: random.Random) -> dict[str, Any]:
    return {"source": "s3://none/*.parquet", "maxLength": 512, "workers": rng.choice((1, 2))}


def stages(name: str, rng: random.Random) -> Script:
    teacher = {"model": "s3://models/none", "gpus": rng.choice((1, 2))}
    evaluation = {"completions": rng.choice((0, 8))}
    fields = {"stages": [VANILLA, RESCORED], "teacher": teacher, "evaluation": evaluation}
    return Script(name, spec(_times(rng), runtime={"report": True}, **fields))


def onpolicy(name: str, rng: random.Random) -> Script:
    teacher = {"model": "s3://models/none", "gpus": 1}
    failing = rng.choice(
        ("", "onpolicy-sampler@1: seconds=0.2 exit=1", "onpolicy-teacher@1: seconds=0.1 exit=1")
    )
    beside = failing.partition("@")[0]  # if the trainer ends first, there is no other attempt
    hollow = f"{_times(rng)}; {BESIDE}; onpolicy: seconds={rng.uniform(1.5, 3):.1f}; {failing}"
    return Script(name, spec(hollow, 2, stages=[ONPOLICY], teacher=teacher), attempts={beside: (1, 2)})


def fails_once(name: str, rng: random.Random) -> Script:
    step, code = rng.choice(("preprocess", "vanilla")), rng.choice((1, 70, 75, 137))
    hollow = f"{_times(rng)}; {step}@1: exit={code} record={rng.choice(('true', 'false'))}"
    return Script(name, spec(hollow, _gpus(rng)), attempts={step: 2})


def is_terminated_once(name: str, rng: random.Random) -> Script:
    step = rng.choice(("preprocess", "vanilla"))
    return Script(name, spec(f"{_times(rng)}; {step}@1: exit=143", _gpus(rng)), attempts={step: 2})


def fails(name: str, rng: random.Random) -> Script:
    attempts = rng.choice((1, 2, 3))
    hollow = f"{_times(rng)}; vanilla: exit={rng.choice((1, 70, 137))} progress=stands"
    return Script(
        name,
        spec(hollow, _gpus(rng), runtime={"attempts": attempts}),
        phase="Failed",
        reason="AttemptsExhausted",
        attempts={"vanilla": attempts},
    )


def fails_for_good(name: str, rng: random.Random) -> Script:
    step = rng.choice(("preprocess", "vanilla"))
    hollow = f"{_times(rng)}; {step}: exit=65"
    attempts = {"vanilla": 0} if step == "preprocess" else {}
    return Script(name, spec(hollow), phase="Failed", reason="PermanentFailure", attempts=attempts)


def is_interrupted_for_good(name: str, rng: random.Random) -> Script:
    hollow = f"{_times(rng)}; vanilla: exit=143 progress=stands"
    runtime = {"interruptions": 3}
    return Script(
        name,
        spec(hollow, runtime=runtime),
        phase="Failed",
        reason="InterruptionsExhausted",
        attempts={"vanilla": 3},
    )


def is_continued(name: str, rng: random.Random) -> Script:
    hollow = f"{_times(rng)}; vanilla@1: exit=1 progress=stands; vanilla@2: exit=1 progress=stands"
    return Script(
        name,
        spec(hollow, _gpus(rng), runtime={"attempts": 2}),
        attempts={"vanilla": 3},
        acts=(("raise attempts", "vanilla", 2),),
    )


def outlasts_interruptions(name: str, rng: random.Random) -> Script:
    hollow = f"{_times(rng)}; @1: exit=143 progress=stands; @2: exit=143 progress=stands; preprocess: exit=0"
    return Script(
        name,
        spec(hollow, _gpus(rng), runtime={"interruptions": 2}),
        attempts={"vanilla": 3},
        acts=(("raise interruptions", "vanilla", 2),),
    )


def fails_beside_another(name: str, rng: random.Random) -> Script:
    """rescore fails for good while vanilla trains, which is then stopped."""
    hollow = f"{_times(rng)}; vanilla: seconds=600; rescore: exit=65"
    teacher = {"model": "s3://models/none", "gpus": 1}
    return Script(
        name,
        spec(hollow, stages=[VANILLA, RESCORED], teacher=teacher),
        phase="Failed",
        reason="PermanentFailure",
        attempts={"rescored": 0},
    )


def loses_its_child(name: str, rng: random.Random) -> Script:
    step = rng.choice(("preprocess", "vanilla"))
    act: Act = rng.choice(("delete child", "delete child, not its pods"))
    hollow = f"{_times(rng)}; {step}@1: seconds=20"
    # If the operator had not seen the child yet, it makes the same one again.
    return Script(name, spec(hollow, _gpus(rng)), attempts={step: (1, 2)}, acts=((act, step, 1),))


def loses_its_pod(name: str, rng: random.Random) -> Script:
    step = rng.choice(("preprocess", "vanilla"))
    act: Act = rng.choice(("delete pod", "evict pod"))
    return Script(
        name,
        spec(f"{_times(rng)}; {step}@1: seconds=20", _gpus(rng), dataset=_dataset(rng)),
        attempts={step: 2},
        acts=((act, step, 1),),
    )


def is_suspended(name: str, rng: random.Random) -> Script:
    step = rng.choice(("preprocess", "vanilla"))
    hollow = f"{_times(rng)}; {step}@1: seconds=20"
    acts: tuple[tuple[Act, str, int], ...] = (("suspend", step, 1), ("resume", step, 1))
    return Script(name, spec(hollow, _gpus(rng)), attempts={step: 2}, acts=acts)


def begins_suspended(name: str, rng: random.Random) -> Script:
    return Script(name, spec(_times(rng), _gpus(rng), suspend=True), acts=(("resume", "", 0),))


def expires(name: str, rng: random.Random) -> Script:
    """By a wall clock that is wrong most of the time."""
    return Script(name, spec(_times(rng), ttlAfterFinished="3s"), phase="Deleted")


def is_deleted(name: str, rng: random.Random) -> Script:
    step = rng.choice(("preprocess", "vanilla"))
    policy = rng.choice(("Retain", "Delete"))
    hollow = f"{_times(rng)}; {step}@1: seconds=20"
    return Script(
        name,
        spec(hollow, _gpus(rng), deletionPolicy=policy),
        phase="Deleted",
        acts=(("delete run", step, 1),),
    )


def never_fits(name: str, rng: random.Random) -> Script:
    return Script(
        name, spec(_times(rng), gpus=64), phase="Queued", reason="PoolTooSmall", attempts={"vanilla": 0}
    )


KINDS: tuple[Callable[[str, random.Random], Script], ...] = (
    plain,
    stages,
    onpolicy,
    fails_once,
    is_terminated_once,
    fails,
    fails_for_good,
    is_interrupted_for_good,
    is_continued,
    outlasts_interruptions,
    fails_beside_another,
    loses_its_child,
    loses_its_pod,
    is_suspended,
    begins_suspended,
    is_deleted,
    expires,
    never_fits,
)


def wrong_ends(scripts: list[Script], runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """How the runs that are left, by name, differ from their scripts."""
    for script in scripts:
        status = runs.get(script.name, {}).get("status", {})
        phase = status.get("phase", "") if script.name in runs else "Deleted"
        if phase != script.phase:
            yield f"{script.name}: it is {phase}, not {script.phase}: {status.get('message', '')}"
            continue
        if phase == "Deleted":
            continue
        reasons = {c["reason"] for c in status["conditions"] if c["type"] in ("Failed", "Stalled")}
        if script.reason and script.reason not in reasons:
            yield f"{script.name}: the reason is {' or '.join(sorted(reasons))}, not {script.reason}"
        for step in status["steps"]:
            expected, attempt = script.attempts.get(step["name"], 1), step.get("attempt", 0)
            if attempt not in (expected if isinstance(expected, tuple) else (expected,)):
                yield f"{script.name}: step {step['name']} has had {attempt} attempts, not {expected}"
