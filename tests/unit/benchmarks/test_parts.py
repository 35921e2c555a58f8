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
from vpmoe.model.learner import Learner
from vpmoe.model.shapes import SHAPES, Shape


def test_a_measured_student_is_freed_before_the_next_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[weakref.ref[Any]] = []
    build = Learner.build.__func__

    def keep(cls: type[Learner], *args: Any, **options: Any) -> Learner:
        it: Learner = build(cls, *args, **options)
        built.extend(map(weakref.ref, (it, it.student, it.ddp, it.student.output)))
        return it

    monkeypatch.setattr(Learner, "build", classmethod(keep))
    gc.disable()  # or a collection during the measurement may be the first of the two
    try:
        measure(replace(SHAPES["tiny"], layers=2, vocabulary=512), Case(2, 256, 0), device, 1, 1)
        free_students(device)
    finally:
        gc.enable()
    assert len(built) == 4 and all(one() is None for one in built)


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
    monkeypatch.setattr(parts.distributed, "start", lambda device: None)
    monkeypatch.setattr(parts.distributed, "stop", lambda: None)
    monkeypatch.setattr(sys, "argv", ["parts", "--only", *only])
    parts.main()
    _, *rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    found = [f"{row[:22].strip()} {row[52:59]}".rstrip() for row in rows]
    assert found == costs
