"""The report in a browser: it asks for nothing, says no error, and answers to mouse, keyboard and colour scheme."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hsvit_ds.results import comparison, outcome, page, present, records
from hsvit_ds.run.summary import FAILED, Cost

from .. import browser
from . import folders

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(browser.program() is None, reason=f"none of {', '.join(browser.NAMES)} is installed"),
]
DRAWN = "document.documentElement.dataset.drawn === 'yes'"
EVIL = "</script><script>document.title='evil'<b>"


def report(root: Path, out: Path) -> Path:
    found = [outcome.of(record, ("train/lr",)) for record in records.in_folder(root)]
    out.write_text(page.html(comparison.compare(found, (), ("train/lr",))), "utf-8")
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two recipes, four seeds each, one with widths and submodules, and a run that failed."""
    root = tmp_path_factory.mktemp("runs")
    sizes = {"0.25": 1000, "0.50": 3000, "1.00": 9000}
    costs = tuple(Cost(width=width, parameters=100, macs=macs) for width, macs in sizes.items())
    for seed in range(4):
        widths = {f"test/top1_w{width}": 80.0 + seed for width in sizes}
        overrides = [f"run.seed={seed}", "optimizer.lr=0.01"]
        folders.run(root, f"a-{seed}", 90.0 + seed, overrides=overrides, more=widths, said=folders.summary(costs=costs))
        folder = folders.run(root, f"b-{seed}", 95.0 - seed, overrides=[f"run.seed={seed}"], said=folders.summary())
        present.write(folder / "evaluate-present-test-step-30.csv", [(0,), (1,), (0, 1)], [70.0, 80.0, 90.0])
    evil = folders.summary(state=FAILED, why=EVIL, recipe=EVIL, title=EVIL)
    folders.run(root, EVIL.replace("/", "∕"), None, said=evil)
    return report(root, root / "report.html")


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Page]:
    with browser.opened() as opened:
        yield opened


@pytest.fixture
def shown(chromium: browser.Page, made: Path) -> browser.Page:
    """The page as it is opened."""
    chromium.size(1280, 900)
    chromium.scheme("light")
    chromium.said.clear()
    chromium.asked.clear()
    chromium.open(made)
    chromium.wait(DRAWN)
    return chromium


def test_the_page_asks_for_nothing_and_has_no_errors(shown: browser.Page, made: Path) -> None:
    for axis in ("step", "hours", "parameters"):
        shown.run(f"""
for (const select of document.querySelectorAll("select")) {{
  if (![...select.options].some((option) => option.value === "{axis}")) continue;
  select.value = "{axis}";
  select.dispatchEvent(new Event("change"));
}}""")
        shown.wait(DRAWN)
    shown.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    shown.run("document.getElementById('theme').click()")
    shown.wait(DRAWN)
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith("data:")] == [made.resolve().as_uri()]
    assert shown.run("document.title") == "9 runs compared"


@pytest.mark.parametrize(
    "fault",
    [
        "fetch('http://example.invalid/x').catch(() => 0)",
        "new Image().src = 'https://example.invalid/x.png'",
        "console.error('no')",
        "setTimeout(() => { throw new Error('no'); })",
    ],
)
def test_a_request_or_an_error_would_be_found(fault: str, shown: browser.Page) -> None:
    shown.run(f"{{ {fault} }}")
    shown.wait("new Promise((done) => setTimeout(() => done(true), 200))")
    assert shown.said


def test_every_plot_has_its_points_and_its_data_as_a_table(shown: browser.Page) -> None:
    titles = shown.run("[...document.querySelectorAll('figure h4')].map((one) => one.textContent)")
    assert {"Against cost", "By width", "By submodules present", "Training loss", "Loss on val"} <= set(titles)
    assert {"Accuracy on val", "Learning rate", "Throughput"} <= set(titles)
    plots = "[...document.querySelectorAll('.plot')]"
    assert shown.run(f"{plots}.every((one) => one.querySelector('.scatterlayer .trace'))")
    shown.run("document.querySelectorAll('figure details').forEach((one) => { one.open = true; })")
    shown.wait("[...document.querySelectorAll('figure details')].every((one) => one.querySelector('tbody tr'))")
    first = shown.run("document.querySelector('figure tbody tr').innerText.split('\\t')")
    assert first[1:] == ["0.002", "93.5", "1.291"]


def test_a_group_is_hidden_and_shown_by_its_button(shown: browser.Page) -> None:
    lines = "document.querySelectorAll('.plot')[3].querySelectorAll('.trace').length"
    before = shown.run(lines)
    button = "document.querySelector('.legend [data-group]')"
    shown.run(f"{button}.click()")
    shown.wait(f"{lines} === {before - 4}")
    assert shown.run(f"{button}.getAttribute('aria-pressed')") == "false"
    shown.run(f"{button}.click()")
    shown.wait(f"{lines} === {before}")


def test_tables_sort_by_keyboard(shown: browser.Page) -> None:
    column = "[...document.querySelectorAll('.runs tbody tr')].map((row) => row.children[4].dataset.value)"
    shown.run("document.querySelectorAll('.runs thead th button')[3].focus()")
    for order in ("descending", "ascending"):
        if order == "descending":
            shown.press("Tab")
        shown.press("Enter")
        assert shown.run("document.activeElement.parentElement.getAttribute('aria-sort')") == order
        found = shown.run(column)
        numbers = [float(value) for value in found if value]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert len(numbers) == 8
        assert found[-1] == ""  # what is missing comes last


def test_every_control_is_reached_by_keyboard_and_shows_it(shown: browser.Page) -> None:
    controls = "[...document.querySelectorAll('button, select, summary')]"
    assert shown.run(f"{controls}.every((one) => one.tabIndex >= 0)")
    for _ in range(6):
        shown.press("Tab")
        assert shown.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    names = f"{controls}.filter((one) => !(one.textContent.trim() || one.getAttribute('aria-label'))).length"
    assert shown.run(names) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_colour_schemes(scheme: str, shown: browser.Page) -> None:
    """Contrast of 4.5 by the WCAG's formula; the plots' texts have the colours of the others."""
    shown.scheme(scheme)
    shown.wait(DRAWN)
    ratio = """
(() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const [r, g, b] = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  return ["--text", "--soft", "--warn"].map((name) => contrast(name, "--back"));
})()"""
    assert min(shown.run(ratio)) >= 4.5
    colour = "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    soft = {"light": "rgb(86, 93, 102)", "dark": "rgb(166, 173, 182)"}
    shown.wait(f"{colour} === '{soft[scheme]}'")


def test_a_phone_shows_it_without_scrolling_sideways(shown: browser.Page) -> None:
    shown.size(390, 844)
    shown.wait("innerWidth === 390")
    assert shown.run("document.documentElement.scrollWidth") == 390


def test_a_name_is_text_and_never_markup(shown: browser.Page) -> None:
    assert shown.run("document.title") == "9 runs compared"
    assert shown.run("document.querySelectorAll('b').length") == 0
    assert "<script>" in shown.run("document.body.innerText")
