"""`python -m distill_operator.crd`: bring the cluster's CRD to this version, whatever put it there before; the init container runs it.

Not Helm: a templated CRD cannot be taken over from kubectl, and crds/ is never upgraded, nor installed over another version.
"""

import asyncio
import logging
import sys

from distill_operator.kube import CRD, Kube, KubeError
from vpmoe.api.crd import crd

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30


async def apply() -> None:
    """Apply the CRD and wait until the API server serves it. Raises KubeError."""
    kube = await asyncio.to_thread(Kube.connect)
    wanted = crd()
    name = wanted["metadata"]["name"]
    await kube.apply(CRD, wanted)
    for _ in range(PATIENCE_SECONDS * 5):
        there = await kube.get(CRD, None, name) or {}
        if any(
            c["type"] == "Established" and c["status"] == "True"
            for c in there.get("status", {}).get("conditions", [])
        ):
            log.info("%s is served", name)
            return
        await asyncio.sleep(0.2)
    raise KubeError(
        f"the API server did not establish {name} within {PATIENCE_SECONDS} s; kubectl describe crd {name} says why"
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
