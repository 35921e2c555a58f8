"""Count the right answers of a student, and of its teacher beside it, to benchmark tasks at three efforts.

Both are served by vLLM and asked with the same token ids. Only a final message is an answer; one that is cut
off is wrong, and counted. Nothing is downloaded. Endpoint, region and credentials of the bucket come from the
environment, as for AWS's own tools.
"""

import argparse
import sys
from pathlib import Path

from vpmoe.api.effort import EFFORTS
from vpmoe.api.stages import MaxTokens
from vpmoe.api.termination import EXIT_CODES, WRONG_USAGE

HELP = "count right answers to benchmark tasks, student beside teacher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--student", required=True, metavar="URL", help="server of the student")
    parser.add_argument("--teacher", metavar="URL", help="server of the teacher")
    parser.add_argument(
        "--task", action="append", metavar="NAME", help="may be repeated (default: the three that vpMoE has)"
    )
    parser.add_argument(
        "--task-dir", action="append", type=Path, default=[], metavar="DIR", help="folder with your own tasks"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N questions of each task")
    parser.add_argument(
        "--max-tokens",
        type=efforts,
        default=MaxTokens().model_dump(),
        metavar="low=N,medium=N,high=N",
        help="longest completion at each effort; an effort that is left out is not asked (default: "
        f"{','.join(f'{name}={size}' for name, size in MaxTokens().model_dump().items())})",
    )
    parser.add_argument("--temperature", type=temperature, default=1.0, metavar="T", help="(default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--concurrency", type=positive, default=64, metavar="N", help="questions at a time (default: 64)"
    )
    parser.add_argument("--run", metavar="RUN_FOLDER", help="write to this run's folder, for its report")
    parser.add_argument(
        "--stage", metavar="NAME", help="of that run, that the student is of (default: the last)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("tasks.json"), metavar="FILE", help="(default: tasks.json)"
    )


def positive(text: str) -> int:
    """A whole number from 1 on. Raises ArgumentTypeError for another text."""
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def temperature(text: str) -> float:
    """A number from 0 to 2. Raises ArgumentTypeError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 (the likeliest token) to 2")
    return value


def efforts(text: str) -> dict[str, int]:
    """Tokens by effort. Raises ArgumentTypeError for another text."""
    pairs = [part.partition("=") for part in text.split(",")]
    found = {name: size for name, _, size in pairs}
    if len(found) < len(pairs) or not found.keys() <= set(EFFORTS):
        raise argparse.ArgumentTypeError(f"{text!r} is not as low=1024,medium=2048,high=4096")
    return {name: positive(found[name]) for name in EFFORTS if name in found}


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, 64 for a stage without a run, 75 if a server or the store is away, else 65."""
    if arguments.stage is not None and arguments.run is None:
        sys.stderr.write("vpmoe evaluate: --stage is of a run: name it with --run\n")
        return WRONG_USAGE
    from vpmoe.failure import classify_error

    try:
        _evaluate(arguments)
    except Exception as error:
        found = classify_error(error)
        if found.kind == "Internal":
            raise
        sys.stderr.write(f"vpmoe evaluate: {found.message}\n")
        return EXIT_CODES[found.kind]
    return 0


def _evaluate(arguments: argparse.Namespace) -> None:
    from vpmoe.api.dataset import Conversation
    from vpmoe.data.harmony import SystemMessage
    from vpmoe.failure import Permanent
    from vpmoe.process.run_folder import choose_stage, open_run
    from vpmoe.rollout.task_record import Side
    from vpmoe.storage import paths
    from vpmoe.storage.bucket import json_bytes
    from vpmoe.task_evaluation.evaluate import evaluate_tasks
    from vpmoe.task_evaluation.harness import OURS, Sampling, load_tasks
    from vpmoe.task_evaluation.server import Server

    opened = open_run(arguments.run) if arguments.run is not None else None
    stage = choose_stage(opened[0], arguments.stage).name if opened is not None else None
    said = opened[0].spec.dataset.conversation if opened is not None else Conversation()
    sampling = Sampling(
        SystemMessage(said.identity, said.knowledge_cutoff, said.date, "high"),
        arguments.max_tokens,
        arguments.temperature,
        arguments.seed,
        arguments.concurrency,
    )
    tasks = load_tasks(arguments.task or OURS, arguments.task_dir, arguments.limit)
    servers: dict[Side, Server] = {"student": Server(arguments.student, "--student")}
    if arguments.teacher is not None:
        servers["teacher"] = Server(arguments.teacher, "--teacher")
    record = evaluate_tasks(
        tasks, servers, sampling, say, run=opened[0].identity if opened else None, stage=stage
    )
    content = json_bytes(record.dump())
    try:
        arguments.output.write_bytes(content)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise Permanent(
            f"--output {arguments.output}: {error.strerror}. Name a file that can be written."
        ) from None
    say(str(arguments.output.resolve()))
    if opened is not None and stage is not None:
        key = paths.task_evaluation(opened[0], stage)
        opened[1].put_bytes(key, content, {"run": opened[0].identity, "config": opened[0].config_hash})
        say(opened[1].url(key))


def say(line: str) -> None:
    """Print one line at once, because an evaluation takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
