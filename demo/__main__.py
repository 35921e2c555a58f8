"""The demonstration: one small DistillRun from `helm install` to a trained student, on the selected cluster.

It types what a user would type and shows it: helm, kubectl create, apply, get. What it shows of the run it
reads from the run's status and metrics. At the end the exported student answers a question. A second run
deletes the DistillRun and creates it again. Cluster and run stay up afterwards."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3

from demo import sample
from demo.plot import plot
from demo.summary import summary
from demo.teacher import SHARDS, make_teacher
from devcluster import configuration, install
from devcluster.access import environment
from devcluster.cluster import Cluster, choice, up

NAMESPACE = "default"
RUN = "demo"
MANIFEST = "manifests/examples/demo.yaml"
BUCKETS = ("corpora", "models", "vpmoe")
TEACHER = "tiny-gpt-oss"
PICTURE, REPORT = "demo.svg", "report.html"
"""Files beside the kubeconfig."""
MODEL = "model"
"""Folder beside the kubeconfig."""
QUESTION = "Why does the Moon always show the same face to Earth?"
"""A question of the sample."""
ANSWER_TOKENS = 192
"""Longest answer that is shown: it takes seconds on a CPU."""
DEADLINE = 900
"""Seconds after which a run that has not ended is reported as stuck."""
REMOVAL = {
    "dev": "make down",
    "kind": "make down CLUSTER=kind",
    "current": f"kubectl delete distillrun {RUN} --namespace {NAMESPACE}",
}
"""Cluster → the command that removes it, or from a user's own cluster the run alone."""


def say(text: str = "") -> None:
    """Print to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_command(*command: str) -> None:
    """Print a command as a user would type it."""
    say("\n$ " + shlex.join(command))


def s3_client(cluster: Cluster) -> Any:
    """A client of the cluster's S3 store."""
    return boto3.client(
        "s3",
        endpoint_url=cluster.s3.endpoint,
        aws_access_key_id=cluster.s3.access_key,
        aws_secret_access_key=cluster.s3.secret_key,
        region_name="us-east-1",
    )


def upload(store: Any) -> None:
    """Upload the repository's sample as parquet shards, and the trained teacher."""
    existing = {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in existing:
            store.create_bucket(Bucket=bucket)
    with tempfile.TemporaryDirectory() as folder:
        shards = sample.write(Path(folder), shards=SHARDS)
        for shard in shards:
            store.upload_file(str(shard), "corpora", f"demo/{shard.name}")
    rows = sample.rows()
    languages = ", ".join(sorted({row["language"] for row in rows if row["language"]}))
    say(
        f"\nTraining input: {len(rows)} documents in {languages}: {len(shards)} parquet files, "
        "s3://corpora/demo/"
    )
    say(
        "Teacher: a tiny GPT-OSS trained on the documents that are not held out, a minute or two the first "
        "time"
    )
    files = sorted(make_teacher().iterdir(), key=lambda file: file.name == "config.json")
    for file in files:  # config.json last: a model without it is incomplete
        store.upload_file(str(file), "models", f"{TEACHER}/{file.name}")
    say(f"         at s3://models/{TEACHER}/")


def apply(cluster: Cluster) -> None:
    """Apply MANIFEST. It names the store of the development cluster; another cluster's replaces it."""
    manifest, endpoint = Path(MANIFEST).read_text(), cluster.s3.pod_endpoint
    if endpoint == configuration.S3_ENDPOINT:
        show_command("kubectl", "apply", "--filename", MANIFEST)
    else:
        replacement = f"s,{configuration.S3_ENDPOINT},{endpoint},"
        say(f"\n$ {shlex.join(['sed', replacement, MANIFEST])} | kubectl apply --filename -")
        manifest = manifest.replace(configuration.S3_ENDPOINT, endpoint)
    say(cluster.kubectl("apply", "--namespace", NAMESPACE, "--filename", "-", input=manifest).rstrip())


def get_run(cluster: Cluster) -> dict[str, Any]:
    """The DistillRun, as `kubectl get --output=json` prints it."""
    command = ("get", "distillrun", RUN, "--namespace", NAMESPACE, "--output=json")
    run: dict[str, Any] = json.loads(cluster.kubectl(*command))
    return run


def follow_command() -> list[str]:
    """The command that shows the run until it ends."""
    return [sys.executable, "-m", "vpmoe", "status", RUN, "--namespace", NAMESPACE, "--watch"]


def follow(cluster: Cluster) -> dict[str, Any]:
    """Show the steps of the run until it has ended, and return it.

    Raises SystemExit with the output of `kubectl describe` if the run fails or does not end in time.
    """
    command = follow_command()
    show_command(*typed(command))
    with subprocess.Popen(command, env=environment(cluster.kubeconfig)) as watching:
        try:
            watching.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            watching.send_signal(signal.SIGINT)
    run = get_run(cluster)
    status = run.get("status", {})
    if status.get("phase") != "Succeeded":
        say(cluster.kubectl("describe", "distillrun", RUN, "--namespace", NAMESPACE))
        pods = f"kubectl get pods --selector vpmoe.dev/run={RUN}"
        raise SystemExit(f"The run is {status.get('phase')}, not Succeeded. Its pods: {pods}")
    return run


def report(cluster: Cluster, store: Any, run: dict[str, Any]) -> None:
    """Print what the student learned, a picture of the losses, the run's report, and where everything is."""
    show_command("kubectl", "get", "distillruns", "--output=wide")
    say(cluster.kubectl("get", "distillruns", "--namespace", NAMESPACE, "--output=wide").rstrip())
    status, folder = run["status"], run["status"]["provenance"]["folder"]
    prefix = folder.removeprefix("s3://vpmoe/")
    stages = read_metrics(store, prefix, [stage["name"] for stage in run["spec"]["stages"]])
    say("\n" + "\n".join(summary(stages)))
    say(f"\nPicture      {plot(stages, cluster.kubeconfig.with_name(PICTURE)).resolve()}")
    page = cluster.kubeconfig.with_name(REPORT)
    store.download_file("vpmoe", f"{prefix}/report/index.html", str(page))
    say(f"Report       {page.resolve()}")
    say(f"Model        {status['model']}")
    say(f"Checkpoint   {status['checkpoint']['manifest']}")
    say(f"Dataset      {status['provenance']['dataset']['manifest']}")
    say(f"Run          {folder}")
    say("\nLook around:")
    for command in look_around(cluster, folder):
        say(f"  {command}")


def look_around(cluster: Cluster, folder: str) -> list[str]:
    """Commands that show more of the run with this folder, and the one that removes the selected cluster."""
    keys = f"AWS_ACCESS_KEY_ID={cluster.s3.access_key} AWS_SECRET_ACCESS_KEY={cluster.s3.secret_key}"
    return [
        f"export KUBECONFIG={cluster.kubeconfig} PATH={cluster.kubectl_path.parent}:$PATH",
        f"kubectl describe distillrun {RUN}",
        f"kubectl get pods --selector vpmoe.dev/run={RUN}",
        f"kubectl logs --selector vpmoe.dev/run={RUN},vpmoe.dev/step=onpolicy-sampler --tail=20",
        "kubectl explain distillrun.spec.stages",
        f"AWS_ENDPOINT_URL={cluster.s3.endpoint} {keys} .venv/bin/python -m vpmoe verify {folder}",
        REMOVAL[choice()],
    ]


def read_metrics(store: Any, folder: str, stages: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The metrics lines of each stage, in the order of the objects."""
    found: dict[str, list[dict[str, Any]]] = {}
    for stage in stages:
        prefix = f"{folder}/steps/{stage}/metrics/"
        objects = store.list_objects_v2(Bucket="vpmoe", Prefix=prefix).get("Contents", [])
        bodies = (store.get_object(Bucket="vpmoe", Key=entry["Key"])["Body"].read() for entry in objects)
        found[stage] = [json.loads(line) for body in bodies for line in body.decode().splitlines()]
    return found


def export_command(folder: str, model: Path) -> list[str]:
    """The command that brings the exported student of the run with this folder into `model`."""
    return [sys.executable, "-m", "vpmoe", "export", folder, "--to", str(model)]


def chat_command(model: Path) -> list[str]:
    """The command that asks the student in `model`."""
    tokens = ("--max-tokens", str(ANSWER_TOKENS))
    return [sys.executable, "-m", "vpmoe", "chat", str(model), QUESTION, "--effort", "high", *tokens]


def ask(cluster: Cluster, run: dict[str, Any]) -> None:
    """Download the exported student, ask it, and print its answer and how to ask again.

    It has learned from a few thousand tokens: it knows the form of an answer at best.
    """
    store = {
        "AWS_ENDPOINT_URL": cluster.s3.endpoint,
        "AWS_ACCESS_KEY_ID": cluster.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": cluster.s3.secret_key,
    }
    model = cluster.kubeconfig.with_name(MODEL)
    shutil.rmtree(model, ignore_errors=True)
    for command in (export_command(run["status"]["provenance"]["folder"], model), chat_command(model)):
        show_command(*typed(command))
        subprocess.run(command, env={**os.environ, **store}, check=True)
    say("\nAsk it something else:\n  " + shlex.join(typed(chat_command(model))))


def typed(command: list[str]) -> list[str]:
    """The command as a user types it in the checkout."""
    return [".venv/bin/python", *command[1:]]


def main() -> None:
    started = time.monotonic()
    cluster = up()
    show_command("helm", *install.arguments(cluster))
    install.operator(cluster)
    say(cluster.kubectl("get", "deployment,pods", "--namespace", install.NAMESPACE).rstrip())
    store = s3_client(cluster)
    upload(store)
    install.credentials(cluster, NAMESPACE)
    delete = ("delete", "distillrun", RUN, "--namespace", NAMESPACE, "--ignore-not-found", "--wait")
    cluster.kubectl(*delete, "--timeout=120s")
    apply(cluster)
    run = follow(cluster)
    report(cluster, store, run)
    say(f"\n{time.monotonic() - started:.0f} s. Now the student answers a question, on this machine:")
    ask(cluster, run)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"{shlex.join(map(str, error.cmd))}: exit {error.returncode}: {error.stderr}"
        ) from error
