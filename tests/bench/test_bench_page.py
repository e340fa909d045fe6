"""The benchmark's page in a real browser: it sorts, it draws, nothing lies outside or over another."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from typing import Any

import pytest

from weft.bench.page import page
from weft.bench.run import bench
from weft.bench.suite import Suite
from weft.bench.suites.digits import digits

pytest.importorskip("sklearn")
BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
PROBE = """
<pre id="told"></pre><script>
const inside = (t, svg) => {
  const [a, b] = [t.getBoundingClientRect(), svg.getBoundingClientRect()];
  return a.left >= b.left - 2 && a.right <= b.right + 2 && a.top >= b.top - 2 && a.bottom <= b.bottom + 2;
};
const rows = () => [...document.querySelectorAll("table.sortable tbody tr")];
const column = (n) => rows().map((r) => r.cells[n].dataset.value);
const heads = [...document.querySelectorAll("table.sortable thead th")];
const mean = heads.findIndex((h) => h.textContent === "mean");
const orders = [0, 1].map(() => { heads[mean].querySelector("button").click(); return column(mean).map(Number); });
heads[0].querySelector("button").click();
const over = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
document.getElementById("told").textContent = JSON.stringify({
  orders, names: column(0), columns: heads.map((h) => h.textContent),
  sorted: heads.filter((h) => h.hasAttribute("aria-sort")).length,
  wide: document.querySelector("table.sortable").scrollWidth - document.querySelector(".scroll").clientWidth,
  drawings: [...document.querySelectorAll("svg[role=img]")].map((svg) => {
    const texts = [...svg.querySelectorAll("text")];
    const ticks = texts.filter((t) => !t.classList.contains("name")).map((t) => t.getBoundingClientRect());
    return {
      width: svg.getBoundingClientRect().width,
      outside: texts.filter((t) => !inside(t, svg)).map((t) => t.textContent),
      covered: ticks.filter((a, i) => ticks.some((b, j) => i < j && over(a, b))).length,
    };
  }),
  heat: document.querySelectorAll("table.heat td span").length,
});
</script>"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the browser says of the page of a run with 3 and 5 tasks."""
    if BROWSER is None:
        pytest.skip("no browser is installed")

    def sizes(seed: int) -> list[Suite]:
        whole = digits(seed)
        return [replace(whole.first(3), name="digits"), whole]

    results = bench(sizes, ["linear", "task_arithmetic", "tsv", "smile"], samples=8, tune=False)
    folder = tmp_path_factory.mktemp("page")
    path = folder / "page.html"
    path.write_text(page(results).replace("</body>", PROBE + "</body>"), encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--window-size=1400,1600", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    match = re.search(r'<pre id="told">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found


def test_the_table_sorts_and_fits(told: dict[str, Any]) -> None:
    down, up = told["orders"]
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(down) == 8
    assert told["names"] == sorted(told["names"], key=str.casefold, reverse=True)
    assert told["sorted"] == 1
    assert told["wide"] <= 0, "all columns are seen on a wide screen"


def test_every_figure_is_drawn_whole(told: dict[str, Any]) -> None:
    assert len(told["drawings"]) == 3  # radar, number of tasks, cost
    for drawn in told["drawings"]:
        assert drawn["width"] > 400 and drawn["outside"] == [] and drawn["covered"] == 0, drawn
    assert told["heat"] == 8 * 5
