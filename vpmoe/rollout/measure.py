"""What is counted of completions, by the effort that was asked for. Whoever samples or trains on some counts them alike."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from vpmoe.rollout.curriculum import EFFORTS
from vpmoe.rollout.record import Rollout


def by_effort(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """As lines of metrics have it: how many there are of each effort, of each validity among them, and how long they are in tokens.

    What there is none of is left out.
    """
    of = {name: found for name in EFFORTS if (found := [one for one in rollouts if one.effort == name])}
    lengths = {name: [len(one.logp_C) for one in found] for name, found in of.items()}
    return {
        "effort": {name: len(found) for name, found in of.items()},
        "validity": {name: dict(sorted(Counter(one.validity for one in found).items())) for name, found in of.items()},
        "length": {name: {"mean": sum(found) / len(found), "max": max(found)} for name, found in lengths.items()},
    }
