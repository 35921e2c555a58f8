"""Complete Vanilla runs on the cluster with real jobs, from parquet and a dense model to a trained student.

Two runs of one recipe: one pod with two processes, and a Master and a Worker with one each. The runs share a
dataset and start together, so that both preprocess it at the same time. Their students begin with the same
small Qwen3.
"""

import hashlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from demo import sample
from devcluster import access
from devcluster.cluster import Cluster
from tests.fakes.dense_models import save_dense_model
from tests.fakes.waiting import wait_until
from vpmoe.provenance import git_sha

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.timeout(1800)  # the first test waits for both runs

RUNS = {"one-pod": None, "two-pods": 1}
"""Run name → student.gpusPerPod."""
DENSE = {"hidden_size": 64, "num_hidden_layers": 2}
"""Of the width of `tiny`."""
MEASURED = "one-pod"
"""The run whose checkpoints are measured while it trains, by the step vanilla-validity."""


def step_of(run: dict[str, Any], name: str) -> Any:
    """The status of a run's step."""
    return next(step for step in run["status"]["steps"] if step["name"] == name)


@pytest.fixture(scope="module")
def environment(cluster: Cluster) -> dict[str, str]:
    """Environment of an S3 client of the selected cluster."""
    return {
        **os.environ,
        "AWS_ENDPOINT_URL": cluster.s3.endpoint,
        "AWS_ACCESS_KEY_ID": cluster.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key,
    }


@pytest.fixture(scope="module")
def s3_client(cluster: Cluster) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3.endpoint,
        aws_access_key_id=cluster.s3.access_key,
        aws_secret_access_key=cluster.s3.secret_key,
        region_name="us-east-1",
    )


@pytest.fixture(scope="module")
def runs(
    cluster: Cluster, namespace: str, s3_client: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Both finished runs, by name."""
    bucket = f"e2e-{secrets.token_hex(4)}"
    s3_client.create_bucket(Bucket=bucket)
    for shard in sample.write(tmp_path_factory.mktemp("shards"), shards=2):
        s3_client.upload_file(str(shard), bucket, f"input/{shard.name}")
    dense = tmp_path_factory.mktemp("dense")
    save_dense_model(dense, **DENSE)
    for path in dense.iterdir():
        s3_client.upload_file(str(path), bucket, f"dense/{path.name}")
    manifest = yaml.safe_load((ROOT / "manifests/examples/demo.yaml").read_text())
    manifest["spec"]["dataset"]["source"] = f"s3://{bucket}/input/*.parquet"
    manifest["spec"]["storage"] |= {"bucket": bucket, "endpoint": cluster.s3.pod_endpoint}
    # the Vanilla stage alone; the others are in test_stages.py
    manifest["spec"]["stages"] = [{**manifest["spec"]["stages"][0], "tokens": "8k"}]
    manifest["spec"]["training"]["optimizer"] = {"learningRate": 1.0e-2, "warmupTokens": "1k"}
    manifest["spec"]["evaluation"] = {"everyTokens": "4k", "documents": 16, "completions": 6}
    manifest["spec"]["student"]["init"] = {"upcycle": {"model": f"s3://{bucket}/dense"}}
    # the chart's are for real models: a node of two cores has no room for them
    manifest["spec"]["runtime"]["resources"]["init"] = {"requests": {"cpu": "100m", "memory": "1Gi"}}
    for name, size in RUNS.items():
        manifest["metadata"]["name"] = name
        manifest["spec"]["student"]["gpusPerPod"] = size
        # the first run has the step that measures validity; no stage is so long that it ends early
        stop = {"evaluations": 1000, "minValidity": 0.01} if name == MEASURED else None
        manifest["spec"]["stages"][0]["stop"] = stop
        cluster.kubectl("apply", "--namespace", namespace, "--filename", "-", input=yaml.safe_dump(manifest))

    def get(name: str) -> Any:
        return json.loads(
            cluster.kubectl("get", "distillrun", name, "--namespace", namespace, "--output=json")
        )

    def has_ended(name: str) -> bool:
        return get(name).get("status", {}).get("phase") in ("Succeeded", "Failed")

    for name in RUNS:
        wait_until(lambda name=name: has_ended(name), f"{name} ends", seconds=840, every=3)  # type: ignore[misc]
    yield {name: get(name) for name in RUNS}


def folder_of(run: dict[str, Any]) -> str:
    """Key of the run's folder."""
    metadata = run["metadata"]
    return f"runs/{metadata['namespace']}/{metadata['name']}-{metadata['uid'][:8]}"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_succeeds_and_its_loss_decreases_in_both_spans(runs: dict[str, Any], name: str) -> None:
    status = runs[name]["status"]
    assert status["phase"] == "Succeeded", status.get("message")
    steps = [(step["name"], step["state"]) for step in status["steps"]]
    beside = ("vanilla-validity",) if name == MEASURED else ()
    assert steps == [
        (step, "Succeeded")
        for step in (
            *("init", "preprocess", *beside, "vanilla", "vanilla-evaluate", "vanilla-export"),
            "vanilla-report",
        )
    ]
    for span in ("reasoning", "final"):
        assert status["heldOut"]["latest"][span] < status["heldOut"]["before"][span] - 0.5


def test_a_master_and_a_worker_reach_the_loss_of_one_pod(
    cluster: Cluster, namespace: str, runs: dict[str, Any]
) -> None:
    one, two = (runs[name]["status"]["heldOut"] for name in RUNS)
    assert one == two  # the same processes, batches and order of sums
    child = step_of(runs["two-pods"], "vanilla")["child"]["name"]
    job = json.loads(cluster.kubectl("get", "pytorchjob", child, "--namespace", namespace, "--output=json"))
    assert {role: spec["replicas"] for role, spec in job["spec"]["pytorchReplicaSpecs"].items()} == {
        "Master": 1,
        "Worker": 1,
    }


def test_the_evaluation_equals_the_trainers_measurement(runs: dict[str, Any], s3_client: Any) -> None:
    found = []
    for run in runs.values():
        key = f"{folder_of(run)}/steps/vanilla-evaluate/evaluation.json"
        evaluation = json.loads(
            s3_client.get_object(Bucket=run["spec"]["storage"]["bucket"], Key=key)["Body"].read()
        )
        held_out = step_of(run, "vanilla")["heldOut"]["latest"]
        for span in ("reasoning", "final"):
            assert evaluation["heldOut"][span] == pytest.approx(
                held_out[span], abs=1e-4
            )  # the order of float32 sums differs
        assert sum(evaluation["validity"].values()) == evaluation["completions"] == 6
        share = evaluation["validity"].get("valid", 0) / 6
        assert step_of(run, "vanilla-evaluate")["validity"] == share
        found.append(
            {
                field: value
                for field, value in evaluation.items()
                if field not in ("run", "config", "checkpoint")
            }
        )
    assert found[0] == found[1], "equal weights give equal results"


def test_both_runs_begin_with_the_same_weights_of_the_dense_model(
    runs: dict[str, Any], s3_client: Any
) -> None:
    """Their checkpoints name them, and the card of the exported model the dense one."""
    weights = []
    for run in runs.values():
        bucket, folder = run["spec"]["storage"]["bucket"], folder_of(run)

        def read(key: str, bucket: str = bucket) -> bytes:
            content: bytes = s3_client.get_object(Bucket=bucket, Key=key)["Body"].read()
            return content

        init = read(f"{folder}/init/manifest.json")
        weights.append({one["name"]: one["digest"] for one in json.loads(init)["subject"]})
        latest = step_of(run, "vanilla")["checkpoint"]["manifest"].removeprefix(f"s3://{bucket}/")
        checkpoint = json.loads(read(latest))
        inputs = checkpoint["predicate"]["buildDefinition"]["resolvedDependencies"]
        (source,) = (one for one in inputs if one["name"] == "init")
        assert source["digest"] == {"sha256": hashlib.sha256(init).hexdigest()}
        assert f"dense model `s3://{bucket}/dense`" in read(f"{folder}/models/vanilla/README.md").decode()
    assert weights[0] == weights[1] != {}


def test_every_object_in_the_bucket_matches_its_manifest(
    runs: dict[str, Any], environment: dict[str, str]
) -> None:
    bucket = runs["one-pod"]["spec"]["storage"]["bucket"]
    command = [sys.executable, "-m", "vpmoe.storage", "verify", f"s3://{bucket}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_exported_student_answers_from_the_bucket(
    runs: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    """The same command lines as a user's."""
    status = runs["one-pod"]["status"]
    assert status["model"] == f"{status['provenance']['folder']}/models/vanilla"
    model = tmp_path / "model"
    for arguments, expected in (
        (["export", status["provenance"]["folder"], "--to", str(model)], "Downloading"),
        (["chat", str(model), "What is a prime?", "--max-tokens", "8"], "Reasoning (medium effort):"),
    ):
        command = [sys.executable, "-m", "vpmoe", *arguments]
        found = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr
        assert expected in found.stdout
    assert "one-pod" in (model / "README.md").read_text()


def test_the_bucket_has_the_documented_layout(runs: dict[str, Any], s3_client: Any) -> None:
    run = runs["one-pod"]
    keys = {
        entry["Key"]
        for entry in s3_client.list_objects_v2(Bucket=run["spec"]["storage"]["bucket"])["Contents"]
    }
    dataset = f"datasets/{run['status']['provenance']['dataset']['id']}"
    folder = folder_of(run)
    parts = {
        f"{dataset}/{split}/part-{part:05d}.{file}"
        for split in ("train", "valid")
        for part in (0, 1)
        for file in ("tokens.bin", "tokens.idx", "spans.bin", "spans.idx", "documents.parquet")
    }
    assert keys >= parts | {
        f"{dataset}/manifest.json",
        f"{folder}/run.json",
        f"{folder}/init.json",
        f"{folder}/init/manifest.json",
        f"{folder}/steps/vanilla/progress.json",
        f"{folder}/report/index.html",  # also a step that could not write it counts as succeeded
    }
    assert any(key.startswith(f"{folder}/steps/vanilla/metrics/") and key.endswith(".jsonl") for key in keys)
    assert any(
        key.startswith(f"{folder}/checkpoints/vanilla/") and key.endswith("/manifest.json") for key in keys
    )
    assert any(key.startswith(f"{folder}/steps/vanilla/validity-") for key in keys), (
        "each evaluation writes down what it knew of the validity that stop requires"
    )
    assert not any(".probe/" in key for key in keys)


def test_every_pod_has_its_provenance(cluster: Cluster, namespace: str, runs: dict[str, Any]) -> None:
    pods = json.loads(cluster.kubectl("get", "pods", "--namespace", namespace, "--output=json"))["items"]
    assert (
        len(pods) >= 5
    )  # two preprocessing workers, one training pod, and the other run's Master and Worker
    for pod in pods:
        labels, annotations = pod["metadata"]["labels"], pod["metadata"]["annotations"]
        run = runs[labels["vpmoe.dev/run"]]
        assert labels["vpmoe.dev/step"] in [step["name"] for step in run["status"]["steps"]]
        assert labels["vpmoe.dev/attempt"] == "1"
        assert annotations["vpmoe.dev/config"].startswith(run["status"]["config"])
        steps = {step["name"]: step for step in run["status"]["steps"]}
        (image,) = steps[labels["vpmoe.dev/step"]]["images"]
        assert (image["firstAttempt"], image["lastAttempt"], image["commit"]) == (1, 1, git_sha())
        assert image["digest"].startswith("sha256:")
        assert cluster.kubectl("logs", pod["metadata"]["name"], "--namespace", namespace).strip()


def test_kubectl_shows_status_events_and_documentation(
    cluster: Cluster, namespace: str, runs: dict[str, Any]
) -> None:
    table = cluster.kubectl("get", "distillruns", "--namespace", namespace).splitlines()
    assert table[0].split() == ["NAME", "PHASE", "STEP", "PROGRESS", "TOKENS/S", "LOSS", "AGE"]
    assert {line.split()[0]: line.split()[1:4] for line in table[1:]} == {
        name: ["Succeeded", "vanilla-report", "100%"] for name in RUNS
    }
    for column in ("ETA", "TEACHER", "MODEL", "CONFIG"):
        assert column in cluster.kubectl("get", "drun", "--namespace", namespace, "--output=wide")
    described = cluster.kubectl("describe", "distillrun", "one-pod", "--namespace", namespace)
    assert "Succeeded" in described and "Events:" in described
    assert "OnPolicy" in cluster.kubectl("explain", "distillrun.spec.stages")
    cluster.kubectl(
        "wait", "--for=condition=Succeeded", "distillrun", "--all", "--namespace", namespace, "--timeout=5s"
    )


def test_the_report_is_made_by_the_runs_name(
    cluster: Cluster, namespace: str, runs: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    """The run's folder is known from the cluster; only the bucket's credentials are given."""
    page = tmp_path / "page.html"
    command = ["report", MEASURED, "--namespace", namespace, "--output", str(page)]
    here = access.environment(cluster.kubeconfig)
    ended = subprocess.run(
        [sys.executable, "-m", "vpmoe", *command],
        cwd=ROOT,
        env={**environment, **{name: here[name] for name in ("KUBECONFIG", "NO_PROXY")}},
        capture_output=True,
        text=True,
    )
    assert (ended.returncode, ended.stdout) == (0, f"{page}\n"), ended.stderr
    assert runs[MEASURED]["status"]["provenance"]["folder"] in page.read_text()
