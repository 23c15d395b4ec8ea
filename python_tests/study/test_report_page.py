"""The report as a browser shows it: nothing overlaps or is cut off, all is legible in light and dark, tables sort."""

import json
import re
import shutil
import subprocess

import pytest
from study.made_up import ARMS, make_study

from align_ext.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Slow, since .ci/run installs no browser; .ci/check-full installs one for these tests.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")]

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
  const table = [...document.querySelectorAll("table")].find((one) => one.closest("#scores"));
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


STUDIES = {
    "arms": {"effects": {"align_kl": 0.4, "m_lora": -0.3}},
    "sweep": {
        "arms": {name: ARMS[name] for name in ("lora", "align_kl", "hydra")},
        "rates": (),
        "weights": (0, 0.1, 0.5),
    },
}


@pytest.fixture(scope="module", params=STUDIES)
def page(request, tmp_path_factory):
    return write_report(make_study(tmp_path_factory.mktemp("study") / "made_up", rows=40, **STUDIES[request.param]))


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Runs the browser without a screen."""

    def run(*options):
        profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", profile, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout

    return run


@pytest.fixture(scope="module", params=["light", "dark"])
def measured(request, page, browse):
    """What the browser measured at widths of 1280 and 400 pixels."""
    folder = page.parent
    (folder / "measured.html").write_text(page.read_text().replace("</body>", f"{MEASURE}</body>"))
    (folder / "frames.html").write_text(FRAMES)
    scheme = f"--blink-settings=preferredColorScheme={1 if request.param == 'light' else 0}"
    dom = browse(scheme, "--virtual-time-budget=20000", "--dump-dom", f"file://{folder}/frames.html")
    text = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL).group(1)
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return request.param, sorted(found, key=lambda one: -one["width"])


def test_no_text_of_a_figure_overlaps_another_or_is_cut_off(measured):
    for one in measured[1]:
        assert one["overlaps"] == []
        assert one["cut"] == []


def test_text_in_figures_is_large_enough(measured):
    assert all(one["smallest"] >= 7.8 for one in measured[1])  # pixels


def test_the_page_itself_never_scrolls_sideways(measured):
    assert [one["width"] for one in measured[1]] == [1280, 400]
    for one in measured[1]:
        assert one["closed"] <= one["width"]
        assert one["open"] <= one["width"]


def test_tables_sort_by_a_click(measured):
    for one in measured[1]:
        (up, first), (down, second) = one["up"], one["down"]
        assert [float(value) for value in up] == sorted(map(float, up))
        assert down == up[::-1]
        assert (first, second) == ("ascending", "descending")


def luminance(colour):
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_and_figures_have_contrast(measured):
    scheme, found = measured
    for one in found:
        paper = luminance(one["paper"])
        assert (paper > 0.9) == (scheme == "light")
        for colour in (one["text"], one["ink"]):
            light, dark = sorted((luminance(colour), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 7, (scheme, colour)


def test_it_prints(page, browse, tmp_path):
    browse(f"--print-to-pdf={tmp_path / 'report.pdf'}", "--no-pdf-header-footer", f"file://{page}")
    content = (tmp_path / "report.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20
