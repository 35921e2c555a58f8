"""Refuses a teacher by its config.json in the first step of a run, before a GPU is asked for and tokens are
spent.

The weights themselves are checked where they are loaded (weights.py).
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vpmoe.api import DistillRun
from vpmoe.api.card import CARD_MEMORY, parse_card_memory
from vpmoe.failure import Permanent
from vpmoe.plan.memory import teacher_problems
from vpmoe.plan.teacher import TeacherSize
from vpmoe.storage import Bucket
from vpmoe.teacher.model import check_vocabulary, fetch_teacher, read_config, resolve_teacher
from vpmoe.teacher.weights import check_config

CONFIG = "config.json"


def check_teacher(
    run: DistillRun, bucket: Bucket, gpu_memory: str | None, check_stop: Callable[[], None] = lambda: None
) -> None:
    """Resolve the run's teacher, and read its config.json alone.

    `gpu_memory` is runtime.gpuMemory, None to compare no memory. Raises Permanent, which names the field, the
    numbers and the remedy, if the model is not a GPT-OSS with our vocabulary, has a shorter context than the
    run needs, or does not fit on the GPUs; otherwise as resolve_teacher and fetch_teacher do. Does nothing if
    no stage uses the teacher.
    """
    spec = run.spec
    if not any(stage.needs_teacher for stage in spec.stages):
        return
    if gpu_memory is not None:
        card = card_memory(gpu_memory)
    teacher = resolve_teacher(run, bucket)
    only = replace(teacher, files=tuple(file for file in teacher.files if file.name == CONFIG))
    with tempfile.TemporaryDirectory(prefix="vpmoe-teacher-") as scratch:
        directory = fetch_teacher(only, bucket, Path(scratch), check_stop)
        config = read_config(directory)
        check_config(config)
        check_vocabulary(directory)
    check_context(run, config.get("max_position_embeddings"))
    if gpu_memory is None:
        return
    size = TeacherSize.from_config(config, spec.teacher.model)
    if problems := teacher_problems(spec, size, card, gpu_memory):
        raise Permanent(" ".join(problems))


def check_context(run: DistillRun, positions: int | None) -> None:
    """Raise Permanent if a text that the teacher reads in vLLM can be longer than its context of
    `positions`."""
    spec = run.spec
    if positions is None:
        return
    scored = [("dataset.maxLength", spec.dataset.max_length)] * any(
        stage.needs_rescoring or stage.runs_teacher for stage in spec.stages
    )
    scored += [("training.sequenceLength", spec.training.sequence_length)] * any(
        stage.samples for stage in spec.stages
    )
    for field, longest in scored:
        if longest > positions:
            raise Permanent(
                f"teacher.model: max_position_embeddings is {positions}, and {field} is {longest}: the "
                f"teacher must read texts of that length. Lower {field}, or use a model with a longer "
                "context."
            )


def card_memory(text: str) -> int:
    """Bytes of runtime.gpuMemory. Raises Permanent if the variable that carries it is malformed."""
    try:
        return parse_card_memory(text)
    except ValueError:
        raise Permanent(
            f"VPMOE_GPU_MEMORY={text[:80]!r} does not match {CARD_MEMORY}. Write it as runtime.gpuMemory, "
            "such as 80Gi, or unset it."
        ) from None
