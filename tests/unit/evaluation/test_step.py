"""The whole evaluation step on a real S3 store with the real engine: its figures against the trainer's and
transformers', and its failures.

The engine is started once. The student is `tiny`, trained for one step, with weights large enough for all
parts to matter.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from tests.fakes.checkpoints import altered, at, save
from tests.fakes.store import S3
from tests.fakes.students import documents, learner
from tests.fakes.tiny_teacher import LONGEST
from tests.fakes.waiting import wait_until
from vpmoe.api import DistillRun
from vpmoe.data import dataset, vocabulary_file
from vpmoe.data.preprocess.encode import EncoderPool
from vpmoe.data.preprocess.step import preprocess
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.data.vocabulary import RETURN
from vpmoe.evaluation.evaluate import evaluate
from vpmoe.failure import Permanent, Terminated
from vpmoe.inference import hf_model
from vpmoe.inference.engine_pool import CheckStop, Completion, EnginePool, SamplingRequest
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives.vanilla import vanilla
from vpmoe.provenance import Provenance
from vpmoe.rollout.evaluation_record import EvaluationRecord, load_evaluation
from vpmoe.rollout.prompts import completion_validity
from vpmoe.storage import Bucket, manifest, paths
from vpmoe.storage.bucket import json_bytes
from vpmoe.trainer.checkpoint.writer import rank_file
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.data.held_out import HeldOutDocuments

TINY = SHAPES["tiny"]
ROOT = Path(__file__).parents[3]
LENGTH = LONGEST - 1
"""Maximum length of a sequence; scoring needs one position more."""
TOLERANCE = 1e-4
"""Mean, in nats per token. All compute in float32, with other orders of summation; single tokens differ by
less too."""
SENTENCE = "The pond is ≈ 3 m deep, ⟨H≈0.4⟩, and nobody has trained on it. "
CANARY = SENTENCE * 60
"""Longer than LENGTH tokens, so it is scored in several windows."""
STEP = "vanilla-evaluate"


@pytest.fixture(scope="module")
def trained(device: torch.device) -> Learner:
    """A student that stops after about ten tokens: all embeddings share a large component that favours
    `<|return|>`."""
    torch.manual_seed(11)
    it = Learner.build(TINY, device, sequence_length=LENGTH, seed=1234, weight_decay=0.1, gradient_clip=1.0)
    with torch.no_grad():
        for name, parameter in it.student.named_parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(
                std=0.3 if name == "embedding.weight" else 0.15
            )
        it.student.output[:, 0] = 0
        it.student.output[RETURN, 0] = 4.6
        it.student.embedding.weight[:, 0] = 10.0
    batch = Batch.from_rows(*documents(torch.Generator().manual_seed(1), [60, 40], 128, TINY.vocabulary))
    it.forward_backward(
        [batch], vanilla(batch.counts, {"reasoning": 1.0, "final": 1.0}), int(batch.counts[0])
    )
    it.step(1e-5)
    return it


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
    """How much is evaluated. Small by default: an engine on a CPU takes seconds for all of it."""

    documents: int = 3
    completions: int = 6
    canary: str = SENTENCE


@pytest.fixture
def amounts(request: pytest.FixtureRequest) -> Amounts:
    """A test may give others, by indirect parametrization."""
    return getattr(request, "param", Amounts())


@pytest.fixture
def spec(run_spec: dict[str, Any], sample_parquet: list[Path], amounts: Amounts) -> dict[str, Any]:
    """A run whose dataset is built from the sample, with a canary in its bucket."""
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
    texts = f"s3://{run_spec['spec']['storage']['bucket']}/canary"
    run_spec["spec"]["evaluation"] |= {
        "documents": amounts.documents,
        "completions": amounts.completions,
        "canary": texts,
    }
    run = DistillRun.parse(run_spec)
    bucket = Bucket.open(run.spec.storage)
    for path in sample_parquet:
        bucket.put_file(f"input/{path.name}", path, {})
    bucket.put_bytes("canary/a.txt", amounts.canary.encode(), {})
    bucket.put_bytes("canary/b.txt", b"Short.", {})
    with EncoderPool(1) as encoders:
        preprocess(run, bucket, provenance(run), threading.Event(), None, encoders)
    return run_spec


def task(spec: dict[str, Any], bucket: Bucket, scratch: Path) -> StageContext:
    run = DistillRun.parse(spec)
    made = dataset.load_dataset(run, bucket)
    return StageContext(run, run.spec.stages[0], bucket, made, provenance(run), threading.Event(), scratch)  # type: ignore[arg-type]


@pytest.fixture
def stage(spec: dict[str, Any], bucket: Bucket, trained: Learner, tmp_path: Path) -> StageContext:
    """Finish the stage with that student."""
    ended = task(spec, bucket, tmp_path)
    save(ended, trained, at(3, finished=True))
    return ended


def do(
    of: StageContext, engines: Any, attempt: int = 1, stopping: threading.Event | None = None
) -> EvaluationRecord:
    run = of.run
    return evaluate(
        run, of.stage, of.bucket, provenance(run, attempt), stopping or threading.Event(), engines
    )


def progress(of: StageContext) -> dict[str, Any]:
    told: dict[str, Any] = of.bucket.get_json(paths.progress(of.run, STEP))
    return told


def written(of: StageContext) -> bytes:
    return of.bucket.get(paths.evaluation(of.run, "vanilla"))


class Unasked:
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


class Watched(Unasked):
    """The real engines; records the student's folder, requests and answers, and runs a hook before
    scoring."""

    def __init__(self, engines: EnginePool, before: Callable[[], object] = lambda: None) -> None:
        self._engines = engines
        self._before = before
        self.scored = 0
        self.sampled: list[tuple[SamplingRequest, Completion]] = []
        self.keep: Callable[[Path], object] = lambda folder: None

    def load(self, folder: Path, check_stop: CheckStop) -> None:
        self.keep(folder)
        self._engines.load(folder, check_stop)

    def sample(self, requests: Sequence[SamplingRequest], check_stop: CheckStop) -> list[Completion]:
        answers = self._engines.sample(requests, check_stop)
        self.sampled += zip(requests, answers, strict=True)
        return answers

    def score(
        self, sequences: Sequence[NDArray[np.int32]], check_stop: CheckStop
    ) -> list[list[NDArray[np.float32]]]:
        self._before()
        self.scored += 1
        return self._engines.score(sequences, check_stop)


def logp_of(model: Any, ids: Sequence[int]) -> NDArray[np.float64]:
    """[T − 1] by transformers: the log-probability of each id but the first."""
    at_T = torch.tensor(ids)
    with torch.no_grad():
        logits_TV = model(at_T[None]).logits[0, :-1].double()
    found: NDArray[np.float64] = logits_TV.log_softmax(1).gather(1, at_T[1:, None])[:, 0].numpy()
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
def test_the_figures_are_the_trainers_and_transformers(
    stage: StageContext, engines: EnginePool, trained: Learner, tmp_path: Path
) -> None:
    watched = Watched(engines)
    models: list[Any] = []
    watched.keep = lambda folder: models.append(hf_model.load_student(folder, TINY))
    found = do(stage, watched)
    (model,) = models
    valid = DatasetReader(stage.dataset, "valid", BlockCache(stage.bucket, tmp_path / "cache"))
    trainers = HeldOutDocuments(valid, 8, stage.run.spec.training.seed, LENGTH).loss(trained)
    assert found.held_out is not None and found.documents == 8 < sum(map(len, valid.lengths))
    for name in ("reasoning", "final"):
        got, wanted = getattr(found.held_out, name), getattr(trainers, name)
        assert wanted > 5 and abs(got - wanted) <= TOLERANCE, f"{name}: {got}, the trainer's {wanted}"
    texts = [reference_bits(model, text) for text in (CANARY, "Short.")]
    assert found.canary is not None and found.canary.bytes == sum(size for _, size in texts) > 4000
    assert abs(
        found.canary.bits_per_byte - sum(bits for bits, _ in texts) / found.canary.bytes
    ) <= TOLERANCE / math.log(2)

    bounds = {"low": 8, "medium": 16, "high": 24}
    assert [request.max_tokens for request, _ in watched.sampled] == ([*bounds.values()] * 7)[:20]
    assert all(found.efforts[effort].most_tokens <= bound for effort, bound in bounds.items())
    for number, effort in enumerate(bounds):
        answers = [completion.ids_C for _, completion in watched.sampled[number::3]]
        assert {kind: count for kind, count in found.efforts[effort].validity.items() if count} == Counter(
            map(completion_validity, answers)
        )
        assert found.efforts[effort].mean_tokens == sum(map(len, answers)) / len(answers)
    assert found.completions == sum(found.validity.values()) == 20
    assert found.validity["truncated"] and found.validity["truncated"] < 20, (
        "some stopped and some did not: both are seen"
    )
    for request, completion in watched.sampled[:4]:
        whole = [*request.ids_P.tolist(), *completion.ids_C.tolist()]
        assert np.abs(logp_of(model, whole)[len(request.ids_P) - 1 :] - completion.logp_C).max() <= 1e-3

    assert load_evaluation(stage.run, "vanilla", stage.bucket) == found and written(stage) == json_bytes(
        found.dump()
    )
    checkpoint = manifest.load(stage.bucket, paths.manifest(paths.checkpoint(stage.run, "vanilla", 3)))
    assert (found.iteration, found.checkpoint) == (3, checkpoint.sha256)
    told = progress(stage)
    assert (
        told["state"] == "Succeeded"
        and told["parts"] == {"done": 3, "total": 3}
        and told["validity"] == found.valid_share
    )
    assert (
        f"held-out loss reasoning {found.held_out.reasoning:.3f}" in told["message"]
        and "of 20 completions valid (low" in told["message"]
    )
    (lines,) = [
        stage.bucket.get(entry.key)
        for entry in stage.bucket.list(paths.metrics(stage.run, STEP, "").removesuffix(".jsonl"))
    ]
    line = json.loads(lines)
    assert line.items() >= found.dump().items() and set(line["seconds"]) == {
        "export",
        "load",
        "heldOut",
        "completions",
        "canary",
    }


def forget(of: StageContext, what: str) -> None:
    """Delete the evaluation, or the named objects of it."""
    for entry in list(of.bucket.list(f"{paths.run(of.run)}/steps/{STEP}/{what}")):
        of.bucket.delete(entry.key)


def test_what_is_measured_is_not_measured_again(stage: StageContext, engines: EnginePool) -> None:
    first = do(stage, engines)
    before = written(stage)
    assert do(stage, Unasked(), attempt=2) == first and written(stage) == before
    told = progress(stage)
    assert (told["message"], told["attempt"], told["state"], told["validity"]) == (
        "Reused",
        2,
        "Succeeded",
        first.valid_share,
    )
    forget(stage, "evaluation.json")
    do(stage, Unasked(), attempt=3)
    assert written(stage) == before, "killed before its last word: nothing is left to ask"
    assert len(list(stage.bucket.list(paths.metrics(stage.run, STEP, "").removesuffix(".jsonl")))) == 1
    forget(stage, "")
    do(stage, engines, attempt=4)
    assert written(stage) == before, "measured again, by an engine that took the weights anew: the same bytes"


def test_an_evaluation_of_another_checkpoint_is_none(stage: StageContext, engines: EnginePool) -> None:
    do(stage, engines)
    save(stage, learner(torch.device("cpu")), at(4, finished=True))
    with pytest.raises(
        Permanent,
        match=(
            r"evaluation.json is not of s3://.*/vanilla/4/manifest.json: .* Delete it to "
            r"have it measured again"
        ),
    ):
        do(stage, Unasked(), attempt=2)
    forget(stage, "evaluation.json")
    with pytest.raises(
        Permanent, match="the state to export as tiny"
    ):  # no parts either: this engine would have been asked
        do(stage, Unasked(), attempt=3)


def test_a_step_that_is_stopped_goes_on_at_the_first_part_that_is_missing(
    stage: StageContext, engines: EnginePool
) -> None:
    whole = do(stage, engines)
    forget(stage, "")
    stopping = threading.Event()

    class Stopping(Watched):
        def sample(self, requests: Sequence[SamplingRequest], check_stop: CheckStop) -> list[Completion]:
            stopping.set()
            check_stop()
            raise AssertionError("not stopped")

    with pytest.raises(
        Terminated, match="vanilla-evaluate was asked to stop; the parts that are done are in the bucket"
    ):
        do(stage, Stopping(engines), stopping=stopping)
    told = progress(stage)
    assert (told["state"], told["parts"], told["message"]) == (
        "Running",
        {"done": 1, "total": 3},
        "Sampling completions, 0 of 6",
    )
    assert load_evaluation(stage.run, "vanilla", stage.bucket) is None
    asked = Watched(engines)
    assert do(stage, asked, attempt=2) == whole
    assert asked.scored == 1, "the canary alone: the held-out documents were scored by the attempt before"


def test_whoever_measures_a_part_first_is_right(stage: StageContext, engines: EnginePool) -> None:
    """A pod that was believed dead continues beside its successor, on a machine that computes other bits."""
    checkpoint = manifest.load(stage.bucket, paths.manifest(paths.checkpoint(stage.run, "vanilla", 3)))
    others = {"documents": 3, "heldOut": {"reasoning": 1.5, "final": 2.5}}
    key = paths.evaluation_part(stage.run, "vanilla", "heldOut", checkpoint.sha256)
    found = do(stage, Watched(engines, lambda: stage.bucket.create(key, json_bytes(others), {})))
    assert found.held_out is not None and found.held_out.dump() == others["heldOut"]
    assert load_evaluation(stage.run, "vanilla", stage.bucket) == found
    forget(stage, "evaluation.json")
    stage.bucket.put_bytes(key, json_bytes({"documents": 3, "loss": 1.5}), {})
    with pytest.raises(
        Permanent,
        match=(
            r"vanilla-evaluate/parts: loss: .*written by another version; delete it to "
            r"have it measured again"
        ),
    ):
        do(stage, Unasked(), attempt=2)


@pytest.mark.parametrize(
    "position, damage, message",
    [
        pytest.param(
            None, None, "checkpoints/vanilla: stage vanilla has no checkpoint. Train it first", id="not-begun"
        ),
        pytest.param(
            at(2),
            None,
            "stage vanilla has trained 200 tokens. Train it to its end: python -m jobs.train --step vanilla",
            id="not-ended",
        ),
        pytest.param(
            at(2, finished=True),
            rank_file(0),
            f"vanilla/2 cannot be used. .*{rank_file(0)}.*sha256 of block 0",
            id="damaged",
        ),
        pytest.param(
            at(2, finished=True),
            "manifest.json",
            "vanilla/2 cannot be used. .*manifest.json.*sha256",
            id="damaged-manifest",
        ),
        pytest.param(
            at(2, finished=True),
            "",
            "the state to export as tiny: main/decoder.final_layernorm.weight is 32, wanted 64",
            id="of-another-shape",
        ),
    ],
)
def test_a_student_that_cannot_be_measured_is_refused_by_name(
    spec: dict[str, Any],
    bucket: Bucket,
    s3: S3,
    tmp_path: Path,
    device: torch.device,
    position: Any,
    damage: str | None,
    message: str,
) -> None:
    of = task(spec, bucket, tmp_path)
    if position is not None:
        save(of, learner(device), position)
    if damage:
        altered(s3.folder / bucket.name / paths.checkpoint(of.run, "vanilla", 2) / damage)
    with pytest.raises(Permanent, match=message):
        do(of, Unasked())
    assert load_evaluation(of.run, "vanilla", bucket) is None


def test_a_block_that_is_damaged_further_on_is_refused_by_name(stage: StageContext, s3: S3) -> None:
    """Found when read: headers first, weights during the export."""
    path = s3.folder / stage.bucket.name / paths.checkpoint(stage.run, "vanilla", 3) / rank_file(0)
    with path.open("r+b") as file:
        file.seek(-(20 << 20), os.SEEK_END)
        file.write(b"\0\1\2\3")
    with pytest.raises(Exception, match=r"rank-00000.safetensors: sha256 of block \d+ is") as refused:
        do(stage, Unasked())
    assert not getattr(refused.value, "retriable", True)


def run_job(run_file: Path, attempt: int, scratch: Path) -> "subprocess.Popen[bytes]":
    """The job as its pod runs it: as a user without name and home, who may write only below TMPDIR."""
    user = [
        "setpriv",
        "--reuid=65532",
        "--regid=65532",
        "--clear-groups",
        "--inh-caps=+dac_read_search",
        "--ambient-caps=+dac_read_search",
    ]
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
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in ("PATH", "LD_LIBRARY_PATH")
    }
    own = {
        "HOME": "/nonexistent",
        "TMPDIR": str(scratch),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    with (scratch / f"{attempt}.log").open("wb") as file:
        return subprocess.Popen(
            [*user, *command], cwd=ROOT, env={**kept, **own}, stdout=file, stderr=subprocess.STDOUT
        )


def test_a_killed_job_is_done_by_the_next_attempt_to_the_same_bytes(
    stage: StageContext, engines: EnginePool, spec: dict[str, Any], tmp_path: Path
) -> None:
    do(stage, engines)
    wanted = written(stage)
    forget(stage, "")
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
        lambda: loading() and progress(stage)["attempt"] == 2, "the next attempt loads it", 120, every=0.1
    )
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 143, (tmp_path / "2.log").read_text()
    last = run_job(run_file, 3, tmp_path)
    assert last.wait(400) == 0, (tmp_path / "3.log").read_text()
    assert written(stage) == wanted and progress(stage)["state"] == "Succeeded"
