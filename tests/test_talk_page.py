"""The page of `sftx serve` in a real browser: answers side by side, text that stays text."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import tiny
import torch

from sftx.eval.sampling import Sampling
from sftx.model.runtime import Machine
from sftx.settings.schema import Model
from sftx.talk.endpoint import Endpoint
from sftx.talk.load import load_assistants

pytestmark = pytest.mark.slow
EVIL = "<img src=x onerror='document.title=1'>"


@pytest.mark.parametrize("token", ["", "secret"])
def test_the_page(tmp_path: Path, token: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium")
    path = tiny.folder(tmp_path / "m", tie_word_embeddings=False, initializer_range=0.4)
    here = Machine(torch.device("cpu"), torch.float32)
    found = load_assistants(Model(path=path), "auto", path, "", here)
    sampling = Sampling(max_tokens=8, temperature=0)
    with (
        Endpoint(found, sampling, port=0, token=token) as server,
        playwright.sync_playwright() as driver,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(server.url)
        assert page.locator("#sides h4").all_text_contents() == ["m", "base"]
        if token:
            page.fill("#said", "without the token")
            page.click("#send")
            page.locator(".wrong").nth(1).wait_for()
            assert "token is missing" in (page.locator(".wrong").first.text_content() or "")
            assert page.input_value("#said") == "without the token", "the message is not lost"
            page.fill("#token", token)
            page.click("#reset")
            assert wrong.pop().startswith("Failed to load resource")
            wrong.clear()
        assert page.locator("#token").is_visible() == bool(token)
        for turn in (1, 2):
            page.fill("#said", EVIL)
            page.keyboard.press("Control+Enter")
            page.locator("#sides .facts").nth(2 * turn - 1).wait_for()
        assert page.locator(".user").all_text_contents() == [EVIL] * 4
        answers = page.locator(".turn:not(.user)").all_text_contents()
        assert len(answers) == 4
        assert all(answers)
        assert page.title() == "Talk to the model"
        assert wrong == []
        browser.close()
        server.shutdown()
