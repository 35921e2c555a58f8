"""How a teacher in vLLM uses a GPU's memory: how many tokens it scores in one forward, and what it needs.

A forward costs the same launches and reads of the weights whatever its tokens, so it should have as many as
fit. The plan prints these numbers before a run, the engine computes with them (inference/teacher_engine.py),
and vLLM, which measures a forward of that size before it accepts work, checks them.
"""

from vpmoe.api.card import GIB
from vpmoe.plan.teacher import TeacherSize

TEACHER_SHARE = (9, 10)
"""Share of the card that vLLM plans with for the teacher, as a fraction. It measures all that a forward
holds. The rest is for the driver, for what the allocator cannot use, and beside a TeacherForced stage for the
output matrix and the answers on their way to the students."""
ENGINE = GIB
"""An engine's CUDA context, and what it holds besides weights, activations and cache. An estimate."""
MOST_TOKENS = 16_384
"""Tokens of a forward, at most: its products are then large enough that more tokens gain nothing."""
LEAST_TOKENS = 2_048
"""With fewer tokens in a forward, a GPU waits for its memory: a teacher that leaves no room for these does
not fit."""
GRAIN = 1_024
"""The tokens of a forward are a multiple of this."""


def teacher_share(card: int) -> int:
    """Bytes of a card that vLLM plans with."""
    share, whole = TEACHER_SHARE
    return card * share // whole


def forward_tokens(teacher: TeacherSize, card: int, length: int) -> int:
    """Tokens of one forward on a card of `card` bytes: as many as fit beside the weights and the keys and
    values of a sequence of `length` tokens that is computed in several forwards; at most MOST_TOKENS.

    0 if fewer than LEAST_TOKENS fit: such a teacher needs needed_to_score(…) bytes.
    """
    room = teacher_share(card) - teacher.stored - ENGINE - length * teacher.cached
    fitting = room // (teacher.activations + teacher.cached) // GRAIN * GRAIN
    return min(fitting, MOST_TOKENS) if fitting >= LEAST_TOKENS else 0


def needed_to_score(teacher: TeacherSize, length: int) -> int:
    """Bytes that a card must have for forwards of LEAST_TOKENS."""
    share, whole = TEACHER_SHARE
    least = LEAST_TOKENS * (teacher.activations + teacher.cached) + length * teacher.cached
    return -(-(teacher.stored + ENGINE + least) * whole // share)
