"""Memory of training: the numbers of the shapes, the figures that were measured, and CEL beside Python."""

import itertools
import re
from dataclasses import replace
from types import ModuleType

import pytest

from tests.fakes import valid_specs
from vpmoe.api import DistillRun, Invalid
from vpmoe.api.card import GIB, cel_card_memory, parse_card_memory
from vpmoe.api.memory import (
    HEAD_CHUNK,
    STUDENTS,
    VOCABULARY,
    cel_least_memory,
    least_memory,
    training_memory,
)
from vpmoe.model import head
from vpmoe.model.shapes import SHAPES
from vpmoe.objectives import teacher_forced_head
from vpmoe.plan.memory import training_role

GRID = list(
    itertools.product(
        STUDENTS, [1, 2, 3, 4, 7, 8, 16, 64], [1, 2, 4, 8], [16, 4096, 5000, 8192, 32_768, 131_072, 1_048_576]
    )
)


def cel_value(text: str) -> int:
    """The value of CEL with numbers, strings, conditionals, whose conditions are ranked as here, and a value
    that has a name."""
    if found := re.fullmatch(r"\[(.+)\]\.map\((\w), (.+)\)\[0\]", text):
        value, name, text = found.groups()
        text = re.sub(rf"\b{name}\b", str(cel_value(value)), f"({text})")
    text = text.replace("/", "//")
    while found := re.search(r"\(([^()?]+) \? ([^()?:]+) : ([^()?:]+)\)", text):
        condition, yes, no = found.groups()
        chosen = yes if eval(condition) else no
        text = text[: found.start()] + f"{eval(chosen)}" + text[found.end() :]
    return int(text)


@pytest.mark.parametrize("name", SHAPES)
def test_the_api_has_the_numbers_of_the_shapes(name: str) -> None:
    shape = SHAPES[name]
    assert STUDENTS[name] == shape.size()
    assert shape.vocabulary == VOCABULARY


@pytest.mark.parametrize("head", [head, teacher_forced_head], ids=["head", "teacher-forced"])
def test_the_api_has_the_constant_of_the_heads(head: ModuleType) -> None:
    assert head.CHUNK_BYTES["cuda"] // (2 * VOCABULARY) == HEAD_CHUNK


@pytest.mark.parametrize(
    "layers, parallel, recomputed, sharded, graphs, measured",
    [
        pytest.param(80, 1, 0, False, True, 119.1, id="80 layers"),
        pytest.param(80, 1, 70, True, False, 68.6, id="80 layers as on cards of 80 GB"),
        pytest.param(40, 1, 0, False, True, 62.7, id="40 layers"),
        pytest.param(40, 2, 0, False, True, 56.4, id="40 layers, experts divided"),
        pytest.param(40, 2, 0, False, False, 55.5, id="40 layers, experts divided, without graphs"),
    ],
)
def test_the_estimate_is_within_2_percent_of_what_pytorch_allocated(
    layers: int, parallel: int, recomputed: int, sharded: bool, graphs: bool, measured: float
) -> None:
    """By benchmarks.step on two H200s (docs/benchmarks.md), microbatches of 32,768 positions; memory outside
    PyTorch is not in the figures."""
    shape = replace(SHAPES["vpmoe-6b"], layers=layers)
    memory = training_memory(
        shape.size(), 2, parallel, 32_768, recomputed, sharded_gradients=sharded, graphs=graphs
    )
    assert (memory.total - memory.context) / GIB == pytest.approx(measured, rel=0.02)


def test_cuda_graphs_keep_a_layer_s_backward_beside_the_head() -> None:
    """Not with sharded gradients, where there are none. Of ranks that share experts, too."""
    size, positions = STUDENTS["vpmoe-6b"], 32_768
    for parallel, sharded in ((1, False), (2, False), (1, True)):
        with_graphs, without = (
            training_memory(size, 4, parallel, positions, 20, sharded, graphs=graphs).total
            for graphs in (True, False)
        )
        backward = (size.backward + (parallel - 1) * size.shared_backward) * positions
        backward += size.backward_weights // parallel
        beside = min(size.head, backward) + size.graphed * positions if not sharded else 0
        assert with_graphs - without == beside


@pytest.mark.parametrize("recomputed", [0, 40, 80])
@pytest.mark.parametrize("parallel", [2, 4, 8])
def test_expert_parallelism_has_room_for_the_choices_of_other_ranks(recomputed: int, parallel: int) -> None:
    """Of each of a position's four choices a layer keeps 128 numbers in bf16, a weight in fp32 and two places
    in int64, if it is not recomputed, or else while its backward runs. That holds as many numbers again,
    1,024 more of each choice and of the position, and a choice's gradient in fp32. Matrices of experts are
    divided."""
    size, positions = STUDENTS["vpmoe-6b"], 262_144
    kept = 4 * (128 * 2 + 4 + 2 * 8) * max(80 - recomputed, 1)
    backward = 4 * (128 * 2 + 1024 * 2 + 4) + 1024 * 2
    alone, shared = (
        training_memory(size, 8, each, positions, recomputed, sharded_gradients=True)
        for each in (1, parallel)
    )
    matrices = 2 * 2 * 256 * 1024 * 128 * (parallel - 1) // parallel
    weights = 2 * size.expert_parameters * (parallel - 1) // parallel
    more = (parallel - 1) * (kept + backward) * positions
    assert shared.total - alone.total == more - matrices - weights


def test_state_that_was_measured() -> None:
    """101 GiB on one rank (an H200), 67.5 on each of two."""
    for ranks, measured in ((1, 101), (2, 67.5)):
        memory = training_memory(STUDENTS["vpmoe-6b"], ranks, 1, 8192, 80, sharded_gradients=False)
        state = memory.weights + memory.gradients + memory.optimizer
        assert state / GIB == pytest.approx(measured, abs=0.25)


def test_two_ranks_of_80_gb_need_sharded_gradients() -> None:
    """Without them two H100s, which have 79 GiB, ran out of memory."""
    size = STUDENTS["vpmoe-6b"]
    whole, sharded = (training_memory(size, 2, 1, 8192, 80, shards).total for shards in (False, True))
    assert whole > 79 * GIB > 79 * GIB - 7 * GIB > sharded == least_memory(size, 2, 1, 8192).total
    assert least_memory(size, 1, 1, 8192).total > 79 * GIB


@pytest.mark.parametrize("name", STUDENTS)
def test_cel_computes_the_same_bytes(name: str) -> None:
    for shape, ranks, parallel, length in GRID:
        if shape == name:
            cel = cel_least_memory(f"'{name}'", str(ranks), str(parallel), str(length))
            wanted = least_memory(STUDENTS[name], ranks, parallel, length).total
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
