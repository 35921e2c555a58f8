"""What the chart tells the operator: one YAML file, read once at start. Nothing is taken from environment variables."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from vpmoe.api.runtime import Resources, Role

Seconds = Annotated[float, Field(gt=0)]


class Part(BaseModel):
    """camelCase, nothing unknown."""

    model_config = ConfigDict(
        alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="forbid", frozen=True
    )


class Images(Part):
    """Full references of the images that pods run."""

    trainer: str
    """Preprocessing and training."""
    inference: str
    """Rescoring, teacher, sampler and evaluation."""


class Backoff(Part):
    """How long a step waits before its next attempt: base, twice that, four times that, …, at most limit."""

    base_seconds: Seconds = 10.0
    limit_seconds: Seconds = 300.0


class LeaseSettings(Part):
    """The Lease that says who is the operator."""

    name: str
    seconds: Annotated[int, Field(ge=2)] = 30
    """How long it outlives its holder."""


class Settings(Part):
    """The file as a whole."""

    git_sha: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """The commit that the images were built from: provenance of every pod and object."""
    images: Images
    lease: LeaseSettings
    resources: dict[Role, Resources] = {}
    """Requests and limits of the roles that a run's runtime.resources does not name."""
    watch_namespaces: list[str] = []
    """Empty: every namespace."""
    resync_seconds: Seconds = 10.0
    """How often every live run is looked at even if nothing seems to have happened."""
    stuck_seconds: Seconds = 300.0
    """The probes turn red when a due run has not been looked at for so long, or the API server has not answered for so long."""
    backoff: Backoff = Backoff()
    port: int = 8080
    """Where /healthz, /readyz and /metrics are served."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load_settings(path: Path) -> Settings:
    """The file's settings. ValueError names the file and every field that is wrong."""
    try:
        return Settings.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()
        )
        raise ValueError(
            f"{path}: {problems}. The chart writes this file from its values: see values.yaml."
        ) from None
