"""What ran is what is recorded, on a real cluster: pods of images that hold other commits, or none."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from distill_operator.kube import EVENT, POD

from devcluster import configuration
from devcluster.access import Cluster
from tests.fakes import run_harness
from tests.fakes.run_harness import IMAGE, RunHarness
from vpmoe.provenance import git_sha

OTHER, UNMARKED = configuration.OTHER_IMAGE, configuration.UNMARKED_IMAGE
LONG = "steps=3000 pause=0.3 every=2 hurry=2"
"""Trains for fifteen minutes. The next attempt finishes at once."""
REASONS = ("CommitUnknown", "ImagesDiffer", "ImageChanged")


@pytest.fixture(scope="module")
def harness(cluster: Cluster, namespace: str) -> Iterator[RunHarness]:
    harness = RunHarness.create(cluster, namespace)
    policy = json.dumps(image_policy(namespace, "mixed", OTHER))
    harness.kubectl("apply", "--filename", "-", input=policy)
    yield harness
    harness.kubectl("delete", "--filename", "-", input=policy)
    run_harness.restore_operator(cluster)


@pytest.fixture(autouse=True)
def own_images(cluster: Cluster, harness: RunHarness) -> None:
    """Each test begins with these images, whatever the one before it has left."""
    run_harness.upgrade_operator(cluster, *run_harness.FAST, "--set", f"images.inference={UNMARKED}")


def image_policy(namespace: str, run: str, image: str) -> dict[str, Any]:
    """An admission policy by which the Workers of a run get this image, and its binding. So do pods of a node
    that has another image of the same tag.
    """
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    labels = "object.metadata.?labels"
    worker = f"{labels}[?'training.kubeflow.org/replica-type'].orValue('') == 'worker'"
    patch = f'[JSONPatch{{op: "replace", path: "/spec/containers/0/image", value: "{image}"}}]'
    api, name = "admissionregistration.k8s.io/v1", f"{namespace}-{run}"
    policy = {
        "matchConstraints": {"resourceRules": [rule]},
        "matchConditions": [
            {"name": "run", "expression": f"{labels}[?'vpmoe.dev/run'].orValue('') == '{run}'"},
            {"name": "worker", "expression": worker},
        ],
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": patch}}],
    }
    here = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    binding = {"policyName": name, "matchResources": {"namespaceSelector": here}}
    items = [
        {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": spec}
        for kind, spec in (("MutatingAdmissionPolicy", policy), ("MutatingAdmissionPolicyBinding", binding))
    ]
    return {"apiVersion": "v1", "kind": "List", "items": items}


def images(harness: RunHarness, name: str, step: str) -> list[tuple[int, int, str, str | None]]:
    """First and last attempt, reference and commit of what a step ran."""
    return [
        (found["firstAttempt"], found["lastAttempt"], found["image"], found.get("commit"))
        for found in harness.step(name, step).get("images", [])
    ]


def image_events(harness: RunHarness, name: str) -> list[tuple[str, str]]:
    """Type and reason of the Events about what the run ran."""
    about = f"involvedObject.kind=DistillRun,involvedObject.name={name}"
    listed = harness.get_object(EVENT, fieldSelector=about)["items"]
    return sorted((event["type"], event["reason"]) for event in listed if event["reason"] in REASONS)


def test_an_upgrade_in_mid_run_is_recorded_as_what_it_was(cluster: Cluster, harness: RunHarness) -> None:
    """The status, and the bucket, say which attempt ran what. The release's values still have a gitSha, which
    helm passes on.
    """
    commit = git_sha()
    assert commit != configuration.OTHER_COMMIT
    harness.apply("upgraded", LONG, evaluation={"completions": 8})
    harness.wait_for_checkpoint("upgraded")
    before = harness.step("upgraded")
    assert images(harness, "upgraded", "vanilla") == [(1, 1, IMAGE, commit)]
    saved = checkpoints(harness, "upgraded")
    assert set(saved.values()) == {commit}
    run_harness.upgrade_operator(
        cluster, "--set", f"images.trainer={OTHER}", "--set-string", "gitSha=" + "a" * 40
    )
    harness.patch("upgraded", suspend=True)
    harness.wait_for_phase("upgraded", "Suspended")
    assert images(harness, "upgraded", "vanilla") == [(1, 1, IMAGE, commit)], "attempt 1 runs on as it was"
    harness.patch("upgraded", suspend=False)
    harness.wait_for_phase("upgraded", "Succeeded")
    expected = [(1, 1, IMAGE, commit), (2, 2, OTHER, configuration.OTHER_COMMIT)]
    assert images(harness, "upgraded", "vanilla") == expected
    first, second = harness.step("upgraded")["images"]
    assert first == before["images"][0]
    assert first["digest"] != second["digest"]
    (pod,) = [
        found
        for found in harness.objects("upgraded", POD)
        if found["metadata"]["labels"]["vpmoe.dev/step"] == "vanilla"
    ]
    (status,) = pod["status"]["containerStatuses"]
    assert second["digest"] in status["imageID"]
    assert images(harness, "upgraded", "preprocess") == [(1, 1, IMAGE, commit)]
    assert images(harness, "upgraded", "vanilla-evaluate") == [(1, 1, UNMARKED, "")]
    assert image_events(harness, "upgraded") == [("Normal", "ImageChanged"), ("Warning", "CommitUnknown")]
    after = checkpoints(harness, "upgraded")
    assert saved.items() <= after.items()
    assert after[max(after)] == configuration.OTHER_COMMIT
    provenance = harness.status("upgraded")["provenance"]
    assert "gitSha" not in provenance and "image" not in provenance


def checkpoints(harness: RunHarness, name: str) -> dict[int, str]:
    """Commit in the metadata of each checkpoint's manifest, by iteration."""
    folder = f"{harness.run_folder(name)}/checkpoints/vanilla/"
    listed = harness.s3.get_paginator("list_objects_v2").paginate(Bucket=harness.bucket, Prefix=folder)
    keys = [found["Key"] for page in listed for found in page.get("Contents", [])]
    return {
        int(key.removeprefix(folder).split("/")[0]): harness.s3.head_object(Bucket=harness.bucket, Key=key)[
            "Metadata"
        ]["git-sha"]
        for key in keys
    }


def test_pods_of_one_attempt_that_run_different_images_are_told_and_the_run_goes_on(
    harness: RunHarness,
) -> None:
    harness.apply("mixed", "steps=40 pause=0.3", student={"shape": "tiny", "gpus": 2, "gpusPerPod": 1})
    harness.wait_for_phase("mixed", "Succeeded")
    found = images(harness, "mixed", "vanilla")
    assert [(first, last) for first, last, _, _ in found] == [(1, 1), (1, 1)]
    assert {commit for _, _, image, commit in found if image == OTHER} == {configuration.OTHER_COMMIT}
    assert ("Warning", "ImagesDiffer") in image_events(harness, "mixed")
