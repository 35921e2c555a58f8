r"""A short recipe on one machine: real jobs on its GPUs, with an S3 store on loopback, within a time limit.

    python -m benchmarks.recipe --limit 250 --gpus teacher=0 sampler=1 trainer=2,3 [--kill sampler] …
    python -m benchmarks.recipe --limit 250 --gpus teacher=0 sampler=0 trainer=1 \
        --share teacher=0.4 sampler=0.5
    python -m benchmarks.recipe --limit 600 --gpus teacher=0 sampler=1,2,3,4 trainer=5,6,7 \
        --teacher gpt-oss-120b --stages Vanilla,Rescored,OnPolicy --after evaluate,export,report

A process takes the place of each pod, with the command and the environment that the operator gives it; the
training pod's launcher starts a process a GPU. Steps start in the operator's order, when their GPUs are free.
Everything is random and small: rows of the repository's sample (or of --parquet), a student without training,
a teacher of the shape --teacher in MXFP4 (float32 on the CPU). Completions of such a student end at their
limits. --teacher-folder and --teacher-cache keep the teacher for the next run, which then need not write and
download it.

--kill sampler sends SIGKILL to one engine of the sampler after its first window, --kill trainer to one rank
after the first version that training has published. The step's next attempt starts at once, where the
operator would wait for some seconds. The stage must end all the same.

Prints what happens, with the seconds since the start, first the speed of one object to and from the bucket;
then, from the run's metrics and records in the bucket, beside `vpmoe plan` for this run with the lengths that
it had and the slower of the two speeds:
  seconds of each step; tokens/s of each role, and the share of the time in which it did not wait
  waits          for rollouts, scores, weights, the teacher, and uploads of versions
  MFU            6 operations a token and active parameter as a share of 989 TFLOP/s (benchmarks.step), on the
                 CPU of the rate of a large product; without waits and without an attempt's first step
  between steps  where training waits for a checkpoint, and copies a policy version; without uploads
  from step to sampling: from the end of an optimizer step, and of the upload before, until the sampler
                 samples from its weights (in the table: if it waited for them); to bucket: until the bucket
                 has them
  GPUs           the share of the time in which a kernel ran, and the least free memory, read once a second
At the end a table for docs/benchmarks.md, in which differences of more than a fifth are bold: measured
without an attempt's first step, planned for a stage so long that its start does not count.

If a role ends wrongly or --limit seconds pass, the figures are of the steps that have succeeded, the last
lines of its log are printed after them, and the exit code is 1.
At the end, after Ctrl-C too, nothing that was started is alive. Files are below --scratch (checkpoints of
vpmoe-6b have 72 GB, versions 12), those of the bucket below --bucket; /dev/shm is faster than most disks, and
counts as memory. On the CPU, if CUDA_VISIBLE_DEVICES is set and empty: GPUs are only counted then.

Roles that share a GPU need --share: the part of its memory that each plans with (a trainer with few layers
fits beside the others; beside the sampler only in OnPolicy stages, because others train on both roles' GPUs).
--layers makes a student with the shape's first layers. Both are no options of the jobs: a sitecustomize.py
makes these changes (tests/fakes/pod_overrides.py). `vpmoe plan` does not know of shared GPUs. Of fewer layers
it has the bytes, and speeds that are scaled by the parameters that a token is multiplied with, unless
--speeds says otherwise; of --teacher-layers nothing.
"""

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.bucket import write_random
from benchmarks.preprocess import store
from benchmarks.recipe_figures import GpuRecorder, Report
from benchmarks.recipe_prepare import TEACHERS
from benchmarks.step import PEAK, active_parameters
from demo import sample
from tests.fakes.local_pods import (
    ROOT,
    VICTIMS,
    Placement,
    RunFailed,
    Settings,
    StepRunner,
    adopt_orphans,
    kill_descendants,
    on_cpu,
    parse_placement,
    training_roles,
)
from vpmoe.api import DistillRun
from vpmoe.api.memory import STUDENTS
from vpmoe.api.quantities import parse_tokens
from vpmoe.cli.plan import WORK, positive_number
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.plan.sampling import ENGINES
from vpmoe.plan.throughput import CARDS, measured
from vpmoe.storage import Bucket

STAGES = ("Vanilla", "Rescored", "TeacherForced", "OnPolicy")
AFTER = ("evaluate", "export", "report")
PROMPT = 90
"""Tokens of a prompt, about: of the repository's sample with its system message."""
EFFORTS = {"low": (0.4, 4), "medium": (0.3, 2), "high": (0.3, 1)}
"""Share of each effort, and what --completion is divided by for its longest completion."""
BUCKET = "benchmark"
TEACHER = "models/teacher"
OBJECT, CPU_OBJECT = 1 << 30, 1 << 26
"""Bytes of the object that the bucket's speed is measured with, on GPUs and on the CPU."""
STORED = ("--default-etag", "placed")
"""For files that are placed in the store's folder, as the teacher's are: the store has no ETag of these."""


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, interrupt)
    adopt_orphans()
    try:
        with tempfile.TemporaryDirectory(prefix="vpr", dir=given.scratch) as scratch:
            code = run_recipe(given, Path(scratch))
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        kill_descendants()
    raise SystemExit(code)


def interrupt(number: int, frame: object) -> NoReturn:
    """Signal handler: end as after Ctrl-C."""
    raise KeyboardInterrupt


def run_recipe(given: argparse.Namespace, scratch: Path) -> int:
    """Prepare the bucket, run all steps and print the figures. Returns the exit code."""
    deadline = time.monotonic() + given.limit
    shape = SHAPES[given.student]
    shape = replace(shape, layers=min(shape.layers, given.layers or shape.layers))
    with store_of(given, scratch) as (endpoint, objects):
        run = DistillRun.parse(document(given, endpoint))
        file = scratch / "run.yaml"
        file.write_text(yaml.safe_dump(run.document()))
        bucket = Bucket.open(run.spec.storage)
        settings = Settings(
            run,
            file,
            given.placement,
            folder(scratch / "pods"),
            folder(given.logs or scratch / "logs"),
            folder(given.teacher_cache or scratch / "teacher-cache"),
            given.weights_volume and folder(given.weights_volume / secrets.token_hex(4)),
            given.layers,
        )
        runner = StepRunner(settings, bucket, deadline, list(given.kill))
        gpus = GpuRecorder(given.placement.all)
        failed: RunFailed | None = None
        try:
            measured_speed = measure_bucket(runner, scratch)
            rate = prepare(given, runner, objects)
            for number, table in enumerate(tables(given)):
                path = scratch / f"{number:03d}.parquet"
                pq.write_table(table, path)
                bucket.put_file(f"input/{path.name}", path, {})
            with gpus:
                runner.run_all()
        except RunFailed as error:
            failed = error
        finally:
            runner.stop()
            if settings.weights_volume:
                shutil.rmtree(settings.weights_volume)
        try:
            if runner.spans:
                STUDENTS[given.student] = shape.size()  # the plan's, if it has fewer layers
                options = [*plan_options(given, shape, measured_speed), "--gpu", given.card]
                active = active_parameters(shape)
                Report(
                    run, bucket, given.placement, runner.spans, gpus, active, rate, options, objects
                ).print()
        finally:
            sys.stdout.flush()  # the error comes last
            if failed:
                print(f"\n{failed}", file=sys.stderr)
    return 1 if failed else 0


def measure_bucket(runner: StepRunner, scratch: Path) -> float:
    """Write one object and read it again as jobs do. Returns the slower of the two speeds, in GB/s."""
    size, key = (CPU_OBJECT if on_cpu() else OBJECT), "speed"
    source, copy = scratch / key, scratch / f"{key}-read"
    write_random(source, size)
    began = time.monotonic()
    stored = runner.bucket.put_file(key, source, {})
    written = time.monotonic()
    runner.bucket.download(stored, copy)
    read = time.monotonic()
    runner.bucket.delete(key)
    for path in (source, copy):
        path.unlink()
    to, back = (size / 1e9 / seconds for seconds in (written - began, read - written))
    runner.say(f"bucket: {to:.2f} GB/s in, {back:.2f} GB/s out")
    return min(to, back)


def plan_options(given: argparse.Namespace, shape: Shape, measured_speed: float) -> list[str]:
    """Options of `vpmoe plan`: the teacher, and the speeds that are given. Of a student with fewer layers
    also those that were measured of the whole, scaled by the parameters that a token is multiplied with.
    `measured_speed`: of the bucket, in GB/s."""
    speeds: dict[str, float] = dict(given.speeds)
    whole = SHAPES[given.student]
    if shape != whole:
        scale = active_parameters(whole) / active_parameters(shape)
        for work in ("train", "sample"):
            found = measured(work, given.student, given.card, ENGINES)
            if found is not None:
                speeds.setdefault(work, found.tokens_per_second * scale)
    options = ["--gigabytes-per-second", f"{given.gigabytes_per_second or measured_speed:.3g}"]
    if given.teacher != "tiny":
        options += ["--teacher", given.teacher]
    for work, speed in speeds.items():
        options += [f"--{work}-tokens-per-second", str(speed)]
    return options


@contextlib.contextmanager
def store_of(given: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path]]:
    """An S3 store with an empty bucket: its endpoint, and the folder with the bucket's objects.

    It keeps what an object has beside its content in files, not in extended attributes, which memory need not
    have.
    """
    with tempfile.TemporaryDirectory(prefix="vpr", dir=given.bucket or scratch) as above:
        records = folder(Path(above) / "records")
        options = [*STORED, "--sidecar", str(records)]
        with store(Path(above), options) as (endpoint, _, objects):
            yield endpoint, objects / BUCKET


def folder(path: Path) -> Path:
    """The folder, made if there is none."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def prepare(given: argparse.Namespace, runner: StepRunner, objects: Path) -> float:
    """Put the teacher into the bucket, and measure a large product on its GPU. Returns the operations a
    second that MFU is a share of. Raises RunFailed."""
    name = given.teacher if given.teacher_layers is None else f"{given.teacher}-{given.teacher_layers}"
    kept = given.teacher_folder and given.teacher_folder / name
    made = kept if kept and kept.exists() else folder(kept.parent if kept else objects) / f"new-{name}"
    if made != kept:
        shutil.rmtree(made, ignore_errors=True)  # of a run that was interrupted
    gpu = {} if on_cpu() else {"CUDA_VISIBLE_DEVICES": given.placement.gpus["teacher"][0]}
    command = [sys.executable, "-m", "benchmarks.recipe_prepare"]
    options = ["--layers", str(given.teacher_layers)] if given.teacher_layers else []
    try:
        process = subprocess.run(
            [*command, str(made), given.teacher, *options],
            cwd=ROOT,
            env={**os.environ, **gpu},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=max(0.0, runner.deadline - time.monotonic()),
        )
    except subprocess.TimeoutExpired:
        raise RunFailed("the time limit has passed (--limit) before the teacher was written") from None
    if process.returncode:
        raise RunFailed(f"benchmarks.recipe_prepare ended with exit code {process.returncode}")
    found = json.loads(process.stdout.splitlines()[-1])
    if kept and made != kept:
        made.rename(kept)
    place(kept or made, objects / TEACHER, move=not kept)
    size = sum(path.stat().st_size for path in (objects / TEACHER).iterdir())
    runner.say(
        f"teacher {name}: {size / 1e9:.1f} GB, {found['seconds']:.1f} s to write; a large product at "
        f"{found['rate'] / 1e12:.3g} TFLOP/s"
    )
    return float(found["rate"]) if on_cpu() else PEAK


def place(model: Path, to: Path, move: bool) -> None:
    """Make the files of a model objects of the store."""
    folder(to.parent)
    if move:
        model.rename(to)
        return
    folder(to)
    for path in model.iterdir():
        try:
            (to / path.name).hardlink_to(path)
        except OSError:  # another file system
            shutil.copyfile(path, to / path.name)


def tables(given: argparse.Namespace) -> Iterator[pa.Table]:
    """The rows that are preprocessed."""
    if given.parquet:
        yield pq.ParquetFile(given.parquet).read().slice(0, given.documents)
        return
    rows = sample.rows()
    repeated = [
        {**rows[number % len(rows)], "synth_id": f"row-{number}"} for number in range(given.documents)
    ]
    yield pa.Table.from_pylist(repeated, schema=sample.SCHEMA)


def document(given: argparse.Namespace, endpoint: str) -> dict[str, Any]:
    """The DistillRun."""
    gpus = {role: len(names) for role, names in given.placement.gpus.items()}
    stages = [stage_of(given, kind, gpus["sampler"]) for kind in given.stages]
    return {
        "apiVersion": "vpmoe.dev/v1alpha1",
        "kind": "DistillRun",
        "metadata": {"name": "recipe"},
        "spec": {
            "dataset": {
                "source": f"s3://{BUCKET}/input/*.parquet",
                "validFraction": 0.15,
                "sampling": {"memorizationMax": 1, "nonEnglishMax": 1},
                "workers": 1,
            },
            "teacher": {"model": f"s3://{BUCKET}/{TEACHER}", "gpus": gpus["teacher"]},
            "student": {"shape": given.student, "gpus": gpus["sampler"] + gpus["trainer"]},
            "training": {
                "sequenceLength": given.sequence,
                "globalBatchTokens": given.batch_tokens,
                "optimizer": {
                    "learningRate": 1e-5,
                    "minLearningRate": 1e-6,
                    "warmupTokens": given.batch_tokens,
                },
                "checkpoint": {"everyTokens": given.checkpoint_tokens, "keep": 1},
            },
            "stages": stages,
            "evaluation": {
                "everyTokens": 1 << 40,
                "documents": given.held_out,
                "completions": given.evaluated if "evaluate" in given.after else 0,
            },
            "export": {"stages": [stages[-1]["name"]] if "export" in given.after else []},
            "runtime": {
                "report": "report" in given.after,
                "weightsVolume": {"claimName": "weights"} if given.weights_volume else None,
            },
            "storage": {"endpoint": endpoint, "bucket": BUCKET, "credentialsSecret": None},
        },
    }


def stage_of(given: argparse.Namespace, kind: str, sampling: int) -> dict[str, Any]:
    """A stage of the run."""
    stage: dict[str, Any] = {"name": kind.lower(), "kind": kind, "tokens": given.steps * given.batch_tokens}
    if kind == "Rescored":
        stage["subset"] = {"tokens": given.steps * given.batch_tokens, "fraction": 1.0}
    if kind != "OnPolicy":
        return stage
    limits = {effort: max(1, given.completion // part) for effort, (_, part) in EFFORTS.items()}
    answer = sum(share * limits[effort] for effort, (share, _) in EFFORTS.items())
    window = given.prompts * (PROMPT + answer) + given.anchor / (1 - given.anchor) * given.batch_tokens
    return stage | {
        # A stage ends with the window that reaches its tokens: half a window less makes that the last one.
        "tokens": int((given.windows - 0.5) * window),
        "anchor": given.anchor,
        "staleness": given.staleness,
        "publishEvery": given.publish_every,
        "require": {"validity": 0},
        "backPressure": {"waiting": 1},
        "maxSamplerKl": given.max_sampler_kl,
        "sampler": {"gpus": sampling},
        "rollout": {"promptsPerWindow": given.prompts, "maxTokens": limits},
        "curriculum": [{"share": 1, "effort": {effort: share for effort, (share, _) in EFFORTS.items()}}],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--limit", type=float, required=True, metavar="SECONDS", help="time for everything but the figures")
    add(
        "--gpus",
        nargs="+",
        default=["teacher=0", "sampler=1", "trainer=2,3"],
        metavar="ROLE=N,…",
        help="GPUs of teacher, sampler and trainer (default: teacher=0 sampler=1 trainer=2,3)",
    )
    add(
        "--share",
        nargs="+",
        default=[],
        metavar="ROLE=PART",
        help="of a GPU's memory",
    )
    add("--stages", type=kinds, default=["OnPolicy"], metavar="KIND,…", help="(default: OnPolicy)")
    add("--after", type=afterwards, default=[], metavar="STEP,…", help=f"also {', '.join(AFTER)}")
    add("--kill", action="append", choices=list(VICTIMS), default=[], help="may be given for each")
    add("--student", choices=sorted(SHAPES), default="vpmoe-6b")
    add("--layers", type=int, help="of the student (default: all of its shape)")
    add("--teacher", choices=TEACHERS, default="gpt-oss-20b")
    add("--teacher-layers", type=int, help="of the teacher (default: all of its shape)")
    add("--teacher-folder", type=Path, metavar="FOLDER", help="keep the teacher's files there")
    add("--teacher-cache", type=Path, metavar="FOLDER", help="volume of runtime.teacherCache")
    add(
        "--weights-volume",
        type=Path,
        metavar="FOLDER",
        help="volume of runtime.weightsVolume",
    )
    add(
        "--scratch",
        type=Path,
        default=Path(tempfile.gettempdir()),
        metavar="FOLDER",
        help="(default: TMPDIR)",
    )
    add("--bucket", type=Path, metavar="FOLDER", help="where the store keeps objects (default: in --scratch)")
    add("--logs", type=Path, metavar="FOLDER", help="keep the jobs' logs there")
    add("--parquet", type=Path, metavar="FILE", help="rows with SYNTH's columns (default: the sample's)")
    add("--documents", type=int, default=400, help="rows that are preprocessed (default: 400)")
    add("--held-out", type=int, default=16, help="held-out documents of an evaluation (default: 16)")
    add("--evaluated", type=int, default=48, help="completions of the step evaluate (default: 48)")
    add("--sequence", type=int, default=2048, help="training.sequenceLength (default: 2048)")
    add(
        "--batch-tokens",
        type=parse_tokens,
        default=65_536,
        help="training.globalBatchTokens (default: 65,536)",
    )
    add("--steps", type=int, default=4, help="optimizer steps of stages that do not sample (default: 4)")
    add("--windows", type=int, default=4, help="windows of an OnPolicy stage, about (default: 4)")
    add("--prompts", type=int, default=64, help="prompts of a window (default: 64)")
    add("--completion", type=int, default=512, help="longest completion, at high effort (default: 512)")
    add("--anchor", type=float, default=0.15, help="stages[].anchor (default: 0.15)")
    add("--staleness", type=int, default=1, help="stages[].staleness (default: 1)")
    add("--publish-every", type=int, default=1, help="stages[].publishEvery (default: 1)")
    add("--max-sampler-kl", type=float, default=0.1, help="stages[].maxSamplerKl (default: 0.1)")
    add(
        "--checkpoint-tokens",
        type=parse_tokens,
        default=1 << 40,
        help="training.checkpoint.everyTokens (default: at the end of a stage only)",
    )
    add(
        "--speeds",
        nargs="+",
        type=speed,
        default=[],
        metavar="WORK=N",
        help=f"tokens a second of one GPU that the plan computes with, for {', '.join(WORK)} (default: as "
        "measured; with --layers, scaled by the parameters that a token is multiplied with)",
    )
    add(
        "--gigabytes-per-second",
        type=positive_number,
        metavar="N",
        help="speed of the bucket that the plan computes with (default: as measured at the start)",
    )
    add("--card", choices=sorted(CARDS), default="h200-141", help="card of the plan (default: h200-141)")
    given = parser.parse_args()
    try:
        given.placement = parse_placement(given.gpus, given.share)
        if not on_cpu():
            check_stages(given.placement, given.stages)
    except ValueError as error:
        parser.error(str(error))
    for path in (given.scratch, given.bucket):
        if path is not None:
            folder(path)
    return given


def check_stages(placement: Placement, stages: Sequence[str]) -> None:
    """Raise ValueError if a stage would have two ranks on a GPU."""
    for kind in stages:
        roles = training_roles(samples=kind == "OnPolicy", runs_teacher=kind == "TeacherForced")
        ranks = Counter(gpu for role in roles for gpu in placement.gpus[role])
        if shared := [gpu for gpu, count in ranks.items() if count > 1]:
            raise ValueError(
                f"--gpus: {kind} trains on the GPUs of {' and '.join(roles)}, a rank on each, and GPU "
                f"{shared[0]} is there twice. Give these roles GPUs of their own, or leave {kind} out of "
                "--stages"
            )


def speed(text: str) -> tuple[str, float]:
    """A speed of --speeds. Raises ArgumentTypeError."""
    work, _, number = text.partition("=")
    if work not in WORK:
        raise argparse.ArgumentTypeError(f"{text!r}: write WORK=N for {', '.join(WORK)}, such as train=9000")
    return work, positive_number(number)


def kinds(text: str) -> list[str]:
    """The kinds of --stages. Raises ArgumentTypeError."""
    return listed(text, STAGES)


def afterwards(text: str) -> list[str]:
    """The steps of --after. Raises ArgumentTypeError."""
    return listed(text, AFTER)


def listed(text: str, known: tuple[str, ...]) -> list[str]:
    """Names separated by commas, each of `known` and once. Raises ArgumentTypeError."""
    found = text.split(",")
    if not set(found) <= set(known) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of {', '.join(known)}, each at most once")
    return found


if __name__ == "__main__":
    main()
