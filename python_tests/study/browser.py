"""A browser without a screen that measures a page: what overlaps or is cut off, sizes, colours, how tables sort."""

import json
import re
import shutil
import subprocess

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Slow, since .ci/run installs no browser; .ci/check-full installs one for these tests.
NEEDED = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")]

MEASURE = """<script>
const within = (inner, outer) => inner.left >= outer.left - 1 && inner.right <= outer.right + 1
  && inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1;
const across = (one, other) => Math.min(one.right, other.right) - Math.max(one.left, other.left) > 1
  && Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top) > 2;
addEventListener("load", () => {
  const closed = document.documentElement.scrollWidth;
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  const overlaps = [], cut = [], sizes = [];
  for (const svg of document.querySelectorAll("svg")) {
    const outer = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((one) => one.textContent.trim());
    const straight = texts.filter((one) => !/rotate\\(-(?!0 |90 )/.test(one.getAttribute("transform") || ""));
    const boxes = straight.map((one) => [one.textContent, one.getBoundingClientRect()]);
    texts.forEach((one) => within(one.getBoundingClientRect(), outer) || cut.push(one.textContent));
    texts.forEach((one) => {
      const { a, b } = one.getScreenCTM();
      sizes.push(parseFloat(getComputedStyle(one).fontSize) * Math.hypot(a, b));
    });
    boxes.forEach(([text, box], index) => {
      boxes.slice(index + 1).forEach(([other, its]) => across(box, its) && overlaps.push([text, other]));
    });
  }
  const table = document.querySelector("#scores table, #tasks table");
  const head = table.querySelectorAll("thead th")[1];
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[1].dataset.value);
  head.querySelector("button").click();
  const up = [column(), head.getAttribute("aria-sort")];
  head.querySelector("button").click();
  const down = [column(), head.getAttribute("aria-sort")];
  const ink = getComputedStyle(document.querySelector("figure svg text"));
  parent.postMessage({
    width: innerWidth, closed, open: document.documentElement.scrollWidth, overlaps, cut, up, down,
    smallest: Math.min(...sizes), ink: ink.fill, paper: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
  }, "*");
});
</script>"""
FRAMES = """<body><pre id="found"></pre><script>
const found = [];
addEventListener("message", (event) => {
  found.push(event.data);
  if (found.length === 2) document.getElementById("found").textContent = JSON.stringify(found);
});
</script><iframe src="measured.html" width="1280" height="900"></iframe>
<iframe src="measured.html" width="400" height="900"></iframe></body>"""


def browse(profile, *options):
    """Runs the browser with a folder for its profile; returns what it printed."""
    profile = f"--user-data-dir={profile}"
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", profile, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout


def measure(page, scheme, profile):
    """What the browser measured of a page in "light" or "dark", at widths of 1280 and 400 pixels."""
    folder = page.parent
    (folder / "measured.html").write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    (folder / "frames.html").write_text(FRAMES)
    colours = f"--blink-settings=preferredColorScheme={1 if scheme == 'light' else 0}"
    dom = browse(profile, colours, "--virtual-time-budget=20000", "--dump-dom", f"file://{folder}/frames.html")
    text = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL).group(1)
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return sorted(found, key=lambda one: -one["width"])


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def check_page(scheme, found):
    """Nothing overlaps, is cut off, too small, too pale, or makes the page scroll sideways; tables sort by a click."""
    assert [one["width"] for one in found] == [1280, 400]
    for one in found:
        assert one["overlaps"] == []
        assert one["cut"] == []
        assert one["smallest"] >= 7.8  # pixels
        assert one["closed"] <= one["width"]
        assert one["open"] <= one["width"]
        (up, first), (down, second) = one["up"], one["down"]
        assert [float(value) for value in up] == sorted(map(float, up))
        assert down == up[::-1]
        assert (first, second) == ("ascending", "descending")
        paper = luminance(one["paper"])
        assert (paper > 0.9) == (scheme == "light")
        for colour in (one["text"], one["ink"]):
            light, dark = sorted((luminance(colour), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 7, (scheme, colour)


def check_print(page, profile, file, most=20):
    """It prints on at most so many sheets."""
    browse(profile, f"--print-to-pdf={file}", "--no-pdf-header-footer", f"file://{page}")
    content = file.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= most
