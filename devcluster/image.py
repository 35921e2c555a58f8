"""Builds the stub image, which has the names of all images of the development cluster.

It has mount points, users and the static `pause`. Programs and code are mounted from the host
(configuration.container_spec), so pods run with production's commands, users and security contexts without an
image build.
"""

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Mapping, Sequence

from devcluster import configuration
from vpmoe.provenance import COMMIT_FILE

WORKING_FOLDER = "/opt/vpmoe"
ENVIRONMENT = {
    "PATH": "/opt/vpmoe/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONPATH": "/opt/vpmoe:/opt/vpmoe/operator",
    "CUDA_VISIBLE_DEVICES": "",  # GPUs are only advertised: jobs run on the CPU
}
STANDIN_ENVIRONMENT = {
    **ENVIRONMENT,
    "PYTHONPATH": f"{WORKING_FOLDER}/{configuration.STANDIN}:{ENVIRONMENT['PYTHONPATH']}",
    "PYTHONSAFEPATH": "1",  # otherwise `python -m` searches the working folder first
}
FOLDERS = ("proc", "sys", "dev", "tmp", "usr", "etc", "etc/ssl", "var", "run", "opt", "opt/vpmoe")
LINKS = ("bin", "sbin", "lib", "lib64")
PASSWD = "root:x:0:0:root:/root:/bin/sh\nnonroot:x:65532:65532:nonroot:/tmp:/bin/sh\n"
GROUP = "root:x:0:\nnonroot:x:65532:\n"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


REVISION_LABEL = "org.opencontainers.image.revision"
"""The OCI label of an image with the commit that it was built from."""


def archive(pause: bytes, commit: str) -> bytes:
    """A tar for `ctr images import`. `pause` is inside because the sandbox container has no mounts.

    The images say that they were built from `commit`, that of the mounted code. If it is empty they say
    nothing.
    """
    files = {"etc/passwd": PASSWD.encode(), "etc/group": GROUP.encode(), "coredns": b"", "manager": b""}
    layer = tar(
        [
            *(entry(name, kind=tarfile.DIRTYPE, mode=0o1777 if name == "tmp" else 0o755) for name in FOLDERS),
            *(entry(name, kind=tarfile.SYMTYPE, link=f"usr/{name}") for name in LINKS),
            *(entry(name, data) for name, data in files.items()),
            entry("pause", pause, mode=0o755),
        ]
    )
    contents, manifest = {"layer.tar": layer}, []
    for names, environment, built_from in (
        (configuration.IMAGES, ENVIRONMENT, commit),
        ((configuration.STANDIN_IMAGE,), STANDIN_ENVIRONMENT, commit),
        ((configuration.OTHER_IMAGE,), STANDIN_ENVIRONMENT, configuration.OTHER_COMMIT),
        ((configuration.UNMARKED_IMAGE,), STANDIN_ENVIRONMENT, ""),
    ):
        layers = {"layer.tar": layer}
        if built_from:
            layers[f"{built_from}.tar"] = commit_layer(built_from)
        config = json.dumps(image_config(list(layers.values()), environment, built_from)).encode()
        name = f"{hashlib.sha256(config).hexdigest()}.json"
        contents |= {**layers, name: config}
        manifest.append({"Config": name, "RepoTags": names, "Layers": list(layers)})
    contents["manifest.json"] = json.dumps(manifest).encode()
    return tar(entry(name, data) for name, data in contents.items())


def commit_layer(commit: str) -> bytes:
    """The layer with the file that our images hold their commit in."""
    return tar([entry(f"{WORKING_FOLDER}/{COMMIT_FILE}".lstrip("/"), f"{commit}\n".encode())])


def image_config(layers: Sequence[bytes], environment: Mapping[str, str], commit: str) -> dict[str, object]:
    return {
        "architecture": ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {
            "Env": [f"{name}={value}" for name, value in environment.items()],
            "WorkingDir": WORKING_FOLDER,
            "Cmd": ["/pause"],
            "Labels": {REVISION_LABEL: commit} if commit else {},
        },
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers],
        },
    }


def entry(
    name: str, data: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type, info.linkname = len(data), mode, kind, link
    return info, data


def tar(entries: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for info, data in entries:
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
