"""A page in headless Chromium, driven over the DevTools pipe: what it logs, what it asks for, what is in it."""

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = Path("/usr/bin/chromium")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"),
    "--remote-debugging-pipe",
)


class Page:
    """One tab. `complaints` are console errors and exceptions, `requests` the addresses it asked for."""

    def __init__(self, to: Any, of: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._to, self._of, self._count, self._session = to, of, 0, ""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, file: Path, width: int) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.ask("Page.navigate", url=file.as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass

    def value(self, script: str) -> Any:
        return self.ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        text = b""
        while (byte := self._of.read(1)) != b"\0":
            assert byte, "Chromium has gone"
            text += byte
        message: dict[str, Any] = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if method == "Runtime.exceptionThrown" or (
            method == "Log.entryAdded" and params["entry"]["level"] == "error"
        ):
            self.complaints.append(json.dumps(params))
        if method == "Runtime.consoleAPICalled" and params["type"] == "error":
            self.complaints.append(json.dumps(params))
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A tab of a browser with an empty profile that reaches no host."""
    its_in, to = os.pipe()
    of, its_out = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (its_in, its_out)]

    def onto_3_and_4() -> None:  # where the DevTools pipe is
        for fd, wanted in zip(high, (3, 4), strict=True):
            os.dup2(fd, wanted)

    process = subprocess.Popen(
        [str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=onto_3_and_4,
        pass_fds=(3, 4),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for fd in (its_in, its_out, *high):
        os.close(fd)
    with os.fdopen(to, "wb") as writer, os.fdopen(of, "rb") as reader:
        try:
            yield Page(writer, reader)
        finally:
            process.terminate()
            process.wait(timeout=30)
