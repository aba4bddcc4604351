"""Folders that were moved with their database and images, or mounted elsewhere."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing

from tests.acceptance import product
from tests.finished import finished_run

PROMPTS = {"a": ("a boat", 40), "b": ("a house", 90)}


def _items(page):
    parts = page.read_text().split('<script type="application/json" class="items">')[1:]
    return {item["id"]: item for part in parts for item in json.loads(part.split("</script>")[0])}


def test_report_and_compare_find_images_that_were_moved(tmp_path):
    """Below the database's own folder, each side of a comparison in its own, also where both files have the
    same name; links of the page lead there. What stands in the database stays as it is.
    """
    for name in ("one", "two"):
        (tmp_path / "old" / name).mkdir(parents=True)
        url = f"sqlite:///{tmp_path}/old/{name}/text2img.db"
        run = "b" if name == "two" else "a"
        finished_run(url, str(tmp_path / "old" / name / "results" / "deep"), run, PROMPTS)
    (tmp_path / "old").rename(tmp_path / "new")
    one, two = tmp_path / "new" / "one", tmp_path / "new" / "two"
    (two / "results" / "deep" / "b.png").unlink()
    reports = [
        ("report", "--database", f"sqlite:///{one}/text2img.db"),
        ("report", "--output-dir", str(one)),
    ]
    compared = ("compare", str(one), str(two), "--json", "-")
    pages = ("compare", str(one), str(two), "--html", "page.html")
    each = product.run_each([*reports, compared, pages], tmp_path)
    for number, finished in enumerate(each):
        assert finished.returncode == 0, finished.stderr
        if number < len(reports):
            assert "unreadable" not in finished.stdout
            for item in _items(tmp_path / str(number) / "report.html").values():
                (picture,) = item["pictures"]
                assert (tmp_path / str(number) / picture["href"]).resolve() == one / "results/deep" / (
                    f"{item['id']}.png"
                )
                assert picture["url"].startswith(f"{tmp_path}/old/")
    pairs = json.loads(each[2].stdout)["pairs"]
    by_id = {pair["prompt_id"]: pair for pair in pairs}
    assert 0 < by_id["a"]["ssim"] < 1
    assert by_id["a"]["a"]["image_url"].startswith(f"{tmp_path}/old/")
    assert (by_id["b"]["ssim"], "cannot be read" in by_id["b"]["note"]) == (None, True)
    assert re.search(r"new/one/results/deep/a\.png", (tmp_path / "3" / "page.html").read_text())
    with closing(sqlite3.connect(one / "text2img.db")) as database:
        urls = [row[0] for row in database.execute("SELECT image_url FROM datasets")]
    assert all(url.startswith(f"{tmp_path}/old/one/") for url in urls)
