"""Environment variables of a run's containers: spec.runtime.env and spec.runtime.envFrom.

A Secret is named, never written. Neither field can set what the operator, Kubernetes or the launcher sets.
"""

import re
from typing import Annotated, ClassVar

from pydantic import Field

from vpmoe.api.base import ApiModel, Rule, TextPattern, cel_string
from vpmoe.api.storage import SECRET

RESERVED_ENV = (
    r"(VPMOE|AWS|PET)_.*|HOME|TMPDIR|MASTER_ADDR|MASTER_PORT|RANK|LOCAL_RANK|WORLD_SIZE|JOB_COMPLETION_INDEX"
)
"""Names of environment variables that the operator, Kubernetes, the training operator and the launcher
set."""
RESERVED_PREFIX = r"(VPMOE|AWS|PET)_.*"
"""Prefixes with which every name would be reserved."""
CREDENTIAL = (
    r"(?i:(.*_)?(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY))"
)
"""Names of variables that hold a credential, in small or capital letters, such as HF_TOKEN."""
URL_PASSWORD = "://[^/@]*:[^/@]+@"
"""A user and a password in a URL, as of a proxy."""
ENV_NAME = TextPattern(
    r"[A-Za-z_][A-Za-z0-9_]*",
    "must be the name of an environment variable: letters, digits and underscores, not starting with a digit",
    128,
)
ENV_PREFIX = TextPattern(
    r"|[A-Za-z_][A-Za-z0-9_]*",
    "must begin the names of environment variables: letters, digits and underscores, not starting with a "
    "digit; or be empty",
    128,
)
CONFIG_MAP = TextPattern(
    r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be the name of a ConfigMap in the run's namespace", 253
)
KEY = TextPattern(
    r"[-._a-zA-Z0-9]+",
    "must be a key of a Secret or ConfigMap: letters, digits, hyphens, dots and underscores",
    253,
)
IN_A_POD = "in a pod: runtime.env, or runtime.envFrom of a Secret"
"""Where a run sets a variable that a message names."""


class SecretKeyRef(ApiModel):
    """A key of a Secret."""

    name: Annotated[str, SECRET]
    """Name of the Secret in the run's namespace."""
    key: Annotated[str, KEY]
    """The key whose value the variable has."""
    optional: bool = False
    """true leaves the variable unset if the Secret or the key does not exist; false keeps the pod from
    starting."""


class ConfigMapKeyRef(ApiModel):
    """A key of a ConfigMap."""

    name: Annotated[str, CONFIG_MAP]
    """Name of the ConfigMap in the run's namespace."""
    key: Annotated[str, KEY]
    """The key whose value the variable has."""
    optional: bool = False
    """true leaves the variable unset if the ConfigMap or the key does not exist; false keeps the pod from
    starting."""


class EnvVarSource(ApiModel):
    """Where the value of a variable is: in a Secret or in a ConfigMap."""

    secret_key_ref: SecretKeyRef | None = None
    """The key of a Secret: for tokens and passwords."""
    config_map_key_ref: ConfigMapKeyRef | None = None
    """The key of a ConfigMap: for values that are no secret."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "needs one of secretKeyRef and configMapKeyRef, and not both.",
            cel="has(self.secretKeyRef) != has(self.configMapKeyRef)",
            broken=lambda source, _: (
                {} if (source.secret_key_ref is None) == (source.config_map_key_ref is None) else None
            ),
        ),
    )


def _is_open_credential(variable: "EnvVar") -> bool:
    source = variable.value_from
    plain = bool(variable.value) or (source is not None and source.config_map_key_ref is not None)
    return plain and re.fullmatch(CREDENTIAL, variable.name) is not None


class EnvVar(ApiModel):
    """An environment variable of the containers of all the run's pods."""

    name: Annotated[str, ENV_NAME]
    """Name of the variable. VPMOE_*, AWS_*, PET_*, HOME, TMPDIR and the variables of torch.distributed are
    reserved."""
    value: Annotated[str, Field(max_length=4096)] = ""
    """Value of the variable. It is stored and shown in plain text, so a name such as HF_TOKEN, and a URL with
    a password, are rejected here: use valueFrom."""
    value_from: EnvVarSource | None = None
    """Where the value is, instead of value: a key of a Secret or ConfigMap."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "name",
            "{name} is reserved: the operator, Kubernetes or the launcher sets it. Remove it. AWS_* follow "
            "from storage.credentialsSecret, endpoint, region and caSecret, and the size of TMPDIR from the "
            "ephemeral-storage in runtime.resources.",
            cel=f"!self.name.matches({cel_string(f'^(?:{RESERVED_ENV})$')})",
            broken=lambda env, _: {"name": env.name} if re.fullmatch(RESERVED_ENV, env.name) else None,
            terms={"name": "self.name"},
        ),
        Rule(
            "name",
            "{name} holds a credential, and what is written here or in a ConfigMap can be read by everybody "
            "who may read runs. Put it into a Secret, and name that in valueFrom.secretKeyRef or in "
            "runtime.envFrom.",
            cel=f"!self.name.matches({cel_string(f'^{CREDENTIAL}$')}) || self.value == '' "
            "&& (!has(self.valueFrom) || !has(self.valueFrom.configMapKeyRef))",
            broken=lambda env, _: {"name": env.name} if _is_open_credential(env) else None,
            terms={"name": "self.name"},
            at_apply=True,
        ),
        Rule(
            "value",
            "the URL in {name} holds a password, which everybody can read who may read runs. Put the whole "
            "value into a Secret, and name that in valueFrom.secretKeyRef or in runtime.envFrom.",
            cel=f"!self.value.matches({cel_string(URL_PASSWORD)})",
            broken=lambda env, _: {"name": env.name} if re.search(URL_PASSWORD, env.value) else None,
            terms={"name": "self.name"},
            at_apply=True,
        ),
        Rule(
            "valueFrom",
            "{name} has a value and a valueFrom. Remove one.",
            cel="self.value == '' || !has(self.valueFrom)",
            broken=lambda env, _: {"name": env.name} if env.value and env.value_from is not None else None,
            terms={"name": "self.name"},
        ),
    )


class SecretRef(ApiModel):
    """A Secret."""

    name: Annotated[str, SECRET]
    """Name of the Secret in the run's namespace."""
    optional: bool = False
    """true starts the pods without it if the Secret does not exist; false keeps them from starting."""


class ConfigMapRef(ApiModel):
    """A ConfigMap."""

    name: Annotated[str, CONFIG_MAP]
    """Name of the ConfigMap in the run's namespace."""
    optional: bool = False
    """true starts the pods without it if the ConfigMap does not exist; false keeps them from starting."""


class EnvFromSource(ApiModel):
    """A Secret or a ConfigMap of which every key becomes an environment variable of the containers."""

    prefix: Annotated[str, ENV_PREFIX] = ""
    """Text before every key, such as "HF_"."""
    secret_ref: SecretRef | None = None
    """The Secret: for tokens and passwords."""
    config_map_ref: ConfigMapRef | None = None
    """The ConfigMap: for values that are no secret, such as endpoints."""

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "",
            "needs one of secretRef and configMapRef, and not both.",
            cel="has(self.secretRef) != has(self.configMapRef)",
            broken=lambda source, _: (
                {} if (source.secret_ref is None) == (source.config_map_ref is None) else None
            ),
        ),
        Rule(
            "prefix",
            "{prefix} makes reserved names: the operator, Kubernetes or the launcher sets VPMOE_*, AWS_* and "
            "PET_*. Choose another.",
            cel=f"!self.prefix.matches({cel_string(f'^(?:{RESERVED_PREFIX})$')})",
            broken=lambda s, _: {"prefix": s.prefix} if re.fullmatch(RESERVED_PREFIX, s.prefix) else None,
            terms={"prefix": "self.prefix"},
        ),
    )


def repeated_name(env: tuple[EnvVar, ...]) -> str | None:
    """The first name that two variables have; None if there is none."""
    names = [variable.name for variable in env]
    return next((name for i, name in enumerate(names) if name in names[:i]), None)
