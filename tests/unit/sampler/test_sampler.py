"""The sampler on a real store with real vLLM: every window has the right contents from the right version,
after any failure."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
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
from vpmoe.failure import Permanent, Terminated
from vpmoe.inference import hf_model
from vpmoe.inference.engine_pool import Completion, EnginePool, SamplingRequest
from vpmoe.model.learner import Learner
from vpmoe.provenance import Provenance
from vpmoe.rollout import policy_version, prompts
from vpmoe.rollout.back_pressure import Adjustment
from vpmoe.rollout.back_pressure import write_adjustment as write_turn
from vpmoe.rollout.curriculum import Curriculum
from vpmoe.rollout.window_files import WindowRollouts, read_rollouts, rollouts_bytes
from vpmoe.rollout.windows import WindowSchedule
from vpmoe.sampler import sampler
from vpmoe.storage import Bucket, StorageError, manifest, paths

ROOT = Path(__file__).parents[3]
TOLERANCE = 1e-4
"""In nats. All compute in float32, with other orders of summation."""
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

    it: Learner
    folder: Path


@pytest.fixture(scope="module")
def students(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> list[Student]:
    """Two; the second is published later."""
    made = []
    for _ in range(2):
        it = policy_versions.ending(policy_versions.learner(device, new_seed()))
        made.append(Student(it, policy_versions.export(tmp_path_factory.mktemp("student"), it)))
    return made


@dataclass
class World:
    """A run whose dataset is built, and a sampler of its OnPolicy stage."""

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

    def publish(self, number: int, tokens: int = 0, which: int | None = None) -> manifest.Manifest:
        student = self.students[min(number, 1) if which is None else which]
        return policy_versions.publish(
            self.bucket, self.run, student.folder, student.it, number, tokens, first_prompt=FIRST_PROMPT
        )

    def sample(self, stopping: threading.Event | None = None, engines: Any = None) -> None:
        """Run the job with the engine that all tests share, as if the engine were new."""
        self.engines.loaded = False
        who = provenance(self.run, "onpolicy-sampler")
        sampler.sample_stage(
            self.run,
            self.stage,
            self.bucket,
            who,
            stopping or threading.Event(),
            engines or self.engines,
            self.scratch,
        )

    def key(self, number: int) -> str:
        return paths.window(self.run, "onpolicy", number, "rollouts")

    def window(self, number: int) -> WindowRollouts:
        return read_rollouts(self.bucket.get(self.key(number)), self.key(number))

    def windows(self) -> list[int]:
        return [number for number in range(9) if self.bucket.exists(self.key(number))]

    def progress(self, step: str = "onpolicy-sampler") -> dict[str, Any]:
        key = paths.progress(self.run, step)
        told: dict[str, Any] = (
            self.bucket.get_json(key) if self.bucket.exists(key) else {"state": "", "message": ""}
        )
        return told

    def tokens_of(self, number: int) -> int:
        """The trainer's TrainState figures at version `number`: all steps up to its last window's."""
        about = self.window(number - 1).header
        return about.seen + about.tokens


def provenance(run: DistillRun, step: str) -> Provenance:
    return Provenance(
        None, None, run.config_hash, "default", run.metadata.name, run.uid8, step, 3, "2026-01-01T00:00:00Z"
    )


@pytest.fixture(scope="module")
def spec(s3: S3, sample_parquet: list[Path]) -> dict[str, Any]:
    """A run whose dataset is built. Other runs in its bucket share it."""
    made = small_run(s3)
    made["spec"]["student"]["gpus"] = 2
    made["spec"]["training"] |= {
        "sequenceLength": LONGEST,
        "globalBatchTokens": 4 * LONGEST,
    }  # as the shared engine's: batches depend on it
    made["spec"]["stages"].append(STAGE)
    run = DistillRun.parse(made)
    bucket = Bucket.open(run.spec.storage)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    with EncoderPool(1) as encoders:
        preprocess(run, bucket, provenance(run, "preprocess"), threading.Event(), None, encoders)
    return made


@pytest.fixture
def world(spec: dict[str, Any], engines: EnginePool, students: list[Student], tmp_path: Path) -> World:
    named = spec | {"metadata": {"name": f"r{secrets.token_hex(4)}", "namespace": "default"}}
    run = DistillRun.parse(named)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(named))
    return World(
        run, Bucket.open(run.spec.storage), engines, students, tmp_path / "scratch", tmp_path / "run.yaml"
    )


def finish(world: World) -> None:
    """A sampler, and a thread that publishes version 2 once the sampler waits for it."""

    def trainer() -> None:
        try:
            wait_until(
                lambda: "Waiting for version 2" in world.progress()["message"], "version 2 is waited for", 120
            )
            assert world.windows() == [0, 1, 2], "windows 3 and 4 are of version 2, and nothing else will do"
            write_turn(
                world.bucket,
                world.run,
                "onpolicy",
                Adjustment(number=1, window=4, setting="maxTokens", waiting=0.7),
                {},
            )
            world.publish(2, world.tokens_of(2))
            wait_until(lambda: world.progress()["state"] == "Succeeded", "the stage has ended", 120)
        except BaseException:
            stopping.set()
            raise

    stopping = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        published = beside.submit(trainer)
        try:
            world.sample(stopping)
        finally:
            published.result()


def check_window(
    world: World, number: int, parts: DatasetReader, anchors: np.ndarray[Any, Any], seen: int
) -> int:
    """Check a window's file against an independent computation; returns the stage's tokens before the next
    window."""
    student = world.students[0 if number < 3 else 1]
    sampled = world.window(number)
    about, curriculum = sampled.header, Curriculum(world.stage)
    of = 0 if number < 3 else 2
    found = policy_version.find_version(world.bucket, world.run, "onpolicy", of)
    assert found
    published, facts = found
    assert (about.run, about.config, about.stage) == (
        f"default/{world.run.metadata.name}-{world.run.uid8}",
        world.run.config_hash,
        "onpolicy",
    )
    assert (about.window, about.version, about.weights, about.seen) == (
        number,
        of,
        policy_version.weights_digest(published),
        seen,
    )
    assert about.turns == (number == 4) and about.tokens == sum(len(one.ids_T) for one in sampled.rollouts)
    after = seen + about.tokens + int(anchors[0]) * (number == 2) if number != 4 else seen + about.tokens
    assert after == curriculum.tokens_before_next(number, seen, about.tokens, anchors)
    assert about.last == (after >= TOKENS) == (number == 4)
    spec = world.run.spec.training
    asked = WindowSchedule(
        world.stage, spec.seed, [len(lengths) for lengths in parts.lengths], FIRST_PROMPT
    ).window(number, facts.tokens)
    assert about.phase == asked.phase
    bounds = MaxTokens(low=12, medium=18, high=30) if number == 4 else world.stage.rollout.max_tokens
    templates = prompts.PromptBuilder(load_dataset(world.run, world.bucket).facts["settings"]["conversation"])
    numbers = np.array([one.document for one in asked.prompts], np.int32)
    read = [
        parts.read_document(one)
        for one in packed_documents(
            numbers, first_documents([len(of) for of in parts.lengths]), parts.lengths
        )
    ]
    wanted = [(one, n) for one in asked.prompts for n in range(len(one.seeds))]
    for (one, rollout), made in zip(wanted, sampled.rollouts, strict=True):
        assert (made.prompt, made.rollout, made.document, made.effort) == (
            one.place,
            rollout,
            one.document,
            one.effort,
        )
        assert (
            made.ids_T[: made.prompt_length].tolist()
            == templates.build(*read[one.place], one.effort).tolist()
        )
        completion = made.ids_T[made.prompt_length :]
        stops = np.flatnonzero(np.isin(completion, STOP_IDS))
        bound = getattr(bounds, one.effort)
        assert (
            stops.tolist() == [len(completion) - 1] if len(completion) < bound else set(stops) <= {bound - 1}
        ), "it ends there, and only there"
        assert len(completion) <= bound and made.validity == prompts.completion_validity(completion)
        assert made.span_C.tolist() == prompts.completion_spans(completion).tolist()
    model = hf_model.load_student(student.folder, policy_versions.TINY)
    trainers = policy_versions.trainers(student.it, [made.ids_T for made in sampled.rollouts])
    for made, says in zip(sampled.rollouts, trainers, strict=True):
        ids = torch.from_numpy(made.ids_T.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids[None]).logits[0]
        logp = logits_TV[:-1].double().log_softmax(1).gather(1, ids[1:, None])[:, 0].numpy()
        assert np.abs(made.logp_C - logp[made.prompt_length - 1 :]).max() <= TOLERANCE
        assert np.abs(made.logp_C - says[made.prompt_length - 1 :]).max() <= TOLERANCE
    return after


def test_a_stage_is_sampled_to_its_end_from_the_versions_that_it_must_be_sampled_from(world: World) -> None:
    world.publish(0)
    finish(world)
    assert world.windows() == [0, 1, 2, 3, 4]
    made = load_dataset(world.run, world.bucket)
    parts = DatasetReader(made, "train", BlockCache(world.bucket, world.scratch / "blocks"))
    training = world.run.spec.training
    anchors = SequenceStream(parts.lengths, training.seed, training.sequence_length).tokens_after_steps(
        0, 4, TOKENS
    )
    seen = 0
    for number in range(5):
        seen = check_window(world, number, parts, anchors, seen)
    rollouts = [one for number in range(5) for one in world.window(number).rollouts]
    assert {one.effort for one in rollouts} == {"low", "medium", "high"} and len(rollouts) == 3 * 5 + 2 * 10
    assert len({one.validity for one in rollouts}) > 1 and {int(one.ids_T[-1]) for one in rollouts} >= set(
        STOP_IDS
    )
    said = world.progress()
    assert (said["state"], said["message"], said["parts"]) == (
        "Succeeded",
        "Complete",
        {"done": 5, "total": 5},
    )
    folder = paths.metrics(world.run, "onpolicy-sampler", "").removesuffix(".jsonl")
    lines = [json.loads(world.bucket.get(found.key)) for found in world.bucket.list(folder)]
    assert [(line["event"], line["window"], line["version"], line["attempt"]) for line in lines] == [
        ("window", number, 0 if number < 3 else 2, 3) for number in range(5)
    ]
    assert [line["load"] is not None for line in lines] == [True, False, False, True, False]
    assert all(line["load"]["probe"] <= 1e-4 for line in lines if line["load"])
    assert [line["together"] for line in lines] == [3, 3, 3, 2, 2] and len(
        {line["seconds"] for line in lines}
    ) == 2
    assert lines[3]["waitWeights"] > lines[1]["waitWeights"] == lines[4]["waitWeights"] == 0
    for number, line in enumerate(lines):
        window = world.window(number)
        assert (line["rollouts"], line["tokens"]) == (len(window.rollouts), window.header.tokens) and line[
            "tokensPerSecond"
        ] > 0
        for effort, count in line["effort"].items():
            of = [one for one in window.rollouts if one.effort == effort]
            assert count == len(of) == sum(line["validity"][effort].values())
            assert line["lengths"][effort]["max"] == max(len(one.logp_C) for one in of)
    assert len(list((world.scratch / "weights").glob("*.safetensors"))) == 1, "one version on disk"


def job(world: World, **environment: str) -> "subprocess.Popen[str]":
    """The job as a pod runs it, with an engine of its own."""
    scratch = world.file.parent
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(scratch),
        "VPMOE_TERMINATION_LOG": str(scratch / "end"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.sampler", "--run", str(world.file), "--step", "onpolicy-sampler"],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(true: Callable[[], bool], process: "subprocess.Popen[str]", what: str) -> None:
    wait_until(lambda: true() or process.poll() is not None, what, 180)
    assert process.poll() is None, process.communicate()[0]


def test_an_attempt_that_begins_within_a_version_makes_what_is_missing_to_the_same_bytes(
    world: World,
) -> None:
    """By the running engine, which held other weights in between, and by a job with a new engine that waits,
    samples and stops."""
    world.publish(0)
    world.publish(2, 700)
    world.sample()
    kept = {number: world.bucket.get(world.key(number)) for number in world.windows()}
    assert len(kept) >= 4
    metrics = [paths.metrics(world.run, "onpolicy-sampler", f"{number:06d}") for number in (0, 1)]
    left = {key: world.bucket.head(key).etag for key in (world.key(0), world.key(1), *metrics)}
    for number in kept:
        if number > 1:
            world.bucket.delete(world.key(number))
    engines = Meddled(world.engines)
    world.sample(engines=engines)
    assert engines.requests == [15, 20], "all windows of a version, however few are missing"
    assert {number: world.bucket.get(world.key(number)) for number in world.windows()} == kept
    assert {key: world.bucket.head(key).etag for key in left} == left, "what is there is left alone"
    for number in kept:
        if number > 0:
            world.bucket.delete(world.key(number))
    world.bucket.delete(paths.manifest(paths.weights(world.run, "onpolicy", 2)))
    world.bucket.delete(paths.progress(world.run, "onpolicy-sampler"))
    process = job(world)
    wait_for(lambda: "Waiting for version 2" in world.progress()["message"], process, "the job waits")
    assert {number: world.bucket.get(world.key(number)) for number in world.windows()} == {
        n: kept[n] for n in (0, 1, 2)
    }
    (engine,) = children(process.pid)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert (
        process.returncode == 143
        and json.loads((world.file.parent / "end").read_text())["class"] == "Terminated"
    ), said
    wait_until(lambda: not alive(engine), "the engine has ended with its job")


def test_what_comes_after_the_stages_end_is_not_written(world: World) -> None:
    """It was sampled nevertheless: a batch is a function of its version, and the end is not known before."""
    world.run = changed(world.run, tokens=10)
    world.publish(0)
    engines = Meddled(world.engines)
    world.sample(engines=engines)
    assert engines.requests == [15] and world.windows() == [0] and world.window(0).header.last
    assert (world.progress()["message"], world.progress()["parts"]) == ("Complete", {"done": 1, "total": 1})
    folder = paths.metrics(world.run, "onpolicy-sampler", "").removesuffix(".jsonl")
    assert len(list(world.bucket.list(folder))) == 1


def changed(run: DistillRun, **fields: Any) -> DistillRun:
    """The run with changed fields in its OnPolicy stage, and its own folder."""
    document = run.document()
    document["spec"]["stages"][-1] |= fields
    return DistillRun.parse(document)


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


class Meddled:
    """Engines with hooks before and after sampling."""

    def __init__(
        self,
        engines: EnginePool,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self._engines, self._before, self._after = engines, before, after
        self.load, self.score = engines.load, engines.score
        self.requests: list[int] = []

    @property
    def loaded(self) -> bool:
        return self._engines.loaded

    def sample(self, requests: list[SamplingRequest], check_stop: Callable[[], None]) -> list[Completion]:
        self._before()
        self.requests.append(len(requests))
        found = self._engines.sample(requests, check_stop)
        self._after()
        return found


def test_whoever_writes_a_window_first_is_right(world: World) -> None:
    """A writer that loses the race continues from the stored object."""
    world.publish(0)
    world.sample(engines=once(world))
    first, second = world.window(0), world.window(1)
    fewer = first.header.model_copy(update={"tokens": sum(len(one.ids_T) for one in first.rollouts[:4])})
    theirs = rollouts_bytes(fewer, first.rollouts[:4])
    for number in range(3):
        world.bucket.delete(world.key(number))
    world.sample(engines=once(world, lambda: world.bucket.create(world.key(0), theirs, {})))
    assert world.bucket.get(world.key(0)) == theirs
    assert world.window(1).header == second.header.model_copy(update={"seen": fewer.tokens})


def once(world: World, meddle: Callable[[], object] = lambda: None) -> Meddled:
    """Engines that sample one version; then the stage is over."""

    def before() -> None:
        meddle()
        succeed(world)

    world.bucket.delete(paths.progress(world.run, "onpolicy"))
    return Meddled(world.engines, before)


def succeed(world: World) -> None:
    said = {"step": "onpolicy", "attempt": 1, "state": "Succeeded", "updated": "2026-01-01T00:00:00Z"}
    world.bucket.write_json(paths.progress(world.run, "onpolicy"), said)


def test_a_stage_that_has_ended_early_is_sampled_no_further(world: World) -> None:
    world.publish(0)
    succeed(world)
    world.sample()
    assert world.windows() == []
    assert (world.progress()["state"], world.progress()["message"]) == ("Succeeded", "The stage has ended")
    engines = once(world)
    world.sample(engines=engines)
    assert world.windows() == [0, 1, 2] and engines.requests == [15]


def test_asked_to_stop_it_stops_at_once_and_leaves_no_window(world: World) -> None:
    world.publish(0)
    stopping = threading.Event()
    with pytest.raises(Terminated, match="onpolicy-sampler was asked to stop"):
        world.sample(stopping, Meddled(world.engines, stopping.set))
    assert world.windows() == []
    world.engines.score([np.arange(5, dtype=np.int32)])  # its reply to the abandoned call is ignored


def test_what_was_sampled_when_it_is_asked_to_stop_is_written_first(world: World) -> None:
    world.publish(0)
    stopping = threading.Event()
    with pytest.raises(Terminated, match="onpolicy-sampler was asked to stop"):
        world.sample(stopping, Meddled(world.engines, after=stopping.set))
    assert world.windows() == [0, 1, 2]


def test_another_student_than_the_trainers_is_found_out_by_its_probe(world: World, tmp_path: Path) -> None:
    """One tensor of a later layer differs slightly: the files match the manifest, but not what the trainer
    computed."""
    good = world.students[0]
    world.publish(5, which=0)
    facts = policy_version.find_version(world.bucket, world.run, "onpolicy", 5)
    assert facts
    held = load_file(good.folder / "model-00001.safetensors")
    held["model.layers.2.mlp.experts.down"] *= 1.01
    changed = tmp_path / "changed"
    shutil.copytree(good.folder, changed)
    save_file(held, changed / "model-00001.safetensors", metadata={"format": "pt"})
    says = facts[1].model_copy(update={"version": 0})
    policy_versions.publish(world.bucket, world.run, changed, good.it, 0, 0, says=says)
    named = (
        r"s3://.*/weights/onpolicy/v000000/manifest.json: engine 0 computes another "
        r"student than the trainer that published it: .* of token"
    )
    with pytest.raises(Permanent, match=named + ".* Delete the version's folder"):
        world.sample()
    assert world.windows() == []


@pytest.mark.parametrize("what", ["weights", "window"])
def test_an_object_that_was_cut_off_is_named(world: World, s3: S3, what: str) -> None:
    world.publish(0)
    if what == "window":
        world.sample(engines=once(world))
        world.bucket.delete(paths.progress(world.run, "onpolicy"))
    key = (
        world.key(2)
        if what == "window"
        else f"{paths.weights(world.run, 'onpolicy', 0)}/model-00001.safetensors"
    )
    file = s3.folder / world.bucket.name / key
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises((StorageError, Permanent), match=rf"{world.bucket.url(key)}: .*delete"):
        world.sample()


def test_a_window_of_another_configuration_is_refused(world: World) -> None:
    world.publish(0)
    world.sample(engines=once(world))
    found = world.window(2)
    world.bucket.delete(world.key(2))
    data = rollouts_bytes(found.header.model_copy(update={"config": "0" * 64}), found.rollouts)
    world.bucket.create(world.key(2), data, {})
    with pytest.raises(
        Permanent,
        match=r"window-000002.rollouts.arrow: it is window 2 of stage onpolicy of .*, configuration 0000",
    ):
        world.sample()
