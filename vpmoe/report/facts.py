"""What a report says in words and numbers: the story of the run, its key figures, its costs beside the plan,
and where its objects come from. Pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from statistics import fmean

from vpmoe.api.card import GIB
from vpmoe.api.effort import EFFORTS
from vpmoe.api.run import SAMPLER, TEACHER, VALIDITY
from vpmoe.api.stages import Stage
from vpmoe.data.spans import SPANS
from vpmoe.plan.plan import Assumptions, Plan, make_plan
from vpmoe.plan.teacher import known_teacher
from vpmoe.plan.throughput import suggested_card
from vpmoe.plan.units import count
from vpmoe.report.run_data import Activity, Line, RunData, StepRecord
from vpmoe.rollout.task_record import TaskEvaluation
from vpmoe.storage.manifest import Manifest

UNKNOWN = "–"
ENDS = 3
"""Windows at either end that are averaged, because the reverse KL of one window varies with its samples."""
NAMED = 5
"""Skipped steps of a stage that are named."""


@dataclass(frozen=True)
class Figure:
    """A key figure."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """A row of the costs: a step, or a training step with those that run beside it."""

    step: str
    state: str
    gpus: str
    tokens: str
    """Trained on so far, of those planned."""
    time: str
    gpu_hours: str
    planned_time: str
    planned_gpu_hours: str


@dataclass(frozen=True)
class Origin:
    """A row of the provenance: an object, and what wrote it."""

    what: str
    key: str
    """Of its manifest, in the bucket."""
    sha256: str
    size: int
    step: str
    attempt: int
    commit: str | None
    image: str | None
    written: str


def headline(data: RunData) -> str:
    """The state of the run in one sentence."""
    done = [step for step in data.steps if step.state == "Succeeded"]
    running = [step.name for step in data.steps if step.state == "Running"]
    count = f"{len(done)} of {len(data.steps)} steps are done"
    if len(done) == len(data.steps):
        return f"The run has finished: all {len(done)} steps are done."
    if running:
        return f"The run is not finished: {count}; {', '.join(running)} had begun when this page was made."
    return f"The run is not finished: {count}, and none was running when this page was made."


def story(data: RunData) -> list[str]:
    """What happened, a sentence a stage, then what the jobs report as a condition."""
    student = data.run.spec.student
    dataset = data.manifest("dataset")
    sentences = []
    if dataset is not None:
        splits = dataset.facts["splits"]
        sentences.append(
            f"A student of shape {student.shape} learns from {splits['train']['documents']:,} documents; "
            f"{splits['valid']['documents']:,} are held out to measure it."
        )
    for stage in data.run.spec.stages:
        step = data.step(stage.name)
        if step.lines:
            sentences.append(_stage_sentence(data, stage, step))
    for step in data.steps:
        if (attempts := len(_attempts(data, step.name))) > 1:
            sentences.append(f"{step.name} took {attempts} attempts.")
    return sentences


_WHAT = {
    "Vanilla": "learned to predict the documents",
    "Rescored": "learned the documents, each token weighted by how likely the teacher finds it",
    "TeacherForced": "learned the teacher's whole distribution on the documents",
    "OnPolicy": "wrote completions itself and learned from the teacher's opinion of them",
}


def _stage_sentence(data: RunData, stage: Stage, step: StepRecord) -> str:
    tokens = count(max(int(line["tokens"]) for line in step.lines))
    sentences = [f"In stage {stage.name} ({stage.kind}) it {_WHAT[stage.kind]}, over {tokens} tokens."]
    losses = _held_out(step)
    changes = [
        f"{span} {before:.2f} → {after:.2f}"
        for span in SPANS
        if len(losses) > 1
        and (before := losses[0].get(span)) is not None
        and (after := losses[-1].get(span)) is not None
    ]
    if changes:
        sentences.append(f"Held-out loss: {', '.join(changes)} nats a token.")
    if windows := _reverse_kl(step):
        first, last = fmean(windows[:ENDS]), fmean(windows[-ENDS:])
        sentences.append(f"Distance to the teacher on its own text: {first:.2f} → {last:.2f} nats a token.")
    if skipped := step.events("skipped"):
        numbers = ", ".join(str(line["step"]) for line in skipped[:NAMED])
        more = f" and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        sentences.append(
            f"It skipped step {numbers}{more}: the loss or the gradient was not finite, so no weight moved."
        )
    evaluation = data.evaluations.get(stage.name)
    if evaluation is not None and evaluation.valid_share is not None:
        sentences.append(f"Afterwards {evaluation.valid_share:.0%} of its answers were valid.")
    return " ".join(sentences)


def conditions(data: RunData) -> list[str]:
    """What the jobs report beside their progress, such as a router that has collapsed."""
    return [
        f"{step.name}: {condition.type}, {condition.reason}: {condition.message}"
        for step in data.steps
        if step.progress is not None
        for condition in step.progress.conditions
        if condition.status == "True"
    ]


def key_figures(data: RunData) -> list[Figure]:
    """The figures at the head of the page."""
    training = [data.step(stage.name) for stage in data.run.spec.stages]
    trained = sum(max((int(line["tokens"]) for line in step.lines), default=0) for step in training)
    planned = sum(stage.tokens for stage in data.run.spec.stages)
    found = [Figure("Tokens trained on", count(trained), f"of {count(planned)} planned")]
    losses = [loss for step in training for loss in _held_out(step)]
    for span in SPANS if losses else ():
        before, after = losses[0].get(span), losses[-1].get(span)
        if before is not None and after is not None:
            found.append(Figure(f"Held-out loss, {span}", f"{after:.2f}", f"nats a token; was {before:.2f}"))
    if windows := [value for step in training for value in _reverse_kl(step)]:
        first = fmean(windows[:ENDS])
        found.append(
            Figure(
                "Distance to the teacher",
                f"{fmean(windows[-ENDS:]):.2f}",
                f"nats a token on its own text; was {first:.2f}",
            )
        )
    shares = [one.valid_share for one in data.evaluations.values() if one.valid_share is not None]
    if shares:
        before_text = f"; was {shares[0]:.0%}" if len(shares) > 1 else ""
        found.append(Figure("Valid answers", f"{shares[-1]:.0%}", f"at the latest evaluation{before_text}"))
    if data.tasks:
        found.append(_right_answers(list(data.tasks.values())[-1]))
    if data.activities:
        start = min(one.start for one in data.activities)
        end = max(one.end for one in data.activities)
        time = duration((end - start) / timedelta(hours=1))
        found.append(Figure("Time so far", time, f"since {start:%Y-%m-%d %H:%M} UTC"))
    if (left := time_left(data)) is not None:
        found.append(Figure("Time left, about", duration(left[0]), f"{left[1]:.2g} times what is planned"))
    return found


def _right_answers(found: TaskEvaluation) -> Figure:
    """Over all tasks, at the highest effort that was asked."""
    effort = [effort for effort in EFFORTS if effort in found.max_tokens][-1]
    shares = {}
    for side in found.models:
        results = [one for one in found.results if (one.side, one.effort) == (side, effort)]
        shares[side] = sum(one.right for one in results) / sum(one.questions for one in results)
    teacher = f"; the teacher {shares['teacher']:.0%}" if "teacher" in shares else ""
    return Figure("Right answers", f"{shares['student']:.0%}", f"to questions, at {effort} effort{teacher}")


def time_left(data: RunData) -> tuple[float, float] | None:
    """Hours of training and evaluation that are left, and the factor by which training has taken longer than
    planned until now: the plan's hours of what is left, times that factor.

    None if nothing is left, nothing has been trained, or the plan does not know the speed of a step.
    """
    left = measured = planned_hours = 0.0
    for row in planned(data).steps:
        step = data.step(row.step)
        if step.role not in ("train", "evaluate"):
            continue
        done = 1.0 if step.state == "Succeeded" else _share_trained(step)
        if row.hours is None:
            return None
        left += row.hours * (1 - done)
        if step.role == "train":
            measured += sum(one.hours for one in _attempts(data, row.step))
            planned_hours += row.hours * done
    if not left or not measured or not planned_hours:
        return None
    return left * measured / planned_hours, measured / planned_hours


def _share_trained(step: StepRecord) -> float:
    amount = step.progress.tokens if step.progress is not None else None
    return min(1.0, amount.done / amount.total) if amount is not None and amount.total else 0.0


def costs(data: RunData) -> tuple[list[Cost], list[str]]:
    """What each step has cost so far beside the plan, and what the plan assumes."""
    plan = planned(data)
    rows = [_cost(data, step.step, step.gpus, step.hours) for step in plan.steps]
    spent = sum(_gpu_hours(data, step.step, step.gpus) for step in plan.steps)
    together = Cost(
        "all",
        "",
        f"{plan.gpus} at most",
        "",
        "",
        _hours(spent),
        _or_unknown(duration, plan.hours),
        _or_unknown(_hours, plan.gpu_hours),
    )
    card = f"the plan is for {plan.card} ({plan.card_memory / GIB:.1f} GiB)"
    return [*rows, together], [card, *plan.sources]


def planned(data: RunData) -> Plan:
    """The plan of the run, as `vpmoe plan` makes it without a card, which the bucket does not know, and with
    the dataset's real tokens."""
    card, dataset = suggested_card(None), data.manifest("dataset")
    tokens = int(dataset.facts["splits"]["train"]["tokens"]) if dataset is not None else None
    teacher = known_teacher(data.run.spec.teacher.model)
    return make_plan(data.run, Assumptions(card, card.memory, teacher, dataset_tokens=tokens))


def _roles(data: RunData, step: str, gpus: Mapping[str, int]) -> dict[str, int]:
    """GPUs by the names of the steps of a row of the plan."""
    names = {"sampler": f"{step}-{SAMPLER}", "teacher": f"{step}-{TEACHER}", "evaluate": f"{step}-{VALIDITY}"}
    known = {one.name for one in data.steps}
    found: dict[str, int] = {}
    for role, number in gpus.items():
        # A teacher beside a TeacherForced stage is a process of the training step; others are their own step.
        name = names[role] if names.get(role) in known else step
        found[name] = found.get(name, 0) + number
    return found


def _gpu_hours(data: RunData, step: str, gpus: Mapping[str, int]) -> float:
    return sum(
        number * sum(one.hours for one in _attempts(data, name))
        for name, number in _roles(data, step, gpus).items()
    )


def _cost(data: RunData, name: str, gpus: Mapping[str, int], plan_hours: float | None) -> Cost:
    step, attempts = data.step(name), _attempts(data, name)
    tokens = ""
    if step.progress is not None and step.progress.tokens is not None:
        amount = step.progress.tokens
        tokens = f"{count(amount.done)} of {count(amount.total)}"
    number = sum(gpus.values())
    return Cost(
        step=name,
        state=step.state,
        gpus=" + ".join(f"{count} {role}" for role, count in gpus.items()) or "none",
        tokens=tokens or UNKNOWN,
        time=duration(sum(one.hours for one in attempts)) if attempts else UNKNOWN,
        gpu_hours=_hours(_gpu_hours(data, name, gpus)) if attempts and number else UNKNOWN,
        planned_time=_or_unknown(duration, plan_hours),
        planned_gpu_hours=_or_unknown(_hours, plan_hours * number if plan_hours and number else None),
    )


def _attempts(data: RunData, step: str) -> list[Activity]:
    return [one for one in data.activities if one.step == step]


def origins(data: RunData) -> list[Origin]:
    """Where the run's objects come from."""
    return [_origin(found) for found in data.manifests]


def _origin(found: Manifest) -> Origin:
    made = found.provenance
    return Origin(
        what=_NAMES[found.kind].format(stage=made.step.partition("-")[0]),
        key=found.key,
        sha256=found.sha256,
        size=sum(subject.size for subject in found.subjects.values()),
        step=made.step,
        attempt=made.attempt,
        commit=made.git_sha,
        image=made.image,
        written=str(found.raw["predicate"]["runDetails"]["metadata"]["finishedOn"]),
    )


_NAMES = {
    "init": "initial weights",
    "dataset": "dataset",
    "scores": "teacher's scores of the dataset",
    "checkpoint": "last checkpoint of {stage}",
    "weights": "last policy version of {stage}",
    "model": "exported model of {stage}",
}


def _held_out(step: StepRecord) -> list[Mapping[str, float | None]]:
    """The held-out losses of a training step by span, in order."""
    return [line["heldOut"] for line in step.events("evaluation") if line.get("heldOut")]


def _reverse_kl(step: StepRecord) -> list[float]:
    """KL(student‖teacher) of each window of a training step, in nats a token: the mean over its sampled
    tokens."""
    windows = [line for line in step.events("step") if line["kind"] == "OnPolicy"]
    return [found for line in windows if (found := _mean_over_spans(line)) is not None]


def _mean_over_spans(line: Line) -> float | None:
    counted = [(line["reverseKl"][span], count) for span, count in line["targets"].items() if count]
    total = sum(count for _, count in counted)
    return sum(nats * count for nats, count in counted) / total if total else None


def _or_unknown(text: Callable[[float], str], value: float | None) -> str:
    return UNKNOWN if value is None else text(value)


def _hours(value: float) -> str:
    """Hours with as many digits as tell something: a small run takes minutes."""
    return f"{value:,.1f}" if value >= 10 else f"{value:.2g}"


def duration(hours: float) -> str:
    """A duration with the unit that suits it."""
    seconds = hours * 3600
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{hours:,.1f} h" if hours < 48 else f"{hours / 24:,.1f} days"


def data_size(size: int) -> str:
    """Bytes with the unit that suits them."""
    number, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.3g} {unit}"
