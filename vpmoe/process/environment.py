"""Reads the environment variables that decide what a process does, and checks them when it starts.

The operator and the launcher set them right. In a shell, or in a pod template of one's own, they may be
anything.
"""

import errno
import os
import re
import tempfile
from collections.abc import Mapping, MutableMapping
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from vpmoe.api.environment import IN_A_POD, RESERVED_ENV
from vpmoe.failure import Permanent, Retriable

MOST_PODS = 1 << 20
STARTED_BY_LAUNCHER = "The launcher sets it for its processes; unset LOCAL_RANK to start the launcher."
TEACHER_PORTS = "VPMOE_TEACHER_PORTS"
"""Variable with the port of each teacher of a TeacherForced stage, separated by commas."""
DECLARED = "VPMOE_DECLARED"
"""Variable of a pod with runtime.envFrom: the reserved variables that the operator, Kubernetes and the
training operator set there, separated by spaces. A name may end with *."""
IDENTITY = (
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_STS_REGIONAL_ENDPOINTS",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_CONTAINER_*",
)
"""Variables that a cloud's admission webhook adds to pods whose service account has an identity there."""
THREADS = re.compile(r"[1-9][0-9]{0,3}(,[1-9][0-9]{0,3})*")


def read_number(
    name: str, least: int, most: int, remedy: str, environment: Mapping[str, str] = os.environ
) -> int:
    """A whole number from a variable. `remedy` says what to do about it.

    Raises Permanent, which names the variable and its value, if it is not set or is no number from `least` to
    `most`.
    """
    value = read_text(name, remedy, environment)
    if not re.fullmatch(r"[0-9]{1,18}", value) or not least <= int(value) <= most:
        raise Permanent(f"{name}={value[:80]!r} is no whole number from {least} to {most}. {remedy}")
    return int(value)


def read_text(name: str, remedy: str, environment: Mapping[str, str] = os.environ) -> str:
    """The value of a variable that must be set. Raises Permanent if it is not."""
    value = environment.get(name)
    if not value:
        raise Permanent(f"{name} is {'not set' if value is None else 'empty'}. {remedy}")
    return value


def check_rank(environment: Mapping[str, str] = os.environ) -> None:
    """Check what the launcher tells a process of a training stage. Raises Permanent if anything is not set or
    malformed."""
    teacher = environment.get("VPMOE_PART") == "teacher"
    ranks = read_number("WORLD_SIZE", 1, MOST_PODS, STARTED_BY_LAUNCHER, environment)
    read_number("LOCAL_RANK", 0, ranks, STARTED_BY_LAUNCHER, environment)
    if not teacher:
        read_number("RANK", 0, ranks - 1, STARTED_BY_LAUNCHER, environment)
    read_number("MASTER_PORT", 1, 65_535, STARTED_BY_LAUNCHER, environment)
    if teacher or TEACHER_PORTS in environment:
        ports = teacher_ports(environment)
        if teacher:
            read_number("VPMOE_TEACHER", 0, len(ports) - 1, STARTED_BY_LAUNCHER, environment)
    for name in ("MASTER_ADDR", "VPMOE_LAUNCHER", "VPMOE_SCRATCH"):
        read_text(name, STARTED_BY_LAUNCHER, environment)


def teacher_ports(environment: Mapping[str, str] = os.environ) -> list[int]:
    """The port of each teacher of a TeacherForced stage, at MASTER_ADDR. Raises Permanent if the variable is
    not set or malformed."""
    value = read_text(TEACHER_PORTS, STARTED_BY_LAUNCHER, environment)
    if not re.fullmatch(r"[0-9]{1,5}(,[0-9]{1,5})*", value):
        raise Permanent(
            f"{TEACHER_PORTS}={value[:80]!r} is no list of ports like 23457,23458. {STARTED_BY_LAUNCHER}"
        )
    return [int(port) for port in value.split(",")]


def worker_index(environment: Mapping[str, str] = os.environ) -> int | None:
    """Index among the pods of an Indexed Job; None if the process is not one of them."""
    if not environment.get("JOB_COMPLETION_INDEX"):
        return None
    return read_number(
        "JOB_COMPLETION_INDEX",
        0,
        MOST_PODS,
        "Kubernetes sets it in the pods of an Indexed Job; unset it elsewhere.",
        environment,
    )


def check_env_from(environment: MutableMapping[str, str] = os.environ) -> None:
    """Check that no Secret or ConfigMap of runtime.envFrom sets a reserved variable, which the pod itself
    does not set. For the process that the container starts: the check is not repeated in its children.

    Raises Permanent, which names the variables and no value.
    """
    declared = environment.pop(DECLARED, None)
    if declared is None:
        return
    allowed = (DECLARED, *declared.split(), *IDENTITY)
    foreign = sorted(
        name
        for name in environment
        if re.fullmatch(RESERVED_ENV, name) and not any(fnmatchcase(name, one) for one in allowed)
    )
    if foreign:
        raise Permanent(
            f"runtime.envFrom sets {', '.join(foreign)}: reserved, because the operator, Kubernetes or the "
            "launcher sets such variables. Remove the keys from the Secret or ConfigMap, or give that a "
            "prefix in runtime.envFrom. AWS_* follow from storage.credentialsSecret, endpoint, region and "
            "caSecret."
        )


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Check what every process of a job, or a library in it, reads: the folder of temporary files, the number
    of threads, and the numbers of torch.distributed if they are set.

    Raises Permanent, or Retriable if the disk of the folder is full.
    """
    check_temporary_folder(environment)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if environment.get(name):
            read_number(name, 0, MOST_PODS, "Unset it: only the launcher of jobs.train sets it.", environment)
    if (endpoint := environment.get("HF_ENDPOINT")) and not _is_url(endpoint):
        raise Permanent(
            f"HF_ENDPOINT={endpoint[:80]!r} is not the address of a mirror of the Hugging Face hub. Write it "
            f"as https://host, or unset it ({IN_A_POD})."
        )
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        if environment.get(name):
            remedy = f"It is in seconds; correct or unset it ({IN_A_POD})."
            read_number(name, 1, 1 << 20, remedy, environment)
    threads = environment.get("OMP_NUM_THREADS")
    if threads is not None and not THREADS.fullmatch(threads):
        raise Permanent(
            f"OMP_NUM_THREADS={threads[:80]!r} is no number of threads. Unset it, or set it to a number "
            f"from 1 to 9999 ({IN_A_POD})."
        )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def check_temporary_folder(environment: Mapping[str, str] = os.environ) -> None:
    """Check that TMPDIR, or else Python's choice of a folder, can be written.

    Python itself goes on to /tmp without a word if TMPDIR cannot be written: in a pod that is another disk.
    """
    folder = environment.get("TMPDIR")
    try:
        with tempfile.TemporaryFile(dir=folder or tempfile.gettempdir()) as file:
            file.write(b"x")
            file.flush()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        message = f"TMPDIR={folder!r} cannot be written: {why}." if folder else f"TMPDIR is not set: {why}."
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Retriable(
                f"{message} Free space there, point TMPDIR to a larger disk, or raise the ephemeral "
                "storage in runtime.resources."
            ) from error
        raise Permanent(
            f"{message} Set it to a folder that this process may write. In a pod it is a volume of the "
            "operator's: let the admission policy that changed it leave it alone."
        ) from error
