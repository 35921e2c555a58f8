"""Nothing that a user can cause ends as Internal: damaged configuration, environment, and objects.

A configuration, variable or object is changed at random, and read by what reads it in a job. What comes out
must be accepted, or be an error of a class other than Internal with a message. A failure's message has the
seed.
"""

import errno
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from jobs.entrypoint import entrypoint, register_run
from tests.fakes.mutations import mutate_bytes, mutate_json, mutate_value
from tests.fakes.recorded import documents
from tests.fakes.store import S3
from tests.fakes.students import new_seed
from vpmoe.api import DistillRun, load_run
from vpmoe.api.stages import Confidence
from vpmoe.api.storage import StorageSpec
from vpmoe.checkpoint.train_state import load_stage_end
from vpmoe.data.dataset import load_training_dataset, recorded_parts, resolve_dataset
from vpmoe.data.preprocess.census import StoredCensus
from vpmoe.data.preprocess.dataset_manifest import PartRecord, merge_records
from vpmoe.data.system_message import EffortSubstitution
from vpmoe.failure import classify_error, read_record, write_record
from vpmoe.objectives.confidence import centre
from vpmoe.process.step_worker import step_succeeded
from vpmoe.provenance import CHECKOUT
from vpmoe.rollout import gate
from vpmoe.rollout.back_pressure import read_adjustments
from vpmoe.rollout.evaluation_record import load_evaluation, parse_evaluation
from vpmoe.rollout.policy_version import find_version
from vpmoe.rollout.window_files import read_rollouts, read_scores
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.client import connect
from vpmoe.storage.records import facts_of, load_record
from vpmoe.storage.retries import Patience
from vpmoe.storage.scratch import PREFIX
from vpmoe.teacher import scores
from vpmoe.teacher.model import resolve_teacher

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CONTRACT = Path(__file__).parents[2] / "fakes" / "contract.yaml"
RUN = DistillRun.parse(json.loads(documents()["tiny/runs/team/inflight-0a1b2c3d/run.json"]))
ROLES = ("init", "preprocess", "rescore", "train", "sampler", "teacher", "evaluate", "export", "clear")


def outcome(action: Callable[[], object]) -> tuple[str, str]:
    """Class and message of what ends the action: "" if nothing does."""
    try:
        action()
    except BaseException as error:  # noqa: BLE001 (whatever ends a job)
        found = classify_error(error)
        return found.kind, found.message
    return "", ""


def check(action: Callable[[], object], about: str) -> str:
    """Run the action; returns the class of its error. Fails if that is Internal, or the message is empty."""
    kind, message = outcome(action)
    assert kind != "Internal", f"{about}: {message}"
    assert not kind or message.strip(), about
    return kind


# Configuration

TEXT = CONTRACT.read_text()
SEED_LINE = "seed: 1234"
ALIASES = "\n".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9) if n else 'x'}]" for n in range(9))
FILES: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n",
    "comment": b"# nothing",
    "list": b"- a\n",
    "scalar": b"hello",
    "two-documents": f"{TEXT}\n---\n{TEXT}".encode(),
    "utf-16": TEXT.encode("utf-16"),
    "latin-1": TEXT.encode() + "# é".encode("latin-1"),
    "binary": bytes(range(256)) * 8,
    "nul": b"a: \x00",
    "tabs": b"a:\n\tb: 1",
    "too-large": b"# " + b"x" * (2 << 20),
    "deep-list": b"[" * 20_000,
    "deep-mapping": b"{a: " * 3000 + b"1" + b"}" * 3000,
    "deep-block": b"".join(b" " * n + b"a:\n" for n in range(1200)),
    "aliases-that-multiply": ALIASES.encode(),
    "aliases-in-fields": f"{TEXT}\n{ALIASES}".replace(
        "tolerations: []", "tolerations: &t [{key: *t}]"
    ).encode(),
    "alias-of-itself": b"a: &a [*a]",
    "alias-of-nothing": b"a: *b",
    "spec-in-itself": b"apiVersion: vpmoe.dev/v1alpha1\nspec: &s {dataset: *s, stages: [*s]}",
    "python-tag": b'!!python/object/apply:os.system ["true"]',
    "unknown-tag": b"!foo {a: 1}",
    "directive": b"%YAML 99999999999.1\n---\na: 1",
    "huge-escape": b'a: "\\UFFFFFFFF"',
    "key-is-a-list": b"[1, 2]: 3",
    "key-is-a-mapping": b"? {a: 1}\n: 2",
    "key-twice": TEXT.replace(SEED_LINE, "seed: 1\n    seed: 2").encode(),
}
VALUES = (
    "9" * 6000,
    "0x" + "f" * 6000,
    "0b_",
    "0x_",
    "1:61",
    "1e999999",
    ".nan",
    "-.inf",
    "!!int abc",
    '!!int ""',
    "!!float abc",
    '!!float ""',
    "!!bool abc",
    "!!timestamp 2026-99-99",
    "!!timestamp abc",
    "!!binary é",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!map [1]",
    "!!str {a: b}",
    '"\\ud800"',
    '"a\\0b"',
    "٣",
    "-0.0",
    "99999999999999999999",
    "[[[]]]",
    "{<<: 3}",
    "~",
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(FILES[name])
    assert outcome(lambda: load_run(tmp_path / "run.yaml"))[0] == "Permanent"


@pytest.mark.parametrize(
    "place",
    [
        SEED_LINE,
        "name: first-run",
        "kind: Vanilla",
        "tokens: 1B",
        "shape: vpmoe-6b",
        "stalledAfter: 15m",
        "learningRate: 3.0e-4",
        "nodeSelector: {}",
        "tolerations: []",
        "source: s3://corpora/synth/*.parquet",
    ],
)
def test_a_value_that_is_none(place: str, tmp_path: Path) -> None:
    for value in VALUES:
        text = TEXT.replace(place, f"{place.partition(':')[0]}: {value}", 1)
        assert text != TEXT
        (tmp_path / "run.yaml").write_text(text, errors="surrogatepass")
        check(lambda: load_run(tmp_path / "run.yaml").config_hash, f"{place} → {value[:40]}")


def test_random_changes_of_a_run(tmp_path: Path) -> None:
    seed = new_seed()
    rng, written = random.Random(seed), yaml.safe_load(TEXT)
    kinds = []
    for number in range(400):
        parse = partial(lambda changed: DistillRun.parse(changed).config_hash, mutate_value(written, rng))
        kinds.append(check(parse, f"seed {seed}, change {number}"))
    for number in range(60):
        (tmp_path / "run.yaml").write_bytes(mutate_bytes(TEXT.encode(), rng))
        check(lambda: load_run(tmp_path / "run.yaml").config_hash, f"seed {seed}, bytes {number}")
    assert {"", "Permanent"} == set(kinds), f"seed {seed}: some must still be runs"


@pytest.mark.parametrize("role", ROLES)
def test_every_job_names_what_is_wrong_with_its_run_and_its_arguments(role: str, tmp_path: Path) -> None:
    """As a process: a job's imports, its command line and its exit. `clear` reads the run itself, all others
    in the same function, which does not know the role: one of them shows it."""
    (tmp_path / "bad.yaml").write_bytes(FILES["binary"])
    mistakes = [(["--attempt", "x"], f"python -m jobs.{role}: ")]
    if role in ("clear", "preprocess"):
        mistakes += [
            (["--run", str(tmp_path / "bad.yaml")], "is not YAML"),
            (["--run", str(tmp_path)], "Is a directory"),
        ]
    for arguments, message in mistakes:
        found = subprocess.run(
            [sys.executable, "-m", f"jobs.{role}", *arguments],
            cwd=CHECKOUT,
            env={**os.environ, "VPMOE_TERMINATION_LOG": str(tmp_path / "log"), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        record = read_record(tmp_path / "log")
        assert found.returncode == 65 and record is not None, found.stderr
        assert record.kind == "Permanent" and message in record.message


# Objects


def sample() -> dict[str, bytes]:
    """The recorded run's objects, with what this version's part records have beside."""
    found = {
        name.removeprefix("tiny/"): data for name, data in documents().items() if name.startswith("tiny/")
    }
    contradiction = {"row": 3, "id": "r3", "result": "4", "answer": "5"}
    for name, data in found.items():
        if re.fullmatch(r"datasets/.*/parts/part-\d+\.json", name):
            record = {**json.loads(data), "emptyQueries": 1, "contradictions": [contradiction]}
            found[name] = json.dumps(record).encode()
    return found


SAMPLE = sample()


def read_dataset(bucket: Bucket, key: str) -> None:
    found = load_training_dataset(RUN, bucket)
    for subject in ("train/part-00000.tokens.bin", "train/part-00000.documents.parquet"):
        assert found.subjects[subject].size > 0
    EffortSubstitution(found.facts["settings"]["conversation"], "low")


def read_part_record(bucket: Bucket, key: str) -> None:
    recorded_parts(bucket, key)
    record = load_record(bucket, key, PartRecord)
    merge_records([record], resolve_dataset(RUN, bucket).inputs.shards[:1])
    [manifest.subject_of(entry, key.rpartition("/parts/")[0]) for entry in record["files"]]


def read_scores_manifest(bucket: Bucket, key: str) -> None:
    found = facts_of(bucket, manifest.load(bucket, key), "scores", scores.ScoresFacts)
    centre(found["histogram"]["final"], Confidence())


def read_evaluation(bucket: Bucket, key: str) -> None:
    for stage in RUN.spec.stages:
        found = load_evaluation(RUN, stage.name, bucket)
        if found is not None:
            (found.valid_share, found.valid_share_by_effort())
        gate.require_validity(RUN, stage, bucket)


def read_windows(bucket: Bucket, key: str) -> None:
    rollouts = key.replace("scores", "rollouts")
    found = read_rollouts(bucket.get(rollouts), rollouts)
    (found.header.window, [(len(one.ids_T), one.prompt_length, one.effort) for one in found.rollouts])
    of = key.replace("rollouts.arrow", "scores.arrow")
    read_scores(bucket.get(of), of, found)


READERS: dict[str, Callable[[Bucket, str], object]] = {
    r".*/run\.json": lambda bucket, key: register_run(RUN, bucket),
    r".*/inputs\.json": lambda bucket, key: resolve_dataset(RUN, bucket),
    r".*/teacher\.json": lambda bucket, key: resolve_teacher(RUN, bucket).sha256,
    r".*/steps/vanilla/progress\.json": lambda bucket, key: step_succeeded(RUN, bucket, "vanilla"),
    r".*/steps/(rescored|vanilla)-evaluate/evaluation\.json": read_evaluation,
    r".*/parts/(completions|heldOut|canary)-.*": lambda bucket, key: parse_evaluation(
        load_record(bucket, key, dict[str, Any]), "vanilla", key
    ),
    r".*/turn-000001\.json": lambda bucket, key: read_adjustments(bucket, RUN, "onpolicy"),
    r".*/checkpoints/(vanilla/5|onpolicy/22|rescored/9)/manifest\.json": lambda bucket, key: load_stage_end(
        bucket, key.rpartition("/")[0].rpartition("/")[0]
    ),
    r".*/v000004/manifest\.json": lambda bucket, key: find_version(bucket, RUN, "onpolicy", 4),
    r"datasets/[0-9a-f]+/manifest\.json": read_dataset,
    r".*/census/part-00000\.json": lambda bucket, key: load_record(bucket, key, StoredCensus).restored(),
    r"datasets/.*/parts/part-00000\.json": read_part_record,
    r"scores/.*/parts/part-00000\.json": lambda bucket, key: scores.merge_records(
        [load_record(bucket, key, scores.PartScores)]
    ),
    r"scores/[0-9a-f]+/manifest\.json": read_scores_manifest,
    r"scores/[0-9a-f]+/origin\.json": lambda bucket, key: load_record(bucket, key, scores.ScoresOrigin),
    r".*\.arrow": read_windows,
}
"""By a pattern of keys, what a job does with such an object."""


@pytest.fixture
def stored(bucket: Bucket) -> Bucket:
    """The bucket with the objects of a run in flight."""
    for key, data in SAMPLE.items():
        bucket.put_bytes(key, data, {})
    return bucket


@pytest.mark.parametrize("pattern", READERS)
def test_a_stored_object_that_is_damaged_swapped_or_of_another_version(
    stored: Bucket, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = new_seed()
    rng, reader = random.Random(seed), READERS[pattern]
    keys = [key for key in SAMPLE if re.fullmatch(pattern, key)]
    assert keys
    kinds = set()
    for key in keys:
        if "/parts/" not in key or "steps" not in key:  # a part of an evaluation alone is no evaluation
            assert outcome(partial(reader, stored, key)) == ("", ""), key
    for number in range(60):
        key = rng.choice(keys)
        damage = mutate_bytes if key.endswith(".arrow") else mutate_json
        data = rng.choice(list(SAMPLE.values())) if number % 10 == 0 else damage(SAMPLE[key], rng)
        stored.put_bytes(key, data, {})
        kinds.add(
            check(partial(reader, stored, key), f"seed {seed}, change {number} of {key}: {data[:2000]!r}")
        )
        stored.put_bytes(key, SAMPLE[key], {})
    assert "Permanent" in kinds or "turn" in pattern or "checkpoints" in pattern, f"seed {seed}"


def test_objects_that_no_job_writes_are_ignored(stored: Bucket) -> None:
    """Of a person, of a file browser, of another program: beside checkpoints, records and windows."""
    folder = paths.checkpoints(RUN, "vanilla")
    before = load_stage_end(stored, folder)
    (record,) = (key for key in SAMPLE if re.fullmatch(r"datasets/.*/parts/part-00000\.json", key))
    for key in (
        f"{folder}/latest/manifest.json",
        f"{folder}/5-old/manifest.json",
        f"{folder}/٧/manifest.json",
        f"{folder}/{'9' * 30}/manifest.json",
        f"{folder}/manifest.json",
        f"{folder}/5/old/manifest.json",
        record.replace("part-00000.json", "part-00000.json.bak"),
        record.replace("part-00000.json", "notes.txt"),
        record.replace("part-00000.json", ".DS_Store"),
        record.replace("part-00000.json", "part-.json"),
    ):
        stored.put_bytes(key, b"{}", {})
    found = load_stage_end(stored, folder)
    assert found is not None and before is not None and found[0].key == before[0].key
    assert recorded_parts(stored, record) == {0}


# Environment

ONCE = Patience(attempts=1, connect=2, read=2)
NUMBERS = ("", "abc", "-1", "1e3", "٣", "0x10", " 1", "9" * 5000, "4.5", "1\n", "2147483648000000000000")
GARBAGE = ("", "x", "::", "/", "/dev/null", "\udcff", "a" * 5000, "http://[", "https://user:p@:99999", "\x01")
VARIABLES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("JOB_COMPLETION_INDEX", "VPMOE_SERVE_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"), NUMBERS
    ),
    **dict.fromkeys(
        ("MASTER_PORT", "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_PORT", "OMP_NUM_THREADS"), NUMBERS
    ),
    **dict.fromkeys(("VPMOE_IMAGE", "VPMOE_CONFIG_HASH", "VPMOE_TERMINATION_LOG", "VPMOE_PART"), GARBAGE),
    **dict.fromkeys(
        ("TMPDIR", "TEMP", "HOME", "USER", "LANG", "LC_ALL", "TZ", "CUDA_VISIBLE_DEVICES"), GARBAGE
    ),
    **dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_CA_BUNDLE", "AWS_REGION", "AWS_CONFIG_FILE"), GARBAGE),
    **dict.fromkeys(("AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), GARBAGE),
    **dict.fromkeys(("AWS_SHARED_CREDENTIALS_FILE", "AWS_DEFAULT_REGION", "AWS_DEFAULTS_MODE"), GARBAGE),
    **dict.fromkeys(("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE", "AWS_USE_FIPS_ENDPOINT"), (*GARBAGE, *NUMBERS)),
    **dict.fromkeys(("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION"), GARBAGE),
    **dict.fromkeys(("AWS_STS_REGIONAL_ENDPOINTS", "AWS_DATA_PATH", "AWS_ACCOUNT_ID_ENDPOINT_MODE"), GARBAGE),
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"), GARBAGE),
}


OTHERS = (
    *("JOB_COMPLETION_INDEX", "VPMOE_SERVE_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"),
    *("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_PORT", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("VPMOE_IMAGE", "VPMOE_CONFIG_HASH", "VPMOE_TERMINATION_LOG", "VPMOE_PART", "TMPDIR", "TEMP"),
)
"""Those that botocore does not read, so that one client of the store serves all their values."""


@pytest.fixture(scope="module")
def client(s3: S3) -> "S3Client":
    return connect(StorageSpec(endpoint=s3.endpoint, bucket="none"), ONCE)


@pytest.fixture
def job_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Restore what a job changes in its process. Requests to the store are made once."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("VPMOE_TERMINATION_LOG", str(tmp_path / "termination"))
    monkeypatch.setattr(Bucket, "open", partial(Bucket.open, patience=ONCE))
    root, handler, temporary = logging.getLogger(), signal.getsignal(signal.SIGTERM), tempfile.tempdir
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    signal.signal(signal.SIGTERM, handler)
    tempfile.tempdir = temporary


@pytest.mark.parametrize("name", VARIABLES)
def test_a_variable_of_the_environment(
    name: str,
    run_spec: dict[str, Any],
    bucket: Bucket,
    tmp_path: Path,
    client: "S3Client",
    job_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # a relative path is one too
    if name in OTHERS:
        monkeypatch.setattr("vpmoe.storage.bucket.connect", lambda spec, patience: client)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_spec))
    for value in VARIABLES[name]:
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            changed.setattr(tempfile, "tempdir", None)
            if name != "TMPDIR":
                changed.setenv("TMPDIR", str(tmp_path))
            kind = check(
                lambda: entrypoint("preprocess", ["--run", str(tmp_path / "run.yaml")]),
                f"{name}={value[:80]!r}",
            )
            if name == "TMPDIR" and value not in ("", "/"):
                assert kind == "Permanent", f"TMPDIR={value[:80]!r} must not be ignored"
        write_record(classify_error(ValueError("x")))


def test_a_full_disk_for_temporary_files_is_retried_and_named(
    tmp_path: Path, run_spec: dict[str, Any], job_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of its own, full before the job starts. Python would go on to /tmp without a word."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_spec))
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    try:
        (disk / "fills").write_bytes(b"x" * (64 << 10))
        monkeypatch.setenv("TMPDIR", str(disk))
        monkeypatch.setattr(tempfile, "tempdir", None)
        kind, message = outcome(lambda: entrypoint("preprocess", ["--run", str(tmp_path / "run.yaml")]))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert kind == "Retriable"
    assert message.startswith(f"TMPDIR='{disk}' cannot be written: No space left on device. Free space there")


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "Retriable", "/x/y: No space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), "Retriable", "Raise the quota"),
        (OSError(errno.EMFILE, "Too many open files"), "Retriable", "ulimit -n"),
        (OSError(errno.EIO, "Input/output error", "/x/y"), "Retriable", "/x/y: Input/output error"),
        (MemoryError("of 8 GiB"), "Retriable", "out of memory (of 8 GiB). Raise the memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nframes"),
            "Retriable",
            "can't allocate memory). Raise the memory in runtime.resources",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nframes"),
            "Retriable",
            "out of GPU memory (CUDA out of memory. Tried to allocate 8 GiB.). If another process",
        ),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors"),
            "Retriable",
            "out of GPU memory (CUDA error: out of memory). If another process",
        ),
        (RuntimeError("shapes differ"), "Internal", "RuntimeError: shapes differ"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", f"{tempfile.gettempdir()}/a"),
            "Permanent",
            "TMPDIR",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", f"{tempfile.gettempdir()}/a"),
            "Retriable",
            "removed",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "/opt/vpmoe/a"), "Internal", "FileNotFoundError"),
        (OSError("without a number"), "Internal", "OSError: without a number"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_of_the_machine_is_not_one_of_the_code(error: Exception, kind: str, message: str) -> None:
    found = classify_error(error)
    assert found.kind == kind and message in found.message


PREPROCESS = """
import os, signal
from jobs.preprocess import main
from vpmoe.data.preprocess import step

if __name__ == "__main__":  # the encoding processes import this file too
    step.store_part = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    main()
"""


def test_a_job_that_is_killed_leaves_nothing_once_it_is_started_again(
    run_spec: dict[str, Any], bucket: Bucket, sample_parquet: list[Path], tmp_path: Path
) -> None:
    """kill -9 while a part is on disk: its files, and those of the encoding processes."""
    bucket.put_file("input/synth_001.parquet", sample_parquet[0], {})
    run_spec["spec"]["dataset"]["sampling"] = {"memorizationMax": 1, "nonEnglishMax": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_spec))
    disk = Path(tempfile.mkdtemp())  # tmp_path is too long for a socket below it
    (disk / "of-another-program").touch()

    def run(*command: str) -> int:
        environment = {**os.environ, "TMPDIR": str(disk), "PYTHONPATH": str(CHECKOUT)}
        return subprocess.run(
            [sys.executable, *command, "--run", str(tmp_path / "run.yaml")],
            cwd=CHECKOUT,
            env=environment,
            check=False,
        ).returncode

    (tmp_path / "job.py").write_text(PREPROCESS)
    assert run(str(tmp_path / "job.py")) == -signal.SIGKILL
    (left,) = (path for path in disk.glob(f"{PREFIX}*") if path.is_dir())
    assert any(path.is_file() and path.stat().st_size for path in left.rglob("*"))
    assert run("-m", "jobs.preprocess") == 0
    assert {path.name for path in disk.iterdir()} == {"of-another-program", f"vpmoe-vocabulary-{os.getuid()}"}
