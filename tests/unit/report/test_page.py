"""The page in a real browser: it draws its data, asks for nothing, and writes nothing to the console."""

import dataclasses
from pathlib import Path

import pytest

from tests.fakes import recorded_run
from tests.fakes.browser import PHONE, WIDE, Browser
from tests.fakes.recorded_run import keep_only
from tests.fakes.store import S3
from vpmoe.process.run_folder import open_run
from vpmoe.report.page import page
from vpmoe.report.plots import all_plots
from vpmoe.report.run_data import Completion, RunData, Token, read_run_data

DRAWN = """Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(plot => [plot.id, {
    traces: plot.data.map(trace => [trace.name ?? '', trace.x.length, trace.y.length]),
    marks: plot.querySelectorAll('.scatterlayer .trace, .barlayer .trace, .heatmaplayer image').length,
    width: plot.querySelector('.main-svg').getBoundingClientRect().width,
    text: getComputedStyle(plot.querySelector('.xtick text')).fill,
}]))"""
"""What plotly.js holds and has drawn, by plot."""


@pytest.fixture(scope="module")
def file(recorded_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the recorded run."""
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page(recorded_data, lambda key: f"s3://bucket/{key}"), encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_plot_is_drawn_with_its_data_and_the_console_is_silent(
    browser: Browser, recorded_data: RunData, file: Path, width: int, dark: bool
) -> None:
    browser.open(file, width=width, dark=dark)
    found = browser.evaluate(DRAWN)
    expected = [plot for _, plots in all_plots(recorded_data) for plot in plots if plot.traces]
    assert list(found) == [plot.name for plot in expected]
    for plot in expected:
        shown = found[plot.name]
        assert shown["traces"] == [
            [trace.get("name", ""), len(trace["x"]), len(trace["y"])] for trace in plot.traces
        ], plot.name
        assert shown["marks"] == len(plot.traces), plot.name
        assert shown["text"] == ("rgb(230, 237, 243)" if dark else "rgb(31, 35, 40)")
        assert 0 < shown["width"] <= width
    assert browser.evaluate("document.documentElement.scrollWidth") == width  # nothing to scroll sideways
    assert not browser.console()
    assert {url.partition(":")[0] for url in browser.requests()} <= {"file", "data"}
    assert [url for url in browser.requests() if url.startswith("file:")] == [file.as_uri()]
    image = browser.screenshot(file.with_name(f"{width}-{'dark' if dark else 'light'}.png"))
    print(f"screenshot: {image}")  # to be looked at after a change of the page: pytest -s, --basetemp


def test_the_style_changes_with_the_system_without_loading_again(browser: Browser, file: Path) -> None:
    browser.open(file, width=WIDE, dark=False)
    browser.set_dark(True)
    text = "getComputedStyle(document.querySelector('.xtick text')).fill"
    assert browser.evaluate(text) == "rgb(230, 237, 243)"


def test_a_page_of_a_run_that_has_not_begun_is_drawn_too(browser: Browser, s3: S3, tmp_path: Path) -> None:
    data = read_run_data(*open_run(recorded_run.store(s3, keep_only("run.json"))))
    path = tmp_path / "index.html"
    path.write_text(page(data, str), encoding="utf-8")
    browser.open(path, width=PHONE, dark=False)
    assert browser.evaluate("document.querySelectorAll('.js-plotly-plot').length") == 0
    missing = [plot.missing for _, plots in all_plots(data) for plot in plots]
    shown = browser.evaluate("[...document.querySelectorAll('.plot .waiting')].map(each => each.textContent)")
    assert shown == missing
    assert not browser.console()


def test_reasoning_and_final_are_apart_and_coloured_by_the_teacher(
    browser: Browser, recorded_data: RunData, file: Path
) -> None:
    browser.open(file, width=WIDE, dark=False)
    shown = browser.evaluate(
        "[...document.querySelectorAll('#completions details')].map(one => "
        "[...one.querySelectorAll('.completion')].map(part => "
        "[...part.querySelectorAll('span')].map(token => [token.textContent, token.className])))"
    )
    assert shown == [
        [coloured(one, "reasoning"), coloured(one, "final")] for one in recorded_data.completions
    ]


def coloured(one: Completion, span: str) -> list[list[str]]:
    """Texts and classes of the tokens of a span."""
    return [[token.text, colour(token)] for token in one.tokens if token.span == span]


def colour(token: Token) -> str:
    """By the teacher's probability of the token: over 1/2, 1/10, 1/100, 1/1000, or less."""
    bounds = (-0.6931471805599453, -2.302585092994046, -4.605170185988091, -6.907755278982137)
    place = sum(token.teacher < bound for bound in bounds)
    return f"t{place} special" if token.special else f"t{place}"


def test_what_a_run_says_cannot_become_markup(recorded_data: RunData) -> None:
    evil = "</script><script>alert(1)</script><b>"
    token = Token(evil, "final", False, -1.0, -1.0)
    said = Completion("onpolicy", 0, 0, "low", "valid", evil, (token,), 1)
    first, *others = recorded_data.steps
    progress = first.progress.model_copy(update={"message": evil})
    renamed = dataclasses.replace(recorded_data.teacher_logp[0], tokens=evil)
    changed = dataclasses.replace(
        recorded_data,
        url=evil,
        completions=(said,),
        teacher_logp=(renamed,),
        steps=(dataclasses.replace(first, progress=progress), *others),
    )
    text = page(changed, lambda key: f'"{evil}')
    assert "<script>alert" not in text and '<b>"' not in text


def test_the_page_tells_the_story_of_the_run(recorded_data: RunData) -> None:
    text = page(recorded_data, lambda key: f"s3://bucket/{key}")
    assert "The run is not finished: 12 of 13 steps are done, and none was running" in text
    assert "Held-out loss: reasoning 12.23 → 11.44, final 12.21 → 11.54 nats a token." in text
    assert "vanilla took 2 attempts." in text
    assert "TrainerStarved" in text
    assert 'href="s3://bucket/runs/team/inflight-0a1b2c3d/checkpoints/onpolicy/22/manifest.json"' in text
