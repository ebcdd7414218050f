"""Both pages in a headless Chromium: they render, they can be used, and hostile text stays text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pages
import pytest
import tiny

from sftx.cli import main
from sftx.report.run_page import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on one run."""
    folder = tmp_path_factory.mktemp("one")
    write_report([pages.folder(folder / "run")], folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on two runs, which differ in one setting."""
    folder = tmp_path_factory.mktemp("two")
    runs = [pages.folder(folder / "low"), pages.folder(folder / "high", rate=3e-3)]
    write_report(runs, folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of `sftx inspect` on 60 rows: one that is split, one that is hostile."""
    folder = tmp_path_factory.mktemp("inspect")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"max_position_embeddings": 128}')
    rows = [{"prompt": f"question {i}\n", "completion": f"answer {i}"} for i in range(60)]
    rows[20]["completion"] = "a long answer that is cut, " * 8
    rows[21]["completion"] = pages.EVIL
    pages.write_lines(folder / "a.jsonl", rows)
    data = [f"data={folder / 'a.jsonl'}", f"data.cache={folder / 'cache'}"]
    page = f"html={folder / 'page.html'}"
    assert main(["inspect", f"model={folder / 'model'}", *data, "rows=1", page]) == 0
    return folder / "page.html"


def opened(browser: Browser, file: Path, width: int = 1280, scheme: Any = "light") -> Page:
    """The page in a new tab, which fails the test where it says an error or asks for anything."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_timeout(100)
    assert asked == [file.as_uri()]
    assert said == []
    page.said = said  # pyright: ignore[reportAttributeAccessIssue]
    return page


def plot(page: Page, title: str) -> Locator:
    """The chart whose name begins so."""
    found = page.get_by_role("application", name=re.compile(f"^{re.escape(title)}"))
    assert found.count() == 1, title
    return found


def figure(page: Page, title: str) -> Locator:
    """The card around it."""
    return plot(page, title).locator("xpath=ancestor::figure")


def span(page: Page, title: str) -> tuple[float, float]:
    """The steps that a chart shows."""
    return tuple(
        plot(page, title).evaluate(
            "node => { const u = [...drawn].find(u => node.contains(u.root));"
            " return [u.scales.x.min, u.scales.x.max]; }"
        )
    )


def is_painted(page: Page, title: str) -> bool:
    """Whether a line in one of our colours is on the chart's canvas."""
    return plot(page, title).evaluate(
        """node => {
            const canvas = node.querySelector("canvas"), { width, height } = canvas;
            const bits = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            let coloured = 0;
            for (let i = 0; i < bits.length; i += 4) {
                const [red, green, blue, solid] = bits.slice(i, i + 4);
                const grey = Math.max(red, green, blue) - Math.min(red, green, blue) < 60;
                coloured += solid > 200 && !grey;
            }
            return coloured > 100;
        }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_render_and_fit(
    browser: Browser, report: Path, comparison: Path, inspected: Path, width: int, scheme: str
) -> None:
    for file in (report, comparison, inspected):
        page = opened(browser, file, width, scheme)
        page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
        page.wait_for_timeout(50)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        charts = page.get_by_role("application")
        assert charts.count() >= (2 if file == inspected else 10)
        for chart in charts.all():
            name = chart.get_attribute("aria-label") or ""
            assert re.search(r"first .*, last .*, lowest|highest bar", name), name
        shown = "Length of examples" if file == inspected else "Loss"
        assert is_painted(page, shown)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", background))) > 380
        assert light == (scheme == "light")
        assert page.said == []  # pyright: ignore[reportAttributeAccessIssue]
        page.close()


def test_hover_and_keys_show_the_values_of_a_step(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    page.locator("#smoothing").fill("0")
    lines = [
        json.loads(line)
        for line in (report.parent / "run" / "metrics.jsonl").open(encoding="utf-8")
    ]
    loss, card = plot(page, "Loss"), figure(page, "Loss")
    loss.focus()
    for key, step in (
        ("Home", 0),
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("End", 60),
        ("ArrowLeft", 59),
    ):
        page.keyboard.press(key)
        assert card.locator(".readout").text_content() == f"step {step}"
        if step:
            shown = card.get_by_role("button", name="training").locator("b").text_content()
            assert float(shown or "nan") == pytest.approx(lines[step]["loss"], rel=1e-3)
    box = loss.locator(".u-over").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 20 / 60, box["y"] + 50)
    assert card.locator(".readout").text_content() == "step 20"
    held = card.get_by_role("button", name="held out").locator("b").text_content()
    assert float(held or "nan") == 2.5
    rate = figure(page, "Learning rate").locator(".legend b").text_content()
    assert float(rate or "nan") == pytest.approx(lines[20]["learning_rate"], rel=1e-3)


def test_drag_zooms_all_charts_and_double_click_and_escape_reset(
    browser: Browser, report: Path
) -> None:
    page = opened(browser, report)
    others = ("Gradient norm", "Tokens per second")
    for undo in ("double click", "Escape", "button"):
        assert span(page, "Loss") == (0, 60)
        box = plot(page, "Loss").locator(".u-over").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60, steps=4)
        page.mouse.up()
        page.wait_for_timeout(50)
        for title in ("Loss", *others):
            assert span(page, title) == pytest.approx((15, 30), abs=0.5), title
        page.locator("#smoothing").fill("0.7")
        page.wait_for_timeout(50)
        assert span(page, "Loss") == pytest.approx((15, 30), abs=0.5)
        match undo:
            case "double click":
                page.mouse.dblclick(box["x"] + 50, box["y"] + 60)
            case "Escape":
                plot(page, "Loss").press("Escape")
            case _:
                page.get_by_role("button", name="Show all steps").click()
        page.wait_for_timeout(50)
        assert span(page, "Gradient norm") == (1, 60)
    plot(page, "Loss").press("End")
    plot(page, "Loss").press("+")
    page.wait_for_timeout(50)
    assert span(page, "Loss") == (45, 60)


def test_smoothing_and_the_legend(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    card = figure(page, "Loss")
    plot(page, "Loss").press("End")
    plot(page, "Loss").press("Home")
    for _ in range(41):
        page.keyboard.press("ArrowRight")
    shown = card.get_by_role("button", name="training").locator("b")
    seen: dict[str, float] = {}
    for value in ("0", "1", "2"):
        page.locator("#smoothing").fill(value)
        page.keyboard.press("Tab")
        plot(page, "Loss").press("ArrowLeft")
        page.keyboard.press("ArrowRight")
        assert "step 41" in (card.locator(".readout").text_content() or "")
        seen[value] = float(shown.text_content() or "nan")
    assert seen["0"] == 6.0
    lines = [
        json.loads(line)
        for line in (report.parent / "run" / "metrics.jsonl").open(encoding="utf-8")
    ]
    for value, over in (("1", 10), ("2", 100)):
        keep = 1 - 1 / over
        losses = [line["loss"] for line in lines[1:42]]
        weights = [keep ** (len(losses) - 1 - i) for i in range(len(losses))]
        mean = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        assert seen[value] == pytest.approx(mean, rel=2e-3)
    button = card.get_by_role("button", name="training")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"


def test_a_spike_leads_to_its_rows(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    spike = page.locator("#step-41")
    assert spike.get_attribute("open") is None
    loss = plot(page, "Loss")
    loss.press("Home")
    for _ in range(41):
        page.keyboard.press("ArrowRight")
    assert "stands out" in (figure(page, "Loss").locator(".readout").text_content() or "")
    page.keyboard.press("Enter")
    assert spike.get_attribute("open") is not None
    assert f"{pages.EVIL}:4" in spike.locator("table").inner_text()
    assert spike.locator("summary").evaluate("node => node === document.activeElement")
    spike.get_by_role("button", name="Show it on the curves").click()
    page.wait_for_timeout(50)
    assert span(page, "Loss") == (0, 91)
    assert "not finite" in page.locator("#step-50 summary").inner_text()


def test_answers_stand_side_by_side(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    first = page.locator("details", has_text="question 0").first
    heads = first.locator("h4").all_inner_texts()
    assert heads == ["before training", "after step 20", "after step 60", "reference"]
    page.get_by_label("Between them").select_option("40")
    assert first.locator("h4").all_inner_texts()[1] == "after step 40"
    assert first.locator("pre").nth(2).text_content() == f"{pages.EVIL} after 40"
    assert "no stop token" in first.locator("section").first.inner_text()


def test_two_runs_are_overlaid_with_what_differs(browser: Browser, comparison: Path) -> None:
    page = opened(browser, comparison)
    differs = page.get_by_role("region", name="Settings that differ between the runs")
    rows = [row.locator("th, td").all_inner_texts() for row in differs.locator("tbody tr").all()]
    assert rows == [["optim.learning_rate", "0.001", "0.003"]]
    names = figure(page, "Loss").locator(".legend button").all_inner_texts()
    assert [name.strip() for name in names] == [
        f"{run}: {line}" for run in ("low", "high") for line in ("training", "held out")
    ]
    page.get_by_label("One run in detail").select_option("1")
    assert page.locator("#details h2").first.inner_text() == "high"


def test_hostile_text_stays_text(
    browser: Browser, report: Path, comparison: Path, inspected: Path
) -> None:
    for file in (report, comparison, inspected):
        page = opened(browser, file)
        page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
        page.wait_for_timeout(50)
        assert page.title() in ("run · sftx report", "low, high · sftx report", "sftx inspect")
        assert page.locator("img").count() == 0
        assert page.locator("script").count() == 4
        if file == inspected:
            page.get_by_label("Search").fill("</script>")
            assert page.locator(".row").count() == 1
        assert pages.EVIL in (page.locator("main").text_content() or "")
        assert page.said == []  # pyright: ignore[reportAttributeAccessIssue]
        page.close()


def test_no_other_script_runs(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    page.evaluate(
        "const node = document.createElement('script'); node.textContent = 'window.taken = 1';"
        "document.body.append(node);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.taken = 1\">');"
    )
    page.wait_for_timeout(100)
    assert page.evaluate("window.taken") is None


def test_the_filters_of_the_inspect_page(browser: Browser, inspected: Path) -> None:
    page = opened(browser, inspected)
    rows, count = page.locator(".row"), page.locator("#count")
    assert rows.count() == 40
    page.get_by_role("button", name="Show more").click()
    everything = rows.count()
    assert everything > 60
    page.get_by_label("Search").fill("answer 37")
    assert rows.count() == 1
    assert "1 of 1 chosen examples" in count.inner_text()
    page.get_by_label("Search").fill("")
    page.get_by_role("button", name="Only rows that were cut").click()
    assert 1 < rows.count() < 10
    assert all("split" in text for text in rows.all_inner_texts())
    page.get_by_role("button", name="Only rows that were cut").click()
    page.get_by_role("button", name="Longest first").click()
    facts = [row.locator(".facts").inner_text() for row in rows.all()]
    lengths = [int(text.split()[0]) for text in facts]
    assert lengths == sorted(lengths, reverse=True)


def test_the_charts_of_the_inspect_page(browser: Browser, inspected: Path) -> None:
    page = opened(browser, inspected)
    data = pages.data_of(inspected.read_text(encoding="utf-8"))
    lengths = plot(page, "Length of examples")
    lengths.press("Home")
    readout = figure(page, "Length of examples").locator(".readout")
    edges, counts = data["lengths"]["edges"], data["lengths"]["counts"]
    assert readout.text_content() == f"{edges[0]} to {edges[1]} tokens: {counts[0]} examples"
    lengths.press("End")
    assert readout.text_content() == f"{edges[-2]} to {edges[-1]} tokens: {counts[-1]} examples"
    steps = plot(page, "Targets and tokens per step")
    steps.press("Home")
    shown = figure(page, "Targets and tokens per step").locator(".legend b").all_inner_texts()
    assert [int(text) for text in shown] == [
        data["steps"]["targets"][0],
        data["steps"]["tokens"][0],
    ]
