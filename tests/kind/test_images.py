"""The images that `make images` has built from this commit: who they run as, what they hold, and that each
role runs in them as the pods do.

VARIANT in the environment, cpu by default, is that of `inference`. With cuda `make test-cuda-images` runs
what needs no GPU.

A container gets what a pod gets: the user 65532, no capability, a read-only root file system, an empty /tmp.
"""

import json
import os
import re
import subprocess
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.fakes.dense_models import save_dense_model
from tests.fakes.store import S3
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.storage import Bucket, paths

ROOT = Path(__file__).parents[2]
NAMES = ("operator", "trainer", "inference")
VARIANT = os.environ.get("VARIANT") or "cpu"
LOCKS = {"operator": "operator", "trainer": "trainer", "inference": f"inference-{VARIANT}"}
OPERATOR_BYTES = 200_000_000
POD = (
    "--read-only",
    "--user=65532:65532",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
    "--env=TMPDIR=/tmp",
    "--env=CUDA_VISIBLE_DEVICES=",
)
"""What docker run needs to give a container what the operator gives its pods."""
START = ["docker", "run", "--rm", *POD, "--network=none"]
INSTALLED = """
import importlib.metadata, json, re
found = importlib.metadata.distributions()
print(json.dumps({re.sub("[-_.]+", "-", each.name.lower()): each.version for each in found}))
"""
FILES = """
import csv, json, posixpath
from importlib.metadata import distributions
rows = {each.name: csv.reader((each.read_text("RECORD") or "").splitlines()) for each in distributions()}
print(json.dumps({name: [posixpath.normpath(path) for path, *_ in found] for name, found in rows.items()}))
"""
SHIPPED_TWICE = {"build_backend.py"}
"""A build script that the wheels of flashinfer-python and torch-c-dlpack-ext have by mistake. Nothing imports
it."""
LEFT_BY_A_BUILD = (
    "find / -xdev -type f ( -name pip.conf -o -name uv.toml -o -name .netrc -o -name uv ) -size +0"
)


def docker(*arguments: str, input: str | None = None) -> str:
    ended = subprocess.run(["docker", *arguments], capture_output=True, text=True, input=input, check=False)
    assert ended.returncode == 0, f"docker {' '.join(arguments)}: {ended.stderr[-4000:]}"
    return ended.stdout


def run(image: str, *command: str, options: tuple[str, ...] = ("--network=none",)) -> str:
    """The output of a command in a container that has what a pod has."""
    return docker("run", "--rm", *POD, *options, image, *command)


@pytest.fixture(scope="session")
def images() -> dict[str, str]:
    """Name → reference of the images of this commit."""
    found = subprocess.run(
        ["docker/images.sh", "names"],
        cwd=ROOT,
        env={**os.environ, "VARIANT": VARIANT},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for reference in found:
        if subprocess.run(
            ["docker", "image", "inspect", reference], capture_output=True, check=False
        ).returncode:
            pytest.fail(f"{reference} is not there. Build it first: make images VARIANT={VARIANT}")
    return dict(zip(NAMES, found, strict=True))


@pytest.fixture(scope="session")
def inspected(images: dict[str, str]) -> dict[str, Any]:
    return {name: json.loads(docker("image", "inspect", image))[0] for name, image in images.items()}


@pytest.fixture(scope="session")
def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_an_image_names_its_user_and_its_commit(
    images: dict[str, str], inspected: dict[str, Any], commit: str, name: str
) -> None:
    config = inspected[name]["Config"]
    assert config["User"] == "65532:65532" and config["WorkingDir"] == "/opt/vpmoe"
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (labels["revision"], labels["version"], labels["licenses"]) == (commit, release, "Apache-2.0")
    assert labels["title"] and labels["base.name"]
    assert run(images[name], "cat", "/opt/vpmoe/commit").strip() == commit
    whoami = "import getpass, os; print(os.getuid(), getpass.getuser())"
    assert run(images[name], "python", "-c", whoami).split() == ["65532", "nonroot"]


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_exactly_the_packages_of_its_lock(images: dict[str, str], name: str) -> None:
    lock = (ROOT / "docker" / f"{LOCKS[name]}.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", lock, re.MULTILINE))
    found = json.loads(run(images[name], "python", "-c", INSTALLED))
    assert found.pop("vpmoe")
    assert found == locked


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_an_image_belongs_to_two_distributions(images: dict[str, str], name: str) -> None:
    """The one that was installed last would have overwritten the other's."""
    owners = defaultdict(set)
    for distribution, files in json.loads(run(images[name], "python", "-c", FILES)).items():
        for file in files:
            owners[file].add(distribution)
    assert {file for file, found in owners.items() if len(found) > 1} <= SHIPPED_TWICE


def test_the_operator_is_small_and_has_neither_a_tensor_library_nor_a_storage_client(
    images: dict[str, str], inspected: dict[str, Any]
) -> None:
    assert inspected["operator"]["Size"] < OPERATOR_BYTES
    for package in ("torch", "numpy", "boto3", "botocore", "vllm", "transformers"):
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is not None)"
        run(images["operator"], "python", "-c", code)


def test_trainer_and_inference_share_the_layer_with_torch(inspected: dict[str, Any]) -> None:
    """It is the layer that docker/shared.lock makes, and is loaded and pulled once."""
    first, second = (inspected[name] for name in ("trainer", "inference"))
    both = set(first["RootFS"]["Layers"]) & set(second["RootFS"]["Layers"])
    sizes = [
        int(line.split()[0])
        for line in docker(
            "history", "--human=false", "--no-trunc", "--format={{.Size}} {{.CreatedBy}}", first["Id"]
        ).splitlines()
        if line.split()[0] != "0" and "WORKDIR" not in line
    ]
    own = len(first["RootFS"]["Layers"]) - len(both)
    assert sum(sizes[own:]) > 0.8 * first["Size"], (own, sizes)


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_states_the_size_of_an_image(inspected: dict[str, Any], name: str) -> None:
    guide = (ROOT / "docs/guides/containers.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|.*\| (.+) \|$", guide, re.MULTILINE)
    sizes = [float(size) for size in re.findall(r"\d+(?:\.\d+)?", row)]
    stated = sizes[1] if "VARIANT=cpu" in row and VARIANT == "cpu" else sizes[0]
    unit = 1e9 if " GB" in row else 1e6
    # Another base image, such as Docker Hub's, is some 10 MB larger or smaller.
    assert inspected[name]["Size"] == pytest.approx(stated * unit, rel=0.02, abs=12e6)


def secrets_of_this_machine() -> set[str]:
    """What must not get into an image: hosts of package indexes, credentials, paths of the checkout."""
    listed = subprocess.run(
        ["python3", "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    values = [*re.findall(r"https?://[^\s'\"]+", listed)]
    values += [value for name, value in os.environ.items() if re.search(r"(PIP|UV)_.*(INDEX|URL)", name)]
    hosts = {urlsplit(value).hostname or "" for value in values} - {"pypi.org", "files.pythonhosted.org", ""}
    return {*hosts, str(ROOT)}


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_has_a_setting_of_the_machine_that_built_it(
    images: dict[str, str], inspected: dict[str, Any], name: str
) -> None:
    described = json.dumps(inspected[name]["Config"]) + docker("history", "--no-trunc", images[name])
    assert not [value for value in secrets_of_this_machine() if value in described]
    found = docker("run", "--rm", "--user=0", "--network=none", images[name], *LEFT_BY_A_BUILD.split())
    assert not found.split()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("operator", ["python", "-m", "distill_operator", "--help"]),
        ("trainer", ["python", "-c", "import jobs.preprocess, jobs.train, jobs.clear, megatron.core, torch"]),
        ("trainer", ["gcc", "--version"]),
        (
            "inference",
            ["python", "-c", "import jobs.rescore, jobs.teacher, jobs.sampler, jobs.evaluate, jobs.report"],
        ),
        ("inference", ["python", "-c", "import jobs.train, jobs.forced_teacher, megatron.core"]),
        ("inference", ["gcc", "--version"]),
        # vLLM for CUDA looks for a GPU before it prints its help
        *(
            [("inference", ["python", "-m", "vllm.entrypoints.openai.api_server", "--help"])]
            * (VARIANT == "cpu")
        ),
    ],
)
def test_what_the_pods_start_starts_without_network_and_without_writing(
    images: dict[str, str], name: str, command: list[str]
) -> None:
    run(images[name], *command)


def test_the_init_container_prints_that_it_finds_no_cluster(images: dict[str, str]) -> None:
    ended = subprocess.run(
        [
            "docker",
            "run",
            "--rm",
            *POD,
            "--network=none",
            images["operator"],
            "python",
            "-m",
            "distill_operator.crd",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr and "kubeconfig" in ended.stderr.lower()


def test_a_run_is_preprocessed_trained_and_evaluated_in_containers(
    images: dict[str, str],
    s3: S3,
    store: Bucket,
    sample_parquet: list[Path],
    run_spec: Mapping[str, Any],
    commit: str,
    tmp_path: Path,
) -> None:
    spec = run_spec["spec"]
    spec["stages"] = [{"name": "vanilla", "kind": "Vanilla", "tokens": 1024}]
    spec["training"] |= {
        "sequenceLength": 512,
        "globalBatchTokens": 1024,
        "checkpoint": {"everyTokens": "1k"},
    }
    spec["training"]["optimizer"] |= {"warmupTokens": 512}
    spec["evaluation"] = {"everyTokens": "1k", "documents": 2, "completions": 3}
    spec["student"]["init"] = {"upcycle": {"model": f"s3://{spec['storage']['bucket']}/dense"}}
    parsed = DistillRun.parse(dict(run_spec))
    bucket = store.other(spec["storage"]["bucket"])
    (dense := tmp_path / "dense").mkdir()
    save_dense_model(dense, hidden_size=64)
    for file in dense.iterdir():
        bucket.put_file(f"dense/{file.name}", file, {})
    for number, file in enumerate(sample_parquet):
        bucket.put_file(f"input/{number:03d}.parquet", file, {})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(dict(run_spec)))
    options = (
        "--network=host",  # the store is on the loopback interface
        f"--volume={tmp_path}:/etc/vpmoe:ro",
        f"--env=AWS_ACCESS_KEY_ID={s3.access_key}",
        f"--env=AWS_SECRET_ACCESS_KEY={s3.secret_key}",
        "--shm-size=1g",
    )
    tmp_path.chmod(0o755)
    for image, role, step in (
        ("trainer", "init", "init"),
        ("trainer", "preprocess", "preprocess"),
        ("trainer", "train", "vanilla"),
        ("inference", "evaluate", "vanilla-evaluate"),
    ):
        run(images[image], "python", "-m", f"jobs.{role}", "--run", "/etc/vpmoe/run.yaml", options=options)
        progress = Progress.model_validate(bucket.get_json(paths.progress(parsed, step)))
        assert progress.state == "Succeeded", progress
    written = {found.key for found in bucket.list(paths.run(parsed))}
    manifests = [bucket.get_json(key) for key in written if key.endswith("manifest.json")]
    assert manifests and all(commit in json.dumps(manifest) for manifest in manifests)
