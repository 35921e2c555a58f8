"""`vpmoe evaluate` with servers whose answers are known: what is right, cut off, valid, and how many tokens.

A real student answers in tests/unit/export/test_serving.py.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import completion_server, recorded_run
from tests.fakes.completions import ASSISTANT, ids
from tests.fakes.store import S3
from vpmoe.cli.main import main
from vpmoe.process.run_folder import open_run
from vpmoe.rollout.task_record import TaskEvaluation, load_task_evaluations
from vpmoe.task_evaluation import server
from vpmoe.task_evaluation.harness import question_seed

THOUGHT = "<|channel|>analysis<|message|>Let me add. 7 is not it.<|end|>" + ASSISTANT
FINAL = "<|channel|>final<|message|>"
SUM = re.compile(r"What is (\d+) \+ (\d+)\?")
QUESTIONS = 12
MAX_TOKENS = {"low": 32, "medium": 40, "high": 80}


def effort_of(prompt: str) -> str:
    return re.findall(r"Reasoning: (\w+)", prompt)[0]


def teacher(prompt: str, body: dict[str, Any]) -> str:
    """Always right, with a comma as English has it."""
    left, right = map(int, SUM.findall(prompt)[0])
    return f"{THOUGHT}{FINAL}It is {left + right:,}.<|return|>"


def student(prompt: str, body: dict[str, Any]) -> str:
    """Right in a third of the questions. In another third the right number is in its reasoning alone, in the
    last third it is wrong. At low effort its reasoning is too long."""
    left, right = map(int, SUM.findall(prompt)[0])
    if effort_of(prompt) == "low":
        return f"<|channel|>analysis<|message|>{'hm ' * 40}{left + right}"
    said = [str(left + right), "I do not know", str(left + right + 1)][left % 3]
    thought = f"<|channel|>analysis<|message|>{left + right}<|end|>{ASSISTANT}"
    return f"{thought}{FINAL}{said}.<|return|>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the task `sums` in tasks/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub/datasets"))
    (tmp_path / "tasks").mkdir()
    lines = [
        json.dumps({"question": f"What is {n} + {n + 995}?", "answer": str(2 * n + 995)})
        for n in range(QUESTIONS)
    ]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    write_task(tmp_path)
    return tmp_path


def write_task(folder: Path, change: Callable[[str], str] = str) -> None:
    """The task `sums`, as a user writes it: ours, with a file of questions."""
    import vpmoe.task_evaluation.tasks.make as make

    text = (Path(make.__file__).parent / "vpmoe_arithmetic.yaml").read_text()
    text = text.replace("task: vpmoe_arithmetic", "task: sums")
    text = text.replace("custom_dataset: !function loader.load", "dataset_path: json")
    text = text.replace("questions: vpmoe_arithmetic.jsonl", "data_files:\n    test: sums.jsonl")
    (folder / "tasks/sums.yaml").write_text(change(text))


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """Addresses of student and teacher."""
    with (
        completion_server.serve("tiny-student", student) as of_student,
        completion_server.serve("tiny-teacher", teacher) as of_teacher,
    ):
        yield of_student, of_teacher


def evaluate(address: str, *options: str, task: str = "sums") -> int:
    sizes = ",".join(f"{name}={size}" for name, size in MAX_TOKENS.items())
    own = ["--task", task, "--task-dir", "tasks", "--max-tokens", sizes]
    return main(["evaluate", "--student", address, *own, *options])


def test_right_answers_are_counted_by_effort_for_student_and_teacher(
    folder: Path, addresses: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(addresses[0], "--teacher", addresses[1] + "/v1", "--output", "found.json") == 0
    said = capsys.readouterr().out
    found = TaskEvaluation.model_validate_json(Path("found.json").read_bytes())
    assert found.models == {"student": "tiny-student", "teacher": "tiny-teacher"}
    assert found.tasks["sums"].questions == QUESTIONS and found.max_tokens == MAX_TOKENS
    assert [(one.side, one.effort) for one in found.results] == [
        (side, effort) for effort in MAX_TOKENS for side in ("student", "teacher")
    ]
    thought = len(ids(THOUGHT.removesuffix(ASSISTANT)))
    for effort in MAX_TOKENS:
        of_teacher, of_student = found.of("teacher", effort, "sums"), found.of("student", effort, "sums")
        assert of_teacher is not None and of_student is not None
        assert of_teacher.right == QUESTIONS and of_teacher.validity == {"valid": QUESTIONS}
        assert of_teacher.reasoning_tokens == thought * QUESTIONS
        if effort == "low":
            assert of_student.right == 0 and of_student.cut_off == QUESTIONS
            assert of_student.reasoning_tokens == MAX_TOKENS["low"] * QUESTIONS
            assert of_student.final_tokens == 0 == of_student.valid_share
        else:
            assert of_student.right == QUESTIONS // 3 and of_student.cut_off == 0
            assert of_student.valid_share == 1.0 and of_student.final_tokens > 5 * QUESTIONS
    assert "sums, medium effort, student: 33.3% right (4 of 12; " in said
    assert f"{folder / 'found.json'}\n" in said


def test_the_same_questions_again_give_the_same_bytes(folder: Path, addresses: tuple[str, str]) -> None:
    seen: dict[str, list[tuple[str, int, float]]] = {"first": [], "second": [], "other": []}
    for name, seed in (("first", "5"), ("second", "5"), ("other", "6")):

        def complete(prompt: str, body: dict[str, Any], name: str = name) -> str:
            seen[name].append((prompt, body["seed"], body["temperature"]))
            return student(prompt, body)

        with completion_server.serve("tiny-student", complete) as address:
            assert evaluate(address, "--seed", seed, "--temperature", "0.7", "--output", f"{name}.json") == 0
    assert Path("first.json").read_bytes() == Path("second.json").read_bytes()
    assert sorted(seen["first"]) == sorted(seen["second"]) != sorted(seen["other"])
    seeds = [seed for _, seed, _ in seen["first"]]
    assert len(set(seeds)) == 3 * QUESTIONS and all(0 <= seed < 2**31 for seed in seeds)
    assert {temperature for _, _, temperature in seen["first"]} == {0.7}
    assert question_seed(5, "sums", 0, "low") in seeds


def test_our_own_tasks_are_asked_without_any_file_of_the_user(folder: Path) -> None:
    """With their right answers, in sentences, all is right."""
    import vpmoe.task_evaluation.tasks.make as make

    right = {}
    for task in make.TASKS:
        for one in make.questions(task):
            right[one["question"] + "".join(sorted(one.get("choices", ())))] = one["answer"]

    def knowing(prompt: str, body: dict[str, Any]) -> str:
        asked = prompt.partition("<|start|>user<|message|>")[2].partition("<|end|>")[0]
        choices = "".join(sorted(re.findall(r"^[A-D]\. (.*)$", asked, re.MULTILINE)))
        answer = right[asked.partition("\n")[0] + choices]
        return f"{THOUGHT}{FINAL}After some thought the answer is **{answer.capitalize()}**.<|return|>"

    with completion_server.serve("tiny-student", knowing) as address:
        assert main(["evaluate", "--student", address, "--limit", "40", "--max-tokens", "high=80"]) == 0
    found = TaskEvaluation.model_validate_json(Path("tasks.json").read_bytes())
    assert {one.task: (one.right, one.questions) for one in found.results} == dict.fromkeys(
        make.TASKS, (40, 40)
    )


def test_a_task_of_the_harness_is_asked_with_its_examples_filters_and_stop_texts(folder: Path) -> None:
    """gsm8k as the harness describes it, with questions from a file: five examples, two filters of which the
    last counts, and what follows a stop text is no part of the answer."""
    import lm_eval

    text = (Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text()
    files = "json\ndataset_kwargs: {data_files: {train: a.jsonl, test: b.jsonl}}"
    change = replaced("openai/gsm8k\ndataset_name: main", files)
    (folder / "tasks/gsm8k.yaml").write_text(change(text))
    for name, first in (("a", 100), ("b", 0)):
        lines = [
            json.dumps({"question": f"What is {n} + 1000?", "answer": f"We add.\n#### {n + 1000:,}"})
            for n in range(first, first + 6)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    prompts: list[str] = []

    def complete(prompt: str, body: dict[str, Any]) -> str:
        prompts.append(prompt)
        number = int(re.findall(r"What is (\d+)", prompt)[-1])
        said = ["It is $1,{:03}.\n\nQuestion: What is 7?", "#### 1{:03}", "It is 2{:03}."][number % 3]
        return f"{THOUGHT}{FINAL}{said.format(number)}<|return|>"

    with completion_server.serve("x", complete) as address:
        for _ in range(2):
            assert evaluate(address, "--max-tokens", "low=100,high=100", task="gsm8k") == 0
    found = TaskEvaluation.model_validate_json(Path("tasks.json").read_bytes())
    assert found.tasks["gsm8k"].metric == "exact_match,flexible-extract"
    assert [(one.right, one.questions) for one in found.results] == [(4, 6), (4, 6)]
    assert all(len(re.findall(r"What is 10\d \+", prompt)) == 5 for prompt in prompts)
    # The same examples at each effort, and in the next evaluation.
    seen = {re.sub("Reasoning: .*", "", prompt) for prompt in prompts}
    assert len(prompts) == 24 and len(seen) == 6


def test_the_record_is_written_to_the_stage_of_a_run_with_its_system_message(
    s3: S3, folder: Path, addresses: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = recorded_run.store(s3)
    assert evaluate(addresses[0], "--run", url, "--stage", "rescored", "--limit", "2") == 0
    assert f"{url}/tasks/rescored.json\n" in capsys.readouterr().out
    run, bucket = open_run(url)
    found = load_task_evaluations(run, bucket)
    assert list(found) == ["rescored"] and found["rescored"].run == run.identity
    assert evaluate(addresses[0], "--run", url, "--limit", "3") == 0
    assert list(load_task_evaluations(run, bucket)) == ["rescored", "onpolicy"]
    assert load_task_evaluations(run, bucket)["onpolicy"].tasks["sums"].questions == 3
    bucket.put_bytes(f"{run.folder}/tasks/rescored.json", b'{"seed": 0}', {})
    from vpmoe.failure import Permanent

    with pytest.raises(Permanent, match=r"tasks/rescored\.json: Field required"):
        load_task_evaluations(run, bucket)


# Mistakes


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        pytest.param(
            lambda text: re.sub(
                "doc_to_target:.*",
                "doc_to_choice: [a, b]\ndoc_to_target: 0",
                text.replace("generate_until", "multiple_choice"),
            ),
            "task sums compares answers by multiple_choice. A model that reasons first",
            id="log-likelihood",
        ),
        pytest.param(replaced("test: sums.jsonl", "test: none.jsonl"), "none.jsonl", id="no-data"),
        pytest.param(
            replaced("dataset_path: json", "dataset_path: someone/else"),
            "Nothing is downloaded while a model is evaluated",
            id="data-on-the-hub",
        ),
        pytest.param(
            replaced("test_split: test", "test_split: test\nrepeats: 4"),
            "asks each question 4 times",
            id="repeats",
        ),
    ],
)
def test_a_task_that_cannot_be_asked_is_named(
    folder: Path,
    addresses: tuple[str, str],
    change: Callable[[str], str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_task(folder, change)
    assert evaluate(addresses[0]) == 65
    assert message in (error := capsys.readouterr().err) and "sums" in error


def test_a_server_that_is_away_or_no_server_of_a_model_is_named(
    folder: Path,
    addresses: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "WAITS", (0.0,))

    def said(address: str, code: int) -> str:
        assert evaluate(address) == code
        return capsys.readouterr().err

    assert "--student http://127.0.0.1:9/v1/models: " in said("http://127.0.0.1:9", 75)
    assert "--student localhost:80 is no address. Write http://HOST:PORT" in said("localhost:80", 65)
    with completion_server.serve("x", student, models={"data": []}) as address:
        assert "does not list a model as vLLM does" in said(address, 65)
    with completion_server.serve("x", lambda prompt, body: "error 400") as address:
        assert "/v1/completions answered 400" in said(address, 65)
    with completion_server.serve("x", lambda prompt, body: "error 503") as address:
        assert "/v1/completions answered 503" in said(address, 75)


def test_an_answer_that_fails_for_a_moment_is_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "WAITS", (0.0, 0.0))
    failed: set[str] = set()

    def complete(prompt: str, body: dict[str, Any]) -> str:
        if prompt not in failed:
            failed.add(prompt)
            return "error 502"
        return teacher(prompt, body)

    with completion_server.serve("x", complete) as address:
        assert evaluate(address) == 0
    found = TaskEvaluation.model_validate_json(Path("tasks.json").read_bytes())
    assert all(one.right == QUESTIONS for one in found.results)


@pytest.mark.parametrize(
    "options, code, message",
    [
        pytest.param(["--task", "nothing"], 65, "--task nothing: there is no such task. Ours are", id="task"),
        pytest.param(["--task-dir", "none"], 65, "--task-dir none is no folder.", id="folder"),
        pytest.param(["--stage", "vanilla"], 64, "--stage is of a run: name it with --run", id="stage"),
        pytest.param(["--max-tokens", "low=1,middle=2"], 64, "is not as low=1024,medium=2048", id="efforts"),
        pytest.param(["--max-tokens", "low=0"], 64, "'0' is no number from 1 on", id="tokens"),
        pytest.param(["--temperature", "warm"], 64, "'warm' is no number from 0", id="temperature"),
        pytest.param(
            ["--task", "sums", "--task-dir", "tasks", "--output", "."],
            65,
            "--output .: Is a directory.",
            id="output",
        ),
    ],
)
def test_a_wrong_option_is_named(
    folder: Path,
    addresses: tuple[str, str],
    options: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Reading the harness' own 14,000 descriptions takes 10 seconds, so here it has none.
    from lm_eval.tasks import TaskManager

    made = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **given: made(self, **{**given, "include_defaults": False})
    )
    try:
        ended = main(
            ["evaluate", "--student", addresses[0], "--limit", "1", "--max-tokens", "low=5", *options]
        )
    except SystemExit as error:
        ended = error.code
    assert ended == code and message in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("harness", "evaluate"):
        monkeypatch.delitem(sys.modules, f"vpmoe.task_evaluation.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", "--student", "http://127.0.0.1:9"]) == 65
    error = capsys.readouterr().err
    assert "the Python package lm_eval" in error and "pip install 'vpmoe[evaluate]'" in error
