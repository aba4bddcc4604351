"""What a few nights left behind, for reports: prompts that were made and that failed, runs, and pictures."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta

from PIL import Image

from tests.contract.database_suite import SqliteBackend
from text2img.databases import Collections, Run, open_database

BEGAN = datetime(2026, 5, 4, 1, tzinfo=UTC)
HOSTILE = "</script><script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
NEGATIVE = "<!--<script>blurry & \u2028 dark"
SAFETY = "the model's safety checker flagged the image"
USED = {"seed": 7, "num_inference_steps": 20, "guidance_scale": 3.0, "scheduler": "dpm++", "width": 128}


class Nights:
    """A database ``prompts.db`` and a folder ``pictures`` within ``folder``."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "pictures").mkdir()
        self.backend = SqliteBackend(folder)
        with closing(open_database(self.backend.url, Collections())) as database:
            for number, (name, pace, price) in enumerate((("monday", 1.5, None), ("tuesday", 3.0, 2.1))):
                database.runs.save_run(_run(name, BEGAN + timedelta(days=number), pace, price), 60)
            database.runs.save_run(
                Run(id="idle", started_at=BEGAN + timedelta(days=3), host="h", status="completed"), 60
            )

    def image(self, name, colour):
        path = self.folder / "pictures" / f"{name}.png"
        Image.new("RGB", (128, 128), colour).save(path)
        return str(path)

    def made(self, number, text, **fields):
        """A completed prompt; its picture is there unless ``image_url`` says otherwise."""
        url = fields.pop("image_url", None) or self.image(number, (number * 37 % 256, 90, 160))
        used = {**USED, "height": 128, "model": "shapes", **fields.pop("used", {})}
        common = {"run_id": "monday", "dataset_id": "spring", "completed_at": _at(number)}
        self._put(number, text, {"status": "completed", "image_url": url, "used": used, **common, **fields})

    def failed(self, number, text, code, message, **fields):
        error = {"error_code": code, "error": message, "error_at": _at(number), "attempts": 1}
        self._put(number, text, {"status": "error", "run_id": "monday", **error, **fields})

    def _put(self, number, text, fields):
        self.backend.put({"_id": number, "text": text, **fields})


def usual(folder):
    """Nine completed prompts of two runs, one of each kind that a report shows, and four that failed."""
    nights = Nights(folder)
    nights.made(1, "a red boat", score=0.25, evaluation={"evaluator": "eye", "missing": ["boat"]})
    nights.made(2, "a blue boat", score=0.75, used={"model": {"odd": [None]}, "width": "wide"})
    nights.made(3, "a green hill", run_id="tuesday", used={"model": "other"})
    several = [nights.image(f"4~{place}", (200, 50 * place, 0)) for place in range(3)]
    nights.made(4, "four hills", image_url=several[0], image_urls=several, dataset_id="autumn")
    nights.made(5, HOSTILE, used={"negative_prompt": NEGATIVE, "scheduler": HOSTILE}, run_id=HOSTILE)
    nights.made(6, "a picture that is gone", image_url=str(folder / "pictures" / "gone.png"))
    nights.made(7, "a picture that is none", image_url="javascript:window.hit=3")
    (folder / "pictures" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    nights.made(8, "a torn picture", image_url=str(folder / "pictures" / "torn.png"))
    tries = [
        {
            "iteration": 1,
            "prompt": "a star",
            "seed": 1,
            "image_url": nights.image("9~1", "red"),
            "score": 0.5,
        },
        {"iteration": 2, "prompt": "a yellow star", "image_url": nights.image("9", "gold"), "score": 1.0},
    ]
    best = {"image_url": tries[1]["image_url"], "score": 1.0, "run_id": "tuesday"}
    nights.made(9, "a star", iterations=2, tries=[tries[0], {**tries[1], "best": True}], **best)
    nights.failed(10, "a dark cellar", "safety", SAFETY)
    nights.failed(11, "a darker cellar", "safety", SAFETY, dataset_id="autumn")
    nights.failed(12, "", "invalid_prompt", "the text is empty")
    nights.failed(13, "a tall tower", "invalid_parameters", f"height: {HOSTILE}")
    return nights


def _run(name, began, pace, price):
    return Run(
        id=name, started_at=began, finished_at=began + timedelta(minutes=5), host="h", status="completed",
        model="shapes", completed=5, failed=2, images=7, images_per_second=pace, device_busy=0.9,
        gpu_hour_price=price, seconds={"load": 12.0, "denoise": 200.0, "decode": 20.0, "encode": 9.0},
    )  # fmt: skip


def _at(number):
    return (BEGAN + timedelta(minutes=number)).isoformat()
