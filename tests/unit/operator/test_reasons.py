"""docs/reference/operator.md lists every reason and every setting that the code has, and no other."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import distill_operator
from distill_operator import conditions, events
from distill_operator.kube import NAMESPACE_ENDS
from distill_operator.settings import Settings, SettingsModel
from pydantic_core import PydanticUndefined

from vpmoe.api.status import INTERRUPTIONS_EXHAUSTED

ROOT = Path(__file__).parents[3]
CODE = Path(distill_operator.__file__).parent
PAGE = (ROOT / "docs/reference/operator.md").read_text()

REASON_OF_CONDITION = {
    "set_headline": 1,
    "summarize": 0,
    "set_stalled": 0,
    "check_stalled": 1,
    "_watch_progress": 1,
    "Headline": 0,
    "Unreadable": 0,
    "report_failure": 2,
}
"""Functions that take a condition's reason, and at which position."""
REASON_OF_EVENT = {"EventSpec": 1}
REASON = re.compile(r"[A-Z][A-Za-z0-9]*")


def section(title: str) -> str:
    """The text below a heading of the page."""
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def trees() -> Iterator[ast.Module]:
    for file in sorted(CODE.glob("*.py")):
        yield ast.parse(file.read_text())


def constants() -> dict[str, str]:
    """Values of the package's constants that are texts, by name, and of those that it imports."""
    found: dict[str, object] = {"INTERRUPTIONS_EXHAUSTED": INTERRUPTIONS_EXHAUSTED}
    for node in (node for tree in trees() for node in tree.body):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found |= {ast.unparse(target): node.value.value for target in node.targets}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def texts(expression: ast.expr, known: Mapping[str, str]) -> Iterator[str]:
    """Texts that an expression may have, as far as they stand in it."""
    if isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        yield expression.value
    elif isinstance(expression, ast.Name) and expression.id in known:
        yield known[expression.id]
    elif not isinstance(expression, ast.Compare | ast.JoinedStr):
        parts = expression.values if isinstance(expression, ast.Dict) else ast.iter_child_nodes(expression)
        for part in parts:
            if isinstance(part, ast.expr):
                yield from texts(part, known)


def reasons(functions: Mapping[str, int], keyword: bool) -> set[str]:
    """Reasons that stand in calls of these functions, and in arguments or variables called reason."""
    known, found = constants(), set[str]()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in functions and len(node.args) > functions[name]:
                found |= {*texts(node.args[functions[name]], known)}
            if keyword:
                named = [one.value for one in node.keywords if one.arg == "reason"]
                found |= {text for value in named for text in texts(value, known)}
        elif keyword and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
            found |= {*texts(node.value, known)}
    return {text for text in found if REASON.fullmatch(text)} - {NAMESPACE_ENDS}  # of a KubeError


def words(text: str) -> set[str]:
    return set(REASON.findall(text))


def test_every_reason_of_a_condition_is_documented() -> None:
    found = reasons(REASON_OF_CONDITION, keyword=True) | {"NotStalled", "Answered"}
    assert {
        "Held",
        "PoolTooSmall",
        "Deleting",
        "StatusUnreadable",
        "HostNetwork",
        "InterruptionsExhausted",
    } <= found
    assert found - words(section("Conditions")) == set()


def test_every_reason_of_an_event_is_documented() -> None:
    found = reasons(REASON_OF_EVENT, keyword=False) | {*events.PHASE_REASONS.values()}
    found |= {"StepRetrying", "StepFailed", "BucketCleared", "BucketKept"}
    stalled = {row.split("|")[1].strip() for row in section("Conditions").splitlines() if row.count("|") == 4}
    found |= {reason for reason in stalled if REASON.fullmatch(reason)} - {*conditions.CONDITION_TYPES}
    assert {"StallCleared", "ProgressUnreadable", "RunFailed", "NameTaken"} <= found
    assert found - words(section("Events")) == set()


def test_every_documented_reason_is_in_the_code() -> None:
    literals = {
        node.value
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    composed = {f"Step{state}" for state in ("Retrying", "Failed")}
    jobs = "".join(file.read_text() for file in (ROOT / "vpmoe").rglob("*.py"))
    rows = [row for title in ("Conditions", "Events") for row in section(title).splitlines()]
    named = {reason for row in rows if row.startswith("|") for reason in words(row.split("|")[1])}
    missing = {reason for reason in named - literals - composed if f'"{reason}"' not in jobs}
    assert missing == set()


def settings_of(model: type[SettingsModel], prefix: str = "") -> dict[str, object]:
    """Names of the settings in the file, with their defaults; PydanticUndefined if one is required."""
    found = dict[str, object]()
    for field in model.model_fields.values():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, SettingsModel):
            found |= settings_of(kind, f"{prefix}{field.alias}.")
        else:
            found[f"{prefix}{field.alias}"] = field.default
    return found


def test_every_setting_is_described_with_its_default() -> None:
    rows = [row.split("|") for row in section("Settings").splitlines() if row.startswith("| `")]
    documented = {row[1].strip(" `"): row[3].strip(" `") for row in rows}
    defaults = {name: shown(default) for name, default in settings_of(Settings).items()}
    assert documented == defaults


def shown(default: object) -> str:
    if default is PydanticUndefined:
        return "required"
    return {"{}": "none", "[]": "all"}.get(str(default), str(default).removesuffix(".0"))
