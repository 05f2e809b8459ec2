"""A sweep's page: whole in itself, and what it does in a browser without a network."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nas.machine.files import write_csv
from nas.sweeps.page import page_data, write_page
from search_spaces.errors import UserError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows() -> list[dict[str, Any]]:
    """Ten trials retrained, one of them worse than a cheaper one; one only searched, one that failed."""
    found = []
    for i in range(10):
        top1 = 90 + i - (4 if i == 5 else 0)
        found.append({"top1": top1, "gflops": 0.001 * (i + 1), "params": 1e5 * (i + 1), "images_per_s": 9000 / (i + 1)})
    found = [{"status": "done", "stage": "retrain", "split": "validation split", "error": ""} | r for r in found]
    found.append(
        {"status": "stopped", "stage": "search", "split": "held-out training images", "top1": 80.5, "gflops": 0.0045}
    )
    found.append({"status": "failed", "error": "the ce term of the loss is nan </script><img src=x onerror=alert(1)>"})
    empty = dict.fromkeys(("status", "stage", "split", "top1", "gflops", "params", "images_per_s", "error"), "")
    order = [2, 10, 0, 11, 1, 3, 4, 5, 6, 7, 8, 9]
    return [
        {"trial": f"{n:03d}", "config.budget": 0.1 * (i + 1), "config.space": "swin-dan-nano"}
        | empty
        | found[i]
        | {"search": f"{n:03d}/search", "retrain": f"{n:03d}/retrain"}
        for n, i in enumerate(order)
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "a sweep"
    for name in ("000/search", "000/retrain"):
        (folder / name).mkdir(parents=True)
        (folder / name / "curves.png").write_bytes(b"png")
    write_csv(folder / "trials.csv", rows())
    return folder


def test_numbers_are_numbers_names_are_words_and_links_lead_to_files(sweep: Path) -> None:
    write_page(sweep)
    text = re.findall(r'id="data">(.*)</script>', (sweep / "index.html").read_text())[0]
    data = json.loads(text)
    assert [r["trial"] for r in data["rows"]] == [f"{n:03d}" for n in range(12)]
    first, failed = data["rows"][0], data["rows"][3]
    assert (first["top1"], first["gflops"], first["config.budget"]) == (92, 0.003, pytest.approx(0.3))
    assert failed["top1"] is None and "alert" in failed["error"]
    assert [c["label"] for c in data["columns"]][:5] == ["trial", "runs", "budget", "space", "status"]
    for link in first["links"]:
        assert (sweep / link["href"]).exists()
    assert [link["label"] for link in first["links"]] == ["search", "curves", "retrain", "curves"]
    assert data["words"] == "12 trials: 10 done, 1 stopped, 1 failed"


def test_the_page_is_whole_in_itself(sweep: Path) -> None:
    page = write_page(sweep).read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page.split('id="data"')[0])
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("</script>") == 2  # what stands in a cell ends no script


def test_a_sweep_without_a_number_or_a_trial_still_has_a_page(tmp_path: Path) -> None:
    assert page_data(tmp_path, [])["rows"] == []
    write_csv(tmp_path / "trials.csv", [{"trial": "000", "status": "waiting", "top1": "", "gflops": ""}])
    write_page(tmp_path)
    with pytest.raises(UserError, match="folder of a sweep"):
        write_page(tmp_path / "nowhere")


# What a reader does: sorts by two columns, hovers over a row and a point, changes the cost axis.
READER = """
<script>
const seen = {}, trials = () => [...document.querySelectorAll("tbody tr")].map(r => r.id.slice(4))
const press = label => [...document.querySelectorAll("th button")].find(b => b.textContent === label).click()
const point = () => document.querySelector('circle[data-trial="000"]')
seen.first = trials()
press("top-1 (%)"); seen.up = trials()
press("top-1 (%)"); seen.down = trials()
seen.sorted = document.querySelector("th[aria-sort=descending]").textContent
press("status"); seen.status = trials()[0]
point().dispatchEvent(new MouseEvent("mouseenter"))
seen.tip = document.getElementById("tip").textContent
seen.shown = !document.getElementById("tip").hidden
seen.lit = [...document.querySelectorAll(".lit")].map(e => e.id || e.dataset.trial)
point().dispatchEvent(new MouseEvent("mouseleave"))
seen.gone = document.getElementById("tip").hidden && !document.querySelector(".lit")
seen.points = document.querySelectorAll("circle").length
seen.fronts = [...document.querySelectorAll("path.front")].map(p => (p.getAttribute("d").match(/[MV]/g) || []).length)
const select = document.getElementById("cost")
select.value = "images_per_s"; select.dispatchEvent(new Event("change"))
seen.axis = document.getElementById("svg").textContent.includes("images/s at batch 32")
seen.fewer = document.querySelectorAll("circle").length
seen.images = document.images.length
document.body.replaceChildren(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(seen) }))
</script>
"""


def browse(page: Path, *options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    command += [f"--user-data-dir={page.parent.parent / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_in_a_browser_the_table_sorts_the_points_tell_and_nothing_is_fetched(sweep: Path) -> None:
    page = write_page(sweep)
    copy = sweep / "read.html"
    copy.write_text(page.read_text().replace("</body>", f"{READER}</body>"))
    text = re.findall(r"<pre>(.*?)</pre>", browse(copy, "--dump-dom"))[0]
    seen = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    by_top1 = sorted((r for r in rows() if r["top1"] != ""), key=lambda r: float(r["top1"]))
    assert seen["first"] == [f"{n:03d}" for n in range(12)]
    assert seen["up"] == [r["trial"] for r in by_top1] + ["003"]  # the failed one has none, and comes last
    assert seen["down"][0] == by_top1[-1]["trial"] and seen["down"][-1] == "003"
    assert seen["sorted"] == "top-1 (%)"
    assert seen["shown"] and "trial 000, on the front" in seen["tip"] and "top-1 (%)  92" in seen["tip"]
    assert sorted(seen["lit"]) == ["000", "row-000"] and seen["gone"]
    assert seen["points"] == 11 and seen["fronts"] == [9, 1]  # all but the one that a cheaper one beats
    assert seen["axis"] and seen["fewer"] == 10  # the search measured no speed
    assert seen["images"] == 0  # what stands in an error is text
    browse(page, f"--screenshot={sweep / 'page.png'}", "--window-size=1200,1100")
    assert (sweep / "page.png").stat().st_size > 20_000
