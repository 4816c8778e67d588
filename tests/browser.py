"""Look at pages as a person would: Chromium without a window loads them in frames of a screen's width and reports.

A small web server hands out the folders and one page of its own, which loads every page to be looked at in a frame, measures
it at each width, as when a window is made wider, and sends back what it found.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

FAULTS = ("overflow", "wide", "broken", "tiny", "flat", "raw")
"""What a page may not have: too much width, parts that stick out, images that do not load, texts of drawings too small to
read, equations flat or unread. "cut", tables and figures that scroll by themselves, is allowed on a phone."""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOOK = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>look</title><body><script>
const pages = PAGES, widths = WIDTHS, found = [];
const scrolls = e => { for (let p = e; p && p.parentElement; p = p.parentElement) {
  const s = p.ownerDocument.defaultView.getComputedStyle(p);
  if (p !== p.ownerDocument.body && ["auto", "scroll", "hidden", "clip"].includes(s.overflowX)) return true;
  if (s.position === "fixed" || s.visibility === "hidden") return true; } return false; };
async function look(page) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${widths[0]}px; height: 900px; border: 0; position: fixed; left: -3000px`;
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page; document.body.append(frame); await loaded;
  for (const width of widths) {
    frame.style.width = `${width}px`; await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    measure(page, width, frame); }
  frame.remove();
}
function measure(page, width, frame) {
  const d = frame.contentDocument, root = d.documentElement;
  const wide = [...d.body.querySelectorAll("*")].filter(e => {
    const box = e.getBoundingClientRect(); return box.width && box.right > width + 1 && !scrolls(e); });
  found.push({page, width, title: d.title, overflow: root.scrollWidth - root.clientWidth,
    wide: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 160)),
    broken: [...d.images].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src),
    cut: [...d.querySelectorAll(".table-wrapper, figure, .circuit")]
      .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 80)),
    tiny: [...d.querySelectorAll("svg.circuit text")]
      .filter(t => t.getBoundingClientRect().height < 11).map(t => t.textContent),
    images: d.images.length,
    equations: d.querySelectorAll("math").length,
    flat: [...d.querySelectorAll("math")].filter(m => m.checkVisibility() && !(m.getBoundingClientRect().width > 1)).length,
    raw: [...d.querySelectorAll("math, .math")].filter(m => m.textContent.includes("\\\\")).map(m => m.textContent)});
}
(async () => {
  try { for (const page of pages) await look(page); }
  catch (error) { found.push({page: "the script", failure: String(error)}); }
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


def chromium() -> str | None:
    """The path of a Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class _Handler(SimpleHTTPRequestHandler):
    """Folders by the first part of the path, the page that looks, and its findings."""

    def __init__(
        self, *arguments: Any, folders: Mapping[str, Path], look: str, found: list[Any], done: threading.Event
    ) -> None:
        self.folders, self.look, self.found, self.done = folders, look, found, done
        super().__init__(*arguments)

    def translate_path(self, path: str) -> str:
        first, _, rest = path.partition("?")[0].partition("#")[0].lstrip("/").partition("/")
        self.directory = str(self.folders.get(first, Path(os.devnull)))
        return super().translate_path("/" + rest)

    def do_GET(self) -> None:
        if self.path != "/look":
            super().do_GET()
            return
        body = self.look.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.found += json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.done.set()

    def log_message(self, *arguments: Any) -> None:
        """Keep still."""


def look_at(
    folders: Mapping[str, Path], pages: Sequence[str], widths: Sequence[int], profile: Path, timeout: float = 240
) -> tuple[list[dict[str, Any]], list[str]]:
    """What is found on each page at each width, and what the console said.

    Args:
        folders: first part of the address -> folder that is served there.
        pages: addresses such as "/site/index.html".
        widths: of the screen, in CSS pixels.
        profile: an empty folder for the browser's own files.
        timeout: seconds.

    Raises:
        TimeoutError: the browser did not answer in time.
    """
    program = chromium()
    assert program is not None
    found: list[dict[str, Any]] = []
    done = threading.Event()
    look = LOOK.replace("PAGES", json.dumps(list(pages))).replace("WIDTHS", json.dumps(list(widths)))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folders=folders, look=look, found=found, done=done))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile.mkdir(parents=True, exist_ok=True)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1400,1000"]
    log = profile / "stderr.txt"
    with open(log, "w") as stderr:
        address = f"http://127.0.0.1:{server.server_port}/look"
        process = subprocess.Popen([program, *flags, address], stdout=stderr, stderr=stderr, start_new_session=True)
        try:
            if not done.wait(timeout):
                raise TimeoutError(f"{program} did not answer in {timeout:g} s: {log.read_text()[-2000:]}")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            server.shutdown()
    return found, [line for line in log.read_text(errors="replace").splitlines() if "CONSOLE" in line]
