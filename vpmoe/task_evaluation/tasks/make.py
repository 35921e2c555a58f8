"""Makes the questions of our tasks: `python -m vpmoe.task_evaluation.tasks.make DIR` writes them.

They follow rules and nobody has written them down before, so no model has learned them by heart, and their
answers are right. They show whether a student reasons at all; they are no measure of knowledge.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

QUESTIONS = 120
"""Of each task."""
NAMES = ("Ana", "Ben", "Chloe", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jun")
THINGS = ("apples", "books", "buttons", "candles", "coins", "cups", "marbles", "pencils", "stamps", "stones")
WORDS = (  # noqa: SIM905 (a list would be 68 lines)
    "anchor autumn basket bridge butter candle castle copper corner cotton desert dinner dragon "
    "engine family flower forest garden hammer harbor island jacket kitchen ladder lemon letter "
    "magnet market meadow mirror monkey needle orange painter pepper pillow planet pocket rabbit "
    "ribbon river saddle season shadow silver singer spider spring station stone summer sunset temple "
    "tiger timber travel tunnel valley velvet village violin wagon window winter wizard yellow"
).split()
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Question = dict[str, Any]


def arithmetic(random: Random) -> Question:
    """A word problem with two or three steps, and its whole number."""
    name, other = random.sample(NAMES, 2)
    thing = random.choice(THINGS)
    a, b, c = random.randint(12, 60), random.randint(2, 9), random.randint(3, 11)
    kind = random.randrange(4)
    if kind == 0:
        text = (
            f"{name} has {a} {thing}. {other} gives {name} {b} boxes with {c} {thing} each. How many {thing} "
            f"has {name} now?"
        )
        return {"question": text, "answer": str(a + b * c)}
    if kind == 1:
        text = (
            f"{name} has {b * c + a} {thing} and sells {a} of them. {name} puts the others into {b} bags, "
            f"the same number into each. How many {thing} are in a bag?"
        )
        return {"question": text, "answer": str(c)}
    if kind == 2:
        text = (
            f"A train goes at {a} km an hour for {b} hours, then at {a + c} km an hour for {c} hours. How "
            "many km does it go?"
        )
        return {"question": text, "answer": str(a * b + (a + c) * c)}
    text = (
        f"{name} reads {b} pages a day for {c} days, then {b + 1} pages a day for a week. The book has "
        f"{b * c + 7 * (b + 1) + a} pages. How many pages are left?"
    )
    return {"question": text, "answer": str(a)}


def choice(random: Random) -> Question:
    """A question with four choices, one of which is right."""
    kind = random.randrange(4)
    if kind == 0:
        whole = random.randint(1, 9)
        values = random.sample(range(11, 100), 3)
        decimals = [f"{whole}.{value}" for value in values] + [
            f"{whole}.{random.randint(10, 99)}{random.randint(1, 9)}"
        ]
        text, choices, right = "Which number is the largest?", decimals, max(decimals, key=float)
    elif kind == 1:
        day, later = random.randrange(7), random.randint(8, 60)
        others = random.sample([other for other in range(7) if other != (day + later) % 7], 3)
        right = DAYS[(day + later) % 7]
        text = f"Today is {DAYS[day]}. Which day is it in {later} days?"
        choices = [right, *(DAYS[other] for other in others)]
    elif kind == 2:
        start, step = random.randint(1, 20), random.randint(2, 9)
        row = [start + step * place * (place + 1) // 2 for place in range(6)]
        text = f"Which number comes next: {', '.join(map(str, row[:5]))}?"
        right = str(row[5])
        choices = [right, *(str(row[5] + off) for off in random.sample([-step, -1, 1, 2, step + 1], 3))]
    else:
        choices = random.sample(WORDS, 4)
        text, right = "Which word comes first in a dictionary?", min(choices)
    random.shuffle(choices)
    return {"question": text, "choices": choices, "answer": "ABCD"[choices.index(right)]}


def spelling(random: Random) -> Question:
    """A question about the letters of a word."""
    word = random.choice(WORDS)
    kind = random.randrange(3)
    if kind == 0:
        return {"question": f'Write the word "{word}" backwards.', "answer": word[::-1]}
    if kind == 1:
        words = random.sample(WORDS, 4)
        text = f"Join the last letters of these words to one word: {', '.join(words)}."
        return {"question": text, "answer": "".join(each[-1] for each in words)}
    vowels = "".join(letter for letter in word if letter not in "aeiou")
    return {"question": f'Write the word "{word}" without the letters a, e, i, o and u.', "answer": vowels}


TASKS: dict[str, Callable[[Random], Question]] = {
    "vpmoe_arithmetic": arithmetic,
    "vpmoe_choice": choice,
    "vpmoe_spelling": spelling,
}


def questions(task: str) -> list[Question]:
    """The questions of a task: the same each time, and none twice."""
    random, found = Random(task), dict[str, Question]()
    while len(found) < QUESTIONS:
        made = TASKS[task](random)
        key = json.dumps(made["question"]) + json.dumps(sorted(made.get("choices", ())))
        if len(set(made.get("choices", ()))) == len(made.get("choices", ())):
            found.setdefault(key, made)
    return list(found.values())


def write(folder: Path) -> None:
    """Write one file of JSON lines for each task."""
    for task in TASKS:
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in questions(task)]
        (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
