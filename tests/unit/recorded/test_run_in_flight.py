"""Stored documents of a run in progress are readable, and are written again with the same content."""

import json
from collections import Counter

from pydantic import TypeAdapter

from tests.fakes.recorded import documents, plain
from vpmoe.api import DistillRun
from vpmoe.api.progress import Progress
from vpmoe.checkpoint.train_state import TrainState
from vpmoe.data.inputs import Inputs
from vpmoe.pretrained.model_files import ModelRef
from vpmoe.rollout.back_pressure import Adjustment
from vpmoe.rollout.evaluation_record import parse_evaluation
from vpmoe.rollout.policy_version import PolicyVersion
from vpmoe.rollout.window_files import ScoresHeader, read_rollouts, read_scores, rollouts_bytes, scores_bytes
from vpmoe.storage import manifest
from vpmoe.storage.bucket import json_bytes

DOCUMENTS = documents()


def documents_ending_with(ending: str) -> dict[str, bytes]:
    """The documents whose paths end with `ending`. Fails if there are none."""
    found = {path: data for path, data in DOCUMENTS.items() if path.endswith(ending)}
    assert found, ending
    return found


def test_manifests() -> None:
    kinds: Counter[str] = Counter()
    for path, data in documents_ending_with("manifest.json").items():
        found = manifest.parse(path, data)
        kinds[found.kind] += 1
        if found.kind == "checkpoint":
            state = TrainState.model_validate(found.facts["position"])
            assert state.dump() == found.facts["position"], path
        if found.kind == "weights" and "probe" in found.facts:
            assert PolicyVersion.model_validate(found.facts).dump() == found.facts, path
    assert kinds == {"checkpoint": 16, "weights": 3, "dataset": 1, "scores": 1}


def test_progress_of_every_role() -> None:
    found = {path: data for path, data in DOCUMENTS.items() if "progress" in path and path.endswith(".json")}
    assert len(found) == 25
    for path, data in found.items():
        assert json_bytes(Progress.model_validate(json.loads(data)).dump()) == data, path


def test_evaluations() -> None:
    for path, data in documents_ending_with("evaluation.json").items():
        assert json_bytes(parse_evaluation(json.loads(data), "stage", path).dump()) == data, path


def test_configurations() -> None:
    for path, data in documents_ending_with("run.json").items():
        stored = json.loads(data)
        read = DistillRun.parse(stored).document()
        assert stored["spec"].pop("runtime"), "it was part of the configuration then"
        assert json_bytes(read) == json_bytes(stored), path


def test_resolved_inputs_and_teacher() -> None:
    for path, data in documents_ending_with("/inputs.json").items():
        inputs = json.loads(data)["inputs"]
        assert plain(TypeAdapter(Inputs).validate_python(inputs).as_json()) == inputs, path
    for path, data in documents_ending_with("/teacher.json").items():
        assert json_bytes(TypeAdapter(ModelRef).validate_json(data).as_json()) == data, path


def test_adjustments() -> None:
    for path, data in documents_ending_with("turn-000001.json").items():
        assert json_bytes(Adjustment.model_validate(json.loads(data)).dump()) == data, path


def test_windows() -> None:
    for path, data in documents_ending_with(".rollouts.arrow").items():
        window = read_rollouts(data, path)
        assert rollouts_bytes(window.header, window.rollouts) == data, path
        scores = DOCUMENTS[path.replace(".rollouts.", ".scores.")]
        logp = read_scores(scores, path, window)
        if not path.startswith("tiny"):  # these have the hash of a real teacher
            window_header = window.header
            header = ScoresHeader(
                run=window_header.run,
                stage=window_header.stage,
                window=window_header.window,
                rollouts=window.sha256,
                teacher="t" * 64,
            )
            assert scores_bytes(header, logp) == scores, path
