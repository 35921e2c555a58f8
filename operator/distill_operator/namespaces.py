"""The watched namespaces, and which of them cannot be read now: the fault of one concerns no other.

With a namespace the operator's rights in it are deleted, so the API server refuses its requests there.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_operator.kube import DISTILLRUN, Json, Kind, KindMissing, Kube, KubeError
from distill_operator.metrics import NAMESPACE_ERRORS

log = logging.getLogger(__name__)

Objects = list[Any]
"""JSON objects, or what was kept of each."""
REFUSED = (403, 404)
"""Status codes with which the API server answers requests in a namespace that is gone, or without rights."""
ADVICE = (
    ". Its runs wait, all others go on. Create the namespace and the operator's rights in it again, or "
    "take it from watchNamespaces."
)


def is_refusal(error: KubeError) -> bool:
    """Whether a request in a namespace was refused until somebody creates the namespace or grants rights."""
    return error.code in REFUSED and not isinstance(error, KindMissing)


@dataclass(frozen=True)
class Listing:
    """Objects of all watched namespaces, without those of a namespace that refuses to be read."""

    objects: Objects
    errors: list[KubeError] = field(default_factory=list)
    """Errors of namespaces that may be read again at any time. Their objects exist and are missing."""
    requests: int = 0
    """How many requests it took."""

    def complete(self) -> Objects:
        """The objects. Raises KubeError if those of a namespace are missing."""
        if self.errors:
            raise self.errors[0]
        return self.objects


class WatchedNamespaces:
    """Lists objects of the namespaces `names`, or of the whole cluster if there are none.

    A namespace's problem is logged once, again when its status code changes, and when it has gone.
    """

    def __init__(self, kube: Kube, names: Sequence[str]) -> None:
        self._kube, self._names = kube, names
        self._problems: dict[str, dict[str, int]] = {}  # status code by namespace and resource

    async def list(
        self,
        kind: Kind,
        labels: str = "",
        fields: str = "",
        keep: Callable[[Json], Any] = lambda obj: obj,
    ) -> Listing:
        """The objects of that kind, or of each what `keep` returns of it: the whole list may take too much
        memory. Raises KubeError if no namespace can be read, but none refuses it.
        """
        if not self._names:
            objects, pages = await self._read(kind, None, labels, fields, keep)
            return Listing(objects, requests=pages)
        objects, errors, requests = list[Any](), list[KubeError](), 0
        for namespace in self._names:
            try:
                found, pages = await self._read(kind, namespace, labels, fields, keep)
                objects += found
                requests += pages
            except KindMissing:  # in none of them
                raise
            except KubeError as error:
                requests += 1
                self._note(namespace, kind, error)
                if not is_refusal(error):
                    errors.append(error)
            else:
                self._note(namespace, kind, None)
        if len(errors) == len(self._names):
            raise errors[0]
        return Listing(objects, errors, requests)

    def refuses(self, namespace: str) -> bool:
        """Whether the namespace refused to be read when its runs were listed."""
        return self._problems.get(namespace, {}).get(DISTILLRUN.plural) in REFUSED

    async def _read(
        self, kind: Kind, namespace: str | None, labels: str, fields: str, keep: Callable[[Json], Any]
    ) -> tuple[Objects, int]:
        """The objects, and the number of pages that they were in."""
        objects, pages = list[Any](), 0
        async for page in self._kube.pages(kind, namespace, labels, fields):
            objects += map(keep, page)
            pages += 1
        return objects, pages

    def _note(self, namespace: str, kind: Kind, error: KubeError | None) -> None:
        """Note how the namespace was listed, and log what is new about it."""
        known = self._problems.setdefault(namespace, {})
        if error is None:
            recovered = known.pop(kind.plural, None) is not None
            if recovered and kind is DISTILLRUN:
                known.clear()  # others, such as pods while no run waits, may not be read for long
            if recovered and not known:
                log.info("namespace %s can be read again", namespace)
            return
        NAMESPACE_ERRORS.labels(namespace, str(error.code)).inc()
        if error.code not in known.values():
            advice = ADVICE if is_refusal(error) else ""
            log.warning("namespace %s cannot be read: %s%s", namespace, error, advice)
        known[kind.plural] = error.code
