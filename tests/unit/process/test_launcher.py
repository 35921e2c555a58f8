"""The launcher: placement of ranks, exit codes and termination messages, with small programs instead of
training."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from vpmoe import failure
from vpmoe.api import DistillRun
from vpmoe.api.layout import layout
from vpmoe.failure import Permanent
from vpmoe.process import launcher
from vpmoe.process.launcher import Placement

POD = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
    "RANK": "1",
    "WORLD_SIZE": "2",
}


def spec(run_spec: dict[str, Any], **student: int) -> DistillRun:
    run_spec["spec"]["student"] |= student
    run_spec["spec"]["training"]["globalBatchTokens"] = 8192
    return DistillRun.parse(run_spec)


@pytest.mark.parametrize(
    "student, environment, first, here",
    [
        pytest.param({"gpus": 1}, {}, 0, 1, id="one-without-cluster"),
        pytest.param({"gpus": 4}, {}, 0, 4, id="four-without-cluster"),
        pytest.param({"gpus": 4, "gpusPerPod": 2}, {}, 0, 4, id="ranks-of-two-pods-without-cluster"),
        pytest.param({"gpus": 4, "gpusPerPod": 2}, POD, 2, 2, id="second-of-two-pods"),
        pytest.param(
            {"gpus": 4, "gpusPerPod": 2}, {**POD, "PET_NODE_RANK": "0"}, 0, 2, id="first-of-two-pods"
        ),
    ],
)
def test_each_pod_starts_its_own_ranks(
    run_spec: dict[str, Any], student: dict[str, int], environment: dict[str, str], first: int, here: int
) -> None:
    run = spec(run_spec, **student)
    placement = launcher.place_ranks(
        layout(run.spec.student, run.spec.training, run.spec.stages[0]), environment
    )
    assert (placement.ranks, placement.first, placement.here) == (student["gpus"], first, here)
    assert placement.address == environment.get("PET_MASTER_ADDR", "127.0.0.1")


@pytest.mark.parametrize(
    "environment, here, ports",
    [
        pytest.param({}, 3, None, id="without-cluster"),
        pytest.param({**POD, "PET_NODE_RANK": "0"}, 3, (23457, 23458, 23459), id="first-pod"),
        pytest.param(POD, 0, (23457, 23458, 23459), id="second-pod"),
    ],
)
def test_the_first_pod_starts_the_teachers_on_the_gpus_after_its_ranks(
    run_spec: dict[str, Any], environment: dict[str, str], here: int, ports: tuple[int, ...] | None
) -> None:
    run = spec(run_spec, gpus=4, gpusPerPod=2)
    placement = launcher.place_ranks(
        layout(run.spec.student, run.spec.training, run.spec.stages[0]), environment, teachers=3
    )
    assert placement.teachers_here == here
    assert placement.teacher_ports == ports if ports else len({placement.port, *placement.teacher_ports}) == 4
    student, *teachers = (
        launcher.worker_environment(placement, local, environment)
        for local in (0, *range(placement.here, placement.here + 3))
    )
    assert not {"VPMOE_PART", "CUDA_VISIBLE_DEVICES"} & set(student)
    assert student["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert student["NCCL_GRAPH_REGISTER"] == "0", "NCCL cannot register memory in such segments"
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        of_user = launcher.worker_environment(placement, 0, environment | {name: "max_split_size_mb:512"})
        assert not {name, "PYTORCH_CUDA_ALLOC_CONF"} & set(of_user), "the user's own stays as it is"
    assert student["VPMOE_TEACHER_PORTS"] == ",".join(map(str, placement.teacher_ports))
    for number, teacher in enumerate(teachers):
        assert teacher["VPMOE_PART"] == "teacher" and teacher["VPMOE_TEACHER"] == str(number)
        assert not teacher["RANK"] and teacher["VPMOE_TEACHER_PORTS"] == student["VPMOE_TEACHER_PORTS"]
        assert teacher["CUDA_VISIBLE_DEVICES"] == str(placement.here + number)
        assert teacher["LOCAL_RANK"] == "0", "the only GPU that it sees"
        assert "PYTORCH_CUDA_ALLOC_CONF" not in teacher, "vLLM decides on its own"
    alone = launcher.place_ranks(layout(run.spec.student, run.spec.training, run.spec.stages[0]), environment)
    assert not alone.teachers_here and "VPMOE_TEACHER_PORTS" not in launcher.worker_environment(alone, 0, {})


@pytest.mark.parametrize(
    "visible, own",
    [
        pytest.param(None, "2", id="all"),
        pytest.param("", "", id="the-cpu"),
        pytest.param("4,5,6", "6", id="some"),
        pytest.param("GPU-a,GPU-b,GPU-c", "GPU-c", id="by-name"),
        pytest.param("4,5", "-1", id="too-few"),
    ],
)
def test_a_teacher_sees_its_own_gpu(visible: str | None, own: str) -> None:
    assert launcher.own_device(2, visible) == own


def test_a_number_of_pods_other_than_the_layouts_is_rejected(run_spec: dict[str, Any]) -> None:
    run = spec(run_spec, gpus=4, gpusPerPod=1)
    with pytest.raises(Permanent, match="has 2 pods, but 4 ranks with 1 per pod need 4"):
        launcher.place_ranks(layout(run.spec.student, run.spec.training, run.spec.stages[0]), POD)


FAIL_BY_RANK = (
    "import os, sys, time; rank = int(os.environ['RANK']); time.sleep(0 if rank == 1 else {others}); "
    "sys.exit({code} if rank == 1 else 0)"
)
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
EXIT_ON_SIGTERM = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    "print('ready', flush=True); time.sleep(60)"
)
CHECK_ENVIRONMENT = (
    "import os; assert os.environ['WORLD_SIZE'] == '3'; "
    "assert os.environ['LOCAL_RANK'] == str(int(os.environ['RANK']) - 1)"
)


def launch_two_ranks(
    monkeypatch: pytest.MonkeyPatch,
    log: Path,
    program: str,
    stopping: threading.Event | None = None,
    grace: float = 0.3,
) -> int:
    """Launch a program as ranks 1 and 2 of 3; returns the exit code."""
    return launch(monkeypatch, log, program, Placement(3, 1, 2, "127.0.0.1", 1), stopping, grace)


def launch(
    monkeypatch: pytest.MonkeyPatch,
    log: Path,
    program: str,
    placement: Placement,
    stopping: threading.Event | None,
    grace: float,
) -> int:
    """Launch a program; returns the exit code. The termination message is written to `log`."""
    log.touch()
    monkeypatch.setenv("VPMOE_TERMINATION_LOG", str(log))
    monkeypatch.setattr(launcher, "GRACE_SECONDS", grace)
    command = [sys.executable, "-c", program]
    return launcher.launch_workers(placement, command, command, stopping or threading.Event())


@pytest.mark.parametrize(
    "program, code, message",
    [
        pytest.param(CHECK_ENVIRONMENT, 0, None, id="all-succeed"),
        pytest.param(FAIL_BY_RANK.format(code=65, others=0.2), 65, None, id="one-fails"),
        pytest.param(FAIL_BY_RANK.format(code=75, others=60), 75, None, id="the-others-hang"),
        pytest.param(KILLED, 75, "rank 1 was killed by SIGKILL", id="killed"),
    ],
)
def test_it_exits_with_the_code_of_the_first_failed_worker(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, code: int, message: str | None
) -> None:
    assert launch_two_ranks(monkeypatch, tmp_path / "log", program) == code
    found = failure.read_record(tmp_path / "log")
    assert (
        found is None
        if message is None
        else found is not None and found.message.startswith(message) and found.exit == code
    )


PREAMBLE = "import os, signal, sys, time; teacher = os.environ.get('VPMOE_PART') == 'teacher'; "


@pytest.mark.parametrize(
    "program, grace, code, message",
    [
        pytest.param("sys.exit(0)", 60, 0, None, id="all-succeed"),
        pytest.param(
            "time.sleep(60 if teacher else 0); sys.exit(65)",
            60,
            65,
            None,
            id="the-teachers-outlive-failed-ranks",
        ),
        pytest.param("time.sleep(0 if teacher else 60); sys.exit(65)", 0.3, 65, None, id="the-teachers-fail"),
        pytest.param(
            "os.kill(os.getpid(), 9) if teacher else time.sleep(60)",
            0.3,
            75,
            "teacher 0 was killed by SIGKILL",
            id="killed",
        ),
        pytest.param(
            "os.environ.get('VPMOE_TEACHER') == '1' and os.kill(os.getpid(), 9); time.sleep(60)",
            0.3,
            75,
            "teacher 1 was killed by SIGKILL",
            id="the-second-teacher-is-killed",
        ),
    ],
)
def test_ranks_and_their_teachers_end_together(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    program: str,
    grace: float,
    code: int,
    message: str | None,
) -> None:
    placement = Placement(3, 0, 2, "127.0.0.1", 1, teacher_ports=(2, 3))
    assert launch(monkeypatch, tmp_path / "log", PREAMBLE + program, placement, None, grace) == code
    found = failure.read_record(tmp_path / "log")
    assert (
        found is None
        if message is None
        else found is not None and found.message.startswith(message) and found.rank is None
    )


def test_the_message_about_a_killed_worker_replaces_those_of_its_peers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rank 2 reports its missing peer before the launcher has detected that rank 1 was killed."""
    log = tmp_path / "log"
    kill_and_report = (
        f"open({str(log)!r}, 'w').write('rank 2 misses rank 1'); os.kill(int(open('{tmp_path}/1').read()), 9)"
    )
    program = (
        f"import os, sys, time; rank = os.environ['RANK']; open('{tmp_path}/' + rank, "
        "'w').write(str(os.getpid())); "
        "time.sleep(0.5); "
        f"rank == '2' and exec({kill_and_report!r}); time.sleep(0 if rank == '2' else 60); sys.exit(70)"
    )
    assert launch_two_ranks(monkeypatch, log, program, grace=5) == 75
    found = failure.read_record(log)
    assert found is not None and found.message.startswith("rank 1 was killed by SIGKILL") and found.rank == 1


def test_sigterm_is_forwarded_to_every_worker_and_their_code_is_returned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopping = threading.Event()
    threading.Timer(1.0, stopping.set).start()
    assert launch_two_ranks(monkeypatch, tmp_path / "log", EXIT_ON_SIGTERM, stopping) == 143


def test_a_worker_that_fails_while_the_others_save_ends_the_launcher_after_the_grace_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopping = threading.Event()
    threading.Timer(1.0, stopping.set).start()
    fails_on_sigterm = (
        "import os, signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(70) if os.environ['RANK'] == '1' else None); "
    )
    assert (
        launch_two_ranks(
            monkeypatch, tmp_path / "log", fails_on_sigterm + "time.sleep(3); time.sleep(60)", stopping
        )
        == 70
    )


def test_workers_without_a_signal_handler_are_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopping = threading.Event()
    threading.Timer(0.5, stopping.set).start()
    assert launch_two_ranks(monkeypatch, tmp_path / "log", "import time; time.sleep(60)", stopping) == 143
    found = failure.read_record(tmp_path / "log")
    assert found is not None and found.kind == "Terminated"


def test_workers_die_with_their_launcher(tmp_path: Path) -> None:
    worker = (
        "from vpmoe.process import launcher; launcher.set_parent_death_signal(); print('ready', flush=True); "
        "import time; time.sleep(60)"
    )
    parent = (
        "import sys, threading; from vpmoe.process.launcher import Placement, launch_workers; "
        f"launch_workers(Placement(1, 0, 1, '127.0.0.1', 1), [sys.executable, '-c', {worker!r}], "
        "[], threading.Event())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": "."}
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == b"", "the pipe is closed when its last writer, the worker, has exited"
    process.wait()


@pytest.mark.parametrize("name", ["PET_NNODES", "PET_NODE_RANK", "PET_MASTER_PORT"])
@pytest.mark.parametrize(
    "value", ["", "abc", "-1", "1.0", " 1", "٣", "0x1", "9" * 5000, "2147483648"], ids=lambda value: value[:9]
)
def test_a_malformed_variable_of_a_pod_is_named(run_spec: dict[str, Any], name: str, value: str) -> None:
    run = spec(run_spec, gpus=4, gpusPerPod=2)
    with pytest.raises(Permanent, match=rf"^{name}(=| is empty)"):
        launcher.place_ranks(
            layout(run.spec.student, run.spec.training, run.spec.stages[0]), {**POD, name: value}
        )


@pytest.mark.parametrize("name", ["PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"])
def test_a_variable_of_a_pod_that_is_not_set_is_named(run_spec: dict[str, Any], name: str) -> None:
    run = spec(run_spec, gpus=4, gpusPerPod=2)
    environment = {one: value for one, value in POD.items() if one != name}
    with pytest.raises(Permanent, match=f"^{name} is not set. The training operator sets PET_"):
        launcher.place_ranks(layout(run.spec.student, run.spec.training, run.spec.stages[0]), environment)
