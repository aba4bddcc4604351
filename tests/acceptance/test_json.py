"""``--json``: one document on standard output, as docs/output.schema.json describes it, and nothing else."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing

import jsonschema
import pytest
from PIL import Image

from tests.acceptance import product
from tests.acceptance.test_command_line import SLOW

SCHEMA = json.loads((product.ROOT / "docs" / "output.schema.json").read_text(encoding="utf-8"))
EVIL = '\x1b[31m\u202e\n\u2028"'
SECRET = "sesame-open"
PROMPTS = [{"id": 7, "text": "a cat"}, {"id": "7", "text": "a dog"}, {"id": f"id{EVIL}", "text": "a boat"}]


def document(text: str, kind: str) -> dict:
    """Return the only line of a text, as a document of that kind; strict readers of JSON take it."""
    (line,) = text.splitlines()
    assert line.isascii()
    found = json.loads(line, parse_constant=pytest.fail)
    json.dumps(found, ensure_ascii=False).encode()  # no half of a surrogate pair
    jsonschema.validate(found, {"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder whose database holds prompts, one that cannot be made, and what other programs wrote."""
    place = tmp_path_factory.mktemp("json")
    product.add(place, *PROMPTS)
    with closing(sqlite3.connect(place / "prompts.db")) as database, database:
        insert = "insert into datasets(_id, text, status, error_code, scheduler) values (?, ?, ?, ?, ?)"
        database.execute(insert, ("wrong", "x", None, None, f"eular{EVIL}"))
        database.execute(insert, ("failed", "x", "error", f"code{EVIL}", None))
        run = "insert into runs(_id, started_at, status, images_per_second, seconds) values (?, ?, ?, ?, ?)"
        seconds = '{"load": NaN, "denoise": 1e999, "decode": "\\ud83d"}'
        database.execute(run, (f"run{EVIL}", "2026-01-01T00:00:00Z", f"done{EVIL}", float("inf"), seconds))
    (place / "new.txt").write_text("a hat\na dog\n")
    Image.new("RGB", (8, 8)).save(place / "plain.png")
    (place / "broken.jsonl").write_text('{"text": "a hat", "sead": 1}\n{"text": 7}\n')
    return place


JOB = ("--output", "images", "--model-id", str(product.MODEL))
CASES = {
    "dry run": (("run", "--dry-run", *JOB, "--json"), "plan", 0),
    "the default command": (("--dry-run", *JOB, "--json"), "plan", 0),
    "status": (("status", "--json"), "status", 0),
    "plot": (("status", "--plot", "last", "--json"), "plot", 0),
    "plot file": (("status", "--plot", "last", "--plot-file", "plot.svg", "--json"), "plot", 0),
    "enqueue": (("enqueue", "{folder}/new.txt", "--json"), "enqueue", 0),
    "retry": (("retry", "--error-code", "safety", "--json"), "retry", 0),
    "retry callbacks": (("retry", "--callbacks", "--json"), "retry", 0),
    "a file's changes": (("run", "--dry-run", "--input-file", "{folder}/new.txt", *JOB, "--json"), "plan", 0),
    "verify": (("verify", "{folder}/plain.png", "{folder}/new.txt", "--json"), "verify", 3),
    "verify nothing": (("verify", "--json"), "failure", 2),
    "doctor": (("doctor", "--device", "cpu", *JOB, "--json"), "doctor", 0),
    "doctor fails": (("doctor", "--output", "/dev/null/x", *JOB[2:], "--json"), "doctor", 1),
    "a wrong file": (("enqueue", "{folder}/broken.jsonl", "--json"), "failure", 2),
    "no such file": (("enqueue", "none.txt", "--json"), "failure", 2),
    "a wrong flag": (("status", "--limits", "--json"), "failure", 2),
    "a wrong value": (("run", "--json", *JOB, "--batch-size", "0"), "failure", 2),
    "no such command": (("statsu", "--json"), "failure", 2),
    "an operand is missing": (("enqueue", "--json"), "failure", 2),
    "no such run": (("status", "--plot", EVIL, "--json"), "failure", 2),
    "no output": (("run", "--json"), "failure", 2),
    "no database": (("status", "--json", "--database", "sqlite:///none.db"), "failure", 2),
    "no database file": (("status", "--json", "--database", "sqlite:///{folder}/new.txt"), "failure", 1),
    "a password": (
        ("status", "--json", "--mongo-uri", f"mongodb://me:{SECRET}@h/?tls=true&tlsCAFile={SECRET}"),
        "failure",
        2,
    ),
}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The finished process of each case, by its name."""
    commands = [[word.format(folder=folder) if "{folder}" in word else word for word in words]
                for words, _, _ in CASES.values()]  # fmt: skip
    url = f"sqlite:///{folder}/prompts.db"
    done = product.run_each(commands, tmp_path_factory.mktemp("cases"), DATABASE_URL=url)
    return dict(zip(CASES, done, strict=True))


@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
def test_a_command_prints_one_document(finished, name) -> None:
    """Whatever a document holds and whatever is wrong; the exit status is the same as without ``--json``."""
    _, kind, status = CASES[name]
    done = finished[name]
    assert done.returncode == status, done.stderr
    assert document(done.stdout, kind)["status"] == status
    assert SECRET not in done.stdout + done.stderr


def test_a_plan_tells_ids_of_different_types_apart(finished) -> None:
    """The number 7 and the text 7 are two prompts; what would fail is named with its code."""
    plan = document(finished["dry run"].stdout, "plan")
    planned = [image["prompt_id"] for batch in plan["batches"] for image in batch["images"]]
    assert planned[:3] == [7, "7", f"id{EVIL}"]
    assert [(error["prompt_id"], error["error_code"]) for error in plan["errors"]] == [
        ("wrong", "invalid_parameters")
    ]


def test_a_plan_counts_what_a_file_changes(finished) -> None:
    """Prompts of the input file that would be added, made again and removed."""
    plan = document(finished["a file's changes"].stdout, "plan")
    assert plan["input_file"]["changed"] == plan["input_file"]["removed"] == 0
    assert "input_file" not in document(finished["dry run"].stdout, "plan")


def test_doctor_names_keys_that_nothing_uses(tmp_path) -> None:
    """A key without the option that uses it: a line, and the status stays 0; with it, no line."""
    keys = {"GEMINI_API_KEY": "g", "FAL_KEY": "f", "INTERNAL_API_TOKEN": "t"}
    product.add(tmp_path, "a cat")
    words = ("doctor", "--device", "cpu", "--database", f"sqlite:///{tmp_path}/prompts.db", *JOB)
    unused, used = product.run_each(
        [(*words, "--json"), (*words, "--webhook-host", "127.0.0.1")], tmp_path, **keys
    )
    checks = {check["name"]: check["message"] for check in document(unused.stdout, "doctor")["checks"]}
    assert unused.returncode == 0
    for name, option in (
        ("GEMINI_API_KEY", "--evaluator gemini"),
        ("FAL_AI_API_KEY", "--generator fal:MODEL"),
        ("INTERNAL_API_TOKEN", "--webhook-host"),
    ):
        assert f"{name} has no effect without" in checks["keys"]
        assert option in checks["keys"]
    assert "INTERNAL_API_TOKEN" not in used.stdout


def test_a_run_prints_its_counts(tmp_path) -> None:
    """The figures of the last line under their names; status 3 as there, since a prompt failed."""
    product.add(tmp_path, "a cat", "a dog")
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("insert into datasets(_id, text) values ('empty', '')")
    words = ("run", "--database", "sqlite:///prompts.db", "--output", "images", "--json")
    done = product.sleeping.run(*words, folder=tmp_path)
    assert done.returncode == 3, done.stderr
    result = document(done.stdout, "run")
    assert (result["status"], result["completed"], result["failed"], result["remaining"]) == (3, 2, 1, 0)
    assert result["errors"] == {"invalid_prompt": 1}
    assert result["images_per_second"] > 0
    assert result["output"] == "images"


def test_a_run_that_is_stopped_prints_a_failure(tmp_path) -> None:
    """SIGTERM while a prompt is on the device: status 143 and one document."""
    product.add(tmp_path, "hold")
    words = ("run", "--database", "sqlite:///prompts.db", "--output", "images", "--json")
    with product.sleeping.running(*words, folder=tmp_path) as process:
        while "loaded" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=product.HANG)
    assert process.returncode == 143
    assert document(output, "failure")["error"].startswith("stopped by signal 15")


def test_watch_prints_one_document_a_line(folder) -> None:
    """Each line is a document of its own; Ctrl-C ends it with a failure's, status 130."""
    words = ("status", "--watch", "0.1", "--json", "--database", "sqlite:///prompts.db")
    with product.sleeping.running(*words, folder=folder) as process:
        first, second = (document(process.stdout.readline(), "status") for _ in range(2))
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=product.HANG)
    assert first["time"] < second["time"]
    assert process.returncode == 130
    assert document(rest.splitlines()[-1], "failure")["status"] == 130
    assert errors.splitlines() == ["text2img: stopped by signal 2"]


@pytest.mark.parametrize("place", ["text2img.telemetry.terminal", "unicodedata", "the end"])
def test_a_signal_leaves_one_document(tmp_path, place) -> None:
    """While it imports, a failure; once the result is printed, nothing more."""
    product.add(tmp_path, "a cat")
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(name=place))
    words = ("status", "--database", "sqlite:///prompts.db", "--json")
    with product.running(*words, folder=tmp_path, PYTHONPATH=str(tmp_path)) as process:
        lines = []
        while not lines or lines[-1] != "now\n":
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=product.HANG)
    assert process.returncode == 130
    document("".join([*lines[:-1], rest]), "status" if place == "the end" else "failure")
    assert errors == "text2img: stopped by signal 2\n"
