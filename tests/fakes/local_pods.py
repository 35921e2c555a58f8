"""Runs the steps of a run as local processes, as the operator runs them on a cluster: each when those that it
needs have succeeded and its GPUs are free, with the pod's command and environment.

A process takes the place of a pod. Pods of a training step are one: its launcher starts a process a GPU.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.fakes.pod_overrides import customization
from vpmoe.api import DistillRun
from vpmoe.api.runtime import Role
from vpmoe.process.launcher import NO_GPU, free_port, set_parent_death_signal
from vpmoe.rollout.version_volume import VARIABLE as WEIGHTS_VOLUME
from vpmoe.storage import Bucket, paths
from vpmoe.teacher.folder import VARIABLE as TEACHER_CACHE

ROOT = Path(__file__).parents[2]
ROLES = ("teacher", "sampler", "trainer")
"""Roles that --gpus places."""
INDEXED: tuple[Role, ...] = ("preprocess", "rescore", "teacher")
"""Roles whose pods have an index."""
VICTIMS: dict[str, Role] = {"sampler": "sampler", "trainer": "train"}
"""What --kill names, and the role."""
ENGINE = "vpmoe.inference.engine"
"""What is in the command line of a sampler's engine."""
LOG_LINES = 30
"""Last lines of a log that are shown if its process fails."""
POLL_SECONDS = 0.1
NEWS_SECONDS = 10.0
"""Seconds between two looks at the progress of the steps."""
PR_SET_CHILD_SUBREAPER = 36


class RunFailed(Exception):
    """A role has ended wrongly, or the time limit has passed."""


@dataclass(frozen=True)
class Placement:
    """Which GPUs each role has."""

    gpus: Mapping[str, tuple[str, ...]]
    """By role of ROLES; names as CUDA_VISIBLE_DEVICES has them."""
    shares: Mapping[str, float]
    """By role: the part of a GPU's memory that it uses, of roles that share one."""

    @property
    def all(self) -> list[str]:
        """The names of all GPUs."""
        return sorted({name for names in self.gpus.values() for name in names})

    def pods(self, run: DistillRun, step: str) -> list[tuple[str, ...]]:
        """The GPUs of each pod of a step. An evaluation has a GPU of the trainer; one beside the trainer has
        the teacher's."""
        role, stage = run.role(step), run.stage_of(step)
        teacher, sampler, trainer = (self.gpus[each] for each in ROLES)
        if role in ("teacher", "rescore"):
            return [(gpu,) for gpu in teacher]
        if role == "sampler":
            return [sampler]
        if role == "train" and stage is not None:
            roles = training_roles(stage.samples, stage.runs_teacher)
            return [tuple(gpu for name in roles for gpu in self.gpus[name])]
        if role == "evaluate":
            return [teacher[:1] if run.serves_trainer(step) else trainer[:1]]
        return [()] * (run.spec.dataset.workers if role == "preprocess" else 1)

    def share(self, role: Role) -> float:
        """The part of its GPUs' memory that a pod of this role uses."""
        named = {"rescore": "teacher", "train": "trainer", "evaluate": "trainer"}
        return self.shares.get(named.get(role, role), 1.0)


def training_roles(samples: bool, runs_teacher: bool) -> list[str]:
    """The roles on whose GPUs a stage trains, a rank on each, in the order of the ranks."""
    if samples:
        return ["trainer"]
    return ["trainer", "sampler", "teacher"] if runs_teacher else ["trainer", "sampler"]


def parse_placement(gpus: list[str], shares: list[str]) -> Placement:
    """The GPUs and shares of benchmarks.recipe's --gpus and --share. Raises ValueError, which says what to
    change."""
    found: dict[str, tuple[str, ...]] = {}
    for text in gpus:
        role, _, names = text.partition("=")
        if role not in ROLES or not all(names.split(",")):
            raise ValueError(f"--gpus {text}: write ROLE=N,… for {', '.join(ROLES)}, such as trainer=2,3")
        found[role] = tuple(names.split(","))
    if missing := [role for role in ROLES if role not in found]:
        raise ValueError(f"--gpus: {', '.join(missing)} has none. Write {missing[0]}=N")
    parts: dict[str, float] = {}
    for text in shares:
        role, _, part = text.partition("=")
        try:
            parts[role] = float(part)
        except ValueError:
            parts[role] = 0.0
        if role not in ROLES or not 0 < parts[role] <= 1:
            raise ValueError(
                f"--share {text}: write ROLE=PART, above 0 and at most 1, for {', '.join(ROLES)}"
            )
    for gpu in {name for names in found.values() for name in names}:
        roles = [role for role in ROLES if gpu in found[role]]
        if sum(parts.get(role, 1.0) for role in roles) > 1:
            raise ValueError(
                f"--gpus: {' and '.join(roles)} share GPU {gpu}, and use more than the whole of it. Give "
                f"them --share {' '.join(f'{role}=PART' for role in roles)} that add up to 1 at most"
            )
    return Placement(found, parts)


@dataclass
class Settings:
    """What all pods have in common."""

    run: DistillRun
    file: Path
    """The run, in YAML."""
    placement: Placement
    scratch: Path
    """Temporary folders of the pods."""
    logs: Path
    teacher_cache: Path
    """The volume of runtime.teacherCache."""
    weights_volume: Path | None
    """The volume of runtime.weightsVolume, if there is one."""
    layers: int | None
    """Layers of the student, if it has fewer than its shape."""


class Pod:
    """A running job."""

    def __init__(
        self, settings: Settings, step: str, attempt: int, index: int, gpus: tuple[str, ...]
    ) -> None:
        self.name = f"{step}-a{attempt}-{index}"
        self.log = settings.logs / f"{self.name}.log"
        self.termination = settings.logs / f"{self.name}.end"
        self._folder = Path(tempfile.mkdtemp(dir=settings.scratch))  # short: sockets are below it
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command(settings, step, attempt),
                cwd=ROOT,
                env={**os.environ, **self._environment(settings, step, index, gpus)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=set_parent_death_signal,
            )

    def _environment(
        self, settings: Settings, step: str, index: int, gpus: tuple[str, ...]
    ) -> dict[str, str]:
        role = settings.run.role(step)
        share = settings.placement.share(role)
        found = environment(settings, step, index) | {
            "TMPDIR": str(self._folder),
            "VPMOE_TERMINATION_LOG": str(self.termination),
            "CUDA_VISIBLE_DEVICES": "" if on_cpu() else ",".join(gpus) or NO_GPU,
        }
        if settings.layers is not None or share < 1:
            text = customization(settings.layers, share, settings.logs)
            (self._folder / "sitecustomize.py").write_text(text)
            before = os.environ.get("PYTHONPATH", "")
            found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self._folder), str(ROOT), before)))
        return found

    def stop(self) -> None:
        """Kill what is left of the pod, and remove its temporary files."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def last_lines(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join(f"    {line[:2000]}" for line in lines)


def on_cpu() -> bool:
    """Whether the jobs compute on the CPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def command(settings: Settings, step: str, attempt: int) -> list[str]:
    """The command of a step's pods."""
    job = f"jobs.{settings.run.role(step)}"
    arguments = ["--run", str(settings.file), "--step", step, "--attempt", str(attempt)]
    return [sys.executable, "-m", job, *arguments]


def environment(settings: Settings, step: str, index: int) -> dict[str, str]:
    """The variables that the operator and Kubernetes set in a pod. Credentials are in this process's
    environment, and pods that train on one machine need no rendezvous."""
    run = settings.run
    role, stage = run.role(step), run.stage_of(step)
    found = {"VPMOE_CONFIG_HASH": run.config_hash, "VPMOE_SERVE_PORT": str(free_port())}
    if role in INDEXED:
        found["JOB_COMPLETION_INDEX"] = str(index)
    if role in ("rescore", "teacher") or (role == "train" and stage is not None and stage.runs_teacher):
        found[TEACHER_CACHE] = str(settings.teacher_cache)
    if settings.weights_volume and stage is not None and stage.samples and role in ("train", "sampler"):
        found[WEIGHTS_VOLUME] = str(settings.weights_volume)
    return found


class Span(NamedTuple):
    """When something ran, in seconds since the epoch."""

    start: float
    end: float


@dataclass
class Step:
    """A step that has started."""

    name: str
    attempt: int
    pods: list[Pod]
    claims: Counter[str]
    """By GPU: the part of it that the step holds."""
    started: float
    killed: float | None = None
    """When a process of it was killed."""


@dataclass
class StepRunner:
    """Runs all steps of a run."""

    settings: Settings
    bucket: Bucket
    deadline: float
    """On the monotonic clock."""
    kills: list[str]
    """Keys of VICTIMS, each killed once."""
    running: dict[str, Step] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    """Of steps that have succeeded, all attempts together."""
    began: float = field(default_factory=time.monotonic)
    _news: dict[str, str] = field(default_factory=dict)
    _told: float = 0.0

    def run_all(self) -> None:
        """Run all steps. Raises RunFailed if one fails or the limit passes; then others still run."""
        run = self.settings.run
        while len(self.spans) < len(run.steps()):
            for name in run.steps():
                if name not in self.running and name not in self.spans and self._is_ready(name):
                    self._start(name, 1)
            for step in list(self.running.values()):
                self._observe(step)
            self._kill()
            self._tell_progress()
            if time.monotonic() > self.deadline:
                raise RunFailed(self._overdue())
            time.sleep(POLL_SECONDS)
        if self.kills:
            raise RunFailed(f"{' and '.join(self.kills)} ended before it could be killed. Raise --windows.")

    def stop(self) -> None:
        """Kill everything."""
        for step in self.running.values():
            for pod in step.pods:
                pod.stop()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.began:7.1f} s  {text}", flush=True)

    def _is_ready(self, name: str) -> bool:
        run = self.settings.run
        held = sum((step.claims for step in self.running.values()), Counter())
        free = all(held[gpu] + part <= 1 for gpu, part in self._claims(name).items())
        return free and all(other in self.spans for other in run.needs(name))

    def _claims(self, name: str) -> Counter[str]:
        run, placement = self.settings.run, self.settings.placement
        part = placement.share(run.role(name))
        return Counter({gpu: part for pod in placement.pods(run, name) for gpu in pod})

    def _start(self, name: str, attempt: int) -> None:
        gpus = self.settings.placement.pods(self.settings.run, name)
        pods = [Pod(self.settings, name, attempt, index, of_pod) for index, of_pod in enumerate(gpus)]
        before = self.running.get(name)
        started = before.started if before else time.time()
        self.running[name] = Step(name, attempt, pods, self._claims(name), started)
        placed = ", ".join(" ".join(of_pod) for of_pod in gpus if of_pod)
        self.say(f"{name}: attempt {attempt}" + (f" on GPU {placed}" if placed and not on_cpu() else ""))

    def _observe(self, step: Step) -> None:
        """Record success, or start the next attempt of a step of which a process was killed."""
        codes = [pod.process.poll() for pod in step.pods]
        failed = [pod for pod, code in zip(step.pods, codes, strict=True) if code]
        if failed:
            for pod in step.pods:
                pod.stop()
            if step.killed is None:
                raise RunFailed(
                    f"{failed[0].name} ended with exit code {failed[0].process.returncode}:\n"
                    f"{failed[0].last_lines()}"
                )
            took = time.monotonic() - step.killed
            self.say(f"{step.name}: ended with exit code {failed[0].process.returncode} {took:.1f} s later")
            self._start(step.name, step.attempt + 1)
        elif None not in codes:
            for pod in step.pods:
                pod.stop()
            del self.running[step.name]
            self.spans[step.name] = Span(step.started, time.time())
            self.say(f"{step.name}: succeeded after {time.time() - step.started:.1f} s")

    def _kill(self) -> None:
        """Kill what is to be killed, if it is in the middle of its work."""
        for step in list(self.running.values()):
            role = self.settings.run.role(step.name)
            for victim in [one for one in self.kills if VICTIMS[one] == role]:
                if (process := self._victim(step, role)) is not None:
                    os.kill(process, signal.SIGKILL)
                    step.killed = time.monotonic()
                    self.kills.remove(victim)
                    self.say(f"{step.name}: killed process {process} of attempt {step.attempt}")

    def _victim(self, step: Step, role: Role) -> int | None:
        """An engine of a sampler that has written a window, or a rank of a trainer that has published a
        version after some training; the last one of either. None if it is too early."""
        run = self.settings.run
        stage = run.stage_of(step.name)
        assert stage is not None
        if not stage.samples:
            return None
        found = children(step.pods[0].process.pid)
        if role == "sampler":
            if not self.bucket.exists(paths.window(run, stage.name, 0, "rollouts")):
                return None
            engines = [process for process in found if ENGINE.encode() in read(process, "cmdline")]
            return engines[-1] if engines else None
        first = paths.manifest(paths.weights(run, stage.name, stage.publish_every))
        if not self.bucket.exists(first):
            return None
        ranks = [process for process in found if b"\0LOCAL_RANK=" in read(process, "environ")]
        return ranks[-1] if ranks else None

    def _tell_progress(self) -> None:
        """Print what the steps report, if it has changed."""
        if time.monotonic() - self._told < NEWS_SECONDS:
            return
        self._told = time.monotonic()
        for name in self.running:
            key = paths.progress(self.settings.run, name)
            message = str(self.bucket.get_json(key)["message"]) if self.bucket.exists(key) else ""
            if message and self._news.get(name) != message:
                self._news[name] = message
                self.say(f"{name}: {message}")

    def _overdue(self) -> str:
        ends = [
            f"{pod.name}, which runs:\n{pod.last_lines()}"
            for step in self.running.values()
            for pod in step.pods
        ]
        return "the time limit has passed (--limit).\n" + "\n".join(ends)


def adopt_orphans() -> None:
    """Make processes whose parent dies children of this one, so that `kill_descendants` finds them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants() -> None:
    """Kill all processes that this one has started, directly or not, and wait until there are none."""
    while True:
        for process in descendants(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def descendants(process: int) -> Iterator[int]:
    """The children of a process, each followed by its own."""
    for child in children(process):
        yield child
        yield from descendants(child)


def children(process: int) -> list[int]:
    """The children of a process, in the order of their start; none if it has ended."""
    found: list[bytes] = []
    with suppress(OSError):
        for task in (Path("/proc") / str(process) / "task").iterdir():
            found += (task / "children").read_bytes().split()
    return sorted(map(int, found))


def read(process: int, file: str) -> bytes:
    """A file of /proc about a process; empty if it has ended."""
    with suppress(OSError):
        return (Path("/proc") / str(process) / file).read_bytes()
    return b""
