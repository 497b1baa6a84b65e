"""The report: what it holds, whether it needs anything else, and, where Chromium is installed, what a click does."""

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from retina_seg.analysis import report
from retina_seg.images import read_image, write_image
from retina_seg.utils import write_json

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


def write(folder) -> dict:
    """A report of three images in `folder`; its data."""
    base = {"input": "/in", "made_with": "general c0e3", "gradable": "yes", "remark": "", "status": "ok"}
    rows = [base | {"name": f"a/{i}", "width": 60, "area_pct": 10.0 - i} for i in range(3)]
    rows[1] |= {"remark": "dark </script><b>", "gradable": "no"}
    rows[2] |= {"area_pct": None, "gradable": None, "status": "cannot be decoded"}
    write_json(folder / "summary.json", rows)
    (folder / "a").mkdir()
    for i in range(2):
        write_image(folder / f"a/{i}_preview.jpg", np.full((40, 120, 3), 90, np.uint8))
    page = report.write_report(folder, {"threads": 2, "packages": {"torch": "2"}}).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"?http|@import|url\(", page)  # needs no network
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_report_holds_rows_pictures_and_settings(tmp_path):
    data = write(tmp_path)
    assert [row["name"] for row in data["rows"]] == ["a/0", "a/1", "a/2"]
    assert data["counts"] == "3 images, 1 gradable: yes, 1 gradable: no"
    assert data["settings"] == {"made with": "general c0e3", "threads": 2, "packages": {"torch": "2"}}
    assert [column["name"] for column in data["columns"] if column["number"]] == ["width", "area_pct"]
    head, picture = data["rows"][0]["preview"].split(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(picture) == (tmp_path / "a/0_preview.jpg").read_bytes()
    assert data["rows"][2]["preview"] is None and data["rows"][2]["area_pct"] is None


def test_pictures_of_many_images_stay_beside_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "EMBEDDED", 2)
    assert write(tmp_path)["rows"][0]["preview"] == "a/0_preview.jpg"
    assert read_image(tmp_path / "a/0_preview.jpg").shape == (40, 120, 3)


CLICKS = """<script>
const names = () => [...document.querySelectorAll("tbody tr")].map(tr => tr.cells[1].textContent).join(), log = [names()];
const act = (change) => { change(); log.push(names()); };
const type = (id, value) => { get(id).value = value; get(id).oninput(); };
act(() => document.querySelector("th[data-name=area_pct] button").click());
act(() => document.querySelector("th[data-name=area_pct] button").click());
act(() => type("search", "DARK"));
act(() => type("search", ""));
act(() => type("grade", "yes"));
act(() => get("reset").click());
act(() => document.querySelector("#charts rect:last-of-type").dispatchEvent(new Event("click")));
document.querySelector(".picture").click();
log.push(document.querySelector("dialog").open, document.querySelectorAll("tbody b").length);
document.title = JSON.stringify(log);
</script>"""


@pytest.mark.skipif(not BROWSER, reason="Chromium is not installed")
def test_a_browser_sorts_filters_and_enlarges(tmp_path):
    write(tmp_path)
    page = tmp_path / "report.html"
    page.write_text(page.read_text(encoding="utf-8") + CLICKS, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    log = json.loads(re.search("<title>(.*?)</title>", dom)[1])
    first, up, down, dark, no_search, yes, reset, bar, opened, markup = log
    assert (first, reset) == ("a/0,a/1,a/2",) * 2
    assert (up, down) == ("a/1,a/0,a/2", "a/0,a/1,a/2")  # an undefined measure comes last either way
    assert (dark, no_search) == ("a/1", "a/0,a/1,a/2")
    assert (yes, bar) == ("a/0", "a/0")
    assert opened and markup == 0  # what a remark holds is text, not markup
