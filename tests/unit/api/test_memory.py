"""Memory of training: the numbers of the shapes, the figures that were measured, and CEL beside Python."""

import itertools
import re

import pytest

from tests.fakes import valid_specs
from vpmoe.api import DistillRun, Invalid
from vpmoe.api.card import GIB, cel_card_memory, parse_card_memory
from vpmoe.api.memory import (
    HEAD_CHUNK,
    MICROBATCH,
    STUDENTS,
    VOCABULARY,
    StudentSize,
    cel_training_memory,
    microbatch,
    training_memory,
)
from vpmoe.model.head import CHUNK_BYTES
from vpmoe.model.shapes import SHAPES
from vpmoe.plan.memory import training_role
from vpmoe.trainer.data import collate

GRID = list(
    itertools.product(
        STUDENTS, [1, 2, 3, 4, 7, 8, 16, 64], [1, 2, 4, 8], [16, 4096, 5000, 8192, 32_768, 131_072, 1_048_576]
    )
)


def cel_value(text: str) -> int:
    """The value of CEL with numbers, strings and conditionals, whose conditions are ranked as here."""
    text = text.replace("/", "//")
    while found := re.search(r"\(([^()?]+) \? ([^()?:]+) : ([^()?:]+)\)", text):
        condition, yes, no = found.groups()
        chosen = yes if eval(condition) else no
        text = text[: found.start()] + f"{eval(chosen)}" + text[found.end() :]
    return int(text)


@pytest.mark.parametrize("name", SHAPES)
def test_the_api_has_the_numbers_of_the_shapes(name: str) -> None:
    shape = SHAPES[name]
    assert STUDENTS[name] == StudentSize(
        shape.parameters(),
        shape.expert_parameters(),
        shape.hidden,
        shape.saved_bytes(),
        2 * shape.layer_bytes(),
        shape.cached_bytes(),
        shape.window_bytes(),
    )
    assert shape.vocabulary == VOCABULARY


def test_the_api_has_the_constants_of_trainer_and_head() -> None:
    assert MICROBATCH == collate.MICROBATCH
    assert CHUNK_BYTES["cuda"] // (4 * VOCABULARY) == HEAD_CHUNK
    for length in (16, 4096, 5000, 8192, 8193, 131_072):
        assert microbatch(length) == collate.rows_per_microbatch(length) * length


@pytest.mark.parametrize(
    "ranks, length, measured",
    [pytest.param(4, 8192, 57, id="8,192 tokens"), pytest.param(4, 32_768, 61, id="32,768 tokens")],
)
def test_the_estimate_is_within_4_percent_of_what_pytorch_allocated(
    ranks: int, length: int, measured: float
) -> None:
    """On 4 H100, docs/benchmarks.md; memory outside PyTorch was not in the figures."""
    memory = training_memory(STUDENTS["vpmoe-6b"], ranks, 1, length)
    assert (memory.total - memory.context) / GIB == pytest.approx(measured, rel=0.04)


def test_state_that_was_measured() -> None:
    """101 GiB on one rank (an H200), 67.5 on each of two."""
    for ranks, measured in ((1, 101), (2, 67.5)):
        memory = training_memory(STUDENTS["vpmoe-6b"], ranks, 1, 8192)
        state = memory.weights + memory.gradients + memory.optimizer
        assert state / GIB == pytest.approx(measured, abs=0.25)


def test_two_ranks_of_80_gb_are_too_few_and_three_are_enough() -> None:
    """Two ran out of memory on H100s."""
    totals = {n: training_memory(STUDENTS["vpmoe-6b"], n, 1, 8192).total for n in (1, 2, 3)}
    assert totals[1] > totals[2] > 80 * GIB > 80 * 10**9 > totals[3]


@pytest.mark.parametrize("name", STUDENTS)
def test_cel_computes_the_same_bytes(name: str) -> None:
    for shape, ranks, parallel, length in GRID:
        if shape == name:
            cel = cel_training_memory(f"'{name}'", str(ranks), str(parallel), str(length))
            wanted = training_memory(STUDENTS[name], ranks, parallel, length).total
            assert cel_value(cel) == wanted, (ranks, parallel, length)


@pytest.mark.parametrize("text, size", [("80G", 80 * 10**9), ("80Gi", 80 * GIB), ("1Gi", GIB)])
def test_a_card_s_memory(text: str, size: int) -> None:
    assert parse_card_memory(text) == size
    number, suffix = text.rstrip("Gi"), "Gi" if text.endswith("i") else "G"
    cel = cel_card_memory("m").replace("m.endsWith('i')", str(suffix == "Gi"))
    assert cel_value(re.sub(r"int\(m\.replace\('Gi?', ''\)\)", number, cel)) == size


@pytest.mark.parametrize("text", ["", "80", "080G", "80GB", "80gi", "1.5G", "99999G", "G", "80 G"])
def test_a_malformed_memory_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="is not a memory size such as 80G or 80Gi"):
        parse_card_memory(text)


def test_the_rule_and_the_plan_refuse_the_same_runs() -> None:
    """Both use one function; the rule knows no teacher, and a Vanilla stage has none."""
    refused = 0
    for shape, ranks, parallel, length in GRID:
        if ranks % parallel:
            continue
        changes = {
            "spec.student": {"shape": shape, "gpus": ranks, "expertParallel": parallel},
            "spec.training.sequenceLength": length,
            "spec.training.globalBatchTokens": ranks * length,
        }
        spec = DistillRun.parse(valid_specs.manifest(changes)).spec
        for card in ("16G", "48Gi", "80G", "80Gi", "141G"):
            fits = training_role(spec, spec.stages[0], parse_card_memory(card), None).fits
            try:
                DistillRun.parse(valid_specs.manifest({**changes, "spec.runtime.gpuMemory": card}))
            except Invalid as error:
                assert not fits and "runtime.gpuMemory" in str(error), (shape, ranks, parallel, length, card)
                refused += 1
            else:
                assert fits, (shape, ranks, parallel, length, card)
    assert refused > 0
