"""Utilisation and free memory of a job's GPUs, from NVML: one record for the lines of metrics of every role.

NVML reports the last fraction of a second, and a line of metrics is written when the work is over. So a
thread reads it while the job works. The trainer reads NVML through torch instead, together with its
allocator (vpmoe.trainer.reporting.gpu). Without a GPU nothing is measured: the record then has null and the
reason, never a zero.
"""

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from vpmoe.api.base import Record
from vpmoe.api.metrics import Sample
from vpmoe.api.pod_metrics import GPU_MEMORY_FREE, GPU_UTILISATION

NO_GPU = "computed on the CPU"
NOT_READ = "not measured"
PERIOD = 1.0
"""Seconds between two readings."""


class GpuUse(Record):
    """The GPUs of a role, for a line of metrics."""

    utilisation: float | None
    """Share of the time in which a kernel ran, 0 to 1; mean of the GPUs."""
    memory_headroom: float | None
    """Least of the GPUs, in bytes."""
    reason: str | None
    """Why the others are null."""

    def samples(self) -> Iterable[Sample]:
        """The numbers that Prometheus shows."""
        return (Sample(GPU_UTILISATION, self.utilisation), Sample(GPU_MEMORY_FREE, self.memory_headroom))


class GpuReading(NamedTuple):
    """One GPU at one time."""

    utilisation: float
    free: float
    """Bytes that no process has allocated."""


ReadGpus = Callable[[], GpuUse]
"""What the GPUs did since the last call."""


def not_read() -> GpuUse:
    """The record of a job that reads no GPU."""
    return GpuUse(utilisation=None, memory_headroom=None, reason=NOT_READ)


class GpuMeter:
    """Reads the GPUs every PERIOD seconds between `with` and its end; `read` returns what they did since the
    last call."""

    def __init__(self, read_all: Callable[[], Sequence[GpuReading]], period: float = PERIOD) -> None:
        """`read_all` returns one reading for each GPU, at least one.

        It raises GpusUnreadable if there is nothing to read; the meter then stops and keeps the reason.
        """
        self._read_all = read_all
        self._period = period
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-meter", daemon=True)
        self._readings: list[GpuReading] = []
        self._reason: str | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def read(self) -> GpuUse:
        """The GPUs since the last call; if no period has passed since then, now."""
        if self._reason is None and not self._readings:
            self.sample()
        with self._lock:
            readings, self._readings = self._readings, []
        if not readings:
            return GpuUse(utilisation=None, memory_headroom=None, reason=self._reason)
        mean = sum(one.utilisation for one in readings) / len(readings)
        return GpuUse(utilisation=mean, memory_headroom=min(one.free for one in readings), reason=None)

    def sample(self) -> None:
        """Read the GPUs once."""
        try:
            found = self._read_all()
        except GpusUnreadable as error:
            self._reason = str(error)
            return
        with self._lock:
            self._readings += found

    def _run(self) -> None:
        while self._reason is None and not self._ended.wait(self._period):
            self.sample()


class GpusUnreadable(Exception):
    """There is no GPU, or NVML does not answer."""


def job_meter() -> GpuMeter:
    """A meter of all GPUs that this process and its children may use."""
    return GpuMeter(read_nvml)


def read_nvml(environment: Mapping[str, str] = os.environ) -> list[GpuReading]:
    """One reading of each GPU that CUDA_VISIBLE_DEVICES names, of all if it is not set.

    Raises GpusUnreadable.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        raise GpusUnreadable(NO_GPU)
    try:
        import pynvml
    except ImportError as error:
        raise GpusUnreadable(f"the Python package nvidia-ml-py is not installed: {error}") from error
    try:
        pynvml.nvmlInit()
        handles = (
            [_handle(name.strip()) for name in visible.split(",")]
            if visible is not None
            else [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        )
        found = [
            GpuReading(
                pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                float(pynvml.nvmlDeviceGetMemoryInfo(handle).free),
            )
            for handle in handles
        ]
    except pynvml.NVMLError as error:
        raise GpusUnreadable(f"NVML: {error}") from error
    if not found:
        raise GpusUnreadable("NVML: this machine has no GPU")
    return found


def _handle(name: str) -> object:
    """NVML's handle of a device that CUDA_VISIBLE_DEVICES names, by number or by UUID."""
    import pynvml

    if name.isdecimal():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)
