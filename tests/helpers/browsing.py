"""A real browser for tests of pages."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

OFF = ("gpu", "background-networking", "component-update", "sync")
FLAGS = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in OFF)]


class Browser:
    """A browser driven by its own protocol, https://www.w3.org/TR/webdriver2/."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}/session"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        session = self.call("", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.base += f"/{session['sessionId']}"

    def call(self, path: str, body: dict[str, Any] | None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)) as answer:
            return json.load(answer)["value"]

    def find(self, css: str) -> str:
        return "/element/" + next(iter(self.call("/element", {"using": "css selector", "value": css}).values()))

    def text(self, css: str) -> str:
        return str(self.call(self.find(css) + "/text", None, "GET"))

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of https://chromedevtools.github.io/devtools-protocol/."""
        return self.call("/goog/cdp/execute", {"cmd": name, "params": parameters})

    def show(self, url: str, scheme: str = "light", width: int = 1160) -> None:
        """Open a page in a color scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.call("/url", {"url": url})

    def value(self, expression: str) -> Any:
        """What JavaScript says."""
        return self.command("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        width, height = (self.value(f"document.documentElement.scroll{side}") for side in ("Width", "Height"))
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def point(self, css: str, x: int = 0, y: int = 0) -> None:
        """Move the mouse to an element."""
        origin = {"element-6066-11e4-a52e-4f735466cecf": self.find(css).rpartition("/")[2]}
        move = {"type": "pointerMove", "duration": 0, "origin": origin, "x": x, "y": y}
        self.call("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})


def chromedriver() -> str:
    """Where it is; a test that needs it is skipped where there is none."""
    if (driver := shutil.which("chromedriver")) is None:
        pytest.skip("no chromedriver here")  # .ci/run installs one; nobody else needs a browser to run the tests
    return driver


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    with subprocess.Popen([chromedriver(), "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = next(int(m[1]) for line in process.stdout if (m := re.search(r"successfully on port (\d+)", line)))
        session = Browser(port, folder / "driven")
        try:
            yield session
        finally:
            session.call("", None, "DELETE")
            process.terminate()
