"""Settings of the operator: one YAML file that the chart writes, read once at start.

No environment variables.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from vpmoe.api.runtime import Resources, Role

Seconds = Annotated[float, Field(gt=0)]
ResourceName = Annotated[str, Field(pattern=r"^[a-z0-9.-]{1,253}/[A-Za-z0-9._-]{1,63}$")]


class SettingsModel(BaseModel):
    """Base of all settings: camelCase in the file, unknown fields rejected."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True
    )


class Images(SettingsModel):
    """Image references of the pods."""

    trainer: str
    """Preprocessing and training."""
    inference: str
    """Rescoring, teacher, sampler, evaluation, export and report."""


class Backoff(SettingsModel):
    """Pause of a step before its next attempt: base, twice that, four times that, …, at most limit."""

    base_seconds: Seconds = 10.0
    limit_seconds: Seconds = 300.0


class LeaseSettings(SettingsModel):
    """The Lease for leader election."""

    name: str
    seconds: Annotated[int, Field(ge=2)] = 12
    """How long the lease outlives a holder that has died, in seconds. A holder renews it four times in that
    time, and ends if it cannot for two thirds of it."""


class Settings(SettingsModel):
    """The whole file."""

    images: Images
    lease: LeaseSettings
    resources: dict[Role, Resources] = {}
    """Requests and limits of the roles that a run's runtime.resources does not name."""
    watch_namespaces: list[str] = []
    """Empty: every namespace."""
    resync_seconds: Seconds = 60.0
    """Interval of the resync: how often all runs and their children are listed, and the runs reconciled that
    have changed without an event. Longer if that takes more than 15 requests, but at most 600 s then."""
    reconcile_seconds: Seconds = 600.0
    """How long a live run is not reconciled while nothing changes. Longer if there are more than 60 such
    runs: together they take at most one request in 5 s."""
    poll_seconds: Seconds = 10.0
    """Interval at which a run is reconciled that waits for something of which no event tells, such as the
    reason why its pods do not start; and at which GPUs are counted while runs wait for some. Longer if more
    than 100 runs are reconciled for such a reason: they take 10 reconciles a second at most."""
    progress_seconds: Seconds = 10.0
    """Interval at which the progress of a running step is read from its pods."""
    stuck_seconds: Seconds = 300.0
    """The probes fail if a due run has not been reconciled, or the API server has not answered, for this
    time."""
    backoff: Backoff = Backoff()
    gpu_resource: ResourceName = "nvidia.com/gpu"
    """The resource that GPUs are requested as, and counted by. A change applies to pods created later."""
    scheduling: Literal["Queued", "Immediate"] = "Queued"
    """runtime.scheduling of runs that do not set it. A change applies to runs that hold no GPUs yet."""
    port: int = 8080
    """Port of /healthz, /readyz and /metrics."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load_settings(path: Path) -> Settings:
    """Load the settings. Raises ValueError, which names the file and every wrong field."""
    try:
        return Settings.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()
        )
        raise ValueError(
            f"{path}: {problems}. The chart writes this file from its values; see values.yaml."
        ) from None
