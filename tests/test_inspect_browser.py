"""The page of `stepkto inspect` in a headless Chromium; skips where there is none."""

import base64
import json

import pytest
from inspect_helpers import BROWSERS, HOSTILE, Browser, find_browser, make_run, solution, write

from stepkto_kernels.cli import main

COUNT = "document.getElementById('count').textContent"
ARTICLES = "document.querySelectorAll('#list article').length"


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is in PATH")
    with Browser(program) as browser:
        yield browser


def total(browser):
    return int(browser.run(COUNT).split(" of ")[1].split(",")[0])


def test_the_page_loads_without_errors_and_without_the_network(browser, tmp_path):
    make_run(tmp_path / "RUN")
    assert main(["inspect", str(tmp_path / "RUN")]) == 0
    page = tmp_path / "RUN" / "report.html"
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert browser.run(ARTICLES) == 25
    assert total(browser) == 3 * 8 + 2 * 8
    assert browser.run("document.querySelectorAll('figure.chart').length") == 3
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_filters_choose_solutions(browser, tmp_path):
    make_run(tmp_path / "RUN")
    main(["inspect", str(tmp_path / "RUN")])
    browser.open(tmp_path / "RUN" / "report.html")
    browser.choose("round", "1")
    assert total(browser) == 16
    browser.choose("set", "training")
    assert total(browser) == 8
    browser.choose("answer", "0")
    assert total(browser) == 4
    browser.choose("steps", "1")
    assert browser.run(COUNT) == "No solution fits" and browser.run(ARTICLES) == 0
    browser.choose("steps", "0")
    assert total(browser) == 4
    assert browser.run("document.querySelectorAll('li.wrong').length") == 4
    browser.choose("search", "PROBLEM 2")
    browser.wait_for(f"{ARTICLES} === 1")
    assert browser.run("document.querySelector('mark').textContent") == "problem 2"
    ratios = browser.run("[...document.querySelectorAll('.ratio')].map((r) => r.textContent)")
    assert ratios == ["log-ratio +0.500", "log-ratio -0.250", "log-ratio 0.000"]
    browser.run("document.querySelector('button[type=reset]').click()")
    browser.wait_for(f"{ARTICLES} === 25")


def test_bars_show_size_and_sign_and_order_sorts_by_them(browser, tmp_path):
    run = make_run(tmp_path / "RUN", rounds=1)
    rows = [solution(i) for i in range(3)]
    steps = [[0.1, 0.2, 0.0], [-4.0, 2.0, 0.0], [float("nan"), float("-inf"), 8.0]]
    write(run / "round_1" / "labelled.jsonl", *rows)
    keys = [{"problem_id": f"p{i}", "sample": 0} for i in range(3)]
    pairs = zip(keys, steps, strict=True)
    write(run / "round_1" / "log_ratios.jsonl", *(k | {"steps": s} for k, s in pairs))
    assert main(["inspect", str(run)]) == 0
    browser.open(run / "report.html")
    browser.choose("set", "training")
    titles = "[...document.querySelectorAll('article h3 button')].map((b) => b.textContent)"
    browser.choose("order", "low")
    assert browser.run(titles) == ["p1", "p0", "p2"]
    browser.choose("order", "high")
    assert browser.run(titles) == ["p2", "p1", "p0"]
    numbers = browser.run("[...document.querySelectorAll('.ratio')].map((r) => r.textContent)")
    assert [n.split()[-1] for n in numbers[:4]] == ["nan", "-inf", "+8.000", "-4.000"]
    bars = "[...document.querySelectorAll('.bar span')].map((b) => [b.style.left, b.style.width])"
    assert browser.run(bars)[:2] == [["50%", "50%"], ["0%", "50%"]]  # a 99th percentile of 4
    assert browser.complaints() == []


def test_hostile_text_is_shown_and_never_run(browser, tmp_path):
    row = solution(0, text=HOSTILE) | {"prompt": HOSTILE, "problem_id": HOSTILE}
    write(tmp_path / "rows.jsonl", row)
    assert main(["inspect", str(tmp_path / "rows.jsonl")]) == 0
    browser.open(tmp_path / "rows.jsonl.html")
    assert browser.complaints() == []
    assert browser.run("typeof window.hostile") == "undefined"
    assert browser.run("document.querySelectorAll('img, #list script').length") == 0
    shown = browser.run("document.querySelector('li .text').textContent")
    spelled = {c: f"U+{ord(c):04X}" for c in "\u2028\u2029\u202e\x00\x1b"}
    assert shown == HOSTILE.translate(str.maketrans(spelled))


def test_the_policy_stops_scripts_and_requests(browser, tmp_path):
    write(tmp_path / "rows.jsonl", solution(0))
    main(["inspect", str(tmp_path / "rows.jsonl")])
    browser.open(tmp_path / "rows.jsonl.html")
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'),"
        "{textContent: 'window.injected = 1'}))"
    )
    browser.run(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"injected = 2\">')"
    )
    assert browser.run("typeof window.injected") == "undefined"
    asked = "fetch('data:text/plain,x').then(() => 'came', () => 'refused')"
    assert browser.run(asked) == "refused"
    assert browser.complaints(), "the browser did not say that it blocked anything"


def test_keys_turn_pages_and_search(browser, tmp_path):
    write(tmp_path / "rows.jsonl", *(solution(i) for i in range(60)))
    main(["inspect", str(tmp_path / "rows.jsonl")])
    browser.open(tmp_path / "rows.jsonl.html")
    assert "1\u201325 of 60" in browser.run(COUNT)
    browser.press("n")
    assert "26\u201350 of 60" in browser.run(COUNT)
    browser.press("n")
    browser.press("n")  # there is no fourth page
    assert "51\u201360 of 60" in browser.run(COUNT)
    browser.press("p")
    assert "26\u201350 of 60" in browser.run(COUNT)
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.press("n")
    assert browser.run("document.getElementById('search').value") == "n"


def test_ten_thousand_solutions(browser, tmp_path):
    text = "Step 1: add the two numbers and carry the one, which gives 14 in all.\n" * 4
    write(tmp_path / "rows.jsonl", *(solution(i, text=text) for i in range(10_000)))
    assert main(["inspect", str(tmp_path / "rows.jsonl")]) == 0
    browser.open(tmp_path / "rows.jsonl.html")
    assert total(browser) == 10_000 and browser.run(ARTICLES) == 25
    browser.choose("search", "p9999")
    browser.wait_for(f"{ARTICLES} === 1", seconds=10)


def test_light_dark_and_print(browser, tmp_path):
    make_run(tmp_path / "kto", method="kto")
    make_run(tmp_path / "step_kto", shift=0.05)
    page = tmp_path / "both.html"
    runs = [str(tmp_path / name) for name in ("kto", "step_kto")]
    assert main(["inspect", *runs, "--output", str(page)]) == 0
    browser.open(page)
    colours = "(({backgroundColor: b, color: c}) => [b, c])(getComputedStyle(document.body))"
    pictures, seen = {}, {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        seen[scheme] = [sum(map(int, colour[4:-1].split(","))) for colour in browser.run(colours)]
        picture = browser.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        pictures[scheme] = base64.b64decode(picture)
        (tmp_path / f"{scheme}.png").write_bytes(pictures[scheme])
        assert len(pictures[scheme]) > 20_000, "an empty page"
    assert seen["light"][0] > 600 > 300 > seen["light"][1]
    assert seen["dark"][1] > 600 > 300 > seen["dark"][0]
    assert pictures["light"] != pictures["dark"]
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.run("getComputedStyle(document.getElementById('filters')).display") == "none"
    assert browser.run("getComputedStyle(document.querySelector('article')).display") == "block"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
    names = browser.run("[...document.getElementById('run').options].map((o) => o.text)")
    assert json.dumps(names) == '["any", "kto", "step_kto"]'
    browser.choose("run", "1")
    assert total(browser) == 40
