"""Our tasks: their files are those that the rules make, and their answers are right, computed another way."""

import json
import re
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from vpmoe.task_evaluation.tasks import make

FOLDER = Path(make.__file__).parent


def stored(task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{task}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", make.TASKS)
def test_the_questions_are_those_of_the_rules(task: str, tmp_path: Path) -> None:
    make.write(tmp_path)
    assert (tmp_path / f"{task}.jsonl").read_bytes() == (FOLDER / f"{task}.jsonl").read_bytes()
    assert len(stored(task)) == make.QUESTIONS


def test_answers_of_arithmetic_are_right() -> None:
    for one in stored("vpmoe_arithmetic"):
        text, answer = one["question"], int(one["answer"])
        numbers = [int(found) for found in re.findall(r"\d+", text)]
        if "boxes" in text:
            has, boxes, each = numbers
            assert answer == has + sum(each for _ in range(boxes))
        elif "bags" in text:
            has, sold, bags = numbers
            assert divmod(has - sold, bags) == (answer, 0)
        elif "train" in text:
            fast, long, faster, longer = numbers
            assert answer == sum([fast] * long + [faster] * longer)
        else:
            pages, days, more, book = numbers
            assert answer == book - sum([pages] * days + [more] * 7) > 0


def test_answers_of_choices_are_right_and_the_only_right_ones() -> None:
    places = set()
    for one in stored("vpmoe_choice"):
        text, choices = one["question"], one["choices"]
        right = choices["ABCD".index(one["answer"])]
        places.add(one["answer"])
        if "largest" in text:
            expected = sorted(choices, key=lambda found: int(found.partition(".")[2].ljust(3, "0")))[-1]
            assert len({float(found) for found in choices}) == 4
        elif "Today" in text:
            today = next(
                day for day in (date(2024, 1, 1) + timedelta(n) for n in range(7)) if f"is {day:%A}." in text
            )
            expected = f"{today + timedelta(int(re.findall(r'[0-9]+', text)[0])):%A}"
        elif "next" in text:
            row = [int(found) for found in re.findall(r"\d+", text)]
            steps = [b - a for a, b in pairwise(row)]
            assert len({b - a for a, b in pairwise(steps)}) == 1
            expected = str(row[-1] + 2 * steps[-1] - steps[-2])
        else:
            expected = sorted(choices)[0]
        assert right == expected and choices.count(right) == 1, one
    assert places == set("ABCD")


def test_answers_of_spelling_are_right() -> None:
    for one in stored("vpmoe_spelling"):
        text, answer = one["question"], one["answer"]
        if "backwards" in text:
            assert f'"{"".join(reversed(answer))}"' in text
        elif "Join" in text:
            words = text.removesuffix(".").partition(": ")[2].split(", ")
            assert len(words) == len(answer) == 4
            assert all(word.endswith(letter) for word, letter in zip(words, answer, strict=True))
        else:
            assert re.sub("[aeiou]", "", text.split('"')[1]) == answer
