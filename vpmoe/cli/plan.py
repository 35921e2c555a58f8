"""Plan a run before anything is spent: hours, GPUs, bytes in the bucket, checkpoints, and memory of each GPU.

Needs neither a cluster, a bucket nor a GPU. Exit code 65, with the numbers and the remedy, if the run cannot
fit.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe.api import DistillRun, Invalid, load_run
from vpmoe.api.card import parse_card_memory
from vpmoe.api.quantities import parse_tokens
from vpmoe.api.termination import EXIT_CODES

if TYPE_CHECKING:
    from vpmoe.plan.plan import Assumptions
    from vpmoe.plan.teacher import TeacherSize

HELP = "hours, GPUs, bytes and memory of a run, before anything is spent"
EFFORTS = ("low", "medium", "high")
WORK = ("preprocess", "train", "sample", "score", "hidden")
CARDS = ("h100-80", "h200-141")
SPEEDS = (1e-12, 1e15)
"""Least and largest number of an option. Beyond them hours are no finite numbers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a DistillRun in YAML or JSON")
    parser.add_argument(
        "--gpu",
        choices=CARDS,
        help="the card: its memory, and the speeds that were measured on it, or else on the other one "
        "(default: the memory is runtime.gpuMemory, and the speeds are of the card that it suggests; without "
        "it h100-80)",
    )
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher-config", type=Path, metavar="FILE", help="the config.json of the teacher, for its size"
    )
    teacher.add_argument(
        "--teacher", choices=("gpt-oss-20b", "gpt-oss-120b"), help="the release that the teacher is"
    )
    parts = (
        "CPU core that preprocesses",
        "GPU of the trainer",
        "GPU of the sampler while its engines are full",
        "GPU of the teacher that scores",
        "GPU of the teacher beside a TeacherForced stage",
    )
    for work, part in zip(WORK, parts, strict=True):
        parser.add_argument(
            f"--{work}-tokens-per-second",
            type=positive_number,
            metavar="N",
            help=f"speed of one {part} (default: as measured, docs/benchmarks.md)",
        )
    parser.add_argument(
        "--dataset-tokens", type=tokens, metavar="TOKENS", help="tokens of the dataset, such as 40B"
    )
    parser.add_argument(
        "--prompt", type=tokens, default=128, metavar="TOKENS", help="length of a prompt (default: 128)"
    )
    parser.add_argument(
        "--completion",
        type=lengths,
        default={},
        metavar="low=N,…",
        help="length of a completion by effort (default: half of maxTokens)",
    )
    parser.add_argument(
        "--gigabytes-per-second",
        type=positive_number,
        default=1.0,
        metavar="N",
        help="speed of a pod to the bucket, for checkpoints, and of its scratch disk (default: 1)",
    )
    parser.add_argument("--output", choices=("text", "json"), default="text", help="form of the plan")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan. Returns 0, or 65 if the run cannot fit. Raises Invalid if a file is not what it must
    be."""
    from vpmoe.plan.plan import make_plan
    from vpmoe.plan.table import plan_json, plan_text

    try:
        planned = load_run(arguments.file)
    except OSError as error:
        raise Invalid([f"cannot be read: {error.strerror}"], str(arguments.file)) from None
    plan = make_plan(planned, assumptions(planned, arguments))
    if arguments.output == "json":
        text = json.dumps(plan_json(plan), indent=2, allow_nan=False)
    else:
        text = plan_text(plan)
    sys.stdout.write(f"{text}\n")
    for problem in plan.problems:
        sys.stderr.write(f"{arguments.file}: {problem}\n")
    return EXIT_CODES["Permanent"] if plan.problems else 0


def assumptions(planned: DistillRun, arguments: argparse.Namespace) -> "Assumptions":
    """What the command line adds to the specification. Raises Invalid."""
    from vpmoe.plan.plan import Assumptions
    from vpmoe.plan.throughput import CARDS as BY_NAME
    from vpmoe.plan.throughput import Work, suggested_card

    written = planned.spec.runtime.gpu_memory
    memory = parse_card_memory(written) if written and not arguments.gpu else None
    card = BY_NAME[arguments.gpu] if arguments.gpu else suggested_card(memory)
    length = planned.spec.training.sequence_length
    if arguments.prompt >= length and any(stage.samples for stage in planned.spec.stages):
        raise Invalid(
            [
                f"--prompt {arguments.prompt} leaves no room for an answer in training.sequenceLength "
                f"{length}. Give the length of your prompts, or raise training.sequenceLength"
            ],
            str(arguments.file),
        )
    given: dict[Work, float | None] = {
        "preprocess": arguments.preprocess_tokens_per_second,
        "train": arguments.train_tokens_per_second,
        "sample": arguments.sample_tokens_per_second,
        "score": arguments.score_tokens_per_second,
        "hidden": arguments.hidden_tokens_per_second,
    }
    return Assumptions(
        card=card,
        memory=memory or card.memory,
        teacher=teacher_size(planned, arguments),
        prompt=arguments.prompt,
        completion=arguments.completion,
        dataset_tokens=arguments.dataset_tokens,
        speeds={work: speed for work, speed in given.items() if speed is not None},
        disk_speed=arguments.gigabytes_per_second * 1e9,
    )


def teacher_size(planned: DistillRun, arguments: argparse.Namespace) -> "TeacherSize | None":
    """The teacher's size: of --teacher-config, of --teacher, or of the release that teacher.model names; None
    if no stage uses it or it is not known. Raises Invalid if the file is no config.json."""
    from vpmoe.plan.teacher import KNOWN, TeacherSize, known_teacher

    model = planned.spec.teacher.model
    if not any(stage.needs_teacher for stage in planned.spec.stages):
        return None
    if arguments.teacher:
        return KNOWN[arguments.teacher]
    if not arguments.teacher_config:
        return known_teacher(model)
    source = str(arguments.teacher_config)
    try:
        config = json.loads(arguments.teacher_config.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("is no JSON object")
        return TeacherSize.from_config(config, model.rstrip("/").rpartition("/")[2])
    except OSError as error:
        raise Invalid([f"cannot be read: {error.strerror}"], source) from None
    except ValueError as error:
        raise Invalid([f"is not the config.json of a GPT-OSS: {error}"], source) from None


def tokens(text: str) -> int:
    """A positive number of tokens, such as 40B. Raises ArgumentTypeError."""
    try:
        count = parse_tokens(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if count < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return count


def positive_number(text: str) -> float:
    """A number of SPEEDS. Raises ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    least, most = SPEEDS
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
    return number


def lengths(text: str) -> dict[str, int]:
    """Tokens by effort, from text such as low=300,high=2000. Raises ArgumentTypeError."""
    found: dict[str, int] = {}
    for each in text.split(","):
        name, _, number = each.partition("=")
        if name not in EFFORTS or not number.isdecimal() or int(number) < 1:
            raise argparse.ArgumentTypeError(
                f"{each!r} is not an effort and a number of tokens, such as low=300,medium=700,high=2000"
            )
        found[name] = int(number)
    return found
