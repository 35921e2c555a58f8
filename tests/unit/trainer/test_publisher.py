"""Policy versions on a real store: transformers reads the student back; each is published once; weights are
pruned."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import datasets, students
from tests.fakes.students import SMALL, new_seed
from vpmoe.checkpoint.train_state import TrainState, WindowStream
from vpmoe.data.reader import BlockCache, DatasetReader
from vpmoe.inference import hf_model
from vpmoe.model.learner import Learner
from vpmoe.rollout import policy_version
from vpmoe.storage import Bucket, StorageError, manifest, paths
from vpmoe.storage.manifest import Input
from vpmoe.trainer.checkpoint.resume import initial_state
from vpmoe.trainer.context import StageContext
from vpmoe.trainer.onpolicy.publisher import Publisher, probe_sequences

pytestmark = pytest.mark.usefixtures("device")
TOLERANCE = 1e-4
"""Nats. Both compute in float32 and sum in other orders."""


@pytest.fixture
def context(bucket: Bucket, run_spec: dict[str, Any], tmp_path: Path) -> StageContext:
    random = np.random.default_rng(new_seed())
    dataset = datasets.write(bucket, [datasets.random_documents(random, 7, 200)], [[]])
    run_spec["spec"]["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": 1000}]
    return datasets.context(bucket, run_spec, tmp_path, dataset)


@pytest.fixture
def publisher(context: StageContext) -> Iterator[Publisher]:
    it = make(context)
    yield it
    it.close()


def make(context: StageContext) -> Publisher:
    parts = DatasetReader(context.dataset, "train", BlockCache(context.bucket, context.scratch / "blocks"))
    return Publisher(
        context,
        [datasets.TOKENIZER, Input("dataset", "s3://x", {"sha256": datasets.HEX}, {})],
        probe_sequences(parts),
    )


def learner(device: torch.device) -> Learner:
    """A student whose parts are all large enough to matter."""
    torch.manual_seed(new_seed())
    it = students.learner(device)
    with torch.no_grad():
        for name, parameter in it.student.named_parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(
                std=0.3 if name == "embedding.weight" else 0.15
            )
    return it


def at(trained: int, steps: int = 5) -> TrainState:
    windows = WindowStream(first_prompt=11, next_prompt=11 + 4 * trained, trained=trained)
    return initial_state("vanilla").model_copy(
        update={"steps": steps, "tokens": 77, "iteration": 9, "first_sequence": 3, "windows": windows}
    )


def test_what_is_published_is_the_student_as_it_was(
    context: StageContext, publisher: Publisher, device: torch.device, tmp_path: Path
) -> None:
    it = learner(device)
    assert not publisher.exists(2)
    publisher.publish(it, at(2))
    with torch.no_grad():
        it.student.output.zero_()  # training goes on meanwhile
    publisher.wait()
    assert publisher.exists(2) and not list(context.scratch.glob("version-*"))
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
        wanted = logits_TV[:-1].log_softmax(1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert len(logp) == len(ids) - 1 and (torch.tensor(logp) - wanted).abs().max() <= TOLERANCE
        assert wanted.std() > 0.3 or len(logp) < 8, (
            "a model to which all tokens are alike would prove nothing"
        )


def test_the_same_weights_are_the_same_content_whoever_publishes_them(
    context: StageContext, publisher: Publisher, device: torch.device
) -> None:
    it = learner(device)
    for number in (2, 4, 6):
        publisher.publish(it, at(number))  # the copy is made in the memory of the one before
        if number == 4:
            with torch.no_grad():
                it.student.output.add_(1)
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
    it = learner(device)
    for number in (0, 2, 4):
        publisher.publish(it, at(number))
    publisher.wait()
    again = make(context)  # another attempt knows of them too
    again.prune(4)
    again.close()
    folder = paths.weights(context.run, "vanilla", 0).rpartition("/")[0]
    left = [found.key.removeprefix(folder + "/") for found in context.bucket.list(folder + "/")]
    assert [key for key in left if not key.startswith("v000004/")] == [
        "v000000/manifest.json",
        "v000002/manifest.json",
    ]
    assert {key for key in left if key.startswith("v000004/")} >= {
        "v000004/manifest.json",
        "v000004/config.json",
    }


def test_an_upload_that_fails_is_told(
    context: StageContext, publisher: Publisher, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that no real store shows when asked to."""

    def rejected(*_: object) -> None:
        raise StorageError("rejected", "Forbidden")

    monkeypatch.setattr(manifest, "write", rejected)
    publisher.publish(learner(device), at(2))
    with pytest.raises(StorageError, match="rejected"):
        publisher.wait()
    assert not publisher.exists(2)
