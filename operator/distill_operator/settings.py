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
    """Rescoring, teacher, sampler and evaluation."""


class Backoff(SettingsModel):
    """Pause of a step before its next attempt: base, twice that, four times that, …, at most limit."""

    base_seconds: Seconds = 10.0
    limit_seconds: Seconds = 300.0


class LeaseSettings(SettingsModel):
    """The Lease for leader election."""

    name: str
    seconds: Annotated[int, Field(ge=2)] = 30
    """How long the lease outlives its holder, in seconds."""


class Settings(SettingsModel):
    """The whole file."""

    git_sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The commit that the images were built from: provenance of every pod and object of a run."""
    images: Images
    lease: LeaseSettings
    resources: dict[Role, Resources] = {}
    """Requests and limits of the roles that a run's runtime.resources does not name."""
    watch_namespaces: list[str] = []
    """Empty: every namespace."""
    resync_seconds: Seconds = 10.0
    """Interval of the resync: how often every active run is reconciled even without an event."""
    stuck_seconds: Seconds = 300.0
    """The probes fail if a due run has not been reconciled, or the API server has not answered, for this
    time."""
    backoff: Backoff = Backoff()
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
