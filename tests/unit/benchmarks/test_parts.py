"""benchmarks.parts and benchmarks.step: a student leaves no memory to the next one's peak; which rows are
measured."""

import gc
import sys
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import parts
from benchmarks.step import Case, free_students, measure
from vpmoe.model import distributed
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES, Shape


def test_a_measured_student_is_freed_before_the_next_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[Any]] = []
    build = Learner.build

    def keep(*args: Any, **options: Any) -> Learner:
        it = build(*args, **options)
        built.extend(map(weakref.ref, (it, it.student, it.ddp, it.student.output)))
        return it

    monkeypatch.setattr(Learner, "build", keep)
    gc.disable()  # or a collection that happens to come may free it
    try:
        measure(replace(SHAPES["tiny"], layers=2, vocabulary=512), Case(2, 256, 0), device, 1, 1)
        assert any(one() is not None for one in built), "or nothing would have to be freed"
        free_students(device)
        left = [one() is not None for one in built]
    finally:
        gc.enable()
    assert left == [False] * 4


@pytest.mark.parametrize(
    "only, costs",
    [
        pytest.param(
            ["all, with graphs", "no part"], ["no part  +0.0 %", "all, with graphs +50.0 %"], id="beside"
        ),
        pytest.param(["all"], ["all"], id="alone"),
    ],
)
def test_only_some_rows_are_measured(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: list[str],
    costs: list[str],
) -> None:
    """In the table's order; the cost beside no part is left out with that row."""

    def cost(shape: Shape, device: torch.device, tokens: int, steps: int, graphs: bool) -> parts.Cost:
        time = 10.0 if shape.local_window is None else 15.0
        return parts.Cost(time, 0.0, {"a kernel": (3, time)}, 5 << 30)

    for name, stand_in in {"measure": cost, "product_rate": lambda device: 1e12}.items():
        monkeypatch.setattr(parts, name, stand_in)
    monkeypatch.setattr(distributed, "start", lambda device: None)
    monkeypatch.setattr(distributed, "stop", lambda: None)
    monkeypatch.setattr(sys, "argv", ["parts", "--only", *only])
    parts.main()
    _, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    found = [f"{row[:22].strip()} {row[52:59]}".rstrip() for row in rows]
    assert found == costs
