"""A headless Chromium for tests: real keys, what the page said and asked for, and how long it took.

It speaks the DevTools protocol over a pipe: JSON messages that end in a zero byte.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}
COMPLAINTS = ("error", "warning", "assert")


class Page:
    """A page in a browser of its own; `with Page(folder) as page: page.open(file)`.

    Args:
        profile: an empty folder for the browser's own files.
    """

    def __init__(self, profile: Path, width: int = 1320, height: int = 1000) -> None:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += [f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        flags += [f"--window-size={width},{height}"]
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", str(BROWSER), *flags],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._id, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, path: Path, timeout_s: float = 60.0) -> float:
        """Open a file and wait until it says that all is drawn; seconds that this took."""
        start = time.monotonic()
        self.call("Page.navigate", url=path.as_uri())
        ready = "document.documentElement?.dataset.ready || ''"
        while not self.evaluate(ready):
            assert time.monotonic() < start + timeout_s, f"not drawn; it said {self.complaints()}"
            time.sleep(0.02)
        return time.monotonic() - start

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of the promise that it gives."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def settled(self) -> None:
        """Wait until what was asked for is on the screen."""
        self.evaluate(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, as a user does, where the focus is."""
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                code = KEYS[key]
                self.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    key=key,
                    code=key,
                    windowsVirtualKeyCode=code,
                    nativeVirtualKeyCode=code,
                )
        self.settled()

    def complaints(self) -> list[str]:
        """Exceptions, and what was logged as an error or a warning."""
        found = []
        for event in self.events:
            method, params = event["method"], event["params"]
            logged = method == "Runtime.consoleAPICalled" and params["type"] in COMPLAINTS
            noted = method == "Log.entryAdded" and params["entry"]["level"] in COMPLAINTS
            if method == "Runtime.exceptionThrown" or logged or noted:
                found.append(json.dumps(params))
        return found

    def requests(self) -> list[str]:
        """Addresses that the page asked for, what it carries itself left out."""
        sent = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        return [url for url in urls if not url.startswith(("data:", "blob:"))]

    def call(self, method: str, **params: Any) -> Any:
        """Send a command and wait for its answer; events on the way are kept."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def _read(self, timeout_s: float = 60.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], timeout_s)
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
