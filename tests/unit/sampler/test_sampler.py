"""Sampler on a real store with real vLLM: every window has the right contents from the right version, also
after failures."""

import dataclasses
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.fakes import policy_versions
from tests.fakes.store import S3, small_run
from tests.fakes.students import new_seed
from tests.fakes.tiny_teacher import LONGEST
from tests.fakes.waiting import wait_until
from vpmoe.api import DistillRun
from vpmoe.api.stages import MaxTokens, OnPolicy
from vpmoe.data.dataset import load_dataset
from vpmoe.data.packing import SequenceStream, first_documents, packed_documents
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.data.vocabulary import STOP_IDS
from vpmoe.failure import Permanent, Retriable, Terminated
from vpmoe.inference import hf_model
from vpmoe.inference.engine_pool import Completion, EnginePool, SamplingRequest
from vpmoe.model.learner import Learner
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.rollout import policy_version, prompts
from vpmoe.rollout.back_pressure import Adjustment, write_adjustment
from vpmoe.rollout.curriculum import Curriculum
from vpmoe.rollout.part_files import Part, PartHeader, RolloutKey, list_parts, part_bytes, read_part
from vpmoe.rollout.version_volume import VARIABLE, VersionVolume
from vpmoe.rollout.window_files import Rollout, WindowRollouts, read_rollouts, rollouts_bytes
from vpmoe.rollout.windows import WindowSchedule
from vpmoe.sampler import part_log, sampler
from vpmoe.storage import Bucket, StorageError, manifest, paths

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4
"""Nats. All compute in float32 with different orders of summation."""
FIRST_PROMPT = 7
TOKENS = 5_600

STAGE = {
    "name": "onpolicy",
    "kind": "OnPolicy",
    "tokens": TOKENS,
    "anchor": 0.25,
    "staleness": 1,
    "publishEvery": 2,
    "require": {"validity": 0},
    "optimizer": {"minLearningRate": 1e-6},
    "rollout": {"promptsPerWindow": 5, "maxTokens": {"low": 16, "medium": 24, "high": 40}},
    "curriculum": [
        {"share": 0.1, "effort": {"low": 0.5, "medium": 0.5}},
        {"share": 0.9, "effort": {"medium": 0.3, "high": 0.7}, "rolloutsPerPrompt": 2},
    ],
}
"""Windows 0 to 2 are sampled from version 0, windows 3 and 4 from version 2; an anchor step precedes window
3."""


@dataclass(frozen=True)
class Student:
    """A student and its checkpoint."""

    learner: Learner
    folder: Path


@pytest.fixture(scope="module")
def students(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[Student]:
    """Two students; the second is published later."""
    students = []
    for _ in range(2):
        learner = policy_versions.end_early(policy_versions.learner(device, new_seed()))
        students.append(Student(learner, policy_versions.export(tmp_path_factory.mktemp("student"), learner)))
    return students


@dataclass
class SamplerRun:
    """A run whose dataset is built, with the sampler of its OnPolicy stage."""

    run: DistillRun
    bucket: Bucket
    engines: EnginePool
    students: list[Student]
    scratch: Path
    file: Path

    @property
    def stage(self) -> OnPolicy:
        found = self.run.stage("onpolicy")
        assert isinstance(found, OnPolicy)
        return found

    def publish(self, number: int, tokens: int = 0, index: int | None = None) -> manifest.Manifest:
        student = self.students[min(number, 1) if index is None else index]
        return policy_versions.publish(
            self.bucket, self.run, student.folder, student.learner, number, tokens, first_prompt=FIRST_PROMPT
        )

    @property
    def volume(self) -> VersionVolume:
        """A volume that the trainer has too."""
        return VersionVolume(self.scratch / "volume", self.run, "onpolicy")

    def write_to_volume(self, number: int, index: int) -> Path:
        """Write a version to the volume, as the trainer does before it publishes it."""
        student = self.students[index]
        facts = policy_versions.version_facts(student.learner, number, 0, FIRST_PROMPT)
        return policy_versions.write_to_volume(self.volume, self.bucket, self.run, student.folder, facts)

    def sample(
        self,
        stopping: threading.Event | None = None,
        engines: Any = None,
        volume: VersionVolume | None = None,
    ) -> ProgressBoard:
        """Run the sampler with the shared engine, as if the engine had loaded no weights. Returns its
        board."""
        self.engines.loaded, board = False, ProgressBoard()
        step_provenance = provenance(self.run, "onpolicy-sampler")
        sampler.sample_stage(
            self.run,
            self.stage,
            self.bucket,
            step_provenance,
            stopping or threading.Event(),
            board,
            engines or self.engines,
            self.scratch,
            volume=volume,
        )
        return board

    def key(self, number: int) -> str:
        return paths.window(self.run, "onpolicy", number, "rollouts")

    def window(self, number: int) -> WindowRollouts:
        return read_rollouts(self.bucket.get(self.key(number)), self.key(number))

    def parts(self, version: int = 0) -> list[int]:
        return list_parts(self.bucket, self.run, "onpolicy", version)

    def part(self, number: int) -> Part:
        return read_part(self.bucket, self.part_key(number), {"version": 0, "part": number})

    def part_key(self, number: int) -> str:
        return paths.part(self.run, "onpolicy", 0, number)

    def windows(self) -> list[int]:
        return [number for number in range(9) if self.bucket.exists(self.key(number))]

    def progress(self, step: str = "onpolicy-sampler") -> dict[str, Any]:
        key = paths.progress(self.run, step)
        content: dict[str, Any] = (
            self.bucket.get_json(key) if self.bucket.exists(key) else {"state": "", "message": ""}
        )
        return content

    def tokens_of(self, number: int) -> int:
        """Tokens that the trainer has trained at version `number`: up to the end of window `number` − 1."""
        header = self.window(number - 1).header
        return header.seen + header.tokens


def provenance(run: DistillRun, step: str) -> Provenance:
    return Provenance(
        None, None, run.config_hash, "default", run.metadata.name, run.uid8, step, 3, "2026-01-01T00:00:00Z"
    )


@pytest.fixture(scope="module")
def spec(s3: S3, sample_parquet: list[Path]) -> dict[str, Any]:
    """A run whose dataset is built. Other runs in its bucket share it."""
    run_document = small_run(s3)
    run_document["spec"]["student"]["gpus"] = 2
    run_document["spec"]["training"] |= {
        "sequenceLength": LONGEST,
        "globalBatchTokens": 4 * LONGEST,
    }  # the shared engine's: batches depend on it
    run_document["spec"]["stages"].append(STAGE)
    run = DistillRun.parse(run_document)
    bucket = Bucket.open(run.spec.storage)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    with EncoderPool(1) as encoders:
        preprocess(
            run, bucket, provenance(run, "preprocess"), threading.Event(), ProgressBoard(), None, encoders
        )
    return run_document


@pytest.fixture
def sampler_run(
    spec: dict[str, Any], engines: EnginePool, students: list[Student], tmp_path: Path
) -> SamplerRun:
    document = spec | {"metadata": {"name": f"r{secrets.token_hex(4)}", "namespace": "default"}}
    run = DistillRun.parse(document)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    return SamplerRun(
        run, Bucket.open(run.spec.storage), engines, students, tmp_path / "scratch", tmp_path / "run.yaml"
    )


def sample_while_training(sampler_run: SamplerRun) -> None:
    """Run the sampler, with a thread that publishes version 2 when the sampler waits for it."""

    def trainer() -> None:
        try:
            wait_until(
                lambda: "Waiting for version 2" in sampler_run.progress()["message"],
                "the sampler waits for version 2",
                120,
            )
            assert sampler_run.windows() == [0, 1, 2], "windows 3 and 4 are sampled only from version 2"
            write_adjustment(
                sampler_run.bucket,
                sampler_run.run,
                "onpolicy",
                Adjustment(number=1, window=4, setting="maxTokens", waiting=0.7),
                {},
            )
            sampler_run.publish(2, sampler_run.tokens_of(2))
            wait_until(lambda: sampler_run.progress()["state"] == "Succeeded", "the stage has ended", 120)
        except BaseException:
            stopping.set()
            raise

    stopping = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(trainer)
        try:
            sampler_run.sample(stopping)
        finally:
            published.result()


def check_window(
    sampler_run: SamplerRun, number: int, parts: DatasetReader, anchors: np.ndarray[Any, Any], seen: int
) -> int:
    """Check a window's file against an independent computation; returns the stage's tokens before the next
    window."""
    student = sampler_run.students[0 if number < 3 else 1]
    sampled = sampler_run.window(number)
    header, curriculum = sampled.header, Curriculum(sampler_run.stage)
    version = 0 if number < 3 else 2
    found = policy_version.find_version(sampler_run.bucket, sampler_run.run, "onpolicy", version)
    assert found
    published, facts = found
    assert (header.run, header.config, header.stage) == (
        f"default/{sampler_run.run.metadata.name}-{sampler_run.run.uid8}",
        sampler_run.run.config_hash,
        "onpolicy",
    )
    assert (header.window, header.version, header.weights, header.seen) == (
        number,
        version,
        policy_version.weights_digest(published),
        seen,
    )
    assert header.turns == (number == 4) and header.tokens == sum(len(one.ids_T) for one in sampled.rollouts)
    tokens_after = (
        seen + header.tokens + int(anchors[0]) * (number == 2) if number != 4 else seen + header.tokens
    )
    assert tokens_after == curriculum.tokens_before_next(number, seen, header.tokens, anchors)
    assert header.last == (tokens_after >= TOKENS) == (number == 4)
    spec = sampler_run.run.spec.training
    plan = WindowSchedule(
        sampler_run.stage, spec.seed, [len(lengths) for lengths in parts.lengths], FIRST_PROMPT
    ).window(number, facts.tokens)
    assert header.phase == plan.phase
    limits = MaxTokens(low=12, medium=18, high=30) if number == 4 else sampler_run.stage.rollout.max_tokens
    templates = prompts.PromptBuilder(
        load_dataset(sampler_run.run, sampler_run.bucket).facts["settings"]["conversation"]
    )
    document_numbers = np.array([one.document for one in plan.prompts], np.int32)
    documents = [
        parts.read_document(one)
        for one in packed_documents(
            document_numbers, first_documents([len(lengths) for lengths in parts.lengths]), parts.lengths
        )
    ]
    expected = [(one, n) for one in plan.prompts for n in range(len(one.seeds))]
    for (one, rollout), sample in zip(expected, sampled.rollouts, strict=True):
        assert (
            sample.prompt,
            sample.rollout,
            sample.document,
            sample.effort,
        ) == (
            one.place,
            rollout,
            one.document,
            one.effort,
        )
        assert (
            sample.ids_T[: sample.prompt_length].tolist()
            == templates.build(*documents[one.place], one.effort).tolist()
        )
        completion = sample.ids_T[sample.prompt_length :]
        stops = np.flatnonzero(np.isin(completion, STOP_IDS))
        limit = getattr(limits, one.effort)
        assert (
            stops.tolist() == [len(completion) - 1] if len(completion) < limit else set(stops) <= {limit - 1}
        ), "a completion ends at its first stop token or at its limit"
        assert len(completion) <= limit and sample.validity == prompts.completion_validity(completion)
        assert sample.span_C.tolist() == prompts.completion_spans(completion).tolist()
    model = hf_model.load_student(student.folder, policy_versions.TINY)
    trainer_logp = policy_versions.trainer_logp(
        student.learner, [sample.ids_T for sample in sampled.rollouts]
    )
    for sample, logp_of_trainer in zip(sampled.rollouts, trainer_logp, strict=True):
        ids = torch.from_numpy(sample.ids_T.astype(np.int64))
        with torch.no_grad():
            logits_CV = model(ids[None], logits_to_keep=len(sample.logp_C) + 1).logits[0, :-1]
        targets_C = ids[sample.prompt_length :, None]
        logp_C = logits_CV.double().log_softmax(1).gather(1, targets_C)[:, 0].numpy()
        assert np.abs(sample.logp_C - logp_C).max() <= TOLERANCE
        assert np.abs(sample.logp_C - logp_of_trainer[sample.prompt_length - 1 :]).max() <= TOLERANCE
    return tokens_after


def test_a_stage_is_sampled_to_its_end_from_the_scheduled_versions(sampler_run: SamplerRun) -> None:
    sampler_run.publish(0)
    sample_while_training(sampler_run)
    assert sampler_run.windows() == [0, 1, 2, 3, 4]
    assert sampler_run.parts(0) == sampler_run.parts(2) == [], "only GPUs have parts"
    dataset_manifest = load_dataset(sampler_run.run, sampler_run.bucket)
    parts = DatasetReader(
        dataset_manifest, "train", BlockCache(sampler_run.bucket, sampler_run.scratch / "blocks")
    )
    training = sampler_run.run.spec.training
    anchors = SequenceStream(parts.lengths, training.seed, training.sequence_length).tokens_after_steps(
        0, 4, TOKENS
    )
    seen = 0
    for number in range(5):
        seen = check_window(sampler_run, number, parts, anchors, seen)
    rollouts = [one for number in range(5) for one in sampler_run.window(number).rollouts]
    assert {one.effort for one in rollouts} == {"low", "medium", "high"} and len(rollouts) == 3 * 5 + 2 * 10
    assert len({one.validity for one in rollouts}) > 1 and {int(one.ids_T[-1]) for one in rollouts} >= set(
        STOP_IDS
    )
    status = sampler_run.progress()
    assert (status["state"], status["message"], status["parts"]) == (
        "Succeeded",
        "Complete",
        {"done": 5, "total": 5},
    )
    folder = paths.metrics(sampler_run.run, "onpolicy-sampler", "").removesuffix(".jsonl")
    lines = [json.loads(sampler_run.bucket.get(found.key)) for found in sampler_run.bucket.list(folder)]
    assert [(line["event"], line["window"], line["version"], line["attempt"]) for line in lines] == [
        ("window", number, 0 if number < 3 else 2, 3) for number in range(5)
    ]
    assert [line["load"] is not None for line in lines] == [True, False, False, True, False]
    assert all(line["load"]["probe"] <= 1e-4 for line in lines if line["load"])
    assert [line["gpu"] is not None for line in lines] == [True, False, False, True, False]
    assert [line["together"] for line in lines] == [3, 3, 3, 2, 2] and len(
        {line["seconds"] for line in lines}
    ) == 2
    assert lines[3]["waitWeights"] > lines[1]["waitWeights"] == lines[4]["waitWeights"] == 0
    for number, line in enumerate(lines):
        window = sampler_run.window(number)
        assert (line["rollouts"], line["tokens"]) == (len(window.rollouts), window.header.tokens) and line[
            "tokensPerSecond"
        ] > 0
        for effort, count in line["effort"].items():
            rollouts_of_effort = [one for one in window.rollouts if one.effort == effort]
            assert count == len(rollouts_of_effort) == sum(line["validity"][effort].values())
            assert line["lengths"][effort]["max"] == max(len(one.logp_C) for one in rollouts_of_effort)
    assert len(list((sampler_run.scratch / "weights").glob("*.safetensors"))) == 1, (
        "only one version is on disk"
    )


def start_job(sampler_run: SamplerRun, **environment: str) -> "subprocess.Popen[str]":
    """Start the job as in a pod, with its own engine."""
    scratch = sampler_run.file.parent
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(scratch),
        "VPMOE_TERMINATION_LOG": str(scratch / "end"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.sampler", "--run", str(sampler_run.file), "--step", "onpolicy-sampler"],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_while_running(true: Callable[[], bool], process: "subprocess.Popen[str]", what: str) -> None:
    wait_until(lambda: true() or process.poll() is not None, what, 180)
    assert process.poll() is None, process.communicate()[0]


def test_an_attempt_that_starts_within_a_version_writes_the_missing_windows_with_the_same_bytes(
    sampler_run: SamplerRun,
) -> None:
    """With the running engine, which has loaded other weights in between, and with a job and a new engine,
    which has the version from a volume."""
    sampler_run.publish(0)
    sampler_run.publish(2, 700)
    sampler_run.sample()
    written = {number: sampler_run.bucket.get(sampler_run.key(number)) for number in sampler_run.windows()}
    assert len(written) >= 4
    metrics = [paths.metrics(sampler_run.run, "onpolicy-sampler", f"{number:06d}") for number in (0, 1)]
    etags = {
        key: sampler_run.bucket.head(key).etag for key in (sampler_run.key(0), sampler_run.key(1), *metrics)
    }
    for number in written:
        if number > 1:
            sampler_run.bucket.delete(sampler_run.key(number))
    hooked = HookedEngines(sampler_run.engines)
    sampler_run.sample(engines=hooked)
    assert hooked.requests == [15, 20], "all windows of a version are sampled again if any is missing"
    assert {
        number: sampler_run.bucket.get(sampler_run.key(number)) for number in sampler_run.windows()
    } == written
    assert {key: sampler_run.bucket.head(key).etag for key in etags} == etags, (
        "existing objects are unchanged"
    )
    for number in written:
        if number > 0:
            sampler_run.bucket.delete(sampler_run.key(number))
    sampler_run.bucket.delete(paths.manifest(paths.weights(sampler_run.run, "onpolicy", 2)))
    sampler_run.bucket.delete(paths.progress(sampler_run.run, "onpolicy-sampler"))
    sampler_run.write_to_volume(0, index=0)
    process = start_job(sampler_run, **{VARIABLE: str(sampler_run.scratch / "volume")})
    wait_while_running(
        lambda: "Waiting for version 2" in sampler_run.progress()["message"], process, "the job waits"
    )
    assert {number: sampler_run.bucket.get(sampler_run.key(number)) for number in sampler_run.windows()} == {
        n: written[n] for n in (0, 1, 2)
    }
    assert load_of(sampler_run, 1)["source"] == "volume"
    (engine,) = child_pids(process.pid)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 143
        and json.loads((sampler_run.file.parent / "end").read_text())["class"] == "Terminated"
    ), output
    wait_until(lambda: not is_alive(engine), "the engine has ended with its job")


def test_windows_after_the_end_of_the_stage_are_not_written(sampler_run: SamplerRun) -> None:
    """They are sampled nevertheless: a batch has all windows of its version, and the end is known only after
    it."""
    sampler_run.run = with_stage_fields(sampler_run.run, tokens=10)
    sampler_run.publish(0)
    hooked = HookedEngines(sampler_run.engines)
    sampler_run.sample(engines=hooked)
    assert hooked.requests == [15] and sampler_run.windows() == [0] and sampler_run.window(0).header.last
    assert (sampler_run.progress()["message"], sampler_run.progress()["parts"]) == (
        "Complete",
        {"done": 1, "total": 1},
    )
    folder = paths.metrics(sampler_run.run, "onpolicy-sampler", "").removesuffix(".jsonl")
    assert len(list(sampler_run.bucket.list(folder))) == 1


def with_stage_fields(run: DistillRun, **fields: Any) -> DistillRun:
    """The run with changed fields of its OnPolicy stage; its folder changes too."""
    document = run.document()
    document["spec"]["stages"][-1] |= fields
    return DistillRun.parse(document)


def child_pids(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


class HookedEngines:
    """Engines with hooks before and after sampling."""

    def __init__(
        self,
        engines: EnginePool,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self._engines, self._before, self._after = engines, before, after
        self.load, self.score, self.check_engines = engines.load, engines.score, engines.check_engines
        self.requests: list[int] = []

    @property
    def loaded(self) -> bool:
        return self._engines.loaded

    @property
    def depth(self) -> int | None:
        return self._engines.depth

    def sample(self, requests: list[SamplingRequest], check_stop: Callable[[], None]) -> list[Completion]:
        self._before()
        self.requests.append(len(requests))
        found = self._engines.sample(requests, check_stop)
        self._after()
        return found

    def sample_queue(
        self, requests: list[SamplingRequest], check_stop: Callable[[], None]
    ) -> Iterator[tuple[int, Completion]]:
        """`after` is called after each completion."""
        self._before()
        self.requests.append(len(requests))
        for found in self._engines.sample_queue(requests, check_stop):
            yield found
            self._after()


def test_an_engine_that_dies_while_a_version_is_awaited_ends_the_attempt(
    sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: the next attempt's engines can start before that version is there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SHARED_ENGINES", "2")
    with EnginePool(1, "tiny", 64, depth=4, per_gpu=2, module="tests.fakes.shared_engine") as engines:
        engines.load(Path("/3"))
        engines._processes[0].kill()
        engines._processes[0].wait()
        with pytest.raises(Retriable, match="engine 0 was killed by SIGKILL"):
            sampler_run.sample(engines=engines)


def test_the_first_writer_of_a_window_wins(sampler_run: SamplerRun) -> None:
    """The writer that loses the race continues from the stored object."""
    sampler_run.publish(0)
    sampler_run.sample(engines=engines_for_one_version(sampler_run))
    first, second = sampler_run.window(0), sampler_run.window(1)
    header = first.header.model_copy(update={"tokens": sum(len(one.ids_T) for one in first.rollouts[:4])})
    theirs = rollouts_bytes(header, first.rollouts[:4])
    for number in range(3):
        sampler_run.bucket.delete(sampler_run.key(number))
    sampler_run.sample(
        engines=engines_for_one_version(
            sampler_run, lambda: sampler_run.bucket.create(sampler_run.key(0), theirs, {})
        )
    )
    assert sampler_run.bucket.get(sampler_run.key(0)) == theirs
    assert sampler_run.window(1).header == second.header.model_copy(update={"seen": header.tokens})


def engines_for_one_version(
    sampler_run: SamplerRun, hook: Callable[[], object] = lambda: None
) -> HookedEngines:
    """Engines that finish the stage when they sample their first version, after calling the hook."""

    def before() -> None:
        hook()
        finish_stage(sampler_run)

    sampler_run.bucket.delete(paths.progress(sampler_run.run, "onpolicy"))
    return HookedEngines(sampler_run.engines, before)


def finish_stage(sampler_run: SamplerRun) -> None:
    progress = {"step": "onpolicy", "attempt": 1, "state": "Succeeded", "updated": "2026-01-01T00:00:00Z"}
    sampler_run.bucket.write_json(paths.progress(sampler_run.run, "onpolicy"), progress)


def test_a_stage_that_ended_early_is_not_sampled_further(sampler_run: SamplerRun) -> None:
    sampler_run.publish(0)
    finish_stage(sampler_run)
    sampler_run.sample()
    assert sampler_run.windows() == []
    assert (sampler_run.progress()["state"], sampler_run.progress()["message"]) == (
        "Succeeded",
        "The stage has ended",
    )
    hooked = engines_for_one_version(sampler_run)
    sampler_run.sample(engines=hooked)
    assert sampler_run.windows() == [0, 1, 2] and hooked.requests == [15]


def test_a_stop_while_sampling_takes_effect_at_once_and_writes_no_window(sampler_run: SamplerRun) -> None:
    sampler_run.publish(0)
    stopping = threading.Event()
    with pytest.raises(Terminated, match="onpolicy-sampler was asked to stop"):
        sampler_run.sample(stopping, HookedEngines(sampler_run.engines, stopping.set))
    assert sampler_run.windows() == []
    sampler_run.engines.score(
        [np.arange(5, dtype=np.int32)]
    )  # the engine's late reply to the abandoned call is ignored


def test_a_stop_after_sampling_takes_effect_when_the_windows_are_written(sampler_run: SamplerRun) -> None:
    sampler_run.publish(0)
    stopping = threading.Event()
    with pytest.raises(Terminated, match="onpolicy-sampler was asked to stop"):
        sampler_run.sample(stopping, HookedEngines(sampler_run.engines, after=stopping.set))
    assert sampler_run.windows() == [0, 1, 2]


def test_a_student_that_differs_from_the_trainers_fails_the_probe(
    sampler_run: SamplerRun, tmp_path: Path
) -> None:
    """One tensor of a later layer differs slightly. The files match the manifest, but not the probe."""
    student = sampler_run.students[0]
    sampler_run.publish(5, index=0)
    facts = policy_version.find_version(sampler_run.bucket, sampler_run.run, "onpolicy", 5)
    assert facts
    weights = load_file(student.folder / "model-00001-of-00001.safetensors")
    weights["model.layers.2.mlp.experts.down"] *= 1.01
    with_stage_fields = tmp_path / "changed"
    shutil.copytree(student.folder, with_stage_fields)
    save_file(weights, with_stage_fields / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    version_facts = facts[1].model_copy(update={"version": 0})
    policy_versions.publish(
        sampler_run.bucket,
        sampler_run.run,
        with_stage_fields,
        student.learner,
        0,
        0,
        other_facts=version_facts,
    )
    message = (
        r"s3://.*/weights/onpolicy/v000000/manifest.json: engine 0 computes another "
        r"student than the trainer that published it: .* of token"
    )
    with pytest.raises(Permanent, match=message + ".* Delete the version's folder"):
        sampler_run.sample()
    assert sampler_run.windows() == []


@pytest.mark.parametrize("kind", ["weights", "window"])
def test_a_truncated_object_is_named(sampler_run: SamplerRun, s3: S3, kind: str) -> None:
    sampler_run.publish(0)
    if kind == "window":
        sampler_run.sample(engines=engines_for_one_version(sampler_run))
        sampler_run.bucket.delete(paths.progress(sampler_run.run, "onpolicy"))
    key = (
        sampler_run.key(2)
        if kind == "window"
        else f"{paths.weights(sampler_run.run, 'onpolicy', 0)}/model-00001-of-00001.safetensors"
    )
    file = s3.folder / sampler_run.bucket.name / key
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises((StorageError, Permanent), match=rf"{sampler_run.bucket.url(key)}: .*delete"):
        sampler_run.sample()


def test_a_window_of_another_configuration_is_rejected(sampler_run: SamplerRun) -> None:
    sampler_run.publish(0)
    sampler_run.sample(engines=engines_for_one_version(sampler_run))
    found = sampler_run.window(2)
    sampler_run.bucket.delete(sampler_run.key(2))
    data = rollouts_bytes(found.header.model_copy(update={"config": "0" * 64}), found.rollouts)
    sampler_run.bucket.create(sampler_run.key(2), data, {})
    with pytest.raises(
        Permanent,
        match=r"window-000002.rollouts.arrow: it is window 2 of stage onpolicy of .*, configuration 0000",
    ):
        sampler_run.sample()


@pytest.fixture
def queue(sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch) -> SamplerRun:
    """A run whose version 0 is published. Its engine has a queue, as on GPUs, and all that has finished goes
    into a part at once."""
    monkeypatch.setattr(sampler_run.engines, "depth", 4)
    monkeypatch.setattr(part_log, "PART_SECONDS", 0.0)
    sampler_run.publish(0)
    return sampler_run


class Killed(BaseException):
    """In place of SIGKILL: nothing is written after it."""


def kill_at_write(
    sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch, key: str, *, before: bool = False
) -> None:
    """Sample, and die when this object is written: before or after it is in the bucket."""
    create, killed = sampler_run.bucket.create, False

    def dying(written: str, data: bytes, metadata: Any) -> bool:
        nonlocal killed
        killed = killed or (before and written == key)
        if killed:
            raise Killed
        found = create(written, data, metadata)
        killed = written == key
        if killed:
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sampler_run.bucket, "create", dying)
        with pytest.raises(Killed):
            sampler_run.sample(engines=engines_for_one_version(sampler_run))
    sampler_run.bucket.delete(paths.progress(sampler_run.run, "onpolicy"))


def check_parts(sampler_run: SamplerRun) -> None:
    """Every rollout of the windows of version 0 is in one part, the same."""
    rollouts: dict[RolloutKey, Rollout] = {}
    for number in sampler_run.parts():
        found = sampler_run.part(number).rollouts
        assert not found.keys() & rollouts.keys()
        rollouts |= found
    assert sampler_run.windows() == [0, 1, 2] and len(rollouts) == 15
    for number in range(3):
        window = sampler_run.window(number)
        assert [(one.prompt, one.rollout) for one in window.rollouts] == [(place, 0) for place in range(5)]
        for one in window.rollouts:
            other = rollouts[RolloutKey(number, one.prompt, one.rollout)]
            assert np.array_equal(one.ids_T, other.ids_T) and np.array_equal(one.logp_C, other.logp_C)
            assert (one.document, one.effort, one.validity) == (other.document, other.effort, other.validity)


@pytest.mark.parametrize(
    "point, before",
    [("part 1", False), ("window 0", True), ("window 0", False)],
    ids=["after-a-part", "before-the-windows", "between-windows"],
)
def test_a_killed_sampler_adopts_its_parts_and_samples_only_the_rest(
    queue: SamplerRun, monkeypatch: pytest.MonkeyPatch, point: str, before: bool
) -> None:
    key = queue.part_key(1) if point == "part 1" else queue.key(0)
    kill_at_write(queue, monkeypatch, key, before=before)
    parts = {number: queue.bucket.head(queue.part_key(number)).etag for number in queue.parts()}
    adopted = sum(len(queue.part(number).rollouts) for number in parts)
    assert len(parts) > 1 and (adopted == 15) == (point == "window 0")
    assert queue.windows() == ([0] if point == "window 0" and not before else [])
    hooked = engines_for_one_version(queue)
    queue.sample(engines=hooked)
    assert hooked.requests == [15 - adopted], "no rollout is sampled again"
    check_parts(queue)
    assert {n: queue.bucket.head(queue.part_key(n)).etag for n in parts} == parts
    line = json.loads(queue.bucket.get(paths.metrics(queue.run, "onpolicy-sampler", "000001")))
    assert line["adopted"] == 5 if point == "window 0" else line["adopted"] < 5


def test_a_stop_in_a_queue_writes_what_has_finished(queue: SamplerRun) -> None:
    stopping = threading.Event()
    with pytest.raises(Terminated, match="onpolicy-sampler was asked to stop"):
        queue.sample(stopping, HookedEngines(queue.engines, after=stopping.set))
    finished = sum(len(queue.part(number).rollouts) for number in queue.parts())
    assert 0 < finished < 15 and queue.windows() == []
    hooked = engines_for_one_version(queue)
    queue.sample(engines=hooked)
    assert hooked.requests == [15 - finished]
    check_parts(queue)


def test_the_first_writer_of_a_part_wins(queue: SamplerRun) -> None:
    """The other adopts its rollouts in place of its own."""
    queue.sample(engines=engines_for_one_version(queue))
    part = queue.part(0)
    ours = queue.window(0).rollouts[0]
    theirs = dataclasses.replace(ours, logp_C=np.full_like(ours.logp_C, -3))
    key = RolloutKey(0, ours.prompt, ours.rollout)
    for number in queue.parts():
        queue.bucket.delete(queue.part_key(number))
    for number in range(3):
        queue.bucket.delete(queue.key(number))
    data = part_bytes(part.header, {key: theirs})
    queue.sample(
        engines=engines_for_one_version(queue, lambda: queue.bucket.create(queue.part_key(0), data, {}))
    )
    assert (queue.window(0).rollouts[0].logp_C == -3).all()
    check_parts(queue)


@pytest.mark.parametrize("fault", ["truncated", "config", "weights", "window", "prompt"])
def test_a_part_of_something_else_is_rejected_by_name(queue: SamplerRun, s3: S3, fault: str) -> None:
    header = part_header(queue)
    rollout = Rollout(
        0,
        0,
        0,
        "low",
        "valid",
        np.arange(9, dtype=np.int32),
        np.ones(3, np.uint8),
        np.full(3, -1, np.float32),
    )
    changed = {fault: "0" * 64} if fault in ("config", "weights") else {}
    rows = {RolloutKey(9 if fault == "window" else 0, 0, 0): rollout}
    key = queue.part_key(0)
    queue.bucket.create(key, part_bytes(header.model_copy(update=changed), rows), {})
    if fault == "truncated":
        file = s3.folder / queue.bucket.name / key
        os.truncate(file, file.stat().st_size // 2)
    message = {
        "truncated": "sha256 is",
        "config": "config is 0000",
        "weights": "weights is 0000",
        "window": "version 0 has no rollout 0 of prompt 0 of window 9",
        "prompt": "rollout 0 of prompt 0 of window 0 has another prompt",
    }[fault]
    with pytest.raises((StorageError, Permanent), match=rf"{queue.bucket.url(key)}: {message}.*delete it"):
        queue.sample()
    assert queue.windows() == []


def part_header(sampler_run: SamplerRun) -> PartHeader:
    found = policy_version.find_version(sampler_run.bucket, sampler_run.run, "onpolicy", 0)
    assert found
    return PartHeader(
        run=provenance(sampler_run.run, "onpolicy-sampler").run,
        config=sampler_run.run.config_hash,
        stage="onpolicy",
        version=0,
        weights=policy_version.weights_digest(found[0]),
        part=0,
    )


def test_a_version_on_the_volume_is_sampled_from_before_it_is_in_the_bucket(
    sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written before it is. The windows are the bits of those that are sampled by the
    bucket."""
    monkeypatch.setattr(sampler, "POLL_SECONDS", 0.1)
    sampler_run.run = with_stage_fields(sampler_run.run, tokens=10)  # ends with window 0
    sampler_run.write_to_volume(0, index=0)

    def after() -> None:
        assert sampler_run.windows() == [] and not list(sampler_run.scratch.glob("weights"))
        sampler_run.publish(0)

    sampler_run.sample(engines=HookedEngines(sampler_run.engines, after=after), volume=sampler_run.volume)
    assert sampler_run.windows() == [0] and load_of(sampler_run, 0)["source"] == "volume"
    assert line_of(sampler_run, 0)["waitUpload"] > 0
    by_volume = sampler_run.bucket.get(sampler_run.key(0))
    sampler_run.bucket.delete(sampler_run.key(0))
    sampler_run.sample()
    assert sampler_run.bucket.get(sampler_run.key(0)) == by_volume
    assert load_of(sampler_run, 0)["source"] == "bucket" and line_of(sampler_run, 0)["waitUpload"] == 0


def test_the_wait_for_a_versions_upload_is_no_wait_for_weights(
    sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer publishes the version once the sampler waits for it, with its sampled windows."""
    monkeypatch.setattr(sampler, "POLL_SECONDS", 0.1)
    sampler_run.run = with_stage_fields(sampler_run.run, tokens=10)
    sampler_run.write_to_volume(0, index=0)
    find, looks = policy_version.find_version, []

    def found(*given: Any) -> Any:
        looks.append(given)
        if len(looks) == 3:
            sampler_run.publish(0, index=0)
        return find(*given)

    monkeypatch.setattr(policy_version, "find_version", found)
    prometheus = sampler_run.sample(volume=sampler_run.volume).metrics.render(None).decode()
    line = line_of(sampler_run, 0)
    counted = re.search(r'vpmoe_wait_seconds_total{.*reason="upload".*} (.*)', prometheus)
    assert counted and 0 < float(counted[1]) <= line["waitUpload"]


def line_of(sampler_run: SamplerRun, window: int) -> dict[str, Any]:
    """A window's line of the sampler's metrics."""
    key = paths.metrics(sampler_run.run, "onpolicy-sampler", f"{window:06d}")
    line: dict[str, Any] = json.loads(sampler_run.bucket.get(key))
    return line


def load_of(sampler_run: SamplerRun, window: int) -> dict[str, Any]:
    """How the version of a window was loaded, by the sampler's metrics."""
    load: dict[str, Any] = line_of(sampler_run, window)["load"]
    return load


def publish_other(sampler_run: SamplerRun) -> None:
    """By a trainer without the volume, on which the version of the one before stays."""
    sampler_run.publish(0, index=1)


def adjust(sampler_run: SamplerRun) -> None:
    adjustment = Adjustment(number=1, window=0, setting="maxTokens", waiting=0.7)
    write_adjustment(sampler_run.bucket, sampler_run.run, "onpolicy", adjustment, {})
    sampler_run.publish(0, index=0)


@pytest.mark.parametrize("change, index", [(publish_other, 1), (adjust, 0)], ids=["weights", "adjustment"])
def test_a_version_that_another_attempt_made_again_is_sampled_again(
    sampler_run: SamplerRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[SamplerRun], None],
    index: int,
) -> None:
    """The trainer was killed after it wrote version 0 to the volume. The next attempt publishes another
    student as version 0, or makes an adjustment before it."""
    monkeypatch.setattr(sampler, "POLL_SECONDS", 0.1)
    sampler_run.run = with_stage_fields(sampler_run.run, tokens=10)
    sampler_run.write_to_volume(0, index=0)
    hooked = HookedEngines(
        sampler_run.engines, after=lambda: None if len(hooked.requests) > 1 else change(sampler_run)
    )
    sampler_run.sample(engines=hooked, volume=sampler_run.volume)
    assert hooked.requests == [15, 15] and "made version 0 again" in caplog.text
    record = policy_version.find_version(sampler_run.bucket, sampler_run.run, "onpolicy", 0)
    assert record is not None
    header = sampler_run.window(0).header
    assert header.weights == policy_version.weights_digest(record[0])
    assert header.turns == (change is adjust)
    again = sampler_run.bucket.get(sampler_run.key(0))
    sampler_run.bucket.delete(sampler_run.key(0))
    sampler_run.sample()
    assert sampler_run.bucket.get(sampler_run.key(0)) == again


@pytest.mark.parametrize("again", [False, True], ids=["recorded", "made-again"])
def test_a_version_on_the_volume_has_no_parts_before_it_is_in_the_bucket(
    sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """Nor ever, if the bucket then has another one."""
    monkeypatch.setattr(sampler_run.engines, "depth", 4)
    monkeypatch.setattr(part_log, "PART_SECONDS", 0.0)
    monkeypatch.setattr(part_log, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(sampler, "POLL_SECONDS", 0.1)
    sampler_run.run = with_stage_fields(sampler_run.run, tokens=10)
    sampler_run.write_to_volume(0, index=0)
    seen: list[list[int]] = []

    def after() -> None:
        seen.append(sampler_run.parts())
        if len(seen) == 5:
            publish_other(sampler_run) if again else sampler_run.publish(0, index=0)

    hooked = HookedEngines(sampler_run.engines, after=after)
    sampler_run.sample(engines=hooked, volume=sampler_run.volume)
    assert hooked.requests == [15, 15] if again else [15]
    first = next(number for number, parts in enumerate(seen) if parts)
    assert first >= (15 if again else 5)
    weights = part_header(sampler_run).weights
    parts = [sampler_run.part(number) for number in sampler_run.parts()]
    assert {part.header.weights for part in parts} == {weights} == {sampler_run.window(0).header.weights}
    assert sum(len(part.rollouts) for part in parts) == 15


def test_a_version_that_is_damaged_on_the_volume_is_taken_from_the_bucket(
    sampler_run: SamplerRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is there: the sampler waits for it."""
    monkeypatch.setattr(sampler, "POLL_SECONDS", 0.1)
    sampler_run.run = with_stage_fields(sampler_run.run, tokens=10)
    folder = sampler_run.write_to_volume(0, index=0)
    (folder / "config.json").write_text("{}")
    with ThreadPoolExecutor(1) as pool:
        sampled = pool.submit(sampler_run.sample, volume=sampler_run.volume)
        wait_until(
            lambda: sampler_run.progress()["message"] == "Waiting for version 0",
            "the sampler waits for the bucket",
            60,
        )
        assert sampler_run.windows() == []
        sampler_run.publish(0)
        sampled.result()
    assert sampler_run.windows() == [0] and load_of(sampler_run, 0)["source"] == "bucket"
