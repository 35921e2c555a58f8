"""Policy versions on a real store, also by a volume: transformers loads the student, old weights are pruned,
failures are raised."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students
from tests.fakes.students import SMALL, new_seed
from vpmoe.api.metrics import Sample
from vpmoe.api.pod_metrics import WAIT_SECONDS
from vpmoe.checkpoint.train_state import TrainState, WindowStream, initial_state
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.inference import hf_model
from vpmoe.model.learner import Learner
from vpmoe.rollout import policy_version
from vpmoe.rollout.version_volume import MANIFEST, VersionVolume
from vpmoe.storage import Bucket, StorageError, manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy import publisher as publisher_module
from vpmoe.trainer.onpolicy.publisher import Publisher, probe_sequences

pytestmark = pytest.mark.usefixtures("device")
TOLERANCE = 1e-4
"""Nats. Both compute in float32 with different orders of summation."""


@pytest.fixture
def context(bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path) -> StageContext:
    random = np.random.default_rng(new_seed())
    dataset = datasets.write_dataset(bucket, [datasets.random_documents(random, 7, 200)], [[]])
    run_spec["spec"]["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": 1000}]
    return datasets.context(bucket, run_spec, tmp_path, dataset)


@pytest.fixture
def publisher(context: StageContext) -> Iterator[Publisher]:
    publisher = make_publisher(context)
    yield publisher
    publisher.close()


def make_publisher(context: StageContext) -> Publisher:
    parts = DatasetReader(context.dataset, "train", BlockCache(context.bucket, context.scratch / "blocks"))
    return Publisher(
        context,
        [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})],
        probe_sequences(parts),
    )


def random_learner(device: torch.device) -> Learner:
    """A student in which every part affects the output."""
    torch.manual_seed(new_seed())
    learner = students.learner(device)
    with torch.no_grad():
        for name, parameter in learner.student.named_parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(
                std=0.3 if name == "embedding.weight" else 0.15
            )
    return learner


def state_at(trained: int, steps: int = 5) -> TrainState:
    windows = WindowStream(first_prompt=11, next_prompt=11 + 4 * trained, trained=trained)
    return initial_state("vanilla").model_copy(
        update={"steps": steps, "tokens": 77, "iteration": 9, "first_sequence": 3, "windows": windows}
    )


def test_a_version_is_the_student_at_the_call_of_publish(
    context: StageContext, publisher: Publisher, device: torch.device, tmp_path: Path
) -> None:
    learner = random_learner(device)
    assert not publisher.exists(2)
    publisher.publish(learner, state_at(2))
    with torch.no_grad():
        learner.student.output.zero_()  # training continues during the upload
    publisher.wait()
    assert publisher.exists(2) and {path.name for path in context.scratch.iterdir()} == {"blocks"}
    found = policy_version.find_version(context.bucket, context.run, "vanilla", 2)
    assert found is not None
    published, facts = found
    assert published.kind == policy_version.KIND and published.inputs.keys() == {"tokenizer", "dataset"}
    assert (
        facts.version,
        facts.steps,
        facts.tokens,
        facts.iteration,
        facts.first_sequence,
        facts.first_prompt,
    ) == (2, 5, 77, 9, 3, 11)
    for name, subject in published.subjects.items():
        context.bucket.download(subject, tmp_path / name)
    model = hf_model.load_student(tmp_path, SMALL)
    assert len(facts.probe.ids) == 4 and max(map(len, facts.probe.ids)) == 64
    for ids, logp in zip(facts.probe.ids, facts.probe.logp, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0].double()
        expected = logits_TV[:-1].log_softmax(1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert len(logp) == len(ids) - 1 and (torch.tensor(logp) - expected).abs().max() <= TOLERANCE
        assert expected.std() > 0.3 or len(logp) < 8, (
            "log-probabilities differ between tokens: else agreement would show nothing"
        )


def test_the_wait_for_the_upload_before_is_counted_and_returned(
    context: StageContext, publisher: Publisher, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it goes on: the upload ends here only when some of it was counted."""
    counted, ends = [], threading.Event()
    upload = publisher._upload_files

    def uploading(*given: Any) -> None:
        assert ends.wait(60)
        upload(*given)

    def record(samples: Sequence[Sample]) -> None:
        counted.extend(samples)
        if len(counted) == 2:
            ends.set()

    monkeypatch.setattr(publisher_module, "POLL", 0.01)
    monkeypatch.setattr(publisher, "_upload_files", uploading)
    monkeypatch.setattr(context.board.metrics, "record", record)
    learner = random_learner(device)
    assert publisher.publish(learner, state_at(2)) == 0.0 and not counted
    waited = publisher.publish(learner, state_at(4))
    assert publisher.exists(2) and len(counted) >= 2 and waited > 0
    assert {(one.metric, one.labels["reason"]) for one in counted} == {(WAIT_SECONDS, "upload")}
    assert sum(one.value or 0.0 for one in counted) == pytest.approx(waited)
    publisher.wait()


def test_equal_weights_have_equal_digests(
    context: StageContext, publisher: Publisher, device: torch.device
) -> None:
    learner = random_learner(device)
    for number in (2, 4, 6):
        publisher.publish(learner, state_at(number))  # the copy reuses the memory of the previous one
        if number == 4:
            with torch.no_grad():
                learner.student.output.add_(1)
    publisher.wait()
    contents = [
        policy_version.weights_digest(found[0])
        for number in (2, 4, 6)
        if (found := policy_version.find_version(context.bucket, context.run, "vanilla", number))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_old_versions_lose_their_weights_and_keep_their_manifests(
    context: StageContext, publisher: Publisher, device: torch.device
) -> None:
    learner = random_learner(device)
    for number in (0, 2, 4):
        publisher.publish(learner, state_at(number))
    publisher.wait()
    other_attempt = make_publisher(context)  # another attempt prunes them too
    other_attempt.prune(4)
    other_attempt.close()
    folder = paths.weights(context.run, "vanilla", 0).rpartition("/")[0]
    remaining = [found.key.removeprefix(folder + "/") for found in context.bucket.list(folder + "/")]
    assert [key for key in remaining if not key.startswith("v000004/")] == [
        "v000000/manifest.json",
        "v000002/manifest.json",
    ]
    assert {key for key in remaining if key.startswith("v000004/")} >= {
        "v000004/manifest.json",
        "v000004/config.json",
    }


def test_a_failed_upload_is_raised(
    context: StageContext, publisher: Publisher, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is injected: a real store cannot be made to show it."""

    def rejected(*_: object) -> None:
        raise StorageError("rejected", "Forbidden")

    monkeypatch.setattr(manifest, "write", rejected)
    publisher.publish(random_learner(device), state_at(2))
    with pytest.raises(StorageError, match="rejected"):
        publisher.wait()
    assert not publisher.exists(2)


@pytest.fixture
def by_volume(context: StageContext, tmp_path: Path) -> StageContext:
    """The context of a pod with a volume."""
    return replace(context, weights_volume=tmp_path / "volume")


def volume_of(context: StageContext) -> VersionVolume:
    """The volume as a sampler's pod has it."""
    assert context.weights_volume is not None
    return VersionVolume(context.weights_volume, context.run, "vanilla")


def on_volume(context: StageContext) -> list[str]:
    return sorted(path.name for path in volume_of(context).folder(0).parent.iterdir())


def test_the_version_on_the_volume_is_that_of_the_bucket(
    by_volume: StageContext, device: torch.device
) -> None:
    """The same manifest, and the same files."""
    publisher = make_publisher(by_volume)
    publisher.publish(random_learner(device), state_at(2))
    publisher.wait()
    found = policy_version.find_version(by_volume.bucket, by_volume.run, "vanilla", 2)
    assert found is not None and volume_of(by_volume).find(2) == found
    with volume_of(by_volume).reading(found[0], lambda: None) as folder:
        assert folder is not None
        assert by_volume.bucket.get(found[0].key) == (folder / MANIFEST).read_bytes()
        assert hf_model.load_student(folder, SMALL)
    assert on_volume(by_volume) == ["v000002"]
    assert {path.name for path in by_volume.scratch.iterdir()} == {"blocks", "volume"}
    publisher.close()


def test_the_volume_has_no_more_versions_than_windows_need(
    by_volume: StageContext, device: torch.device
) -> None:
    """Older ones leave it before the next is written, and the last ones with the stage."""
    publisher, learner = make_publisher(by_volume), random_learner(device)
    for number in (0, 2, 4):
        publisher.publish(learner, state_at(number), oldest=number - 3)
        publisher.wait()
    assert on_volume(by_volume) == ["v000002", "v000004"]
    publisher.empty_volume()
    assert on_volume(by_volume) == []
    publisher.close()


def test_a_version_that_was_not_recorded_leaves_the_volume_with_the_next_attempt(
    by_volume: StageContext, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is injected: a real store cannot be made to show it."""
    publisher, learner = make_publisher(by_volume), random_learner(device)
    publisher.publish(learner, state_at(2))
    publisher.wait()

    def rejected(*_: object) -> None:
        raise StorageError("rejected", "Refused")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", rejected)
        publisher.publish(learner, state_at(4))
        with pytest.raises(StorageError, match="rejected"):
            publisher.wait()
    assert volume_of(by_volume).find(4) is not None and not publisher.exists(4)
    publisher.close()
    make_publisher(by_volume).close()
    assert on_volume(by_volume) == ["v000002"]


def test_a_file_that_is_altered_before_its_upload_is_an_error(
    by_volume: StageContext, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the version is not recorded. The moment is that of `add`."""
    add = VersionVolume.add

    def alter(volume: VersionVolume, *given: Any) -> Path:
        folder = add(volume, *given)
        (folder / "config.json").write_text("{}")
        return folder

    monkeypatch.setattr(VersionVolume, "add", alter)
    publisher = make_publisher(by_volume)
    publisher.publish(random_learner(device), state_at(2))
    with pytest.raises(StorageError, match=r"config\.json: it was altered before it was uploaded") as error:
        publisher.wait()
    assert error.value.reason == "Local" and not publisher.exists(2)
    publisher.close()
