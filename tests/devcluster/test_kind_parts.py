"""Parts of CLUSTER=kind that need neither Docker nor a cluster."""

import re
from pathlib import Path

import pytest
import yaml

from devcluster import ClusterError, addons, configuration, current, kind, node_image
from vpmoe.api import DistillRun

ROOT = Path(__file__).parents[2]


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((addons.MANIFESTS / "kind" / name).read_text()))


def test_host_and_pods_reach_the_same_service() -> None:
    (node,) = documents("cluster.yaml")[0]["nodes"]
    (opened,) = node["extraPortMappings"]
    objects = {document["kind"]: document for document in documents("s3.yaml")}
    service, (port,) = objects["Service"], objects["Service"]["spec"]["ports"]
    assert opened["containerPort"] == port["nodePort"]
    assert kind.STORE.endpoint == f"http://{opened['listenAddress']}:{opened['hostPort']}"
    place = "{name}.{namespace}".format_map(service["metadata"])
    assert kind.STORE.pod_endpoint == f"http://{place}.svc.cluster.local:{port['port']}"


def test_the_stores_keys_are_those_that_clients_use() -> None:
    secret = next(found for found in documents("s3.yaml") if found["kind"] == "Secret")
    keys = {"ROOT_ACCESS_KEY": kind.STORE.access_key, "ROOT_SECRET_KEY": kind.STORE.secret_key}
    assert secret["stringData"] == keys


def test_the_demonstrations_run_names_the_store_that_other_clusters_replace() -> None:
    run = yaml.safe_load((ROOT / "manifests/examples/demo.yaml").read_text())
    assert run["spec"]["storage"]["endpoint"] == configuration.S3_ENDPOINT


def test_compiled_images_replace_all_that_would_be_pulled() -> None:
    pulled = addons.kustomize("overlay", ["s3.yaml"], compiled_images=False)
    compiled = addons.kustomize("overlay", ["s3.yaml"], compiled_images=True)
    assert "images" not in pulled
    named = {f"{image['newName']}:{image['newTag']}" for image in compiled["images"]}
    init = re.search(r"--pytorch-init-container-image=(\S+)", compiled["patches"][-1]["patch"])
    assert init and {*named, init[1]} == set(node_image.STUB_IMAGES)
    deployment = next(found for found in documents("s3.yaml") if found["kind"] == "Deployment")
    store = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert store.rpartition(":")[0] in {image["name"] for image in compiled["images"]}


@pytest.mark.parametrize(
    "image, stage",
    [
        ("registry.k8s.io/pause:3.10.1", "pause"),
        ("registry.k8s.io/coredns/coredns:v1.12.1", "coredns"),
        ("registry.k8s.io/kube-apiserver:v1.36.3", "components"),
        ("registry.k8s.io/etcd:3.6.8-0", "components"),
        *((image, "components") for image in node_image.STUB_IMAGES),
    ],
)
def test_each_image_of_the_node_has_a_stage_of_the_dockerfile(image: str, stage: str) -> None:
    assert node_image.stage(image) == stage
    assert f" AS {stage}\n" in (node_image.SOURCES / "Dockerfile").read_text()


def test_an_unknown_node_is_rejected_with_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIND_NODE", "podman")
    with pytest.raises(ClusterError, match=r"KIND_NODE=podman: choose stock .* or built"):
        node_image.is_built()


def test_the_chart_gets_the_images_registry_and_tag_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind, "kubectl", lambda: Path("kubectl"))
    monkeypatch.setattr(kind, "helm", lambda: Path("helm"))
    images = [f"localhost:5000/vpmoe/{name}:abc" for name in ("operator", "trainer", "inference")]
    assert kind.connect(images).chart_arguments == (
        *("--set", "images.registry=localhost:5000/vpmoe"),
        *("--set", "images.tag=abc"),
    )


def test_missing_images_of_your_own_cluster_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REGISTRY", raising=False)
    monkeypatch.setenv("TAG", "v1")
    with pytest.raises(ClusterError, match="set REGISTRY to those that you built with `make images`"):
        current.chart_arguments()


def test_demonstration_fits_a_small_node() -> None:
    # A role that is not named asks for the chart's 2 or 4 CPUs, which a node of two cores never has free.
    run = DistillRun.model_validate(yaml.safe_load((ROOT / "manifests/examples/demo.yaml").read_text()))
    assert {run.role(step) for step in run.steps()} <= set(run.spec.runtime.resources)


def test_links_are_removed_and_not_what_they_point_to(tmp_path: Path) -> None:
    # Debian's packages have links to folders among what the node does not need.
    kept = tmp_path / "kept" / "file"
    kept.parent.mkdir()
    kept.write_text("kept")
    for link, target in (("to-folder", "kept"), ("to-file", "kept/file"), ("to-nothing", "gone")):
        (tmp_path / link).symlink_to(target)
        node_image.remove(tmp_path / link)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    node_image.remove(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "kept"
