"""The report's page in Chromium: it is laid out, its script runs, and it can be read at any width, light and dark."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from ..test_report import LOG_PX, report, write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
DARK = "--blink-settings=preferredColorScheme=0"
COLOURS = {
    "light": ((0, 114, 178), (213, 94, 0), (0, 158, 115)),
    "dark": ((61, 155, 224), (232, 116, 59), (31, 181, 138)),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


def browse(page, tmp_path, *flags):
    """(the page after its script, what it wrote to the console)."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(tmp_path / "profile")
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def screenshot(page, tmp_path, width, height, *flags):
    """The page's pixels, (height, width, 3)."""
    path = tmp_path / "screen.png"
    _, console = browse(page, tmp_path, f"--screenshot={path}", f"--window-size={width},{height}", *flags)
    assert console == []
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    for name, values in LOG_PX.items():
        for seed, value in enumerate(values):
            write(root / f"runs/digits-{name}-{seed}", seed, name, value, picture=(1500, 700))
    report(root, root / "runs", "--reference", "vae")
    return root / "report.html"


def with_script(page, code):
    """A copy of the page in which `code` runs after the page's own script; its result is data-result of the body."""
    path = page.with_name("probe.html")
    probe = f"<script>document.body.dataset.result = (() => {{{code}}})();</script></body>"
    path.write_text(page.read_text().replace("</body>", probe))
    return path


def result(page, tmp_path, code, *flags):
    dom, console = browse(with_script(page, code), tmp_path, "--dump-dom", *flags)
    assert console == []
    return re.search(r'<body data-result="([^"]*)"', dom)[1]


def test_the_script_runs_without_an_error(page, tmp_path):
    dom, console = browse(page, tmp_path, "--dump-dom")
    assert 'data-script="ready"' in dom.split(">", 2)[1] and console == []


def test_an_error_of_the_script_would_be_found(page, tmp_path):
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace('"use strict";', '"use strict"; nothing.there;'))
    dom, console = browse(broken, tmp_path, "--dump-dom")
    assert "data-script" not in dom.split(">", 2)[1] and len(console) == 1


def test_something_from_outside_would_be_found(page, tmp_path):
    """The page's own policy forbids it, so a mistake in the template would show on the console."""
    outside = page.with_name("outside.html")
    outside.write_text(page.read_text().replace("</body>", '<img src="http://127.0.0.1:9/x.png" alt=""></body>'))
    assert "Content Security Policy" in browse(outside, tmp_path, "--dump-dom")[1][0]


@pytest.mark.parametrize(("scheme", "flags"), [("light", []), ("dark", [DARK])])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn(page, tmp_path, width, scheme, flags):
    pixels = screenshot(page, tmp_path, width, 2400, *flags).astype(int)
    assert pixels.shape == (2400, width, 3)
    background = np.median(pixels.reshape(-1, 3), 0).mean()
    assert background > 240 if scheme == "light" else background < 40
    for colour in COLOURS[scheme]:  # each group's dots, lines and swatches
        assert (np.abs(pixels - colour).max(-1) < 30).sum() > 300
    ink = np.abs(pixels - background).max(-1) > 100
    assert ink[:, : width // 2].any(1).mean() > 0.2 and ink[1200:].any(1).mean() > 0.2
    assert not ink[:, -8:].any()  # nothing is cut off


@pytest.mark.parametrize("width", [1280, 500])  # no window is narrower
def test_nothing_sticks_out_of_the_window(page, tmp_path, width):
    code = "return document.documentElement.scrollWidth - innerWidth + ' ' + innerWidth"
    assert result(page, tmp_path, code, f"--window-size={width},900") == f"0 {width}"


def test_a_table_is_sorted_by_the_column_that_is_pressed(page, tmp_path):
    code = """
      const table = document.getElementById("figures"), heads = [...table.querySelectorAll("thead button")];
      const order = () => [...table.tBodies[0].rows].map(r => r.cells[0].textContent.trim().split(/\\s/)[0]).join(" ");
      const orders = [order()];
      for (const column of [3, 3, 0]) { heads[column].click(); orders.push(order()); }
      return orders.join("; ");
    """
    by_name, by_log_px = "iwae piwae vae", "piwae iwae vae"
    expected = [by_name, by_log_px, " ".join(by_log_px.split()[::-1])]
    assert result(page, tmp_path, code).split("; ")[:3] == expected


def test_groups_are_hidden_and_brought_out(page, tmp_path):
    code = """
      const number = selector => document.querySelectorAll(selector).length;
      const count = () => number("g[data-g].off") + "/" + number("g.hot");
      const counts = [];
      for (const s of ["[data-show='1']", "[data-hot='1']", "[data-hot='1']", "[data-show='0']", "[data-show='0']"]) {
        document.querySelector(s).click(); counts.push(count());
      }
      return counts.join(" ");
    """
    # ten panels; bringing a hidden group out shows it
    assert result(page, tmp_path, code) == "10/0 0/10 0/0 10/0 0/0"


def test_the_pointer_reads_the_curves(page, tmp_path):
    code = """
      const svg = document.querySelector("figure.panel svg"), box = svg.getBoundingClientRect();
      const at = {clientX: box.left + 0.999 * box.width * 450 / 460, clientY: box.top + box.height / 2};
      svg.dispatchEvent(new PointerEvent("pointermove", at));
      const tip = svg.parentNode.querySelector(".tip"), text = [...tip.childNodes].map(n => n.textContent).join("|");
      svg.dispatchEvent(new PointerEvent("pointerleave"));
      return text + "|" + tip.hidden;
    """
    step, *rows, hidden = result(page, tmp_path, code).split("|")
    assert step == "step 270" and hidden == "true"  # the last evaluation of 300 steps, one in 30
    shown = {name: float(value.replace("\N{MINUS SIGN}", "-")) for name, value in (row.split(": ") for row in rows)}
    assert list(shown) == ["piwae", "iwae", "vae"]  # from the top
    for name, value in shown.items():
        level = np.mean(LOG_PX[name])
        assert abs(value - level) < 4 * 0.1 / np.sqrt(3) + 0.05  # noise of 0.1 in each of three seeds or more
