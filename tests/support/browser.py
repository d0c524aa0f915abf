"""Chromium without a window, where the machine has one."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: install chromium to look at pages"
)
LOOK = """
<!doctype html><meta charset="utf-8">
<iframe id="frame" width="{width}" height="2000" style="border: 0"></iframe><pre id="said"></pre>
<script>
const frame = document.getElementById("frame");
frame.onload = () => {{
  const page = frame.contentDocument, sizes = [];
  for (const element of page.body.querySelectorAll("*:not(svg *)"))
    if ([...element.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
      sizes.push(parseFloat(frame.contentWindow.getComputedStyle(element).fontSize));
  const spread = image => {{
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    return Math.max(...pixels.filter((_, n) => n % 4 < 3).values().take(60000)) -
      Math.min(...pixels.filter((_, n) => n % 4 < 3).values().take(60000));
  }};
  const box = element => (({{x, y, width, height}}) => [x, y, width, height])(
    element.getBoundingClientRect());
  console.log("looked");
  document.getElementById("said").textContent = JSON.stringify({{
    width: page.documentElement.clientWidth, needed: page.documentElement.scrollWidth,
    smallest: Math.min(...sizes), spreads: [...page.images].map(spread),
    images: [...page.images].map(box), drawings: [...page.querySelectorAll("svg")].map(box),
    height: page.documentElement.scrollHeight, text: page.body.innerText,
  }});
}};
frame.srcdoc = {page};
</script>
"""
"""A page that looks into another one: its width and what its content needs, the smallest letters,
how far the pixels of each picture are apart, and where everything is."""


def look_at(page: Path, folder: Path, *, width: int) -> tuple[dict[str, Any], list[str]]:
    """What a browser window of this width makes of a page; and what the page says on the
    console.
    """
    looking = folder / f"look-{width}.html"
    # In a script no word of the page may end the script.
    content = json.dumps(page.read_text()).replace("<", "\\u003c")
    looking.write_text(LOOK.format(width=width, page=content))
    said = _chromium(folder, "--dump-dom", looking.as_uri())
    found = re.search(r'<pre id="said">(.+?)</pre>', said.stdout, re.DOTALL)
    assert found is not None, said.stderr
    spoken = [line for line in said.stderr.splitlines() if "CONSOLE" in line]
    heard = [line for line in spoken if '"looked"' not in line]
    assert len(heard) == len(spoken) - 1, "the console is heard"
    return json.loads(html.unescape(found[1])), heard


def screenshot(page: str, folder: Path, *, width: int, height: int, dark: bool) -> Path:
    """A picture of the page at this address, to whom the system says light or dark."""
    picture = folder / f"{'dark' if dark else 'light'}.png"
    _chromium(
        folder,
        f"--screenshot={picture}",
        f"--window-size={width},{height}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        page,
    )
    return picture


def _chromium(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={folder / 'profile'}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
