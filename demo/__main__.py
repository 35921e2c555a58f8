"""The demonstration: one small DistillRun from `helm install` to a trained student, on the development cluster that is up.

It types what a user would type and shows it: helm, kubectl create, apply, get --watch. What it knows it reads from the run's status.
Run it again and it deletes the run and makes it anew. Cluster and run stay up afterwards, to look at.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3

from demo import sample
from devcluster import install
from devcluster.cluster import Cluster, up
from tests.fakes import tiny_teacher

NAMESPACE = "default"
RUN = "demo"
MANIFEST = "manifests/examples/demo.yaml"
BUCKETS = ("corpora", "models", "vpmoe")
TEACHER = "tiny-gpt-oss"
DEADLINE = 900
"""Seconds after which a run that has not ended is shown as stuck."""


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def shown(*command: str) -> None:
    say("\n$ " + shlex.join(command))


def client(cluster: Cluster) -> Any:
    """The development cluster's store."""
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3.endpoint,
        aws_access_key_id=cluster.s3.access_key,
        aws_secret_access_key=cluster.s3.secret_key,
        region_name="us-east-1",
    )


def upload(store: Any) -> None:
    """The repository's sample as parquet shards, and a teacher: a random GPT-OSS of a few million parameters beside its vocabulary."""
    there = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in there:
            store.create_bucket(Bucket=bucket)
    with tempfile.TemporaryDirectory() as folder:
        shards = sample.write(Path(folder), shards=2)
        for shard in shards:
            store.upload_file(str(shard), "corpora", f"demo/{shard.name}")
    rows = sample.rows()
    languages = sorted({row["language"] for row in rows if row["language"]})
    say(
        f"\nTraining input: {len(rows)} documents in {', '.join(languages)}, as {len(shards)} parquet files at s3://corpora/demo/"
    )
    if not store.list_objects_v2(Bucket="models", Prefix=f"{TEACHER}/model.safetensors").get(
        "KeyCount"
    ):  # the last of its files
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(
                tiny_teacher.write(Path(folder)).iterdir(), key=lambda file: file.name == "config.json"
            ):  # last: then it is whole
                store.upload_file(str(file), "models", f"{TEACHER}/{file.name}")
    say(f"Teacher: a tiny GPT-OSS with random weights, made here, at s3://models/{TEACHER}/")


def get(cluster: Cluster) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(
        cluster.kubectl("get", "distillrun", RUN, "--namespace", NAMESPACE, "--output=json")
    )
    return run


def follow(cluster: Cluster) -> dict[str, Any]:
    """Show `kubectl get --watch` until the run has ended. Returns the run.

    Raises SystemExit with `kubectl describe` where it failed or did not end in time.
    """
    command = ["get", "distillrun", RUN, "--namespace", NAMESPACE, "--watch"]
    shown("kubectl", *command)
    watch = subprocess.Popen([cluster.kubectl_path, "--kubeconfig", cluster.kubeconfig, *command])
    try:
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            run = get(cluster)
            if run.get("status", {}).get("phase") in ("Succeeded", "Failed"):
                time.sleep(0.5)  # the watch shows the last line too
                break
            time.sleep(2)
    finally:
        watch.terminate()
        watch.wait()
    phase = run.get("status", {}).get("phase")
    if phase != "Succeeded":
        say(cluster.kubectl("describe", "distillrun", RUN, "--namespace", NAMESPACE))
        raise SystemExit(
            f"The run is {phase}, not Succeeded. Its pods: kubectl get pods --selector vpmoe.dev/run={RUN}"
        )
    return run


def report(cluster: Cluster, store: Any, run: dict[str, Any]) -> None:
    """Where everything is, and what it came to."""
    shown("kubectl", "get", "distillruns", "--output=wide")
    say(cluster.kubectl("get", "distillruns", "--namespace", NAMESPACE, "--output=wide").rstrip())
    status = run["status"]
    say("\nHeld-out loss, nats a token             before    after")
    for step in (step for step in status["steps"] if "heldOut" in step):
        before, after = step["heldOut"]["before"], step["heldOut"]["latest"]
        for span in ("reasoning", "final"):
            say(f"  {step['name']:<12} {span:<21} {before[span]:>9.3f} {after[span]:>8.3f}")
    folder = status["provenance"]["folder"]
    say("\n" + "\n".join(on_policy(store, folder.removeprefix("s3://vpmoe/"))))
    say(f"\nCheckpoint   {status['checkpoint']['manifest']}")
    say(f"Data set     {status['provenance']['dataset']['manifest']}")
    rescored = next(step for step in status["steps"] if step["name"] == "rescored")["checkpoint"]["manifest"]
    checkpoint = json.loads(
        store.get_object(Bucket="vpmoe", Key=rescored.removeprefix("s3://vpmoe/"))["Body"].read()
    )
    made_from = checkpoint["predicate"]["buildDefinition"]["resolvedDependencies"]
    say(f"Scores       {next(found['uri'] for found in made_from if found['name'] == 'scores')}")
    say(f"Run          {folder}")
    say(
        f"""
Look around:
  export KUBECONFIG={cluster.kubeconfig} PATH={cluster.kubectl_path.parent}:$PATH
  kubectl describe distillrun {RUN}
  kubectl get pods --selector vpmoe.dev/run={RUN}
  kubectl logs --selector vpmoe.dev/run={RUN},vpmoe.dev/step=onpolicy-sampler --tail=20
  kubectl explain distillrun.spec.stages
  AWS_ENDPOINT_URL={cluster.s3.endpoint} AWS_ACCESS_KEY_ID={cluster.s3.access_key} AWS_SECRET_ACCESS_KEY={cluster.s3.secret_key} \\
    .venv/bin/python -m vpmoe.storage verify {folder}
  make down"""
    )


def on_policy(store: Any, folder: str) -> list[str]:
    """What the OnPolicy stage came to, from its metrics."""
    found = store.list_objects_v2(Bucket="vpmoe", Prefix=f"{folder}/steps/onpolicy/metrics/")["Contents"]
    text = "".join(
        store.get_object(Bucket="vpmoe", Key=entry["Key"])["Body"].read().decode() for entry in found
    )
    windows = [line for line in map(json.loads, text.splitlines()) if line.get("kind") == "OnPolicy"]
    versions = sorted({line["version"] for line in windows})
    said = [
        f"{len(windows)} windows of the student's own completions, from its versions {', '.join(map(str, versions))}"
    ]
    for span in ("reasoning", "final"):
        if measured := [line["reverseKl"][span] for line in windows if line["reverseKl"][span] is not None]:
            said.append(
                f"  KL(student‖teacher), nats a token  {span:<9} {measured[0]:>8.3f} {measured[-1]:>8.3f}"
            )
    return said


def main() -> None:
    started = time.monotonic()
    cluster = up()
    shown(
        "helm",
        "upgrade",
        "--install",
        "distill-operator",
        "charts/distill-operator",
        "--values=…/values-dev.yaml",
        "--wait",
    )
    install.operator(cluster)
    say(cluster.kubectl("get", "deployment,pods", "--namespace", install.NAMESPACE).rstrip())
    store = client(cluster)
    upload(store)
    install.credentials(cluster, NAMESPACE)
    cluster.kubectl(
        "delete",
        "distillrun",
        RUN,
        "--namespace",
        NAMESPACE,
        "--ignore-not-found",
        "--wait",
        "--timeout=120s",
    )
    shown("kubectl", "apply", "--filename", MANIFEST)
    say(cluster.kubectl("apply", "--namespace", NAMESPACE, "--filename", MANIFEST).rstrip())
    report(cluster, store, follow(cluster))
    say(f"\n{time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
