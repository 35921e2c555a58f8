"""A copy of this checkout, its wheel, and Python environments that have it and not the checkout.

Nothing is downloaded: the wheel is built with the setuptools of this environment, and what it depends on is
copied from it.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SITE = "lib/python3.12/site-packages"


def copy_checkout(folder: Path) -> Path:
    """Copy the checkout's files that git does not ignore into a new folder. Returns the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build_wheel(folder: Path) -> Path:
    """The wheel of the checkout's files that git does not ignore, built in a copy of them."""
    copy = copy_checkout(folder / "source")
    code = "import setuptools.build_meta as backend, sys; backend.build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, cwd=copy, env=environment(), check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def environment(**added: str) -> dict[str, str]:
    """This process' environment without what would make the checkout importable."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | added


def install_with_its_requirements(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel, and the distributions that it requires without any extra. Returns its
    folder of programs."""
    programs = _install(wheel, folder)
    for name in required(wheel):
        for file in distribution(name).files or []:
            if file.parts[0] != "..":  # programs of the distribution
                (folder / SITE / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), folder / SITE / file)
    return programs


def install_beside_everything(wheel: Path, folder: Path) -> Path:
    """An environment with the wheel and all packages of this process' environment. Returns its folder of
    programs."""
    programs = _install(wheel, folder)
    packages = Path(distribution("pytest").locate_file("."))
    (folder / SITE / "packages.pth").write_text(f"{packages}\n")
    return programs


def _install(wheel: Path, folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    options = ["--quiet", "--offline", "--no-deps", "--no-cache", "--python", folder / "bin/python"]
    subprocess.run([sys.executable, "-m", "uv", "pip", "install", *options, wheel], check=True)
    return folder / "bin"


def required(wheel: Path) -> set[str]:
    """Names of the distributions that the wheel requires without any extra, and of what they require."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    found: set[str] = set()
    ahead = _names(re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE))
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead |= _names(distribution(name).requires or [])
    return found


def _names(requirements: Iterable[str]) -> set[str]:
    parsed = map(Requirement, requirements)
    return {each.name for each in parsed if each.marker is None or each.marker.evaluate({"extra": ""})}
