"""A plan as text for people, and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vpmoe.api.card import GIB
from vpmoe.plan.memory import RoleMemory
from vpmoe.plan.plan import Plan
from vpmoe.plan.units import UNKNOWN, count, gigabytes, gpus, hours


def plan_text(plan: Plan) -> str:
    """The plan as tables. Numbers are rounded to three digits."""
    steps = [("step", "tokens", "GPUs", "tokens/s", "busiest", "hours", "pauses, hours", "busy")]
    for step in plan.steps:
        roles = " + ".join(f"{number:,} {role}" for role, number in step.gpus.items()) or "none"
        steps.append(
            (
                step.step,
                count(step.tokens),
                roles,
                count(step.tokens_per_second),
                step.slowest or UNKNOWN,
                hours(step.hours),
                hours(step.pause_hours) if step.pause_hours else UNKNOWN,
                ", ".join(f"{role} {100 * share:.0f} %" for role, share in step.busy.items()) or UNKNOWN,
            )
        )
    checkpoints = [("checkpoints", "written", "kept", "GB", "pause, s", "upload, s", "interval, s")]
    saving = [("each training pod", "host memory for copies, GB", "grace period, s")]
    for one in plan.checkpoints:
        interval = UNKNOWN if one.interval_seconds is None else f"{one.interval_seconds:,.0f}"
        checkpoints.append(
            (
                one.stage,
                f"{one.number:,}",
                f"{one.kept:,}",
                gigabytes(one.size),
                f"{one.pause_seconds:,.1f}",
                f"{one.upload_seconds:,.0f}",
                interval,
            )
        )
        saving.append((one.stage, gigabytes(one.host_bytes), f"{one.grace_seconds:,}"))
    bucket = [("in the bucket", "GB")]
    bucket += [(kind, UNKNOWN if size is None else gigabytes(size)) for kind, size in plan.bucket.items()]
    everything = "all known" if None in plan.bucket.values() else "all"
    bucket.append((everything, gigabytes(sum(size or 0 for size in plan.bucket.values()))))
    before = "without preprocessing"
    if plan.preprocess_cpu_hours is not None:
        before = (
            f"after {hours(plan.preprocess.hours)} hours of preprocessing "
            f"({hours(plan.preprocess_cpu_hours)} CPU hours)"
        )
    teacher = ""
    if any("teacher" in step.gpus for step in plan.steps):
        teacher = f"; teacher {plan.teacher or 'of unknown size'}"
    taken = "hours not known,"
    if plan.hours is not None:
        taken = f"{hours(plan.hours)} hours and {hours(plan.gpu_hours)} GPU hours"
    head = (
        f"{plan.run}: {taken} on {gpus(plan.gpus)} of "
        f"{plan.card_memory / GIB:.1f} GiB ({plan.card}), {before}{teacher}"
    )
    sources = "\n".join(f"- {source}" for source in plan.sources)
    tables = (steps, checkpoints, saving, bucket, microbatch_rows(plan.memory), memory_rows(plan.memory))
    return "\n\n".join([head, *(table(rows) for rows in tables), f"Speeds and lengths:\n{sources}"])


def microbatch_rows(memory: Sequence[RoleMemory]) -> list[tuple[str, ...]]:
    """How each stage's trainer divides a rank's sequences."""
    rows: list[tuple[str, ...]] = [("microbatch", "positions", "sequences", "recomputed layers", "gradients")]
    for role in memory:
        if (one := role.microbatch) is not None:
            gradients = "sharded" if one.sharded_gradients else "whole"
            recomputed = f"{one.recomputed_layers} of {one.layers}"
            rows.append((role.step, f"{one.positions:,}", f"{one.sequences:,}", recomputed, gradients))
    return rows


def memory_rows(memory: Sequence[RoleMemory]) -> list[tuple[str, ...]]:
    """The memory of each GPU by role, in GiB."""
    head = ("GiB of each GPU", "role", "GPUs", "engines", *RoleMemory.ITEMS, "total", "card")
    rows: list[tuple[str, ...]] = [head]
    for role in memory:
        items = [f"{role.items[name] / GIB:.1f}" if name in role.items else "" for name in role.ITEMS]
        verdict = f"{role.card / GIB:.1f}" + ("" if role.fits else f", needs {-(-role.needed // GIB)}")
        engines = "" if role.sequences is None else str(role.engines)
        rows.append(
            (role.step, role.role, f"{role.gpus:,}", engines, *items, f"{role.total / GIB:.1f}", verdict)
        )
    return rows


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values: camelCase keys; bytes, seconds, hours and tokens; null if not known."""
    found = asdict(plan)
    for role, planned in zip(plan.memory, found["memory"], strict=True):
        planned |= {"total": role.total, "fits": role.fits}
    return {_camel(key): _camel_values(value) for key, value in found.items() if key != "bucket"} | {
        "bucket": found["bucket"]
    }


def _camel_values(value: Any) -> Any:
    if isinstance(value, list):
        return [_camel_values(each) for each in value]
    if isinstance(value, Mapping):
        return {_camel(key): _camel_values(each) for key, each in value.items()}
    return value


def _camel(key: str) -> str:
    first, *others = key.split("_")
    return first + "".join(word.capitalize() for word in others)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)
