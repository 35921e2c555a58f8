"""The header of a part of a policy version, and random rollouts for it."""

import numpy as np

from vpmoe.data.vocabulary import VOCABULARY_SIZE
from vpmoe.rollout.part_files import PartHeader, RolloutKey
from vpmoe.rollout.window_files import Rollout

HEADER = PartHeader(
    run="default/r-01234567", config="c" * 64, stage="onpolicy", version=2, weights="w" * 64, part=3
)


def random_rollouts(random: np.random.Generator, count: int = 5) -> dict[RolloutKey, Rollout]:
    found = {}
    for number in range(count):
        prompt, sampled = random.integers(1, 9), int(random.integers(1, 30))
        key = RolloutKey(int(random.integers(4, 6)), number // 2, number % 2)
        found[key] = Rollout(
            key.prompt,
            key.rollout,
            int(random.integers(1000)),
            "low",
            "valid",
            random.integers(VOCABULARY_SIZE, size=prompt + sampled, dtype=np.int32),
            random.integers(1, 3, size=sampled, dtype=np.uint8),
            -random.exponential(3, size=sampled).astype(np.float32),
        )
    return found
