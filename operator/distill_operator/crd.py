"""`python -m distill_operator.crd`: install or upgrade the DistillRun CRD with server-side apply.

The chart's init container runs it.

Helm cannot do it: a templated CRD cannot be adopted from kubectl, and Helm neither upgrades crds/ nor
installs it over another version.
"""

import asyncio
import logging
import sys

from distill_operator.kube import CRD, Kube, KubeError
from vpmoe.api.crd import crd

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30


async def apply() -> None:
    """Apply the CRD and wait until the API server has established it. Raises KubeError."""
    kube = await asyncio.to_thread(Kube.connect)
    definition = crd()
    name = definition["metadata"]["name"]
    await kube.apply(CRD, definition)
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


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    try:
        asyncio.run(apply())
    except KubeError as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
