"""How engines divide a card: random cards, shapes and lengths, beside a count in fractions."""

import random
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fakes.students import new_seed
from vpmoe.api.card import GIB
from vpmoe.api.memory import STUDENTS, VOCABULARY, StudentSize
from vpmoe.failure import Permanent
from vpmoe.inference.engine import check_card
from vpmoe.inference.vllm_options import GRAPH_SIZES, STEP_TOKENS
from vpmoe.plan import sampling
from vpmoe.plan.sampling import (
    ENGINES,
    LEAST_SEQUENCES,
    SEQUENCES,
    divide_card,
    needed_to_sample,
    sequence_bytes,
    share_card,
)


def random_sizes(number: int) -> list[tuple[StudentSize, int, int]]:
    """(shape, bytes of a card that holds an engine, longest sequence)."""
    generator = random.Random(new_seed())
    found = []
    for _ in range(number):
        parameters = int(10 ** generator.uniform(6, 10.5))
        size = StudentSize(
            parameters,
            parameters // 2,
            generator.randrange(1, 100),
            1024,
            int(10 ** generator.uniform(3, 5)),
            0,
            int(10 ** generator.uniform(3, 6)),
            0,
            0,
            0,
            0,
            int(10 ** generator.uniform(2, 6)),
            generator.choice([0, int(10 ** generator.uniform(4, 8))]),
        )
        length = int(2 ** generator.uniform(5, 18))
        card = int(needed_to_sample(size, length) * generator.choice([1, generator.uniform(1, 20)]))
        found.append((size, card, length))
    return found


def fixed_bytes(size: StudentSize) -> int:
    """What each engine holds whatever the card: weights in bf16, values and a copy of a layer, two pieces of
    logits in float32, and 2.5 GiB."""
    return 2 * size.parameters + 4096 * size.forward + 2 * 1024 * VOCABULARY * 4 + 5 * GIB // 2


def test_engines_together_never_exceed_the_card_and_leave_no_more_than_rounding() -> None:
    for size, card, length in random_sizes(500):
        for most in range(1, ENGINES + 2):
            found = divide_card(size, card, length, most)
            assert 1 <= found.engines <= most and found.card == card
            exact = Fraction(9, 10) * card / found.engines - fixed_bytes(size)
            longest = SEQUENCES * sequence_bytes(size, length)
            assert min(exact, longest) - 2 <= found.cache <= min(exact, longest)
            assert found.total <= Fraction(9, 10) * card
            assert found.sequences == found.cache // (size.cached * length + size.window) >= 1


def test_as_many_engines_share_a_card_as_have_room_for_enough_sequences() -> None:
    several = 0
    for size, card, length in random_sizes(500):
        found = divide_card(size, card, length, ENGINES)
        several += found.engines > 1
        if found.engines > 1:
            assert found.sequences >= LEAST_SEQUENCES
        if found.engines < ENGINES:
            assert share_card(size, card, length, found.engines + 1).sequences < LEAST_SEQUENCES
        more = divide_card(size, 2 * card, length, ENGINES)
        assert more.engines >= found.engines, "a larger card has no fewer"
    assert 0 < several < 500, "the cards are of both kinds"


def test_a_card_holds_one_engine_from_the_named_size_on() -> None:
    for size, _, length in random_sizes(100):
        needed = needed_to_sample(size, length)
        assert share_card(size, needed, length, 1).sequences == 1
        check_card("a", size, needed, length)
        assert share_card(size, needed - 2, length, 1).sequences == 0
        with pytest.raises(
            Permanent,
            match=rf"a with sequences of {length} tokens needs GPUs of .* GiB, and this pod's "
            r"\(stages\[\]\.sampler\.gpus\) has .*\. Use GPUs with more memory",
        ):
            check_card("a", size, needed - 2, length)


@pytest.mark.parametrize(
    "card, engines", [pytest.param(79, 2, id="h100-80"), pytest.param(139, 2, id="h200-141")]
)
def test_engines_of_the_large_student(card: int, engines: int) -> None:
    """By hand for 139 GiB: 134.3 GB of 149.2; twice 12.06 GB of weights, 0.16 of a forward, 1.65 of
    logits and 2.68 of context leave 50.6 GB each, and a sequence of 8,192 tokens takes 0.176."""
    found = divide_card(STUDENTS["vpmoe-6b"], card * GIB, 8192, ENGINES)
    assert found.engines == engines
    if card == 139:
        assert found.cache == pytest.approx(50.6e9, rel=0.005) and found.sequences == 288


def test_a_small_student_has_no_more_cache_than_it_can_fill() -> None:
    found = divide_card(STUDENTS["tiny"], 139 * GIB, 512, ENGINES)
    assert found.engines == ENGINES and found.sequences == SEQUENCES
    assert found.cache == SEQUENCES * (128 * 512 + 65_536)


def test_the_arithmetic_has_the_numbers_of_vllm_and_of_its_options() -> None:
    vllm = find_spec("vllm")  # not imported: that takes seconds
    assert vllm and vllm.origin
    logprobs = Path(vllm.origin).parent / "v1" / "worker" / "gpu" / "sample" / "prompt_logprob.py"
    assert f"CHUNK_SIZE = {sampling.PROMPT_LOGITS}\n" in logprobs.read_text()
    assert STEP_TOKENS["cuda"] == sampling.STEP_TOKENS
    assert max(GRAPH_SIZES) == SEQUENCES, "every step that only decodes is a graph"
