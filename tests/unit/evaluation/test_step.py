"""The evaluation step on a real S3 store with the real engine: its figures equal those of the trainer and of
transformers, and its failures name their cause.

The tests share one engine, one dataset and one checkpoint, of which each has a copy. The student is `tiny`
after one optimizer step, with weights so large that every part affects the output.
"""

import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from tests.fakes import pod_user
from tests.fakes.checkpoints import alter, save_checkpoints, state_at
from tests.fakes.store import S3, small_run
from tests.fakes.students import LOCKED, SMALL, documents, learner
from tests.fakes.tiny_teacher import LONGEST
from tests.fakes.waiting import wait_until
from vpmoe.api import DistillRun
from vpmoe.api.microbatch import on_cpu
from vpmoe.data import canary, dataset, vocabulary_file
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.data.vocabulary import RETURN
from vpmoe.evaluation.evaluate import evaluate
from vpmoe.evaluation.validity import measure_while_training
from vpmoe.failure import Permanent, Terminated
from vpmoe.inference import hf_model
from vpmoe.inference.engine_pool import CheckStop, Completion, EnginePool, SamplingRequest
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES, Shape
from vpmoe.objectives.vanilla import vanilla
from vpmoe.process.board import ProgressBoard
from vpmoe.provenance import Provenance
from vpmoe.rollout import evaluation_record
from vpmoe.rollout.evaluation_record import EvaluationRecord, load_evaluation
from vpmoe.rollout.prompts import completion_validity
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.trainer.checkpoint.state_copy import rank_file
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.held_out import HeldOutDocuments

TINY = SHAPES["tiny"]
ROOT = Path(__file__).parents[3]
LENGTH = LONGEST - 1
"""Maximum length of a sequence; scoring needs one position more."""
TOLERANCE = 1e-4
"""Allowed difference of means, in nats per token. All compute in float32 with different orders of
summation."""
SENTENCE = "The pond is ≈ 3 m deep, ⟨H≈0.4⟩, and nobody has trained on it. "
CANARY = SENTENCE * 60
"""Longer than LENGTH tokens, so it is scored in several windows."""
STEP = "vanilla-evaluate"


@pytest.fixture(scope="module")
def trained(device: torch.device) -> Learner:
    """A student that stops after about ten tokens: all embeddings share a large component that favours
    `<|return|>`."""
    torch.manual_seed(11)
    learner = Learner.build(
        TINY, device, sequence_length=LENGTH, seed=1234, weight_decay=0.1, gradient_clip=1.0
    )
    with torch.no_grad():
        for name, parameter in learner.student.named_parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(
                std=0.3 if name == "embedding.weight" else 0.15
            )
        learner.student.output[:, 0] = 0
        learner.student.output[RETURN, 0] = 4.6
        learner.student.embedding.weight[:, 0] = 10.0
    batch = Batch.from_rows(*documents(torch.Generator().manual_seed(1), [60, 40], 128, TINY.vocabulary))
    learner.forward_backward(
        [batch], vanilla(batch.counts, {"reasoning": 1.0, "final": 1.0}), int(batch.counts[0])
    )
    learner.step(1e-5)
    return learner


def provenance(run: DistillRun, attempt: int = 1) -> Provenance:
    return Provenance(
        None,
        None,
        run.config_hash,
        "default",
        run.metadata.name,
        run.uid8,
        STEP,
        attempt,
        "2026-01-01T00:00:00Z",
    )


@dataclass(frozen=True)
class Amounts:
    """How much is evaluated. The defaults take an engine on a CPU a few seconds."""

    documents: int = 3
    completions: int = 6
    canary: str | None = SENTENCE
    """None: the run names none."""


@pytest.fixture
def amounts(request: pytest.FixtureRequest) -> Amounts:
    """The amounts of a test; others than the defaults by indirect parametrization."""
    return getattr(request, "param", Amounts())


@pytest.fixture(scope="module")
def first_spec(s3: S3, sample_parquet: list[Path]) -> dict[str, Any]:
    """A run whose dataset is built from the sample. Other runs in its bucket share it."""
    run_spec = small_run(s3)
    run_spec["spec"]["dataset"] |= {
        "sampling": {"nonEnglishMax": 0.6},
        "maxLength": 256,
        "validFraction": 0.45,
    }
    run_spec["spec"]["training"] |= {"sequenceLength": LENGTH}
    run_spec["spec"]["student"]["gpus"] = 2
    rollout = {"maxTokens": {"low": 8, "medium": 16, "high": 24}}
    on_policy = {
        "name": "onpolicy",
        "kind": "OnPolicy",
        "tokens": 4096,
        "optimizer": {"minLearningRate": 1e-6},
        "rollout": rollout,
    }
    run_spec["spec"]["stages"].append(on_policy)
    run_spec["spec"]["evaluation"] |= {"completions": 6}
    run = DistillRun.parse(run_spec)
    bucket = Bucket.open(run.spec.storage)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    with EncoderPool(1) as encoders:
        preprocess(run, bucket, provenance(run), threading.Event(), ProgressBoard(), None, encoders)
    return run_spec


@pytest.fixture
def spec(first_spec: dict[str, Any], bucket: Bucket, amounts: Amounts) -> dict[str, Any]:
    """A run of its own with that dataset, and with a canary in its bucket."""
    name = f"r{secrets.token_hex(4)}"
    if amounts.canary is not None:
        bucket.put_bytes(f"canary/{name}/a.txt", amounts.canary.encode(), {})
        bucket.put_bytes(f"canary/{name}/b.txt", b"Short.", {})
    evaluation = first_spec["spec"]["evaluation"] | {
        "documents": amounts.documents,
        "completions": amounts.completions,
        "canary": None if amounts.canary is None else bucket.url(f"canary/{name}"),
    }
    return first_spec | {
        "metadata": {"name": name, "namespace": "default"},
        "spec": first_spec["spec"] | {"evaluation": evaluation},
    }


@pytest.fixture
def bucket(first_spec: dict[str, Any], store: Bucket) -> Bucket:
    """The bucket of all runs."""
    return store.other(first_spec["spec"]["storage"]["bucket"])


def stage_context(spec: dict[str, Any], bucket: Bucket, scratch: Path) -> StageContext:
    run = DistillRun.parse(spec)
    dataset_manifest = dataset.load_dataset(run, bucket)
    return StageContext(
        run, run.spec.stages[0], bucket, dataset_manifest, provenance(run), threading.Event(), scratch
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(
    first_spec: dict[str, Any],
    s3: S3,
    store: Bucket,
    trained: Learner,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of that student's checkpoint at the end of a stage: 300 MB, which take seconds to write
    through the store."""
    bucket = store.other(first_spec["spec"]["storage"]["bucket"])
    context = stage_context(first_spec, bucket, tmp_path_factory.mktemp("checkpoint"))
    save_checkpoints(context, trained, state_at(3, finished=True))
    return s3.folder / bucket.name / paths.checkpoint(context.run, "vanilla", 3)


@pytest.fixture
def stage(
    spec: dict[str, Any], bucket: Bucket, checkpoint: Path, s3: S3, tmp_path: Path
) -> Iterator[StageContext]:
    """The context of a finished stage with a copy of that checkpoint."""
    context = stage_context(spec, bucket, tmp_path)
    folder = s3.folder / bucket.name / paths.checkpoint(context.run, "vanilla", 3)
    shutil.copytree(checkpoint, folder)  # with the extended attributes, in which the store has its metadata
    yield context
    shutil.rmtree(folder)


def run_evaluation(
    stage: StageContext, engines: Any, attempt: int = 1, stopping: threading.Event | None = None
) -> EvaluationRecord:
    run = stage.run
    return evaluate(
        run,
        stage.stage,
        stage.bucket,
        provenance(run, attempt),
        stopping or threading.Event(),
        stage.board,
        engines,
    )


def progress(stage: StageContext) -> dict[str, Any]:
    content: dict[str, Any] = stage.bucket.get_json(paths.progress(stage.run, STEP))
    return content


def evaluation_object(stage: StageContext) -> bytes:
    return stage.bucket.get(paths.evaluation(stage.run, "vanilla"))


class UnusedEngines:
    """Engines that must not be used."""

    loaded = False

    def load(self, folder: Path, check_stop: CheckStop) -> None:
        raise AssertionError("loaded")

    def sample(self, requests: Sequence[SamplingRequest], check_stop: CheckStop) -> list[Completion]:
        raise AssertionError("sampled")

    def score(
        self, sequences: Sequence[NDArray[np.int32]], check_stop: CheckStop
    ) -> list[list[NDArray[np.float32]]]:
        raise AssertionError("scored")


class RecordingEngines(UnusedEngines):
    """The real engines with two hooks: `on_load` gets the student's folder, the other runs before scoring.

    Records the sampled completions and the number of calls of score().
    """

    def __init__(self, engines: EnginePool, before_scoring: Callable[[], object] = lambda: None) -> None:
        self._engines = engines
        self._before_scoring = before_scoring
        self.scored = 0
        self.sampled: list[tuple[SamplingRequest, Completion]] = []
        self.on_load: Callable[[Path], object] = lambda folder: None

    def load(self, folder: Path, check_stop: CheckStop) -> None:
        self.on_load(folder)
        self._engines.load(folder, check_stop)

    def sample(self, requests: Sequence[SamplingRequest], check_stop: CheckStop) -> list[Completion]:
        completions = self._engines.sample(requests, check_stop)
        self.sampled += zip(requests, completions, strict=True)
        return completions

    def score(
        self, sequences: Sequence[NDArray[np.int32]], check_stop: CheckStop
    ) -> list[list[NDArray[np.float32]]]:
        self._before_scoring()
        self.scored += 1
        return self._engines.score(sequences, check_stop)


def logp_of(model: Any, ids: Sequence[int], first: int = 1) -> NDArray[np.float64]:
    """[T − first] log-probability of each id from number `first` on, by transformers. In small pieces: in
    double precision the logits of all take gigabytes."""
    at_T = torch.tensor(ids)
    with torch.no_grad():
        logits_TV = model(at_T[None], logits_to_keep=len(ids) - first + 1).logits[0, :-1]
    pieces = [
        logits_PV.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
        for logits_PV, targets in zip(logits_TV.split(16), at_T[first:].split(16), strict=True)
    ]
    found: NDArray[np.float64] = torch.cat(pieces).numpy()
    return found


def reference_bits(model: Any, text: str) -> tuple[float, int]:
    """Bits and bytes of a text by the rule in docs/reference/evaluation.md, one token at a time.

    Token t is counted once, by the first window [k·⌈L/2⌉, k·⌈L/2⌉ + L) that contains it."""
    ids = vocabulary_file.encoding().encode_ordinary(text)
    bits, size = 0.0, 0
    seen: dict[int, NDArray[np.float64]] = {}
    for t in range(1, len(ids)):
        start = 0
        while start + LENGTH <= t:
            start += math.ceil(LENGTH / 2)
        if start not in seen:
            seen[start] = logp_of(model, ids[start : start + LENGTH])
        bits -= seen[start][t - start - 1] / math.log(2)
        size += len(vocabulary_file.encoding().decode_single_token_bytes(ids[t]))
    return bits, size


@pytest.mark.parametrize("amounts", [Amounts(8, 20, CANARY)], indirect=True, ids=["whole"])
def test_the_figures_equal_those_of_the_trainer_and_transformers(
    stage: StageContext, engines: EnginePool, trained: Learner, tmp_path: Path
) -> None:
    recorder = RecordingEngines(engines)
    models: list[Any] = []
    recorder.on_load = lambda folder: models.append(hf_model.load_student(folder, TINY))
    found = run_evaluation(stage, recorder)
    (model,) = models
    valid = DatasetReader(stage.dataset, "valid", BlockCache(stage.bucket, tmp_path / "cache"))
    trainer_loss = HeldOutDocuments(valid, 8, stage.run.spec.training.seed, LENGTH, on_cpu(LENGTH)).loss(
        trained
    )
    assert found.held_out is not None and found.documents == 8 < sum(map(len, valid.lengths))
    for name in ("reasoning", "final"):
        got, expected = getattr(found.held_out, name), getattr(trainer_loss, name)
        assert expected > 5 and abs(got - expected) <= TOLERANCE, f"{name}: {got}, the trainer's {expected}"
    texts = [reference_bits(model, text) for text in (CANARY, "Short.")]
    assert found.canary is not None and found.canary.bytes == sum(size for _, size in texts) > 4000
    assert abs(
        found.canary.bits_per_byte - sum(bits for bits, _ in texts) / found.canary.bytes
    ) <= TOLERANCE / math.log(2)

    limits = {"low": 8, "medium": 16, "high": 24}
    assert [request.max_tokens for request, _ in recorder.sampled] == ([*limits.values()] * 7)[:20]
    assert all(found.efforts[effort].most_tokens <= limit for effort, limit in limits.items())
    for number, effort in enumerate(limits):
        completions = [completion.ids_C for _, completion in recorder.sampled[number::3]]
        assert {kind: count for kind, count in found.efforts[effort].validity.items() if count} == Counter(
            map(completion_validity, completions)
        )
        assert found.efforts[effort].mean_tokens == sum(map(len, completions)) / len(completions)
    assert found.completions == sum(found.validity.values()) == 20
    assert found.validity["truncated"] and found.validity["truncated"] < 20, (
        "some completions stopped and some did not, so both are tested"
    )
    for request, completion in recorder.sampled[:4]:
        sequence = [*request.ids_P.tolist(), *completion.ids_C.tolist()]
        assert np.abs(logp_of(model, sequence, len(request.ids_P)) - completion.logp_C).max() <= 1e-3

    assert load_evaluation(stage.run, "vanilla", stage.bucket) == found and evaluation_object(
        stage
    ) == json_bytes(found.dump())
    checkpoint = manifest.load(stage.bucket, paths.manifest(paths.checkpoint(stage.run, "vanilla", 3)))
    assert (found.iteration, found.checkpoint) == (3, checkpoint.sha256)
    status = progress(stage)
    assert (
        status["state"] == "Succeeded"
        and status["parts"] == {"done": 3, "total": 3}
        and status["validity"] == found.valid_share
    )
    assert (
        f"held-out loss reasoning {found.held_out.reasoning:.3f}" in status["message"]
        and "of 20 completions valid (low" in status["message"]
    )
    (lines,) = [
        stage.bucket.get(entry.key)
        for entry in stage.bucket.list(paths.metrics(stage.run, STEP, "").removesuffix(".jsonl"))
    ]
    line = json.loads(lines)
    assert line["gpu"]["reason"] == "not measured", "the job gives it a meter"
    assert line.items() >= found.dump().items() and set(line["seconds"]) == {
        "export",
        "load",
        "heldOut",
        "completions",
        "canary",
    }


@pytest.mark.parametrize("amounts", [Amounts(0, 3, None)], indirect=True, ids=["packaged"])
def test_a_run_that_names_no_canary_measures_the_packaged_one(
    stage: StageContext, engines: EnginePool
) -> None:
    found = run_evaluation(stage, engines).canary
    texts = canary.packaged_texts()
    assert found is not None and found.sha256 == canary.texts_digest(texts)
    assert found.bytes == sum(text.size for text in texts) and math.isfinite(found.bits_per_byte)
    assert progress(stage)["parts"] == {"done": 2, "total": 2}


def delete_objects(stage: StageContext, name: str) -> None:
    """Delete the objects of the step whose names start with `name`; all if it is empty."""
    for entry in list(stage.bucket.list(f"{paths.run(stage.run)}/steps/{STEP}/{name}")):
        stage.bucket.delete(entry.key)


def test_finished_parts_are_not_measured_again(stage: StageContext, engines: EnginePool) -> None:
    measured = run_evaluation(stage, engines)
    written = evaluation_object(stage)
    assert (
        run_evaluation(stage, UnusedEngines(), attempt=2) == measured and evaluation_object(stage) == written
    )
    status = progress(stage)
    assert (status["message"], status["attempt"], status["state"], status["validity"]) == (
        "Reused",
        2,
        "Succeeded",
        measured.valid_share,
    )
    delete_objects(stage, "evaluation.json")
    run_evaluation(stage, UnusedEngines(), attempt=3)
    assert evaluation_object(stage) == written, "only the result was missing: nothing is measured"
    assert len(list(stage.bucket.list(paths.metrics(stage.run, STEP, "").removesuffix(".jsonl")))) == 1
    delete_objects(stage, "")
    run_evaluation(stage, engines, attempt=4)
    assert evaluation_object(stage) == written, "measured again by an engine that loaded the weights again"


def test_an_evaluation_of_another_checkpoint_is_rejected(stage: StageContext, engines: EnginePool) -> None:
    run_evaluation(stage, engines)
    save_checkpoints(stage, learner(torch.device("cpu")), state_at(4, finished=True))
    with pytest.raises(
        Permanent,
        match=(
            r"evaluation.json is not of s3://.*/vanilla/4/manifest.json: .* Delete it to "
            r"have it measured again"
        ),
    ):
        run_evaluation(stage, UnusedEngines(), attempt=2)
    delete_objects(stage, "evaluation.json")
    with pytest.raises(Permanent, match="its student has other parts than tiny"):  # its checkpoint is read
        run_evaluation(stage, UnusedEngines(), attempt=3)


def test_a_stopped_step_resumes_at_its_first_missing_part(stage: StageContext, engines: EnginePool) -> None:
    whole = run_evaluation(stage, engines)
    delete_objects(stage, "")
    stopping = threading.Event()

    class Stopping(RecordingEngines):
        def sample(self, requests: Sequence[SamplingRequest], check_stop: CheckStop) -> list[Completion]:
            stopping.set()
            check_stop()
            raise AssertionError("not stopped")

    with pytest.raises(
        Terminated, match="vanilla-evaluate was asked to stop; the parts that are done are in the bucket"
    ):
        run_evaluation(stage, Stopping(engines), stopping=stopping)
    status = progress(stage)
    assert (status["state"], status["parts"], status["message"]) == (
        "Running",
        {"done": 1, "total": 3},
        "Sampling completions, 0 of 6",
    )
    assert load_evaluation(stage.run, "vanilla", stage.bucket) is None
    recorder = RecordingEngines(engines)
    assert run_evaluation(stage, recorder, attempt=2) == whole
    assert recorder.scored == 1, "only the canary: the previous attempt scored the held-out documents"


def test_the_first_writer_of_a_part_wins(stage: StageContext, engines: EnginePool) -> None:
    """A pod that was presumed dead continues beside its successor, on a machine that computes other bits."""
    checkpoint = manifest.load(stage.bucket, paths.manifest(paths.checkpoint(stage.run, "vanilla", 3)))
    theirs = {"documents": 3, "heldOut": {"reasoning": 1.5, "final": 2.5}}
    key = paths.evaluation_part(stage.run, "vanilla", "heldOut", checkpoint.sha256)
    found = run_evaluation(
        stage, RecordingEngines(engines, lambda: stage.bucket.create(key, json_bytes(theirs), {}))
    )
    assert found.held_out is not None and found.held_out.dump() == theirs["heldOut"]
    assert load_evaluation(stage.run, "vanilla", stage.bucket) == found
    delete_objects(stage, "evaluation.json")
    stage.bucket.put_bytes(key, json_bytes({"documents": 3, "loss": 1.5}), {})
    with pytest.raises(
        Permanent,
        match=(
            r"vanilla-evaluate/parts: loss: .*written by another version; delete it to "
            r"have it measured again"
        ),
    ):
        run_evaluation(stage, UnusedEngines(), attempt=2)


@pytest.mark.parametrize(
    "shape, position, damage, message",
    [
        pytest.param(
            LOCKED,
            None,
            None,
            "checkpoints/vanilla: stage vanilla has no checkpoint. Train it first",
            id="not-started",
        ),
        pytest.param(
            LOCKED,
            state_at(2),
            None,
            "stage vanilla has trained 200 tokens. Train it to its end: python -m jobs.train --step vanilla",
            id="not-finished",
        ),
        pytest.param(
            LOCKED,
            state_at(2, finished=True),
            rank_file(0),
            f"vanilla/2 cannot be used. .*{rank_file(0)}.*sha256 of block 0",
            id="damaged",
        ),
        pytest.param(
            LOCKED,
            state_at(2, finished=True),
            "manifest.json",
            "vanilla/2 cannot be used. .*manifest.json.*sha256",
            id="damaged-manifest",
        ),
        pytest.param(
            LOCKED,
            state_at(2, finished=True),
            "",
            "the state to export as tiny: main/decoder.final_layernorm.weight is 32, wanted 64",
            id="of-another-shape",
        ),
        pytest.param(
            SMALL,
            state_at(2, finished=True),
            "",
            r"vanilla/2/manifest\.json: its student has other parts than tiny: global_every \(off, here 4\)",
            id="of-other-parts",
        ),
    ],
)
def test_a_student_that_cannot_be_measured_is_rejected_with_its_name(
    spec: dict[str, Any],
    bucket: Bucket,
    s3: S3,
    tmp_path: Path,
    device: torch.device,
    shape: Shape,
    position: Any,
    damage: str | None,
    message: str,
) -> None:
    stage = stage_context(spec, bucket, tmp_path)
    if position is not None:
        save_checkpoints(stage, learner(device, shape), position)
    if damage:
        alter(s3.folder / bucket.name / paths.checkpoint(stage.run, "vanilla", 2) / damage)
    with pytest.raises(Permanent, match=message):
        run_evaluation(stage, UnusedEngines())
    assert load_evaluation(stage.run, "vanilla", bucket) is None


def test_a_damaged_block_of_weights_is_rejected_with_its_name(stage: StageContext, s3: S3) -> None:
    """Headers are verified first, weights only when the export reads them."""
    path = s3.folder / stage.bucket.name / paths.checkpoint(stage.run, "vanilla", 3) / rank_file(0)
    with path.open("r+b") as file:
        file.seek(-(20 << 20), os.SEEK_END)
        file.write(b"\0\1\2\3")
    with pytest.raises(Exception, match=r"rank-00000.safetensors: sha256 of block \d+ is") as caught:
        run_evaluation(stage, UnusedEngines())
    assert not getattr(caught.value, "retriable", True)


def validity_context(spec: dict[str, Any], bucket: Bucket, scratch: Path) -> StageContext:
    """A stage whose checkpoints are measured each 200 tokens, which is two iterations of `state_at`."""
    run_spec = json.loads(json.dumps(spec))
    run_spec["spec"]["evaluation"] |= {"everyTokens": 200}
    run_spec["spec"]["stages"][0]["stop"] = {"minValidity": 0.5}
    return stage_context(run_spec, bucket, scratch)


class WatchedStage:
    """A stage whose trainer writes its next checkpoint, or finishes, each time the step looks for one."""

    def __init__(self, stage: StageContext, *actions: Callable[[], object]) -> None:
        self.stage = stage
        self._actions = list(actions)
        self.reports: list[tuple[str, float | None]] = []

    def measure(self, engines: Any, attempt: int = 1) -> dict[str, Any]:
        """Run an attempt; returns its last progress."""
        run, step = self.stage.run, "vanilla-validity"
        measure_while_training(
            run,
            self.stage.stage,
            self.stage.bucket,
            replace(provenance(run, attempt), step=step),
            self.stopping(),
            self.stage.board,
            engines,
        )
        found: dict[str, Any] = self.stage.bucket.get_json(paths.progress(run, step))
        return found

    def stopping(self) -> threading.Event:
        actions = self._actions

        class Event(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                assert actions, "the step waits for something that never comes"
                actions.pop(0)()
                return False

        return Event()

    def finish(self) -> None:
        """What the trainer reports at its end."""
        key = paths.progress(self.stage.run, "vanilla")
        self.stage.bucket.write_json(key, {"state": "Succeeded"}, {})


@pytest.mark.parametrize("amounts", [Amounts(2, 6, None)], indirect=True, ids=["validity"])
def test_each_multiple_of_tokens_is_measured_once_by_its_newest_checkpoint(
    spec: dict[str, Any],
    bucket: Bucket,
    engines: EnginePool,
    trained: Learner,
    device: torch.device,
    s3: S3,
    tmp_path: Path,
) -> None:
    stage = validity_context(spec, bucket, tmp_path)
    run, folder = stage.run, paths.checkpoints(stage.run, "vanilla")

    def write(iteration: int, student: Learner = trained, **changes: Any) -> Callable[[], object]:
        return lambda: save_checkpoints(stage, student, state_at(iteration, **changes))

    def prune(iteration: int) -> Callable[[], object]:
        return lambda: bucket.delete_prefix(f"{folder}/{iteration}")

    recorder = RecordingEngines(engines)
    watched = WatchedStage(
        stage,
        write(1, learner(device)),  # not due: it is not even read
        write(5),
        prune(1),
    )

    # The checkpoint is pruned while the student is sampled, and a damaged one follows.
    def damaged() -> None:
        write(6, learner(device))()
        alter(s3.folder / bucket.name / f"{folder}/6/{rank_file(0)}")

    watched._actions += [damaged, write(7, learner(device), finished=True), watched.finish]
    last = watched.measure(recorder)
    assert evaluation_record.measured_validities(run, "vanilla", bucket) == [2], (
        "400 tokens have passed at iteration 5; the first multiple had no checkpoint of its own"
    )
    record = evaluation_record.load_validity(run, "vanilla", bucket, 2)
    assert (record.iteration, record.completions, record.held_out, record.canary) == (5, 6, None, None)
    expected = Counter(completion_validity(completion.ids_C) for _, completion in recorder.sampled)
    assert {kind: count for kind, count in record.validity.items() if count} == expected
    assert [request.max_tokens for request, _ in recorder.sampled] == [8, 16, 24] * 2
    assert (last["state"], last["message"]) == ("Succeeded", "The stage has ended")
    assert last["validity"] == record.valid_share and last["parts"]["done"] == 1

    stage.bucket.write_json(paths.progress(run, "vanilla"), {"state": "Running"}, {})
    bucket.delete_prefix(f"{folder}/7")
    bucket.delete_prefix(f"{folder}/6")
    again = WatchedStage(stage, watched.finish)
    last = again.measure(UnusedEngines(), attempt=2)
    assert (last["validity"], last["attempt"]) == (record.valid_share, 2), "not measured again"


def run_job(run_file: Path, attempt: int, scratch: Path) -> "subprocess.Popen[bytes]":
    """Start the job with the rights of its pod: a user without name and home, who writes only to TMPDIR."""
    command = [
        sys.executable,
        "-m",
        "jobs.evaluate",
        "--run",
        str(run_file),
        "--step",
        STEP,
        "--attempt",
        str(attempt),
    ]
    with (scratch / f"{attempt}.log").open("wb") as file:
        return subprocess.Popen(
            [*pod_user.COMMAND, *command],
            cwd=ROOT,
            env=pod_user.environment(scratch),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def test_the_next_attempt_of_a_killed_job_writes_the_same_bytes(
    stage: StageContext, engines: EnginePool, spec: dict[str, Any], tmp_path: Path
) -> None:
    run_evaluation(stage, engines)
    expected = evaluation_object(stage)
    delete_objects(stage, "")
    tmp_path.chmod(0o777)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(spec))
    key = paths.progress(stage.run, STEP)

    def loading() -> bool:
        return stage.bucket.exists(key) and progress(stage)["message"] == "Loading the student"

    killed = run_job(run_file, 1, tmp_path)
    wait_until(loading, "the student is being loaded", 120, every=0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert load_evaluation(stage.run, "vanilla", stage.bucket) is None
    stopped = run_job(run_file, 2, tmp_path)
    wait_until(
        lambda: loading() and progress(stage)["attempt"] == 2,
        "the next attempt loads the student",
        120,
        every=0.1,
    )
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143, (tmp_path / "2.log").read_text()
    last = run_job(run_file, 3, tmp_path)
    assert last.wait(400) == 0, (tmp_path / "3.log").read_text()
    assert evaluation_object(stage) == expected and progress(stage)["state"] == "Succeeded"
