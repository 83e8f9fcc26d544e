"""The page in a browser: what is seen, what is found, what a click does, and that no text of a row becomes markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from lightning_sft.commands.show.page import write_page
from lightning_sft.data.batches.packing import pack
from lightning_sft.data.batches.plan import EpochPlan
from lightning_sft.data.batches.split_plan import SplitPlan
from lightning_sft.data.inspect.token_text import Piece
from lightning_sft.data.tokens.dataset import Split
from lightning_sft.data.tokens.examples import Examples, to_record_batch
from lightning_sft.data.tokens.row_report import RowReport
from lightning_sft.types import Example
from tests.helpers.browsing import FLAGS, Browser

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"><!--"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """45 rows: 44 that count, and one that attacks."""
    texts = [f"row {i} says\t{'fizz' if i % 3 == 0 else 'buzz'}⏎\nend" for i in range(1, 45)] + [EVIL]
    examples = Examples([to_record_batch([Example([1, 2, 3], [0, 1, 1])] * 45)])
    split = Split("train", examples, RowReport(num_rows=46, refused=[f"{EVIL}:3: {EVIL}"]))
    documents = [
        (f"a.jsonl:{i}", "step 1", [Piece("<|user|>", (7,), 0.0, True), Piece(text, (i, 99), 0.5, False)])
        for i, text in enumerate(texts, 1)
    ]
    plan = EpochPlan(split.lengths, split.examples.weights, lambda lengths: pack(lengths, 8))
    write_page(str(tmp_path / "page.html"), documents, {"train": split}, SplitPlan(split, plan, 8, "packed"), "tiny")
    return tmp_path / "page.html"


def test_the_page_loads_nothing_and_text_is_never_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(""", text)
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2  # the data's end, and the program's
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data
    assert json.loads(data)["pieces"][-1][0] == EVIL


def seen(page: Path, address: str = "") -> str:
    """The document as the browser has it after the page's program has run."""
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("no chromium here")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [chromium, *FLAGS, profile, "--dump-dom", f"{page.as_uri()}{address}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_the_address_says_what_is_shown(page: Path) -> None:
    assert re.findall(r"<b>a.jsonl:(\d+)</b>", seen(page)) == [str(i) for i in range(1, 21)]
    last = seen(page, "#page=3")
    assert re.findall(r"<b>a.jsonl:(\d+)</b>", last) == [str(i) for i in range(41, 46)]
    assert "<title>What will be trained</title>" in last
    assert "&lt;img src=x" in last  # the text of the row, as text
    assert re.findall(r"<b>a.jsonl:(\d+)</b>", seen(page, "#q=FIZZ")) == [str(i) for i in range(3, 45, 3)]
    assert re.findall(r"<b>a.jsonl:(\d+)</b>", seen(page, "#q=a.jsonl%3A17")) == ["17"]
    assert '<span class="newline">\n</span>' in last
    assert "×0.5" in last


@pytest.mark.slow
def test_a_person_pages_searches_and_looks_at_a_token(page: Path, browser: Browser) -> None:
    browser.call("/url", {"url": page.as_uri()})
    assert browser.text("#place") == "1–20 of 45"
    browser.call(browser.find("#next") + "/click", {})
    assert browser.text("#place") == "21–40 of 45"
    assert browser.text("article header b") == "a.jsonl:21"
    browser.call(browser.find("#search") + "/value", {"text": "fizz"})
    assert browser.text("#place") == "1–14 of 14"  # back on the first page
    assert browser.text("article .target").replace("\n", "") == "row 3 says fizzend"
    browser.point("article .target")
    for _ in range(20):
        if browser.text("#tip"):
            break
        time.sleep(0.1)
    assert browser.text("#tip").endswith("ids 3, 99 (together one character)\nposition 1\ntarget, weight 0.5")
    browser.call(browser.find("#search") + "/value", {"text": "nowhere"})
    assert browser.text("#none") == "No row has this text."
