"""Which rows are dropped: blank answers, failed generations, and answers that certainly contradict their
check."""

import random
from fractions import Fraction

import pytest

from vpmoe.data.preprocess.filters import Contradiction, contradiction, quality, stated_result
from vpmoe.data.preprocess.single_value import Number, Option, certainly_differ, read_value


@pytest.mark.parametrize(
    "answer, constraints, reason",
    [
        ("Paris.", None, None),
        ("Paris.", "", None),
        (None, None, "blankAnswer"),
        ("", None, "blankAnswer"),
        (" \n\t", "result: 4", "blankAnswer"),
        ("42", "result:Failed after maximum attempts", "failedGeneration"),
        ("42", "attempts: 5\nRESULT:  failed AFTER maximum Attempts", "failedGeneration"),
        ("41", "result: 42", "contradictedResult"),
        ("B", "result: C", "contradictedResult"),
        (
            "A guide said that the mission failed after maximum attempts",
            "<source_1>failed after maximum attempts</source_1>",
            None,
        ),
    ],
)
def test_a_dropped_row_has_one_reason(
    answer: str | None, constraints: str | None, reason: str | None
) -> None:
    assert quality(answer, constraints) == reason


@pytest.mark.parametrize(
    "result, line",
    [
        ("B", "C"),
        ("B", "c)"),
        ("b", "**C**"),
        ("(B)", "\\boxed{C}"),
        ("B", "Answer: C"),
        ("B", "The correct option is (C)."),
        ("B", "Option D"),
        ("B", "Réponse : C"),
        ("B", "$\\text{A}$"),
        ("B", "Ｄ"),
        ("42", "41"),
        ("42", "420"),
        ("42", "**41**"),
        ("42", "The answer is 41."),
        ("42", "Final answer: $\\boxed{41}$"),
        ("42", "x = 41"),
        ("42", "#### 41"),
        ("42", "٤١"),
        ("42", "४१"),
        ("-3", "3"),
        ("4", "−4"),
        ("1/2", "0.7"),
        ("0.5", "1/3"),
        ("\\frac{1}{2}", "2/3"),
        ("$\\frac12$", "¾"),
        ("1 1/2", "2.25"),
        ("50 %", "60 %"),
        ("1,000", "1,001"),
        ("1 000 000", "2 million"),
        ("1.000,5", "1000.6"),
        ("1e3", "10^4"),
        ("1e3", "1e4"),
        ("1/2", "1/3"),
        ("0.25", "24"),
        ("1", "100"),
        ("2 × 10⁶", "3·10^6"),
        ("12,34,567", "1234568"),
        ("$20", "$25"),
        ("2 Milliarden", "3 000 000 000"),
        ("5万", "60000"),
    ],
)
def test_another_number_or_letter_alone_contradicts(result: str, line: str) -> None:
    found = contradiction(f"attempts: 3\nresult: {result}", f"{line}\n\nLater lines may say C or 17.")
    assert found == Contradiction(result, line)


SAME = [
    [
        "0.5",
        "1/2",
        "½",
        "50%",
        "50 %",
        "50 percent",
        "0,5",
        ".5",
        "\\frac{1}{2}",
        "$\\dfrac12$",
        "٠٫٥",
        "5e-1",
    ],
    [
        "1000",
        "1,000",
        "1.000",
        "1 000",
        "1\u202f000",
        "1\u00a0000",
        "1'000",
        "1_000",
        "1e3",
        "10^3",
        "1 × 10³",
    ],
    [
        "1000",
        "1 thousand",
        "mille",
        "10^{3}",
        "1{,}000",
        "1\\,000",
        "１０００",
        "१०००",
        "𝟏𝟎𝟎𝟎",
        "١٬٠٠٠",
        "1000.0",
    ],
    [
        "-4",
        "−4",
        "–4",
        "- 4",
        "(4)",
        "x = -4",
        "$-4$",
        "\\boxed{-4}",
        "**−4**",
        "－4",
        "-4.",
        "-8/2",
        "&minus;4",
    ],
    ["1234567.5", "1,234,567.5", "1.234.567,5", "1 234 567,5", "12,34,567.5", "1'234'567.5", "1234567½"],
    ["1000000000", "1 billion", "1 milliard", "1.000.000.000", "10^9", "10億", "1 Mrd.", "100 crore"],
    ["1.75", "1 3/4", "1¾", "7/4", "1\\frac{3}{4}", "175 %", "1,75", "7⁄4", "1.750"],
    [
        "B",
        "b",
        "B)",
        "(B)",
        "B.",
        "**B**",
        "[B]",
        "\\boxed{B}",
        "\\(B\\)",
        "Answer: B",
        "Option B",
        "𝐁",
        "<b>B</b>",
    ],
    ["3.14159", "3.14", "3.1416", "3.1", "3", "3.141 59"],
    ["20", "$20$", "20.0", "=20", "twenty", "20 apples", "$20", "20 km", "about 20", "19 + 1", "XX", "20th"],
]


@pytest.mark.parametrize("notations", SAME, ids=lambda notations: notations[0])
def test_notations_of_one_value_never_contradict_each_other(notations: list[str]) -> None:
    for result in notations:
        for line in notations:
            assert contradiction(f"result: {result}", line) is None, (result, line)


@pytest.mark.parametrize(
    "result, answer",
    [
        ("42", "Step 1: Multiply 6 by 7."),
        ("42", "1. Multiply 6 by 7.\n2. The product is 42."),
        ("42", "1.\nMultiply 6 by 7: 42"),
        ("42", "# 1\nMultiply 6 by 7: 42"),
        ("42", "6 × 7 = 42"),
        ("42", "6 · 7"),
        ("42", "2x = 84"),
        ("42", "Since 6 < 7, we need 7 sixes"),
        ("42", "In 1979"),
        ("42", "41 or 42"),
        ("42", "41, 42"),
        ("42", "40–45"),
        ("42", "≈ 41"),
        ("42", "41!"),
        ("42", "4²"),
        ("42", "√41"),
        ("42", "41st"),
        ("42", "41°"),
        ("42", "41 km"),
        ("42", "€41"),
        ("€42", "$41"),
        ("42", "3:30"),
        ("42", "01.02.2003"),
        ("42", "1.2.3"),
        ("42", "0x29"),
        ("42", "XLI"),
        ("42", "①"),
        ("42", "四十一"),
        ("42", "41\n\nNo, I made a mistake:\n\n**42**"),
        ("42", "C"),
        ("8", "8/10"),
        ("0.25", "25"),
        ("50", "1/2"),
        ("3e8", "299 792 458"),
        ("1234567", "1.2 million"),
        ("x = 3", "y = 4"),
        ("B", "A: the wrong ones first. The answer is B."),
        ("B", "A good start is to compare both."),
        ("B", "A)\nwrong\nB)\nright"),
        ("B", "C) Rome"),
        ("B", "A and B"),
        ("B", "Not C"),
        ("B", "Incorrect answer: C"),
        ("B", "2"),
        ("B", "В"),  # Cyrillic
        ("B", "Paris"),
        ("2", "2 + 0 = 2"),
        ("yes", "no"),
        ("a long explanation with 7", "8"),
        ("7 km", "8"),
        ("1/0", "8"),
        ("1e999999999", "8"),
    ],
)
def test_anything_else_than_one_value_alone_proves_nothing(result: str, answer: str) -> None:
    assert contradiction(f"result: {result}", answer) is None


@pytest.mark.parametrize(
    "constraints, result",
    [
        ("result: 42", "42"),
        ("Result:42", "42"),
        ("attempts: 3\nresult: 42", "42"),
        ("attempts: 3; result: 42;", "42"),
        ("- integers only: yes\n- **result**: 42\n", "42"),
        ("result: 41\nresult: 42", None),
        ("Final result: 42", None),
        ("Step 1: 40\nresult: 42", None),
        ("The sum is known.\nresult: 42", None),
        ("<source_1>Match report. Final result: 4</source_1>", None),
        ("<source_1>\nResult: 4\n</source_1>", None),
        ("Match report. Result: 4", None),
        ("expected result: 42", None),
        ("x = 42, result: 42", None),
        ("attempts: 3", None),
        ("", None),
    ],
)
def test_only_the_one_field_result_of_a_list_of_fields_is_a_check(
    constraints: str, result: str | None
) -> None:
    assert stated_result(constraints) == result


@pytest.mark.parametrize("value", ["4", "A", "1920"])
def test_a_result_within_evidence_proves_nothing(value: str) -> None:
    for evidence in (
        f"<source_1>Match report. Final result: {value}</source_1>",
        f"<source_1>\nBlood group test.\nResult: {value}\n</source_1>",
        f"Source 1: Result: {value}",
        f"The club was founded late.\nResult: {value}",
        f'{{"text": "Result: {value}"}}',
    ):
        assert quality("B", evidence) is None
        assert quality("1931", evidence) is None


def notations(value: Fraction, generator: random.Random) -> str:
    """A number with at most three decimals in a random notation that has no other reading."""
    thousandths = round(abs(value) * 1000)
    whole, decimals = divmod(thousandths, 1000)
    groups, point = generator.choice(
        [(" ", ","), ("\u202f", ","), ("'", "."), ("", "."), ("_", "."), ("٬", "٫")]
    )
    text = f"{whole:,}".replace(",", groups) + (f"{point}{decimals:03d}".rstrip("0") if decimals else "")
    zero = ord(generator.choice("0٠०０๐"))
    text = "".join(chr(zero + int(letter)) if letter.isdecimal() else letter for letter in text)
    if value < 0:
        text = generator.choice("-−") + text
    return generator.choice(["{}", "**{}**", "$\\boxed{{{}}}$", "Answer: {}", "{}.", "`{}`", "> {}"]).format(
        text
    )


def test_random_numbers_differ_if_and_only_if_their_values_do() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    for _ in range(3000):
        value = Fraction(generator.randrange(-(10**8), 10**8), generator.choice([1, 10, 100, 1000]))
        other = value + Fraction(generator.randrange(1, 100)) * generator.choice([-1, 1])
        first, same, third = (notations(each, generator) for each in (value, value, other))
        one = read_value(first)
        assert isinstance(one, Number) and not certainly_differ(one, read_value(same)), (first, same)
        assert certainly_differ(one, read_value(third)), (first, third)


def test_any_text_is_read_without_an_error() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    generator = random.Random(seed)
    pieces = [
        *"0123.,-−–+()[]{}$^/eE×%x=AB:#½²٫'\0ُ ",
        "\\",
        "\\frac",
        "\\boxed",
        "10",
        "Answer",
        "**",
        "million",
    ]
    for _ in range(20_000):
        text = "".join(generator.choices(pieces, k=generator.randrange(1, 9)))
        found = read_value(text)
        assert found is None or isinstance(found, Number | Option)
        assert not certainly_differ(found, found), text
