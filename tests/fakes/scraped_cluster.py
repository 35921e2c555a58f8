"""The pods of a cluster as Prometheus scrapes them from outside, in place of the chart's monitors."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from kubernetes.client import Configuration
from kubernetes.config import load_kube_config

from tests.fakes.run_harness import api_client


@contextmanager
def pods_of_cluster(kubeconfig: Path, folder: Path, *namespaces: str) -> Iterator[dict[str, Any]]:
    """A scrape configuration of the running pods of these namespaces that declare a port `metrics` (runs) or
    `http` (the operator), as the chart's monitors select them, through the API server's proxy.

    The labels `namespace` and `pod` are those that the monitors add. Debian's Prometheus has no service
    discovery for Kubernetes, so a thread writes the pods to a file in `folder`, once a second.
    """
    found = Configuration()
    load_kube_config(str(kubeconfig), client_configuration=found)
    file, ended = folder / "pods.json", threading.Event()

    def write(targets: list[dict[str, Any]]) -> None:
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(targets))
        draft.rename(file)

    def follow() -> None:
        with api_client(kubeconfig) as api:
            before: list[dict[str, Any]] = []
            while not ended.wait(1):
                with suppress(httpx2.HTTPError):  # the next look shows the same
                    now = [target for name in namespaces for target in pod_targets(api, name)]
                    if now != before:
                        write(now)
                        before = now

    write([])
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield {
            "job_name": "pods",
            "scheme": "https",
            "tls_config": {
                "ca_file": found.ssl_ca_cert,
                "cert_file": found.cert_file,
                "key_file": found.key_file,
            },
            "file_sd_configs": [{"files": [str(file)]}],
        }
    finally:
        ended.set()
        thread.join()


def pod_targets(api: httpx2.Client, namespace: str) -> list[dict[str, Any]]:
    """The pods to scrape in a namespace, as the API server lists them now."""
    answer = api.get(f"/api/v1/namespaces/{namespace}/pods").raise_for_status()
    return [
        {
            "targets": [api.base_url.netloc.decode()],
            "labels": {
                "__metrics_path__": f"/api/v1/namespaces/{namespace}/pods/{name}:{port['containerPort']}"
                "/proxy/metrics",
                "namespace": namespace,
                "pod": name,
                "instance": name,
            },
        }
        for pod in answer.json()["items"]
        if pod["status"].get("phase") == "Running" and (name := pod["metadata"]["name"])
        for container in pod["spec"]["containers"]
        for port in container.get("ports", ())
        if port.get("name") in ("metrics", "http")
    ]
