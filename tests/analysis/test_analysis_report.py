"""`weft.analyze`, its report in a real browser, and the command."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from analysis_models import Mlp, digits, fit, trained
from safetensors.torch import save_file

import weft
from weft.analysis.analyze import ANALYSES, Analysed
from weft.analysis.barrier import Barrier
from weft.analysis.least_squares import tail_averaging
from weft.analysis.report import html_report, write_report
from weft.analysis.similarity import Similarity
from weft.analysis.stability import sgd_stability
from weft.errors import DataError, UsageError

BROWSER = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
HOSTILE = "</script><script>document.title='hacked'</script><b>x"


@pytest.fixture(scope="module")
def world() -> dict[str, torch.nn.Module]:
    """A base and two models fine-tuned on two halves of the classes."""
    train, _ = digits()
    base = fit(Mlp((64, 24, 24, 10), 7), train, epochs=2)
    made = {"base": base}
    for name, keep in (("low", train[1] < 5), ("high", train[1] >= 5)):
        copy = Mlp((64, 24, 24, 10), 7)
        copy.load_state_dict(base.state_dict())
        made[name] = fit(copy, (train[0][keep], train[1][keep]), epochs=2, rate=5e-4)
    return made


def halves(split: int = 1) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    x, y = digits()[split]
    return {"low": (x[y < 5][:120], y[y < 5][:120]), "high": (x[y >= 5][:120], y[y >= 5][:120])}


@pytest.fixture(scope="module")
def everything(world: dict[str, torch.nn.Module]) -> Analysed:
    pytest.importorskip("plotly")
    names = [n for n in ANALYSES if n != "trajectory"]
    models = {"low": world["low"], "high": world["high"]}
    return weft.analyze(models, base=world["base"], module=world["base"], data=halves(), only=names)


def test_everything_that_is_given_is_analysed_and_is_plain_data(everything: Analysed) -> None:
    kinds = [type(f).__name__ for f in everything]
    assert set(kinds) == {
        "Similarity", "SubspaceOverlap", "Barrier", "LayerwiseBarrier", "FeatureLinearity", "Plane", "Sharpness",
        "EnsembleGap", "RepresentationBias", "Disentanglement", "Localisation", "Decomposition", "Curve", "Path",
    }  # fmt: skip
    assert kinds.count("Sharpness") == 3 and kinds.count("RepresentationBias") == 2
    told = json.loads(json.dumps(everything.to_json(), allow_nan=False))
    assert all(f["title"] and f["headline"] for f in told["findings"])
    assert everything.of(Barrier)[0].a == "low"
    assert "measured on 240 examples" in everything.notes
    for found in everything:
        assert found.about.endswith(".") and found.plot().data


def test_weights_alone_give_what_they_allow_and_say_what_is_missing(
    world: dict[str, torch.nn.Module],
) -> None:
    found = weft.analyze([world["low"], world["high"]])
    assert [type(f) for f in found] == [Similarity]
    assert found.skipped["barrier"] == "needs a module and data"
    assert found.skipped["overlap"] == "needs a base"
    run = weft.analyze([trained(s) for s in (1, 2, 3, 4)], only=["trajectory"])
    assert run.findings[0].title == "Averaging along a run of 4 checkpoints"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"only": ["bariers"]}, "did you mean 'barrier'"),
        ({"only": ["overlap", "curve"]}, "overlap needs a base; curve needs a module and data"),
        ({"module": trained(1)}, "belong together"),
        (
            {"module": trained(1), "data": {"a": digits()[1]} | {n: digits()[1] for n in "bc"}},
            "3 data sets for 2 models",
        ),
    ],
)
def test_requests_that_cannot_be_meant(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weft.analyze([trained(1), trained(2)], **arguments)  # type: ignore[arg-type]


def test_a_model_that_does_not_fit_stops_it_before_anything_is_done(
    world: dict[str, torch.nn.Module],
) -> None:
    started: list[str] = []
    with pytest.raises(DataError, match=r"layers\.0\.weight"):
        weft.analyze(
            [world["low"], trained(1)], module=world["base"], data=digits()[1], on_start=started.append
        )
    assert not started


def test_many_findings_of_a_kind_are_folded_in_the_contents(everything: Analysed) -> None:
    line = everything.of(Barrier)[0]
    pages = {n: html_report([line] * n).partition("<section")[0] for n in (3, 4)}
    assert "<details>" not in pages[3]
    assert "<details><summary>Barrier: 4 findings</summary>" in pages[4]
    assert all(f'href="#f{i}"' in pages[4] for i in range(4))


def test_the_page_needs_nothing_else_and_shows_names_as_text(everything: Analysed, tmp_path: Path) -> None:
    extra = weft.analyze({HOSTILE: trained(1), "other": trained(2)})
    page = html_report([*everything, *extra], heading=HOSTILE, notes=[HOSTILE])
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//", page)
    assert page.count("plotly.js v") <= 2 and len(page) < 12e6
    assert "</script><script>document" not in page and "&lt;/script&gt;" in page
    with pytest.raises(UsageError, match=r"ends in \.html"):
        everything.report(tmp_path / "report.pdf")
    with pytest.raises(DataError, match="make it first"):
        everything.report(tmp_path / "none" / "report.html")
    with pytest.raises(UsageError, match="no findings"):
        write_report([], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


PROBE = """
<script>
window.addEventListener('load', async () => {
  const told = {errors: window.problems, plots: [], title: document.title};
  for (const plot of document.querySelectorAll('.js-plotly-plot')) {
    const axes = plot._fullLayout;
    const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
    const found = {drawn: plot.querySelectorAll('svg.main-svg').length, width: box.width, high: box.height};
    const before = JSON.stringify(axes.xaxis.range);
    const target = plot.querySelector('.nsewdrag');
    const mouse = (kind, on, x, y) => on.dispatchEvent(new MouseEvent(kind, {
      bubbles: true, cancelable: true, view: window, buttons: kind === 'mousemove' && on === target ? 0 : 1,
      clientX: box.left + x * box.width, clientY: box.top + y * box.height}));
    const pause = () => new Promise((done) => setTimeout(done, 60));
    // drag over the middle of the plot: zoom
    mouse('mousedown', target, 0.25, 0.25);
    mouse('mousemove', document, 0.5, 0.5);
    mouse('mousemove', document, 0.75, 0.75);
    mouse('mouseup', document, 0.75, 0.75);
    await pause();
    found.zoomed = JSON.stringify(plot._fullLayout.xaxis.range) !== before;
    await Plotly.relayout(plot, {'xaxis.autorange': true, 'yaxis.autorange': true});
    // move over the plot until something says what is there: hover
    found.hover = 0;
    for (let y = 0.04; y < 1 && !found.hover; y += 0.08) {
      for (let x = 0.02; x < 1 && !found.hover; x += 0.04) {
        mouse('mousemove', target, x, y);
        await pause();
        found.hover = plot.querySelectorAll('.hoverlayer .hovertext').length;
      }
    }
    found.type = plot.data[0].type;
    told.plots.push(found);
  }
  const out = document.createElement('pre');
  out.id = 'told';
  out.textContent = JSON.stringify(told);
  document.body.appendChild(out);
});
</script>
"""
ERRORS = """<script>
window.problems = [];
window.addEventListener('error', (e) => problems.push(String(e.message)));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_a_real_browser_draws_every_figure_and_hovers_and_zooms(everything: Analysed, tmp_path: Path) -> None:
    train, _ = digits()
    theory = [
        tail_averaging([1.0, 0.3], noise=0.5, rate=0.1, steps=[16, 32, 64]),
        sgd_stability(train[0][:50], (train[1][:50] > 4).long(), steps=40, replicas=8),
        *weft.analyze({HOSTILE: trained(1), "other": trained(2)}),
        *weft.analyze([trained(s) for s in (1, 2, 3, 4)], only=["trajectory"]),
    ]
    page = html_report([*everything, *theory], heading="checked", notes=[HOSTILE])
    path = tmp_path / "probe.html"
    path.write_text(
        page.replace("<style>", ERRORS + "<style>", 1).replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--window-size=1200,1600", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=300000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    match = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    told = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert told["errors"] == [] and told["title"] == "checked"
    assert len(told["plots"]) == page.count('class="plotly-graph-div"') >= 20
    for plot in told["plots"]:
        assert plot["drawn"] >= 2 and plot["width"] > 300 and plot["high"] > 100, plot
        assert plot["hover"] >= 1, plot
        assert plot["zoomed"], plot


MODULE = """
import torch
from torch import nn

def make():
    return nn.Linear(64, 10)

def data():
    from sklearn.datasets import load_digits
    bunch = load_digits()
    return torch.from_numpy(bunch.data).float() / 8 - 1, torch.from_numpy(bunch.target).long()

def absolute(outputs, targets):
    return outputs.abs().mean()
"""


def weft_command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weft.cli.main", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)


def test_the_command_prints_json_writes_the_page_and_names_what_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    (tmp_path / "mine.py").write_text(MODULE)
    for i in range(2):
        torch.manual_seed(i)
        save_file(
            {"weight": torch.randn(10, 64) / 8, "bias": torch.zeros(10)}, tmp_path / f"m{i}.safetensors"
        )
    both = ["analyze", "m0.safetensors", "m1.safetensors"]
    given = ["--module", "mine:make", "--data", "mine:data"]
    ran = weft_command(tmp_path, *both, *given, "--only", "barrier,similarity",
                       "--json", "--report", "out.html")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert [f["finding"] for f in told["findings"]] == ["Similarity", "Barrier"]
    assert told["findings"][1]["barrier"] == 0.0  # cross-entropy of a linear model is convex
    assert "barrier …" in ran.stderr and (tmp_path / "out.html").stat().st_size > 1e6
    plain = weft_command(tmp_path, *both, *given, "-q", "--loss", "mine:absolute",
                         "--only", "barrier")  # fmt: skip
    assert plain.returncode == 0 and "Barrier between m0 and m1" in plain.stdout and not plain.stderr
    for words, message in (
        (["--module", "mine:make"], "belong together"),
        (["--only", "planes"], "did you mean 'plane'"),
        (["--report", "out.pdf"], "ends in .html"),
    ):
        ran = weft_command(tmp_path, *both, *words)
        assert ran.returncode == 2 and message in ran.stderr and "Traceback" not in ran.stderr
