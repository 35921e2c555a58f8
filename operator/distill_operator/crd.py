"""`python -m distill_operator.crd`: install or upgrade the DistillRun CRD with server-side apply.

The chart's init container runs it. A CRD of a newer release stays as it is: an older one would delete the
fields that it does not have from every run.

Helm cannot do it: a templated CRD cannot be adopted from kubectl, and Helm neither upgrades crds/ nor
installs it over another version.
"""

import asyncio
import logging
import re
import sys

from distill_operator.kube import CRD, Conflict, Json, Kube, KubeError
from vpmoe.api.crd import RELEASE_ANNOTATION, crd

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30
CONFLICT_RETRIES = 5


async def apply(kube: Kube, definition: Json) -> None:
    """Apply the CRD unless the stored one is of a newer release, and wait until it is established.

    Raises KubeError.
    """
    name = definition["metadata"]["name"]
    await _apply_upwards(kube, definition)
    for _ in range(TIMEOUT_SECONDS * 5):
        found = await kube.get(CRD, None, name) or {}
        if any(
            c["type"] == "Established" and c["status"] == "True"
            for c in found.get("status", {}).get("conditions", [])
        ):
            log.info("CRD %s is established", name)
            return
        await asyncio.sleep(0.2)
    raise KubeError(
        f"the API server did not establish CRD {name} within {TIMEOUT_SECONDS} s. "
        f"`kubectl describe crd {name}` shows why."
    )


async def _apply_upwards(kube: Kube, definition: Json) -> None:
    """Apply the CRD to the stored one that was looked at, and to no newer one that another operator applies
    meanwhile.
    """
    name, ours = definition["metadata"]["name"], release(definition)
    for _ in range(CONFLICT_RETRIES):
        stored = await kube.get(CRD, None, name)
        if stored is not None and is_newer(release(stored), ours):
            log.warning(
                "CRD %s is of release %s, newer than this operator's %s: it stays as it is. Upgrade the "
                "operator, or apply manifests/crd.yaml of %s by hand",
                name,
                release(stored),
                ours,
                ours,
            )
            return
        seen = {"resourceVersion": stored["metadata"]["resourceVersion"]} if stored is not None else {}
        try:
            await kube.apply(CRD, {**definition, "metadata": {**definition["metadata"], **seen}})
        except Conflict:
            continue
        return
    raise KubeError(f"CRD {name} was changed {CONFLICT_RETRIES} times while it was applied")


def release(definition: Json) -> str:
    """The release that a CRD carries; empty if it is of one that did not carry it yet."""
    return str(definition["metadata"].get("annotations", {}).get(RELEASE_ANNOTATION, ""))


def is_newer(stored: str, ours: str) -> bool:
    """Whether the stored CRD is of a newer release. One that cannot be read counts as newer: whoever wrote it
    knows more.
    """
    if not stored:
        return False
    parsed = _numbers(stored)
    return parsed is None or parsed > (_numbers(ours) or ())


def _numbers(text: str) -> tuple[int, ...] | None:
    found = re.fullmatch(r"v?([0-9]+)\.([0-9]+)\.([0-9]+)", text)
    return tuple(int(number) for number in found.groups()) if found else None


async def install() -> None:
    """Connect, and apply this operator's CRD. Raises KubeError."""
    kube = await asyncio.to_thread(Kube.connect)
    try:
        await apply(kube, crd())
    finally:
        await kube.close()


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        asyncio.run(install())
    except KubeError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
