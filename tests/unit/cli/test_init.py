"""`vpmoe init`: the plan, and a folder that appears whole or not at all."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes.dense_models import save_dense_model
from vpmoe.cli.main import main
from vpmoe.model.shapes import SHAPES
from vpmoe.upcycle.build import upcycle

FITS = {"hidden_size": 64, "num_hidden_layers": 2}
"""What a source has in common with `tiny`."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_dense_model(tmp_path / "source", **FITS)
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def _short_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thousand ids: the whole vocabulary takes seconds, and has no other code."""
    monkeypatch.setitem(SHAPES, "tiny", replace(SHAPES["tiny"], vocabulary=1_000))


def test_the_plan_is_printed_and_nothing_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["init", "--model", str(source), "--shape", "tiny"]) == 0
    said = capsys.readouterr().out
    assert "source    qwen3: 2 layers, hidden 64" in said and "self_attention.linear_proj.weight" in said
    assert "rows      1,000 of the vocabulary" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_out_has_the_weights_and_what_they_were_made_from(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "student"
    assert main(["init", "--model", str(source), "--shape", "tiny", "--seed", "3", "--out", str(out)]) == 0
    want, facts = upcycle(source, SHAPES["tiny"], 3)
    got = load_file(out / "model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert manifest.pop("weights") == {"file": "model.safetensors", "sha256": digest}
    assert manifest.keys() - facts.keys() == {"commit"} and manifest["tensors"] == facts["tensors"]
    assert (
        manifest["source"]["files"]["config.json"]
        == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    )
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--shape", "large"], "--shape: large is not a student. Use vpmoe-6b or tiny."),
        (["--shape", "vpmoe-6b"], "hidden_size is 64, and vpmoe-6b has 1,024"),
        (["--model", "absent"], "absent: config.json cannot be read"),
        (["--donor", "absent"], "absent: config.json cannot be read"),
        (["--out", "."], ". exists. Name a new folder, or remove it."),
    ],
)
def test_what_cannot_be_done_is_refused(
    change: list[str], message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "--model", str(source), "--shape", "tiny", *change]) == 65
    assert message in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the source fails while it is read."""
    from vpmoe.upcycle import build

    real = build.Upcycling.tensor

    def fails(self: build.Upcycling, name: str) -> torch.Tensor:
        if name == "main/output":
            raise OSError(5, "Input/output error", str(source / "model.safetensors"))
        return real(self, name)

    monkeypatch.setattr(build.Upcycling, "tensor", fails)
    out = tmp_path / "student"
    assert main(["init", "--model", str(source), "--shape", "tiny", "--out", str(out)]) == 75
    assert list(tmp_path.iterdir()) == [source]
