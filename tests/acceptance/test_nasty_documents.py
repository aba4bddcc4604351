"""The whole command over documents that nobody should have written, and ids that would like to be paths."""

from __future__ import annotations

from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, Regex, Timestamp
from pymongo import MongoClient

from tests.acceptance import product
from tests.acceptance.product import sleeping
from text2img.errors import ErrorCode

ODD = [
    None, True, -1, 0.5, float("nan"), float("inf"), 2**63 - 1, "", " ", "a\0b", "x" * 25_000, b"bytes",
    [], [None],
    {}, {"$gt": 1}, Decimal128("NaN"), Int64(7), Binary(b"", 5), Regex("("), Timestamp(1, 1), MinKey(),
    MaxKey(), Code("x"),
]  # fmt: skip
PATHS = [
    "..",
    "../../x",
    "/etc/x",
    "C:\\x",
    "a\0b",
    "x" * 10_000,
    "Cafe",
    "cafe",
    "café",
    "cafe\u0301",
    ".hidden",
    "a/b",
]


def test_a_run_over_nasty_documents_and_ids(tmp_path, mongodb_server, gcs_server):
    """Some 60 nasty documents: each is made or refused with its reason, every object within the prefix."""
    uri = f"{mongodb_server}/nasty"
    documents = [{"_id": f"text {n}", "text": value} for n, value in enumerate(ODD)]
    left = {"text": "a boat", "status": "processing"}
    odd = [value for value in ODD if value is not None]
    documents += [{**left, "_id": n, "width": value, "claim_number": value} for n, value in enumerate(odd)]
    documents += [{"_id": path, "text": "a large red circle on a blue background"} for path in PATHS]
    with MongoClient(uri) as client:
        database = client.get_default_database()
        database.datasets.insert_many(documents)
        finished = sleeping.run(
            "--mongo-uri", uri, "--gcs-bucket", gcs_server.bucket, "--model-id", str(product.MODEL),
            folder=tmp_path, STORAGE_EMULATOR_HOST=gcs_server.host,
        )  # fmt: skip
        found = list(database.datasets.find())
    assert finished.returncode == 3, finished.stderr
    assert "Traceback" not in finished.stderr
    assert {document["status"] for document in found} == {"completed", "error"}
    for document in found:
        if document["status"] == "error":
            assert document["error_code"] in {*ErrorCode}
            assert document["error"]
    urls = [document["image_url"] for document in found if document["_id"] in PATHS]
    assert len(set(urls)) == len(PATHS)
    assert all(url.startswith(f"gs://{gcs_server.bucket}/generated/") and url.count("/") == 4 for url in urls)


def test_no_id_leaves_the_folder(tmp_path, mongodb_server):
    """Ids that are paths, or differ by case or Unicode form alone, become files of one folder."""
    uri = f"{mongodb_server}/paths"
    with MongoClient(uri) as client:
        datasets = client.get_default_database().datasets
        datasets.insert_many(
            [{"_id": path, "text": "a large red circle on a blue background"} for path in PATHS]
        )
        finished = sleeping.run(
            "--mongo-uri", uri, "--output", "in/here", "--model-id", str(product.MODEL),
            folder=tmp_path,
        )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert len(list((tmp_path / "in" / "here").iterdir())) == len(PATHS)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["in"]
