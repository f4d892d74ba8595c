"""The Pareto page in a real browser: Chromium, headless, driven through chromedriver."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import zoo
from zoo.analysis import pareto as module
from zoo.analysis.pareto import page, pareto
from zoo.analysis.pick import Option
from zoo.cli import main

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1100,1400"),
)
TAB, RIGHT, ENTER, SPACE = "\ue004", "\ue014", "\ue007", " "


def option(model: str, family: str, top1: float, ms: float, **changes: Any) -> Option:
    values: dict[str, Any] = {
        "model": model,
        "weights": f"{model}.x",
        "family": family,
        "top1": top1,
        "source": "a paper",
        "licence": "mit",
        "params": 5_000_000,
        "macs": 300_000_000,
        "size_mb": 20.0,
        "latency_ms": ms,
        "latency_q": (0.9 * ms, 1.1 * ms),
        "images_per_s": 1000 / ms,
        "throughput_batch": 1,
        "memory_mb": None,
        "device": "cpu",
        "runtime": "eager, fused",
        "precision": "fp32",
        "threads": 1,
        "clock": "cpu",
        "here": True,
        "where": "a CPU",
        "command": f"zoo bench {model}",
    }
    return Option(**values | changes)


OPTIONS = [
    option("quick", "one", 60.0, 2.0),
    option("middle", "one", 70.0, 8.0),
    option("beaten", "two", 65.0, 9.0),
    option("best", "two", 80.0, 30.0, source="</script><b>"),
]


class Browser:
    """The few calls of the WebDriver protocol that the tests need."""

    def __init__(self, address: str, profile: Path, binary: str) -> None:
        self.address = address
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": binary}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self.session = self._call("POST", "/session", wanted)["sessionId"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def call(self, path: str, body: Any) -> Any:
        return self._call("POST", f"/session/{self.session}{path}", body)

    def run(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": script, "args": []})

    def press(self, *keys: str) -> None:
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def models(self) -> list[str]:
        """The table's models from top to bottom."""
        return self.run("return [...document.querySelectorAll('#body tr')].map(row => row.dataset.model)")

    def points(self) -> list[str]:
        """The models of the scatter from left to right."""
        return self.run("return [...document.querySelectorAll('circle')].map(point => point.dataset.point)")

    def quit(self) -> None:
        self._call("DELETE", f"/session/{self.session}")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    program = shutil.which("chromedriver")
    if binary is None or program is None:
        missing = "no Chromium with chromedriver (Debian: chromium, chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(f"{missing}, and CI must have it")
        pytest.skip(missing)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([program, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{address}/status", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        browser = Browser(address, tmp_path_factory.mktemp("profile"), binary)
        yield browser
        browser.quit()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser(driver: Browser, tmp_path: Path) -> Browser:
    path = tmp_path / "pareto.html"
    path.write_text(page(OPTIONS), encoding="utf-8")
    driver.call("/url", {"url": path.as_uri()})
    return driver


def test_shows_all_models_and_the_front(browser: Browser) -> None:
    assert browser.models() == ["best", "middle", "beaten", "quick"]  # by accuracy
    assert browser.points() == ["quick", "middle", "beaten", "best"]  # by latency
    front = browser.run("return [...document.querySelectorAll('tr.front')].map(row => row.dataset.model)")
    assert front == ["best", "middle", "quick"]
    assert browser.run("return document.querySelectorAll('svg .front')[0].getAttribute('d').split('L').length") == 3
    assert browser.run("return performance.getEntriesByType('resource').length") == 0  # nothing else was loaded


def test_filters_by_family_budget_and_accuracy(browser: Browser) -> None:
    browser.run("document.querySelector('input[value=two]').click()")
    assert browser.models() == ["middle", "quick"]
    browser.run("document.querySelector('input[value=two]').click()")
    fill = "const box = document.getElementById('{0}'); box.value = '{1}'; box.dispatchEvent(new Event('input'))"
    browser.run(fill.format("budget", 8.5))
    assert browser.points() == ["quick", "middle"]
    browser.run(fill.format("least", 65))
    assert browser.points() == ["middle"]
    browser.run(fill.format("least", 99))
    assert "No model is within these limits" in browser.run("return document.getElementById('plot').textContent")
    assert browser.run("return document.getElementById('count').textContent") == "0 of 4 models"


def test_other_costs_leave_out_what_was_not_measured(browser: Browser) -> None:
    choose = "const box = document.getElementById('cost'); box.value = '{}'; box.dispatchEvent(new Event('input'))"
    browser.run(choose.format("memory_mb"))
    assert browser.points() == []
    browser.run(choose.format("params"))
    assert len(browser.points()) == 4


def tab_to(browser: Browser, selector: str) -> None:
    """Press Tab until such an element has the focus; a script's focus() does not raise its event in every Chromium."""
    for _ in range(60):
        browser.press(TAB)
        if browser.run(f"return document.activeElement.matches({selector!r})"):
            return
    pytest.fail(f"Tab never reached {selector}")


def test_works_by_keyboard(browser: Browser) -> None:
    tab_to(browser, "circle")
    details = "return document.getElementById('details').textContent"
    assert browser.run(details).startswith("quick: top-1 60.0 %")
    browser.press(RIGHT)
    assert browser.run("return document.activeElement.dataset.point") == "middle"
    assert "8.00 ms (quartiles 7.20 to 8.80)" in browser.run(details)
    assert browser.run("return document.querySelector('tr.chosen').dataset.model") == "middle"
    tab_to(browser, "th[data-column=latency_ms] button")
    browser.press(ENTER)
    assert browser.models() == ["quick", "middle", "beaten", "best"]
    browser.press(SPACE)
    assert browser.models() == ["best", "beaten", "middle", "quick"]
    sorted_by = "return document.querySelector('th[data-column=latency_ms]').getAttribute('aria-sort')"
    assert browser.run(sorted_by) == "descending"


def test_every_control_is_reached_by_tab(browser: Browser) -> None:
    browser.run("document.body.focus()")
    reached = []
    for _ in range(8 + len(OPTIONS) + 10):
        browser.press(TAB)
        reached.append(
            browser.run("const e = document.activeElement; return e.id || e.value || e.dataset.point || e.textContent")
        )
    for name in ("theme", "target", "cost", "budget", "least", "one", "two", "quick", "best", "model", "top-1 (%)"):
        assert name in reached, name


def test_light_and_dark(browser: Browser) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    assert browser.run(colour) == "rgb(255, 255, 255)"
    browser.run("document.getElementById('theme').click()")
    assert browser.run(colour) == "rgb(20, 24, 28)"


def test_hover_shows_details_and_text_is_never_markup(browser: Browser) -> None:
    browser.run("document.querySelector('circle[data-point=best]').dispatchEvent(new Event('mouseenter'))")
    assert "</script><b>" in browser.run("return document.getElementById('details').textContent")
    assert browser.run("return document.querySelectorAll('b').length") == 0


def test_the_page_names_no_address_to_load_from() -> None:
    text = page(OPTIONS)
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "url(" not in text
    assert text.count("http") == text.count("http-equiv") + text.count("http://www.w3.org/2000/svg")


def test_command_writes_page_and_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "gather", lambda device, others: OPTIONS)
    for name, start in (("x.html", b"<!DOCTYPE html>"), ("x.png", b"\x89PNG")):
        with pytest.raises(SystemExit) as stop:
            main(["pareto", "--latency", "cpu", "--out", str(tmp_path / name)])
        assert stop.value.code == 0
        assert (tmp_path / name).read_bytes().startswith(start)
        assert "4 models" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pareto", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {row["model"]: row["pareto"] for row in rows}["beaten"] is False


@pytest.mark.parametrize(
    "name, message", [("x.gif", "expected a name that ends in"), ("no/x.html", "there is no folder")]
)
def test_a_file_that_cannot_be(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(zoo.ConfigError, match=message):
        pareto(out=tmp_path / name)


def test_nothing_measured_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gather", lambda device, others: [])
    with pytest.raises(zoo.DataError, match="run `zoo bench"):
        pareto()
