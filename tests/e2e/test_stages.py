"""Complete runs of all four kinds of stages on the cluster, with a real teacher: one undisturbed, one with
kills.

Both have the same recipe, source and teacher, but their own buckets, so that neither reuses results of the
other. They must end with the same bits. Every job of the second and the operator are killed at random times,
the trainer of the OnPolicy stage twice.
"""

import json
import math
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
import yaml

from demo import sample
from devcluster import ClusterError, install
from devcluster.cluster import Cluster
from tests.fakes import prometheus, tiny_teacher
from tests.fakes.prometheus import DASHBOARDS, Prometheus
from tests.fakes.scraped_cluster import pods_of_cluster
from tests.fakes.waiting import wait_until
from vpmoe.api import pod_metrics

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.timeout(2400)  # the first test waits for both runs

STAGES = [
    {"name": "vanilla", "kind": "Vanilla", "tokens": "8k"},
    {"name": "rescored", "kind": "Rescored", "tokens": "8k", "subset": {"fraction": 0.3}, "mix": 0.65},
    {"name": "forced", "kind": "TeacherForced", "tokens": "4k"},
    {
        "name": "onpolicy",
        "kind": "OnPolicy",
        "tokens": "8k",
        "anchor": 0.2,
        "staleness": 1,
        "require": {"validity": 0},
        "rollout": {"promptsPerWindow": 6, "maxTokens": {"low": 24, "medium": 32, "high": 48}},
        "maxSamplerKl": 1.0,
        "optimizer": {"learningRate": 3.0e-4, "minLearningRate": 3.0e-5, "warmupTokens": "2k"},
    },
]
ROLES = ("onpolicy-sampler", "onpolicy-teacher", "onpolicy")
STEPS = (
    *("preprocess", "rescore", "vanilla", "vanilla-report", "rescored", "rescored-report"),
    *("forced", "forced-report", *ROLES, "onpolicy-export", "onpolicy-report"),
)
LATEST_KILLS = {
    "preprocess": [2.0],
    "rescore": [40.0],
    "vanilla": [20.0],
    "rescored": [20.0],
    "forced": [20.0],
    "onpolicy-sampler": [60.0],
    "onpolicy-teacher": [60.0],
    "onpolicy": [40.0, 40.0],
    "onpolicy-export": [4.0],
}
"""The latest kill of a step's pods, in seconds after their start; one entry per kill. Most of this time is
spent in loading vLLM."""
KILL_EVERYTHING = "import os; os.kill(-1, 9)"


class StageRuns:
    """The runs of this module, their namespace and their buckets."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.name = f"stages-{secrets.token_hex(4)}"
        self.client: Any = boto3.client(
            "s3",
            endpoint_url=cluster.s3.endpoint,
            aws_access_key_id=cluster.s3.access_key,
            aws_secret_access_key=cluster.s3.secret_key,
            region_name="us-east-1",
        )

    def kubectl(self, *arguments: str, input: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, input=input)

    def apply(self, name: str, bucket: str, stages: list[dict[str, Any]]) -> None:
        document = yaml.safe_load((ROOT / "manifests/examples/demo.yaml").read_text())
        spec = document["spec"]
        document["metadata"]["name"] = name
        spec["dataset"]["source"] = f"s3://{self.name}-source/input/*.parquet"
        # stated, because the default of a run without an OnPolicy stage would be another dataset
        spec["dataset"]["conversation"] = {"effort": "low=0.3,medium=0.4,high=0.3"}
        spec["teacher"]["model"] = f"s3://{self.name}-source/teacher"
        spec["student"]["gpus"] = 2
        spec["training"] |= {"globalBatchTokens": 2048, "checkpoint": {"everyTokens": "4k", "keep": 2}}
        spec["stages"] = stages
        spec["evaluation"] = {"everyTokens": "8k", "documents": 8, "completions": 0}
        spec["storage"] |= {"bucket": bucket, "endpoint": self.cluster.s3.pod_endpoint}
        spec["runtime"]["attempts"] = 20
        self.kubectl("apply", "--filename", "-", input=yaml.safe_dump(document))

    def get(self, name: str) -> dict[str, Any]:
        run: dict[str, Any] = json.loads(self.kubectl("get", "distillrun", name, "--output=json"))
        return run

    def step(self, name: str, step: str) -> dict[str, Any]:
        return next(
            (found for found in self.get(name).get("status", {}).get("steps", []) if found["name"] == step),
            {},
        )

    def has_ended(self, name: str) -> bool:
        return self.get(name).get("status", {}).get("phase") in ("Succeeded", "Failed")

    def read_json(self, bucket: str, key: str) -> Any:
        return json.loads(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def read_manifest(self, url: str) -> Any:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        return self.read_json(bucket, key)

    def running_pod(self, run: str, step: str) -> dict[str, Any] | None:
        selector = f"vpmoe.dev/run={run},vpmoe.dev/step={step}"
        pods = json.loads(
            self.kubectl(
                "get",
                "pods",
                "--selector",
                selector,
                "--field-selector=status.phase=Running",
                "--output=json",
            )
        )
        return next((pod for pod in pods["items"] if "deletionTimestamp" not in pod["metadata"]), None)

    def kill_pod(self, run: str, step: str) -> bool:
        """Send SIGKILL to all processes in a pod of the step. Returns whether there was a pod."""
        pod = self.running_pod(run, step)
        if pod is None:
            return False
        container = pod["spec"]["containers"][0]["name"]
        with suppress(ClusterError):  # the connection breaks with the container, or the pod has ended
            self.kubectl(
                "exec",
                pod["metadata"]["name"],
                "--container",
                container,
                "--",
                "python",
                "-c",
                KILL_EVERYTHING,
            )
        return True

    def kill_operator(self) -> None:
        self.cluster.kubectl(
            "delete",
            "pods",
            "--namespace",
            install.NAMESPACE,
            "--selector",
            "app.kubernetes.io/name=distill-operator",
            "--force",
            "--grace-period=0",
        )


def kill_at_random(
    bench: StageRuns, run: str, rng: random.Random, finished: threading.Event, killed: list[str]
) -> None:
    """Until `finished`, kill pods of each step at random times after their start, and the operator from time
    to time. Appends the names of what was killed to `killed`."""
    pauses = {step: [rng.uniform(0, latest) for latest in kills] for step, kills in LATEST_KILLS.items()}
    due: dict[str, float] = {}
    operator_due = time.monotonic() + rng.uniform(5, 40)
    while not finished.wait(0.5):
        with suppress(ClusterError):
            for step in [step for step, remaining in pauses.items() if remaining]:
                if step not in due and bench.running_pod(run, step):
                    due[step] = time.monotonic() + pauses[step][0]
                elif time.monotonic() > due.get(step, math.inf) and bench.kill_pod(run, step):
                    killed.append(step)
                    del due[step], pauses[step][0]
            if time.monotonic() > operator_due:
                bench.kill_operator()
                killed.append("operator")
                # The next operator waits a minute for the lease.
                operator_due = time.monotonic() + rng.uniform(90, 200)


@pytest.fixture(scope="module")
def scraped(
    cluster: Cluster, namespace: str, promtool: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the pods of the runs and the operator."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        pods_of_cluster(cluster.kubeconfig, folder, namespace, install.NAMESPACE) as pods,
        prometheus.server(folder, [pods], interval=1) as it,
    ):
        yield it


@pytest.fixture(scope="module")
def bench(
    cluster: Cluster, namespace: str, scraped: Prometheus, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StageRuns]:
    """Both runs after their end: "undisturbed" and "killed". Prometheus has scraped their pods meanwhile."""
    it = StageRuns(cluster, namespace)
    for bucket in ("source", "undisturbed", "killed"):
        it.client.create_bucket(Bucket=f"{it.name}-{bucket}")
    folder = tmp_path_factory.mktemp("stages")
    for shard in sample.write(folder / "shards", shards=2):
        it.client.upload_file(str(shard), f"{it.name}-source", f"input/{shard.name}")
    for file in tiny_teacher.write(folder / "teacher").iterdir():
        it.client.upload_file(str(file), f"{it.name}-source", f"teacher/{file.name}")
    seed = secrets.randbelow(1 << 32)
    print(f"seed {seed}")
    finished, killed = threading.Event(), list[str]()
    killer = threading.Thread(
        target=kill_at_random, args=(it, "killed", random.Random(seed), finished, killed)
    )
    for name in ("undisturbed", "killed"):
        it.apply(name, f"{it.name}-{name}", STAGES)
    killer.start()
    try:
        for name in ("undisturbed", "killed"):
            wait_until(lambda name=name: it.has_ended(name), f"{name} ends", seconds=1500, every=3)  # type: ignore[misc]
    finally:
        finished.set()
        killer.join()
        print(f"killed: {killed}")
    assert {"operator", *ROLES} <= set(killed), f"seed {seed}: only {killed} were killed"
    yield it


@pytest.mark.parametrize("name", ["undisturbed", "killed"])
def test_a_run_of_all_kinds_of_stages_succeeds(bench: StageRuns, name: str) -> None:
    status = bench.get(name)["status"]
    assert status["phase"] == "Succeeded", status.get("message")
    assert [(step["name"], step["state"]) for step in status["steps"]] == [
        (step, "Succeeded") for step in STEPS
    ]
    if name == "killed":
        assert sum(step["attempt"] for step in status["steps"]) >= len(STEPS) + 2, (
            "killed attempts were retried"
        )
    else:
        assert [step["attempt"] for step in status["steps"]] == [1] * len(STEPS)
    reports = [step for step in status["steps"] if step["name"].endswith("-report")]
    assert all(step["message"].startswith("Wrote s3://") for step in reports), reports


def test_rescoring_ran_beside_vanilla_and_before_the_stages_that_need_it(bench: StageRuns) -> None:
    step = {name: bench.step("undisturbed", name) for name in STEPS}
    assert step["rescore"]["started"] < step["vanilla"]["finished"]
    assert step["rescored"]["started"] >= max(step["rescore"]["finished"], step["vanilla"]["finished"])
    assert step["forced"]["started"] >= step["rescored"]["finished"]


def test_the_three_roles_started_together_and_ended_with_the_trainer(bench: StageRuns) -> None:
    step = {name: bench.step("undisturbed", name) for name in ROLES}
    assert len({found["started"] for found in step.values()}) == 1
    assert step["onpolicy-sampler"]["partsDone"] == step["onpolicy-teacher"]["partsDone"] >= 3


SECONDS_AT_THE_END = {"vpmoe_rescore_part_seconds_sum", "vpmoe_rescore_part_seconds_count"}
"""Of a process that may end before it is scraped once more."""


def test_every_query_of_a_dashboard_finds_time_series_of_the_run(
    bench: StageRuns, scraped: Prometheus, namespace: str
) -> None:
    """In a real scrape: of the run's pods, and of the operator, whatever killed it meanwhile."""
    status = bench.get("undisturbed")["status"]
    start, end = (datetime.fromisoformat(status[name]).timestamp() for name in ("started", "finished"))
    variables = {"namespace": namespace, "run": "undisturbed"}
    empty = prometheus.panels_without_data(scraped, DASHBOARDS["run"], start, end, **variables)
    assert {name for query in empty for name in query.names} <= prometheus.WITH_GPUS | SECONDS_AT_THE_END
    place = {"namespace": install.NAMESPACE}
    empty = prometheus.panels_without_data(scraped, DASHBOARDS["operator"], start, end, **place)
    assert {name for query in empty for name in query.names} <= {"vpmoe_operator_run_condition"}


def test_the_pods_of_a_run_have_every_metric(bench: StageRuns, scraped: Prometheus, namespace: str) -> None:
    """Except those of GPUs, of a collapse, and of completions, which this run does not measure."""
    status = bench.get("undisturbed")["status"]
    start, end = (datetime.fromisoformat(status[name]).timestamp() for name in ("started", "finished"))
    missing = {
        metric
        for metric in pod_metrics.METRICS
        for series in metric.series()
        if not scraped.series(f'{series}{{namespace="{namespace}",run="undisturbed"}}', start, end)
    }
    gpus = {pod_metrics.GPU_UTILISATION, pod_metrics.GPU_MEMORY_FREE}
    assert missing <= gpus | {pod_metrics.CONDITION, pod_metrics.VALIDITY}


@pytest.mark.parametrize("stage", ["vanilla", "rescored", "forced", "onpolicy"])
def test_kills_do_not_change_the_bits_of_the_weights(bench: StageRuns, stage: str) -> None:
    """Weights, both moments, expert biases and random state, compared by file."""
    ends = [
        bench.read_manifest(bench.step(name, stage)["checkpoint"]["manifest"])
        for name in ("undisturbed", "killed")
    ]
    undisturbed, killed = ({subject["name"]: subject["digest"] for subject in end["subject"]} for end in ends)
    assert undisturbed == killed
    assert "rank-00000.safetensors" in undisturbed


def test_kills_do_not_change_the_bytes_of_the_exported_model(bench: StageRuns) -> None:
    """Except those of its card, which names the run."""
    models = []
    for name in ("undisturbed", "killed"):
        url = bench.get(name)["status"]["model"]
        assert url == bench.step(name, "onpolicy-export")["model"]
        subjects = bench.read_manifest(f"{url}/manifest.json")["subject"]
        models.append({found["name"]: found["digest"] for found in subjects if found["name"] != "README.md"})
    assert models[0] == models[1]
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < set(models[0])


def test_kills_do_not_change_the_bytes_of_the_scores(bench: StageRuns) -> None:
    results = []
    for name in ("undisturbed", "killed"):
        bucket = f"{bench.name}-{name}"
        keys = [
            entry["Key"]
            for entry in bench.client.list_objects_v2(Bucket=bucket, Prefix="scores/")["Contents"]
        ]
        (key,) = [key for key in keys if key.endswith("/manifest.json")]
        found = bench.read_json(bucket, key)
        results.append((key, {subject["name"]: subject["digest"] for subject in found["subject"]}))
        assert found["predicate"]["buildDefinition"]["internalParameters"]["documents"] > 5
    assert results[0] == results[1]


def test_kills_do_not_change_the_bits_of_the_windows(bench: StageRuns) -> None:
    """Rollouts and scores depend only on the sampled weights and the teacher, except for the run's name."""
    results = []
    for name in ("undisturbed", "killed"):
        bucket = f"{bench.name}-{name}"
        keys = [
            entry["Key"] for entry in bench.client.list_objects_v2(Bucket=bucket, Prefix="runs/")["Contents"]
        ]
        files = sorted(key for key in keys if "/rollouts/onpolicy/window-" in key)
        tables = [
            pa.ipc.open_file(bench.client.get_object(Bucket=bucket, Key=key)["Body"].read()).read_all()
            for key in files
        ]
        headers = [json.loads(table.schema.metadata[b"vpmoe"]) for table in tables]
        compared_headers = [
            {key: value for key, value in header.items() if key not in ("run", "config", "rollouts")}
            for header in headers
        ]
        versions = {
            key.split("/")[-2]
            for key in keys
            if "/weights/onpolicy/" in key and key.endswith("/manifest.json")
        }
        results.append(
            (
                [file.rpartition("/")[2] for file in files],
                compared_headers,
                [table.to_pydict() for table in tables],
                versions,
            )
        )
    assert results[0] == results[1]
    assert len(results[0][0]) == 2 * bench.step("undisturbed", "onpolicy-sampler")["partsDone"]
    assert len(results[0][3]) >= 2


@pytest.mark.parametrize("name", ["undisturbed", "killed"])
def test_every_object_matches_its_manifest(bench: StageRuns, cluster: Cluster, name: str) -> None:
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": cluster.s3.endpoint,
        "AWS_ACCESS_KEY_ID": cluster.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key,
    }
    command = [sys.executable, "-m", "vpmoe.storage", "verify", f"s3://{bench.name}-{name}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_second_run_with_the_same_dataset_and_teacher_reuses_both_and_reports_it(bench: StageRuns) -> None:
    bench.apply("again", f"{bench.name}-undisturbed", [STAGES[0], {**STAGES[1], "mix": 0.3}])
    wait_until(
        lambda: bench.step("again", "rescore").get("state") in ("Succeeded", "Failed"),
        "again has scores",
        seconds=180,
        every=1,
    )
    for step in ("preprocess", "rescore"):
        assert (bench.step("again", step)["reused"], bench.step("again", step)["message"]) == (True, "Reused")
    bench.kubectl("delete", "distillrun", "again", "--timeout=120s")
