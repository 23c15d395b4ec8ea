"""The report as a browser shows it: nothing overlaps or is cut off, all is legible in light and dark, tables sort."""

import pytest
from study.browser import NEEDED, check_page, check_print, measure
from study.made_up import ARMS, make_study

from align_ext.report.page import write_report

pytestmark = NEEDED
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_legibly(page, scheme, tmp_path):
    check_page(scheme, measure(page, scheme, tmp_path))


def test_it_prints(page, tmp_path):
    check_print(page, tmp_path, tmp_path / "report.pdf")
