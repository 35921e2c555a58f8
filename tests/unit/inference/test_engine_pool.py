"""Engine processes: devices and engines that share them, requests, the death of a process, and verification
against a probe."""

import logging
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes.shared_engine import BROKEN
from tests.fakes.students import new_seed
from tests.fakes.waiting import wait_until
from vpmoe.failure import Permanent, Retriable, failure_record
from vpmoe.inference.engine_pool import (
    CheckStop,
    EnginePool,
    SamplingRequest,
    engine_environment,
    engine_error,
)
from vpmoe.inference.verify import verify_against_probe
from vpmoe.rollout.policy_version import Probe

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    "visible, devices",
    [("", [None, None]), (None, ["0", "1"]), ("4,7", ["4", "7"]), ("GPU-1,GPU-2,GPU-3", ["GPU-1", "GPU-2"])],
    ids=["cpu", "all", "some", "more-than-needed"],
)
def test_the_engines_of_each_gpu_see_it_alone(visible: str | None, devices: list[str | None]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = [engine_environment(environment, number, 2) for number in range(2)]
    assert [environment_of_engine.get("CUDA_VISIBLE_DEVICES") for environment_of_engine in found] == devices
    assert {environment_of_engine["OMP_NUM_THREADS"] for environment_of_engine in found} == {"1"}
    assert engine_environment({"OMP_NUM_THREADS": "3"}, 0, 1)["OMP_NUM_THREADS"] == "3"


def test_fewer_devices_than_gpus_are_rejected() -> None:
    with pytest.raises(
        Permanent,
        match=(
            r"CUDA_VISIBLE_DEVICES is 3: 1 devices, and 2 are used\. Name as many as "
            r"stages\[\]\.sampler\.gpus"
        ),
    ):
        engine_environment({"CUDA_VISIBLE_DEVICES": "3"}, 1, 2)


@pytest.mark.parametrize(
    "kind, error", [("Permanent", Permanent), ("Retriable", Retriable), ("Internal", RuntimeError)]
)
def test_an_engines_error_keeps_its_class(kind: str, error: type[Exception]) -> None:
    found = engine_error(3, failure_record(kind, "no memory"))
    assert type(found) is error and str(found) == "engine 3: no memory"


SHARED = "tests.fakes.shared_engine"
ONE = SamplingRequest(np.int32([5, 6]), 0, 1)


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> EnginePool:
    """Two GPUs, of which the first has room for two of three engines and the second for one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SHARED_ENGINES", "2,1")
    return EnginePool(2, "tiny", 64, depth=4, per_gpu=3, module=SHARED)


def test_each_gpu_has_as_many_engines_as_it_has_room_for(
    shared: EnginePool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), shared as engines:
        for version in (3, 4):
            engines.load(Path(f"/{version}"))
            found = [scores[0].tolist() for scores in engines.score([ONE.ids_P])]
            assert found == [[0, version, 2], [1, version, 1], [0, version, 2]], (
                "engine by engine: its device, the version, and how many share the device"
            )
        assert engines.gpu_of == [0, 1, 0]
    assert caplog.messages == [
        "GPU 0, 80.0 GiB: engines 0 and 2, each with 11.0 GiB of weights and 24.0 GiB of keys and values, "
        "150 of the longest sequences",
        "GPU 1, 80.0 GiB: engine 1, with 11.0 GiB of weights and 24.0 GiB of keys and values, 150 of the "
        "longest sequences",
    ]


def test_all_engines_of_all_gpus_share_one_queue(shared: EnginePool) -> None:
    with shared as engines:
        engines.load(Path("/3"))
        processes = {process.pid for process in engines._processes}
        found = list(engines.sample_queue([ONE] * 40))
        some = engines.sample_in_order((number, ONE) for number in range(1_000_000))
        endless = [next(some)[0] for _ in range(30)]
        after = list(engines.sample_queue([ONE] * 5))
    assert sorted(number for number, _ in found) == list(range(40))
    assert {int(completion.ids_C[0]) for _, completion in found} == processes
    assert max(endless) < 30 + 3 * 4, "requests are taken as engines have room, from an endless list too"
    assert sorted(number for number, _ in after) == list(range(5)), "what was given up is dropped"


def test_one_of_several_engines_on_a_gpu_is_named_when_it_dies(shared: EnginePool) -> None:
    with shared as engines:
        engines.load(Path("/3"))
        answered = engines.sample_in_order((number, ONE) for number in range(1_000_000))
        next(answered)
        engines._processes[2].kill()
        with pytest.raises(Retriable, match=r"engine 2 was killed by SIGKILL.*runtime\.resources\.sampler"):
            for _ in answered:
                pass
    assert all(process.poll() is not None for process in engines._processes), "the others are stopped too"


def test_an_error_of_one_of_several_engines_keeps_its_class(shared: EnginePool) -> None:
    with shared as engines:
        engines.load(Path("/3"))
        with pytest.raises(Permanent, match=f"engine 1: /{BROKEN} is not a complete checkpoint"):
            engines.load(Path(f"/{BROKEN}"))


def test_engines_of_their_own_gpus_are_not_asked_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("SHARED_ENGINES", "9,9")
    with EnginePool(2, "tiny", 64, module=SHARED) as engines:
        engines.load(Path("/3"))
        assert [scores[0].tolist() for scores in engines.score([ONE.ids_P])] == [[0, 3, 1], [1, 3, 1]]


@pytest.mark.engine
def test_a_killed_engine_is_a_retriable_error_that_names_it(tmp_path: Path) -> None:
    def kill() -> None:
        wait_until(lambda: len(engines._processes) == 2, "the engines are started")
        engines._processes[1].kill()

    with EnginePool(2, "tiny", 64) as engines, ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        with pytest.raises(Retriable, match=r"engine 1 was killed by SIGKILL.*runtime\.resources\.sampler"):
            engines.load(tmp_path)
        killed.result()
    assert all(process.poll() is not None for process in engines._processes), (
        "the other engine is stopped too"
    )


@pytest.mark.engine
def test_engines_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from vpmoe.inference.engine_pool import EnginePool
        def print_pid():
            print(engines._processes[0].pid, flush=True)
        with EnginePool(1, "tiny", 64) as engines:
            engines.load(Path({str(tmp_path)!r}), print_pid)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout
    engine = int(process.stdout.readline())
    assert Path(f"/proc/{engine}").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(
        lambda: (
            not Path(f"/proc/{engine}").exists() or "State:\tZ" in Path(f"/proc/{engine}/status").read_text()
        ),
        "the engine has ended",
    )


@pytest.mark.engine
def test_two_engines_share_a_device_and_the_requests_and_load_again(tmp_path: Path, device: object) -> None:
    """Their first checkpoint is incomplete, which is a permanent error, and they load the next one."""
    from tests.fakes import policy_versions

    learners = [policy_versions.learner(device, new_seed()) for _ in range(2)]  # type: ignore[arg-type]
    folder, other = (
        policy_versions.export(tmp_path / str(number), learner) for number, learner in enumerate(learners)
    )
    random = np.random.default_rng(new_seed())
    requests = [SamplingRequest(random.integers(0, 1000, 5 + n, dtype=np.int32), n, 1 + n) for n in range(5)]
    with EnginePool(1, "tiny", 64, per_gpu=2, module=SHARED) as engines:
        with pytest.raises(Permanent, match=f"engine 0: {tmp_path} is not a complete checkpoint"):
            engines.load(tmp_path)
        engines.load(other)
        reloaded = engines.score([requests[4].ids_P])
        engines.load(folder)
        found = engines.sample(requests)
        repeated = engines.sample(requests)
        first_only = engines.sample(requests[::2])[:1]
        scores = engines.score([requests[4].ids_P])
        check_queue(engines, random)
    assert [len(one.ids_C) for one in found] == [1, 2, 3, 4, 5]
    assert all(np.array_equal(one.logp_C, other.logp_C) for one, other in zip(found, repeated, strict=True))
    assert np.array_equal(first_only[0].ids_C, found[0].ids_C)
    assert len(scores) == 2 and np.array_equal(scores[0][0], scores[1][0]), (
        "every engine computes the scores of its own weights"
    )
    for learner, computed in zip(learners, (scores, reloaded), strict=True):
        (expected,) = policy_versions.trainer_logp(learner, [requests[4].ids_P])
        for (of_engine,) in computed:
            assert np.abs(of_engine - expected).max() <= 1e-4, "all engines have the weights that were loaded"


def check_queue(engines: EnginePool, random: np.random.Generator) -> None:
    """Two engines with one queue: what a request draws does not depend on the engine, every request is
    answered once, a call that was given up has no effect on the next, and a dead engine is named."""
    lengths = random.integers(1, 30, 14).tolist()
    requests = [
        SamplingRequest(random.integers(0, 1000, 5, dtype=np.int32), n, length)
        for n, length in enumerate(lengths)
    ]
    expected = engines.sample(requests)
    engines.depth = 2
    next(
        engines.sample_queue(requests[::-1])
    )  # given up after one completion, its requests have other numbers
    engines.depth = 3
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        send = engines._send

        def record(engine: int, method: str, arguments: tuple[Any, ...], check_stop: CheckStop) -> None:
            sent.extend(index for index, _ in arguments[0])
            send(engine, method, arguments, check_stop)

        patch.setattr(engines, "_send", record)
        found = list(engines.sample_queue(requests))
    assert sorted(index for index, _ in found) == list(range(14))
    first = sorted((lengths[index] for index in sent[:6]), reverse=True)
    assert first == sorted(lengths, reverse=True)[:6], "the longest start first, three on each engine"
    different = 0
    for index, one in found:
        if np.array_equal(one.ids_C, expected[index].ids_C):
            assert np.abs(one.logp_C - expected[index].logp_C).max() <= 1e-4
        else:
            different += 1
    assert different <= 1, "a draw that falls between two tokens within rounding is rare"
    completions = engines.sample_queue(requests)
    next(completions)
    engines._processes[1].kill()
    with pytest.raises(Retriable, match="engine 1 was killed by SIGKILL"):
        list(completions)


PROBE = Probe(ids=((5, 6, 7), (8, 9)), logp=((-1.0, -2.0), (-100.0,)))


@pytest.mark.parametrize(
    "differences, exact, passes",
    [
        pytest.param((0.0, 0.0, 0.0), True, True, id="equal"),
        pytest.param((9e-4, -9e-4, 0.0), True, True, id="within-the-bound"),
        pytest.param((2e-3, 0.0, 0.0), True, False, id="one-token"),
        pytest.param((0.5, 0.0, -0.01), False, True, id="rounded"),
        pytest.param((0.5, 0.2, 0.0), False, False, id="rounded-too-far"),
        pytest.param((np.nan, 0.0, 0.0), True, False, id="no-number"),
        pytest.param((np.nan, 0.0, 0.0), False, False, id="no-number-rounded"),
        pytest.param((0.0, 0.0, -900.0), True, True, id="impossible-to-both"),
    ],
)
def test_a_version_is_verified_against_its_probe(
    differences: tuple[float, ...], exact: bool, passes: bool
) -> None:
    found = [
        np.float32([-1.0 + differences[0], -2.0 + differences[1]]),
        np.float32([-100.0 + differences[2]]),
    ]
    if passes:
        assert verify_against_probe(PROBE, found, exact, True, "here") <= 0.51
        return
    with pytest.raises(
        Permanent, match=r"here computes another student than the trainer .* most of all that of token 6, "
    ):
        verify_against_probe(PROBE, found, exact, True, "here")
    with pytest.raises(
        Retriable, match=r"here computes another student .* Another attempt loads it into new engines"
    ):
        verify_against_probe(PROBE, found, exact, False, "here")
