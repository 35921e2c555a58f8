"""Reads a line that is one number or one option letter alone, in any usual notation, and compares two such
lines. Pure.

The quality filter (filters.py) drops a row only if its answer certainly contradicts the row's own check. So a
notation with several readings has all of them (`1,234` is 1234 or 1.234), and two values certainly differ
only if no reading of one agrees with any of the other. A line with anything else in it, such as a sentence,
an equation or a unit, has no value.
"""

import html
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 120
"""Characters of a line that can be one value alone. A longer one is a text."""


@dataclass(frozen=True)
class Option:
    """A letter of a multiple-choice question."""

    letter: str


@dataclass(frozen=True)
class Reading:
    """One value that a number's notation may have."""

    value: Fraction
    step: Fraction
    """One unit of its last digit: 1/100 for 0.25, 1 for 7. 0 for a fraction, which is exact."""
    among: int = 0
    """10 for `8/10` as 8 of 10. 0 if the number is no such count."""

    def agrees(self, other: "Reading") -> bool:
        """Whether both may be the same number, one of them rounded or cut to fewer digits."""
        if self.among and other.among and self.among != other.among:
            return False
        if self.value == other.value:
            return True
        fine, coarse = sorted((self, other), key=lambda reading: reading.step)
        away, step = abs(fine.value - coarse.value), coarse.step
        if fine.step == step or away >= step:
            return False
        return step <= 1 or away <= step / 2 or abs(fine.value) > abs(coarse.value)


@dataclass(frozen=True)
class Number:
    """A number with all of its readings."""

    readings: frozenset[Reading]
    currency: str = ""
    """The currency sign, empty if there is none."""
    variable: str = ""
    """`x` of `x = 5`, empty if there is none."""


def certainly_differ(one: Option | Number | None, other: Option | Number | None) -> bool:
    """Whether two values of the same kind exclude each other. False for a letter and a number, for two
    currencies, and for the values of two variables."""
    if isinstance(one, Option) and isinstance(other, Option):
        return one.letter != other.letter
    if not (isinstance(one, Number) and isinstance(other, Number)) or one.currency != other.currency:
        return False
    if one.variable and other.variable and one.variable != other.variable:
        return False
    return not any(mine.agrees(theirs) for mine in one.readings for theirs in other.readings)


WRAPPERS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"\$(?P<inside>[^$]+)\$",
        r"\$\$(?P<inside>[^$]+)\$\$",
        r"\\\((?P<inside>.+)\\\)",
        r"\\\[(?P<inside>.+)\\\]",
        r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf)\s*\{(?P<inside>.+)\}",
        r"\{(?P<inside>[^{}]+)\}",
        r"(?P<mark>\*{1,3}|_{1,3}|`+)(?P<inside>(?:(?!(?P=mark)).)+)(?P=mark)",
        r"<(?P<tag>b|strong|i|em|u|p|mark|code|answer)>(?P<inside>[^<>]+)</(?P=tag)>",
        r"[\"“”„«»](?P<inside>[^\"“”„«»]+)[\"“”„«»]",
        r"(?:#{1,6}|[*•])\s+(?P<inside>.+)",
        r">\s*(?P<inside>.+)",
        r"(?P<inside>.*[^.。])[.。]",
    )
)
"""LaTeX, Markdown, HTML, quotation marks, the mark of a heading, a list or a quotation, a full stop: what may
be around a value."""

LABEL = re.compile(
    r"[*_`]*(?:"
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:(?:correct|right|final|best)\s+)*"
    r"(?:answer|option|choice|result|solution)(?:\s+is\b\s*:?|\s*[*_`]*\s*[:=])"
    r"|(?:réponse|antwort|lösung|ergebnis|respuesta|resultado|solución|risposta|risultato|soluzione|odpowiedź|"
    r"wynik|antwoord|resultaat|oplossing|responsum|ответ|答案)"
    r"(?:\s+(?:finale?|correcta|correcte|corretta))?\s*[*_`]*\s*:"
    r")[*_`]*\s*(?P<inside>.+)",
    re.IGNORECASE | re.DOTALL,
)
"""`Answer: 5`, `The correct answer is 5`, `**Réponse :** 5`."""

VARIABLE = re.compile(r"(?P<name>[a-zα-ω])\s*=\s*(?P<inside>.+)", re.IGNORECASE | re.DOTALL)
OPTION = re.compile(
    r"(?:(?:option|choice|opción|opzione|opcja|optie)\s+)?[(\[]?([A-J])[)\].:]?", re.IGNORECASE
)


def read_value(line: str) -> Option | Number | None:
    """The value that a line consists of, None if it is anything else."""
    if len(line) > LONGEST:
        return None
    text, variable = _unwrap(_fold(line))
    if (option := OPTION.fullmatch(text)) and not variable:
        return Option(option[1].upper())
    number = _number(_fold_latex(text))
    return Number(number.readings, number.currency, variable) if number and variable else number


def _unwrap(text: str) -> tuple[str, str]:
    """The text without what is around it, and the variable that it is the value of."""
    variable, before = "", None
    while text != before:
        before = text = text.strip()
        for pattern in (*WRAPPERS, LABEL):
            if found := pattern.fullmatch(text):
                text = found["inside"].strip()
        if not variable and (found := VARIABLE.fullmatch(text)):
            variable, text = found["name"], found["inside"].strip()
    return text, variable


def _fold(text: str) -> str:
    """The text with the digits of all scripts as 0 to 9, all blanks as spaces, characters that differ in
    width or font alone (fullwidth forms, mathematical letters) as ASCII, and without invisible marks.

    Superscripts, circled and Roman numerals stay as they are: they have other meanings.
    """
    return "".join(map(_fold_character, html.unescape(text)))


def _fold_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf":
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Zs":
        return " "
    if unicodedata.decomposition(character).startswith(("<wide>", "<narrow>", "<small>", "<font>")):
        return unicodedata.normalize("NFKC", character)
    return {"٪": "%", "،": ",", "﹣": "−", "－": "−", "‐": "-", "‑": "-"}.get(character, character)


LATEX = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r"(\1)/(\2)"),
        (r"\\[dt]?frac\s*(\d)\s*(\d)", r"(\1)/(\2)"),
        (r"\\(?:left|right|displaystyle|!)", ""),
        (r"\\(?:[,;:> ]|quad)|(?<=\d)~(?=\d)", " "),
        (r"\{([.,])\}", r"\1"),
        (r"\\([%$])", r"\1"),
        (r"\\times", "×"),
        (r"\\cdot", "·"),
        (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
    )
)


def _fold_latex(text: str) -> str:
    """A number without LaTeX's commands. Other commands than those of numbers stay, and it has no value."""
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


SIGN = re.compile(r"([-−–—+])(\s*)(.+)", re.DOTALL)
BRACKETS = re.compile(r"\(([^()]+)\)")


def _number(text: str) -> Number | None:
    """A number alone, with a sign and a currency sign."""
    if found := BRACKETS.fullmatch(text):  # an accountant's negative number, or only in brackets
        inside = _number(found[1].strip())
        return Number(inside.readings | _times(-1, inside.readings), inside.currency) if inside else None
    currency, text = _currency(text)
    sign, certain, text = _sign(text)
    if not currency:
        currency, text = _currency(text)
    readings = frozenset(_magnitude(text))
    if not readings:
        return None
    if sign < 0:
        negative = _times(-1, readings)
        readings = negative if certain else readings | negative
    shares = {reading for reading in readings if 0 < abs(reading.value) < 1 and not reading.among}
    return Number(readings | _times(100, shares), currency)  # a share may be in percent elsewhere


def _sign(text: str) -> tuple[int, bool, str]:
    """Sign of a number, whether it is certain, and the rest. A dash before a blank may be a list's."""
    found = SIGN.fullmatch(text)
    if not found:
        return 1, True, text
    mark, blank, rest = found[1], found[2], found[3]
    return (1 if mark == "+" else -1), mark in "−+" or (mark == "-" and not blank), rest


def _currency(text: str) -> tuple[str, str]:
    """The currency sign at either end, and the text without it."""
    for place, rest in ((0, text[1:]), (-1, text[:-1])):
        if text and unicodedata.category(text[place]) == "Sc":
            return text[place], rest.strip()
    return "", text


def _times(factor: int, readings: Iterable[Reading]) -> frozenset[Reading]:
    return frozenset(
        Reading(factor * reading.value, abs(factor) * reading.step, reading.among) for reading in readings
    )


FRACTION = re.compile(
    r"(?:(?P<whole>\d{1,15})(?:\s+|(?=\()))?\(?(?P<minus>[-−]?)(?P<over>\d{1,15})\)?\s*[/⁄∕]\s*\(?(?P<under>\d{1,15})\)?"
)
VULGAR = re.compile(r"(?P<whole>\d{0,15})\s?(?P<part>\D)")
DECIMAL = re.compile(r"(?P<digits>[\d.,'’_ ٫٬]*\d)\s*(?P<rest>.*)", re.DOTALL)
POWER = re.compile(r"(?:e\s*|[×x*·]\s*10\s*\^\s*)\(?\s*(?P<exponent>[-−+]?\d{1,3})\s*\)?", re.IGNORECASE)
POWER_RAISED = re.compile(r"[×x*·]\s*10(?P<exponent>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})", re.IGNORECASE)
POWER_OF_TEN = re.compile(r"10\s*\^\s*\(?\s*(?P<exponent>[-−+]?\d{1,3})\s*\)?")


def _magnitude(text: str) -> set[Reading]:
    """The readings of a number without sign, none if it is no number."""
    if found := FRACTION.fullmatch(text):
        return _fraction(found)
    if found := POWER_OF_TEN.fullmatch(text):
        return {Reading(_ten_to(found["exponent"]), Fraction(0))}
    if (found := VULGAR.fullmatch(text)) and unicodedata.decomposition(found["part"]).startswith(
        "<fraction>"
    ):
        part = Fraction(unicodedata.numeric(found["part"])).limit_denominator(100)
        return {Reading(int(found["whole"] or 0) + part, Fraction(0))}
    if not (found := DECIMAL.fullmatch(text)):
        return set()
    return {
        Reading(reading.value * factor, reading.step * factor)
        for reading in _decimal(found["digits"])
        for factor in _factors(found["rest"].strip())
    }


def _fraction(found: re.Match[str]) -> set[Reading]:
    """`3/4`, `1 3/4`. `8/10` may also be 8 of 10."""
    if int(found["under"]) == 0 or (found["whole"] and found["minus"]):
        return set()
    over = -int(found["over"]) if found["minus"] else int(found["over"])
    value = int(found["whole"] or 0) + Fraction(over, int(found["under"]))
    readings = {Reading(value, Fraction(0))}
    if not found["whole"]:
        readings.add(Reading(Fraction(over), Fraction(0), among=int(found["under"])))
    return readings


def _decimal(text: str) -> set[Reading]:
    """The readings of digits with separators: every separator can be of groups or, once, of decimals."""
    readings = set()
    if (whole := _ungroup(text)) is not None:
        readings.add(Reading(Fraction(whole), Fraction(1)))
    for separator in ".,٫":
        if text.count(separator) != 1:
            continue
        before, _, after = text.partition(separator)
        whole = _ungroup(before) if before else "0"
        if whole is not None and re.fullmatch(r"\d+|\d{3}( \d{3})*( \d{1,2})?", after):
            decimals = after.replace(" ", "")
            step = Fraction(1, 10 ** len(decimals))
            readings.add(Reading(int(whole + decimals) * step, step))
    return readings


GROUPED = tuple(
    re.compile(pattern)
    for pattern in (
        r"\d+",
        r"[1-9]\d{0,2}(?:(?P<mark>[.,'’_ ٬])\d{3})(?:(?P=mark)\d{3})*",
        r"[1-9]\d?(?:(?P<mark>[, ])\d{2})(?:(?P=mark)\d{2})*(?P=mark)\d{3}",
        r"[1-9]\d{0,3}(?:(?P<mark>[, ])\d{4})(?:(?P=mark)\d{4})*",
    )
)
"""Digits without groups, in thousands, as in India (1,00,000), and in ten thousands as in East Asia."""


def _ungroup(text: str) -> str | None:
    """The digits of a whole number, None if the groups are those of no notation."""
    return re.sub(r"\D", "", text) if any(pattern.fullmatch(text) for pattern in GROUPED) else None


def _ten_to(exponent: str) -> Fraction:
    return Fraction(10) ** int(unicodedata.normalize("NFKC", exponent).replace("−", "-"))


def _factors(text: str) -> tuple[Fraction, ...]:
    """What may multiply a number that is followed by this text; nothing if the text has another meaning."""
    if not text:
        return (Fraction(1),)
    if found := POWER.fullmatch(text) or POWER_RAISED.fullmatch(text):
        return (_ten_to(found["exponent"]),)
    return SCALES.get(text.casefold().removesuffix("."), ())


def _scales() -> dict[str, tuple[Fraction, ...]]:
    """The factors of percent signs and of words, in the languages of SYNTH and some others. A word may mean
    two of them: a billion is 10^9 or 10^12."""
    words = {
        (1, Fraction(1, 100)): "% percent prozent procent procento",
        (1, Fraction(1, 1000)): "‰",
        (12,): "dozen",
        (100,): "hundred 百",
        (10**3,): "thousand mille mila tausend duizend tysiąc tysiące tysięcy тысяча тысячи тысяч 千",
        (10**3, 10**6): "mil",
        (10**4,): "万 萬 만",
        (10**5,): "lakh lakhs",
        (10**6,): "million millions millón millones milione milioni millionen mio mln miljoen milion miliony "
        "milionów milhão milhões миллион миллиона миллионов млн",
        (10**7,): "crore crores",
        (10**8,): "億 亿 억",
        (
            10**9,
        ): "milliard milliards milliarde milliarden mrd mld miliardo miliardi miliard miliardy miliardów "
        "miljard миллиард миллиарда миллиардов млрд",
        (
            10**9,
            10**12,
        ): "billion billions bn billionen billón billones bilione bilioni bilion biliony bilionów biljoen",
        (
            10**12,
            10**18,
        ): "trillion trillions trillionen trillón trillones trilione trilioni trylion tryliony",
    }
    phrases = {"per cent", "pour cent", "por ciento", "per cento", "por cento"}
    named = {word: factors for factors, several in words.items() for word in several.split()}
    named |= dict.fromkeys(phrases, (1, Fraction(1, 100)))
    return {word: tuple(map(Fraction, factors)) for word, factors in named.items()}


SCALES = _scales()
