"""vLLM's server finds an exported student by the package's entry point, continues as transformers does, and
answers chats with reasoning and final message apart.

All tests use one server, in an environment that has the wheel and not the checkout."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai_harmony import HarmonyEncoding

from tests.fakes import clean_environment
from tests.fakes.conversations import SYSTEM, harmony_ids
from tests.fakes.model_folders import write_learner
from tests.fakes.policy_versions import TINY, trainer_logp
from tests.fakes.students import new_seed
from tests.fakes.vllm_server import serve
from vpmoe.cli.main import main
from vpmoe.data.harmony import Renderer
from vpmoe.data.tokenizer import tokenizer
from vpmoe.data.vocabulary import RETURN
from vpmoe.inference import hf_model
from vpmoe.model.batch import Batch
from vpmoe.model.learner import Learner
from vpmoe.objectives.vanilla import vanilla
from vpmoe.rollout.task_record import TaskEvaluation
from vpmoe.task_evaluation.tasks import make

pytestmark = pytest.mark.engine

QUESTION = {"role": "user", "content": "How deep is the pond? <|end|>"}
REASONING, ANSWER = "The rope was 3 m long ⟨H≈0.4⟩.", "About 3 m 🐟."


@pytest.fixture(scope="module")
def memorised(device: torch.device) -> Learner:
    """A tiny student that has learned one document by heart."""
    learner = Learner.build(
        TINY, device, sequence_length=256, seed=new_seed(), weight_decay=0.0, gradient_clip=1.0
    )
    document = Renderer(tokenizer(), SYSTEM).render(str(QUESTION["content"]), None, REASONING, ANSWER)
    ids = torch.from_numpy(document.ids.astype("int64"))[None]
    spans = torch.zeros_like(ids, dtype=torch.uint8)
    spans[:, document.prompt :] = 1
    spans[:, document.prompt + document.reasoning :] = 2
    spans[:, -1] = 0
    batch = Batch.from_rows(ids, spans, torch.zeros_like(ids, dtype=torch.int32))
    objective = vanilla(batch.counts, {"reasoning": 1.0, "final": 1.0})
    for _ in range(20):
        for _ in range(25):
            learner.forward_backward([batch], objective, int(batch.counts[0]))
            learner.step(1e-2)
        (logp,) = trainer_logp(learner, [document.ids])
        if logp[document.prompt - 1 : -1].min() > np.log(0.9):
            return learner
    pytest.fail(f"not learned by heart: {logp}")


@pytest.fixture(scope="module")
def exported(memorised: Learner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of that student."""
    return write_learner(tmp_path_factory.mktemp("export") / "vpmoe-tiny", memorised, positions=512)


@pytest.fixture(scope="module")
def served(wheel: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of vLLM's server of that student, with this package as an installed plugin."""
    scratch = tmp_path_factory.mktemp("serve")
    programs = clean_environment.install_beside_everything(wheel, scratch / "venv")
    options = ("--served-model-name", "vpmoe", "--reasoning-parser", "hf", "--max-num-seqs", "4")
    with serve(programs, exported, scratch, *options) as address:
        yield address


def post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        url, json.dumps({"model": "vpmoe", **body}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        content: bytes = answer.read()
    return content


def chat(url: str, **body: Any) -> bytes:
    return post(f"{url}/v1/chat/completions", {"messages": [QUESTION], **body})


def test_a_continuation_is_that_of_transformers(served: str, exported: Path) -> None:
    """Greedy, in float32, after random ids.

    The tokens are equal: the logits of the two likeliest differ by 1e-2 or more (the least of 480 that were
    measured), far above rounding (2e-5 by benchmarks.agreement).
    """
    prompt = np.random.default_rng(new_seed()).integers(0, TINY.vocabulary, 40).tolist()
    body = {
        "prompt": prompt,
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    (choice,) = json.loads(post(f"{served}/v1/completions", body))["choices"]
    model = hf_model.load_student(exported, TINY)
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert choice["token_ids"] == expected[0, 40:].tolist()


def test_an_answer_has_reasoning_and_content(served: str, harmony: HarmonyEncoding) -> None:
    """The student answers what it has learned, so the whole prompt has the ids of training."""
    found = json.loads(chat(served, temperature=0, max_tokens=100, return_token_ids=True))
    (choice,) = found["choices"]
    assert found["prompt_token_ids"] == harmony_ids(harmony, [QUESTION])
    assert choice["token_ids"][-1] == RETURN and choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning"] == REASONING
    assert choice["message"]["content"] == ANSWER


def test_a_streamed_answer_has_reasoning_and_content(served: str) -> None:
    lines = chat(served, temperature=0, max_tokens=100, stream=True).decode().splitlines()
    deltas = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for line in lines
        if line.startswith("data: {")
    ]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == REASONING
    assert "".join(delta.get("content") or "" for delta in deltas) == ANSWER


def test_an_answer_that_is_cut_off_has_reasoning_only(served: str) -> None:
    (choice,) = json.loads(chat(served, temperature=0, max_tokens=8))["choices"]
    assert choice["finish_reason"] == "length"
    assert REASONING.startswith(choice["message"]["reasoning"]) and not choice["message"]["content"]


def test_requests_choose_the_effort(served: str, harmony: HarmonyEncoding) -> None:
    for effort in ("low", "medium"):
        body = json.loads(chat(served, max_tokens=1, return_token_ids=True, reasoning_effort=effort))
        expected = harmony_ids(harmony, [QUESTION], system=replace(SYSTEM, effort=effort))
        assert body["prompt_token_ids"] == expected
    with pytest.raises(urllib.error.HTTPError, match="400"):
        chat(served, reasoning_effort="none")


def test_its_answers_to_a_task_are_counted_by_effort(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At high effort it answers what it has learned; at low effort it is cut off after three tokens. As
    teacher the same server gives the same answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    text = (Path(make.__file__).parent / "vpmoe_spelling.yaml").read_text()
    own = {
        "task: vpmoe_spelling": "task: pond",
        "custom_dataset: !function loader.load": "dataset_path: json",
        "questions: vpmoe_spelling.jsonl": "data_files: {test: pond.jsonl}",
        "\\n\\nEnd your answer with that word alone.": "",
        "([^\\\\W_]+)": "([0-9]+ m)",
    }
    for old, new in own.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "pond.yaml").write_text(text)
    (tmp_path / "pond.jsonl").write_text(json.dumps({"question": QUESTION["content"], "answer": "3 M"}))
    options = ["--task", "pond", "--task-dir", ".", "--max-tokens", "low=3,high=100", "--temperature", "0"]
    assert main(["evaluate", "--student", served, "--teacher", served, *options]) == 0
    found = TaskEvaluation.model_validate_json((tmp_path / "tasks.json").read_bytes())
    assert found.models == {"student": "vpmoe", "teacher": "vpmoe"}
    document = Renderer(tokenizer(), SYSTEM).render(str(QUESTION["content"]), None, REASONING, ANSWER)
    for one in found.results:
        if one.effort == "low":
            assert (one.right, one.cut_off, one.reasoning_tokens, one.final_tokens) == (0, 1, 3, 0)
        else:
            assert (one.right, one.validity) == (1, {"valid": 1})
            # <|start|>assistant of the first message stands in the prompt.
            assert one.reasoning_tokens == document.reasoning - 2 and one.final_tokens == document.final
    assert len(found.results) == 4

    files = []
    for name in ("first.json", "second.json"):  # sampled at temperature 1, one question at a time
        same = ["--limit", "3", "--concurrency", "1", "--max-tokens", "low=20,medium=20", "--output", name]
        assert main(["evaluate", "--student", served, *same]) == 0
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
