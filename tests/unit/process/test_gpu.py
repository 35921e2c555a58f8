"""Readings of GPUs: what a meter makes of them, and why there are none."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from vpmoe.process.gpu import NO_GPU, GpuMeter, GpuReading, GpusUnreadable, GpuUse, not_read, read_nvml

NEVER = 3600.0


def meter(*readings: Sequence[GpuReading]) -> GpuMeter:
    """A meter that reads these, one after the other; its thread reads none."""
    source: Iterator[Sequence[GpuReading]] = iter(readings)
    return GpuMeter(lambda: next(source), NEVER)


def test_a_meter_returns_mean_utilisation_and_least_free_memory_since_the_last_call() -> None:
    two = meter(
        [GpuReading(1.0, 30.0), GpuReading(0.5, 20.0)],
        [GpuReading(0.0, 10.0), GpuReading(0.5, 40.0)],
        [GpuReading(0.25, 5.0), GpuReading(0.75, 6.0)],
    )
    two.sample()
    two.sample()
    assert two.read() == GpuUse(utilisation=0.5, memory_headroom=10.0, reason=None)
    assert two.read() == GpuUse(utilisation=0.5, memory_headroom=5.0, reason=None), (
        "read now: nothing is kept"
    )


def test_a_meter_reads_while_the_job_works() -> None:
    calls = threading.Semaphore(0)

    def read_all() -> list[GpuReading]:
        calls.release()
        return [GpuReading(1.0, 1.0)]

    with GpuMeter(read_all, 0.001) as running:
        for _ in range(3):
            assert calls.acquire(timeout=60)
        assert running.read().utilisation == 1.0


def test_a_meter_stops_reading_what_cannot_be_read_and_says_why() -> None:
    calls = []

    def read_all() -> list[GpuReading]:
        calls.append(1)
        raise GpusUnreadable("NVML: Driver Not Loaded")

    broken = GpuMeter(read_all, NEVER)
    wanted = GpuUse(utilisation=None, memory_headroom=None, reason="NVML: Driver Not Loaded")
    assert [broken.read(), broken.read()] == [wanted, wanted] and len(calls) == 1
    assert wanted.model_dump(by_alias=True) == {
        "utilisation": None,
        "memoryHeadroom": None,
        "reason": "NVML: Driver Not Loaded",
    }


def test_on_the_cpu_nothing_is_read() -> None:
    with pytest.raises(GpusUnreadable, match=f"^{NO_GPU}$"):
        read_nvml({"CUDA_VISIBLE_DEVICES": ""})


def test_a_machine_without_a_driver_says_so() -> None:
    """The real NVML; where a GPU is there, it is read."""
    try:
        found = read_nvml({})
    except GpusUnreadable as error:
        assert str(error).startswith("NVML: ")
    else:
        assert all(0 <= one.utilisation <= 1 and one.free > 0 for one in found)


def test_a_job_that_reads_no_gpu_has_no_numbers() -> None:
    assert not_read().reason == "not measured" and not_read().utilisation is None
