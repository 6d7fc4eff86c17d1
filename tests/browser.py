"""A headless Chromium, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
PATIENCE = 60
"""Seconds that an answer may take."""


def program() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page. said: what its console had to say of errors and warnings. asked: URLs that it requested."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._unread, self._count, self._session = b"", 0, ""
        self.said: list[str] = []
        self.asked: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": values}
        os.write(
            self._commands,
            json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0",
        )
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            part = os.read(self._events, 1 << 20)
            assert part, "Chromium is gone"
            self._unread += part
        text, _, self._unread = self._unread.partition(b"\0")
        event: dict[str, Any] = json.loads(text)
        values = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.asked.append(values["request"]["url"])
        elif event.get("method") == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.said.append(values["entry"]["text"])
        elif event.get("method") == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.said.append(str(values["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(values["exceptionDetails"]))
        return event

    def run(self, script: str) -> Any:
        """What an expression gives."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.run(condition):
            assert time.monotonic() < end, f"never: {condition}; console: {self.said}"
            time.sleep(0.05)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def scheme(self, name: str) -> None:
        """light or dark, as the person's system asks for."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            values = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **values, **text)

    def picture(self, path: Path, whole: bool = False) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def opened() -> Iterator[Page]:
    command = program()
    assert command is not None
    their_end, commands = os.pipe()
    events, other_end = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={folder}"]
        browser = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{their_end} 4>&{other_end}',
                "bash",
                command,
                "--remote-debugging-pipe",
                *options,
            ],
            pass_fds=(their_end, other_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_end)
        os.close(other_end)
        try:
            yield Page(commands, events)
        finally:
            browser.terminate()
            browser.wait()
            os.close(commands)
            os.close(events)
