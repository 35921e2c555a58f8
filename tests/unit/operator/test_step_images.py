"""What ran is what is recorded: image, digest and commit of each attempt, from its pods."""

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from distill_operator.events import EventSpec, events_between
from distill_operator.pod_records import ImageReports, PodImage, image_digest, reported_images
from distill_operator.step_images import describe_image, images_of, merge_images

from tests.fakes.simulated_cluster import ERROR, SimulatedCluster, progress
from vpmoe.api.status import MAX_IMAGE, MAX_IMAGES, RunProvenance, Status, StepImage, StepStatus
from vpmoe.api.termination import TerminationRecord

OLD, NEW = "r.example.com/vpmoe/trainer:1", "r.example.com/vpmoe/trainer:2"
A, B = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
FIRST, SECOND = "1" * 40, "2" * 40


def reports(*found: tuple[str, str, str | None]) -> ImageReports:
    """Reference, digest and commit of pods."""
    return frozenset((PodImage(image, digest), commit) for image, digest, commit in found)


def merged(*attempts: tuple[int, ImageReports]) -> list[tuple[int, int, str, str | None, str | None]]:
    """The images after these reports, each of an attempt."""
    images: tuple[StepImage, ...] = ()
    for attempt, found in attempts:
        images = merge_images(images, attempt, found)
        assert merge_images(images, attempt, found) == images, "repeating it changes nothing"
    return [(one.first_attempt, one.last_attempt, one.image, one.digest, one.commit) for one in images]


@pytest.mark.parametrize(
    "image_id, expected",
    [
        pytest.param(f"r.example.com:5000/vpmoe/trainer@{A}", A, id="containerd, CRI-O"),
        pytest.param(f"docker.io/library/python@{A}", A, id="containerd, of the default registry"),
        pytest.param(f"docker-pullable://r.example.com/vpmoe/trainer@{A}", A, id="docker, pulled"),
        pytest.param(f"docker://{A}", A, id="docker, built on the node"),
        pytest.param(A, A, id="loaded on the node"),
        pytest.param("a" * 64, A, id="digits alone"),
        pytest.param(f"r/x@sha512:{'c' * 128}", f"sha512:{'c' * 128}", id="another hash"),
        pytest.param("", "", id="not reported"),
        pytest.param("r.example.com/vpmoe/trainer:1", "", id="a tag"),
        pytest.param("r.example.com/vpmoe/trainer@sha256:abc", "", id="too short"),
        pytest.param(f"{A}\n", "", id="more behind it"),
        pytest.param("x" * 10**6, "", id="something else"),
    ],
)
def test_the_digest_is_read_from_every_form_of_an_image_id(image_id: str, expected: str) -> None:
    assert image_digest(image_id) == expected


def pod(state: dict[str, Any], image: str = OLD, image_id: str = A, **more: Any) -> dict[str, Any]:
    statuses = [
        {"name": "sidecar", "state": {"running": {}}, "image": "mesh", "imageID": f"mesh@{B}"},
        {"name": "main", "state": state, "image": "another name of it", "imageID": image_id, **more},
    ]
    containers = [{"name": "sidecar", "image": "mesh"}, {"name": "main", "image": image}]
    return {
        "metadata": {"name": "p"},
        "spec": {"containers": containers},
        "status": {"containerStatuses": statuses},
    }


def ended(commit: str | None) -> dict[str, Any]:
    record = TerminationRecord(kind="Succeeded", exit=0, commit=commit)
    return {"terminated": {"exitCode": 0, "message": record.to_json_line().decode()}}


@pytest.mark.parametrize(
    "found, expected",
    [
        pytest.param(pod({"running": {}}), {(OLD, A, None)}, id="runs"),
        pytest.param(pod(ended(FIRST)), {(OLD, A, FIRST)}, id="has ended"),
        pytest.param(pod(ended("")), {(OLD, A, "")}, id="of an image without its commit"),
        pytest.param(pod(ended(None)), {(OLD, A, None)}, id="of an older version"),
        pytest.param(pod({"terminated": {"exitCode": 137}}), {(OLD, A, None)}, id="was killed"),
        pytest.param(
            pod({"terminated": {"exitCode": 1, "message": "Traceback"}}),
            {(OLD, A, None)},
            id="without a record",
        ),
        pytest.param(pod({"running": {}}, image_id=""), {(OLD, "", None)}, id="without a digest"),
        pytest.param(
            pod({"waiting": {"reason": "ImagePullBackOff"}}, image_id=""), set(), id="has not started"
        ),
        pytest.param({"metadata": {"name": "p"}}, set(), id="no status"),
    ],
)
def test_what_a_pod_runs_is_that_of_the_jobs_own_container(found: dict[str, Any], expected: set[Any]) -> None:
    assert {
        (image.image, image.digest, commit) for image, commit in reported_images([found], "main")
    } == expected


def test_a_reference_of_any_length_fits_into_the_status() -> None:
    images = merge_images((), 1, reported_images([pod({"running": {}}, image="x" * 10**5)], "main"))
    assert [len(image.image) for image in images] == [MAX_IMAGE]


@pytest.mark.parametrize(
    "attempts, expected",
    [
        pytest.param([(1, reports((OLD, A, None)))], [(1, 1, OLD, A, None)], id="it runs"),
        pytest.param(
            [(1, reports((OLD, A, None))), (1, reports((OLD, A, None), (OLD, A, FIRST)))],
            [(1, 1, OLD, A, FIRST)],
            id="the commit is known later",
        ),
        pytest.param(
            [(1, reports((OLD, "", None))), (1, reports((OLD, A, FIRST)))],
            [(1, 1, OLD, A, FIRST)],
            id="the digest is known later",
        ),
        pytest.param(
            [(attempt, reports((OLD, A, FIRST))) for attempt in (1, 2, 5)],
            [(1, 5, OLD, A, FIRST)],
            id="the same in all attempts",
        ),
        pytest.param(
            [(1, reports((OLD, A, FIRST))), (2, reports((NEW, B, None))), (2, reports((NEW, B, SECOND)))],
            [(1, 1, OLD, A, FIRST), (2, 2, NEW, B, SECOND)],
            id="an upgrade",
        ),
        pytest.param(
            [(1, reports((OLD, A, None))), (2, reports((NEW, B, SECOND)))],
            [(1, 1, OLD, A, None), (2, 2, NEW, B, SECOND)],
            id="an upgrade from a version whose pods report no commit",
        ),
        pytest.param(
            [(1, reports((OLD, A, FIRST))), (2, reports((NEW, B, SECOND))), (3, reports((OLD, A, FIRST)))],
            [(1, 1, OLD, A, FIRST), (2, 2, NEW, B, SECOND), (3, 3, OLD, A, FIRST)],
            id="an upgrade, and back",
        ),
        pytest.param(
            [(1, reports((OLD, A, FIRST))), (2, reports((OLD, B, SECOND)))],
            [(1, 1, OLD, A, FIRST), (2, 2, OLD, B, SECOND)],
            id="the tag was moved",
        ),
        pytest.param(
            [
                (1, reports((OLD, A, FIRST), (OLD, B, SECOND))),
                (2, reports((OLD, A, FIRST), (OLD, B, SECOND))),
            ],
            [(1, 2, OLD, A, FIRST), (1, 2, OLD, B, SECOND)],
            id="two nodes with different images",
        ),
        pytest.param(
            [
                (1, reports((OLD, A, FIRST))),
                (2, reports((OLD, A, FIRST), (OLD, B, None))),
                (3, reports((OLD, B, SECOND))),
            ],
            [(1, 2, OLD, A, FIRST), (2, 3, OLD, B, SECOND)],
            id="the tag was moved between two pods of an attempt",
        ),
        pytest.param(
            [(1, reports((OLD, "", FIRST))), (2, reports((OLD, "", SECOND)))],
            [(1, 1, OLD, None, FIRST), (2, 2, OLD, None, SECOND)],
            id="nodes that report no digest",
        ),
        pytest.param(
            [(1, reports((OLD, "", FIRST), (OLD, "", SECOND), (OLD, "", None)))],
            [(1, 1, OLD, None, FIRST), (1, 1, OLD, None, SECOND)],
            id="different commits, no digest",
        ),
        pytest.param(
            [(1, reports((OLD, "", None))), (2, reports((OLD, "", SECOND)))],
            [(1, 1, OLD, None, None), (2, 2, OLD, None, SECOND)],
            id="the commit of one attempt says nothing about another",
        ),
        pytest.param([(1, reports((OLD, A, "")))], [(1, 1, OLD, A, "")], id="an image without its commit"),
    ],
)
def test_each_attempt_has_what_it_ran(attempts: list[tuple[int, ImageReports]], expected: list[Any]) -> None:
    assert merged(*attempts) == expected


@pytest.mark.parametrize("seed", range(50))
def test_whatever_pods_report_the_record_is_true_bounded_and_stable(seed: int) -> None:
    """Each entry was reported for its first and last attempt, and the latest attempt has one, also if there
    are too many for the status.
    """
    print("seed", seed)
    chance = random.Random(seed)
    images: tuple[StepImage, ...] = ()
    references: dict[int, set[str]] = {}
    attempt = 1
    for _ in range(60):
        attempt += chance.random() < 0.3
        found = {
            (chance.choice([OLD, NEW]), chance.choice(["", A, B]), chance.choice([None, "", FIRST, SECOND]))
            for _ in range(chance.choice([1, 1, 1, 2, 3, 12]))
        }
        references.setdefault(attempt, set()).update(image for image, _, _ in found)
        images = merge_images(images, attempt, reports(*found))
        assert merge_images(images, attempt, reports(*found)) == images
        assert len(images) <= MAX_IMAGES
        assert images_of(images, attempt)
        for one in images:
            assert 1 <= one.first_attempt <= one.last_attempt <= attempt
            assert one.image in references[one.first_attempt] & references[one.last_attempt]


def status(*steps: tuple[str, int, Iterable[tuple[int, int, str, str | None, str | None]]]) -> Status:
    """A status whose steps have this attempt and these images."""
    return Status(
        steps=tuple(
            StepStatus(
                name=name,
                state="Running",
                attempt=attempt,
                images=tuple(
                    StepImage(
                        first_attempt=first, last_attempt=last, image=image, digest=digest, commit=commit
                    )
                    for first, last, image, digest, commit in images
                )
                or None,
            )
            for name, attempt, images in steps
        )
    )


def image_events(before: Status, after: Status) -> list[EventSpec]:
    reasons = ("CommitUnknown", "ImagesDiffer", "ImageChanged")
    return [event for event in events_between(before, after) if event.reason in reasons]


def test_an_image_without_its_commit_is_reported_once_a_run_with_the_file() -> None:
    before = status(("preprocess", 1, []), ("vanilla", 1, []))
    first = status(("preprocess", 1, [(1, 1, OLD, A, "")]), ("vanilla", 1, []))
    (event,) = image_events(before, first)
    assert (event.type, event.reason) == ("Warning", "CommitUnknown")
    assert f"{OLD}@{A} does not hold its commit in /opt/vpmoe/commit" in event.message
    both = status(("preprocess", 1, [(1, 1, OLD, A, "")]), ("vanilla", 2, [(1, 2, OLD, A, "")]))
    assert not image_events(first, both), "another step, and another attempt"
    another = status(
        ("preprocess", 1, [(1, 1, OLD, A, "")]), ("vanilla", 2, [(1, 2, OLD, A, ""), (2, 2, NEW, B, "")])
    )
    assert [event.reason for event in image_events(both, another)] == ["CommitUnknown", "ImagesDiffer"]


def test_a_commit_that_is_not_known_yet_is_not_reported() -> None:
    assert not image_events(status(("vanilla", 1, [])), status(("vanilla", 1, [(1, 1, OLD, A, None)])))


def test_pods_of_an_attempt_that_run_different_images_are_reported_once() -> None:
    one = status(("vanilla", 1, [(1, 1, OLD, A, FIRST)]))
    two = status(("vanilla", 1, [(1, 1, OLD, A, FIRST), (1, 1, OLD, B, SECOND)]))
    (event,) = image_events(one, two)
    assert (event.type, event.reason) == ("Warning", "ImagesDiffer")
    for text in ("vanilla: pods of attempt 1", f"{OLD}@{A} (commit {FIRST})", f"{OLD}@{B} (commit {SECOND})"):
        assert text in event.message
    assert image_events(status(("vanilla", 1, [])), two) == [event], "both at once"
    assert not image_events(two, two)
    next_attempt = status(("vanilla", 2, [(1, 1, OLD, A, FIRST), (1, 2, OLD, B, SECOND)]))
    assert not image_events(two, next_attempt), "one of them runs on"


@pytest.mark.parametrize(
    "image, digest, expected",
    [
        pytest.param(NEW, B, ("Normal", ""), id="an upgrade"),
        pytest.param(NEW, None, ("Normal", ""), id="an upgrade, no digests"),
        pytest.param(OLD, B, ("Warning", ": the tag was moved"), id="another image of the same name"),
        pytest.param(OLD, None, None, id="the digest is not known"),
    ],
)
def test_an_attempt_that_runs_another_image_than_the_one_before_is_reported(
    image: str, digest: str | None, expected: tuple[str, str] | None
) -> None:
    before = status(("vanilla", 2, [(1, 1, OLD, A, FIRST)]))
    after = status(("vanilla", 2, [(1, 1, OLD, A, FIRST), (2, 2, image, digest, None)]))
    found = image_events(before, after)
    if expected is None:
        assert not found
        return
    (event,) = found
    assert (event.type, event.reason) == (expected[0], "ImageChanged")
    assert f"attempt 2 runs {image}" in event.message and event.message.endswith(
        f"attempt 1 ran {OLD}@{A} (commit {FIRST}){expected[1]}"
    )


def test_a_reference_with_a_digest_is_not_written_twice() -> None:
    image = StepImage(first_attempt=1, last_attempt=1, image=f"r/x@{A}", digest=A)
    assert describe_image(image) == f"r/x@{A}"


def test_a_run_records_what_its_attempts_ran_through_an_upgrade() -> None:
    """As the pods say, whatever the operator's settings are when a child is created."""
    world = SimulatedCluster()
    world.reconcile()
    world.set_child_state("Succeeded", images=reports((OLD, A, FIRST)))
    world.reconcile_repeatedly()
    world.set_child_state("Running", step="vanilla", images=reports((OLD, A, None)))
    world.reconcile()
    served = progress("vanilla", done=100)
    world.set_progress(replace(served, images=reports((OLD, A, FIRST))))
    world.reconcile()
    world.set_child_state("Failed", ERROR, step="vanilla", images=reports((OLD, A, None)))
    world.reconcile()
    world.advance(60)
    world.readings.clear()
    world.reconcile_repeatedly()
    world.set_child_state("Succeeded", step="vanilla", images=reports((NEW, B, SECOND)))
    world.reconcile_repeatedly()
    assert world.status.phase == "Succeeded"
    found = {
        step.name: [
            (one.first_attempt, one.last_attempt, one.digest, one.commit) for one in step.images or ()
        ]
        for step in world.status.steps
    }
    assert found == {"preprocess": [(1, 1, A, FIRST)], "vanilla": [(1, 1, A, FIRST), (2, 2, B, SECOND)]}
    provenance = world.status.provenance
    assert provenance is not None and (provenance.git_sha, provenance.image) == (None, None)


def test_what_a_run_of_the_version_before_has_recorded_stays() -> None:
    world = SimulatedCluster()
    world.reconcile()
    assert world.status.provenance is not None
    before = RunProvenance.model_validate({**dict(world.status.provenance), "git_sha": FIRST, "image": OLD})
    world.status = world.status.model_copy(update={"provenance": before})
    world.set_progress(progress("preprocess", done=4))
    world.set_child_state("Running", images=reports((OLD, A, None)))
    world.reconcile_repeatedly()
    after = world.status.provenance
    assert after is not None and after.dataset is not None
    assert (after.git_sha, after.image, after.config_hash) == (FIRST, OLD, before.config_hash)
