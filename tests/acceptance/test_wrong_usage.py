"""Wrong usage: one line that names the option, status 2, before anything is touched."""

from __future__ import annotations

import pytest

from tests.acceptance import product

DATABASE = ("--database", "sqlite:///prompts.db")
OUTPUT = ("--output", "pictures")


MISTAKES = [
    (OUTPUT, "--mongo-uri"),
    (DATABASE, "--output"),
    ((*DATABASE, *OUTPUT, "--scheduler", "eular"), "euler"),
    ((*DATABASE, *OUTPUT, "--batch-size", "0"), "--batch-size"),
    ((*DATABASE, *OUTPUT, "--batch_size=0"), "--batch-size"),
    ((*DATABASE, *OUTPUT, "--guidance-scale", "nan"), "--guidance-scale"),
    ((*DATABASE, *OUTPUT, "--width", "65"), "--width"),
    ((*DATABASE, *OUTPUT, "--device", "gpu"), "--device"),
    ((*DATABASE, *OUTPUT, "--dtype", "float16"), "--dtype"),
    ((*DATABASE, *OUTPUT, "--callback-url", "ftp://receiver"), "callback"),
    ((*DATABASE, *OUTPUT, "--callback-url", "http://127.0.0.1:9", "--callback-secret", "x"), "whsec_"),
    (("--mongo-uri", "mongodb://[half", *OUTPUT), "MongoDB URI"),
    (("--database", "postgres://here/it", *OUTPUT), "mongodb://"),
    (("--database", "sqlite:///a.db", "--mongo-uri", "mongodb://h", *OUTPUT), "--mongo-uri"),
    ((*DATABASE, "--output", "s4://bucket"), "s4://"),
    ((*DATABASE, "--output", "gs://"), "gs://"),
    ((*DATABASE, "--output", "s3://My_Bucket/p"), "s3://BUCKET"),
    (
        (*DATABASE, "--s3-bucket", "a-b", "--gcs-bucket", "a-b"),
        "--gcs-bucket (GCS_BUCKET) and --s3-bucket",
    ),
    ((*DATABASE, "--s3-bucket", "a-b", "--output", "p"), "--s3-bucket (S3_BUCKET) and --output"),
    ((*DATABASE, "--s3-bucket", "a-b", "--s3-endpoint", "minio:9000"), "--s3-endpoint"),
    ((*DATABASE, "--s3-bucket", "a-b", "--acl", "public"), "--acl"),
    ((*DATABASE, "--s3-bucket", "a-b", "--public-urls=perhaps"), "--public-urls"),
    ((*DATABASE, *OUTPUT, "--acl", "public-read"), "--acl"),
    ((*DATABASE, *OUTPUT, "--public-urls"), "--public-urls"),
    ((*DATABASE, *OUTPUT, "--no-such-flag"), "--no-such-flag"),
    (("frobnicate",), "frobnicate"),
    (("retry", *DATABASE, "--error-code", "bad_luck"), "--error-code"),
    (("enqueue", *DATABASE, "prompts.xyz"), ".jsonl"),
    ((*DATABASE, *OUTPUT, "--log-file", "/dev/null/run.log"), "--log-file"),
    ((*DATABASE, *OUTPUT, "--run-id", "../night"), "--run-id"),
    (("serve", *DATABASE, *OUTPUT, "--rabbitmq-host", "amqp://broker"), "--rabbitmq-url"),
    (("status", *DATABASE, "--plot", "last", "--plot-file", "plot.jpg"), ".png, .svg, .pdf, .txt"),
    (("status", *DATABASE, "--plot", "last", "--plot-file", "plot"), ".png, .svg, .pdf, .txt"),
    (
        (*DATABASE, *OUTPUT, "--image-format", "jpg"),
        "--image-format must be one of png, jpeg, webp; did",
    ),
    ((*DATABASE, *OUTPUT, "--image-quality", "0"), "--image-quality"),
    ((*DATABASE, *OUTPUT, "--signature-position", "top"), "--signature-position"),
    ((*DATABASE, *OUTPUT, "--signature-opacity", "256"), "--signature-opacity"),
    ((*DATABASE, *OUTPUT, "--artist-name", "Ana\nDíaz"), "--artist-name"),
    ((*DATABASE, *OUTPUT, "--signature-font", "no-such.ttf"), "no-such.ttf"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By the arguments of each mistake: the folder in which it was made, and the finished process."""
    folder = tmp_path_factory.mktemp("mistakes")
    finished = product.run_each([arguments for arguments, _ in MISTAKES], folder)
    return {each.args: (folder / str(number), each) for number, each in enumerate(finished)}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "named"),
    MISTAKES,
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, tuple) else "",
)
def test_wrong_usage_is_one_line_and_status_2(made, arguments, named):
    """Each mistake ends with status 2 and a single line that names it; nothing is created."""
    folder, finished = made[arguments]
    assert finished.returncode == 2, finished.stderr
    (line,) = product.errors(finished)
    assert named in line
    assert finished.stdout == ""
    assert list(folder.iterdir()) == []


def test_a_misspelt_flag_does_not_repeat_its_value(tmp_path):
    """The password behind a misspelt flag is not shown in the error."""
    finished = product.run("--mongo-url", "mongodb://me:pass-word@host/db", folder=tmp_path)
    assert finished.returncode == 2
    assert "did you mean --mongo-uri?" in finished.stderr
    assert "pass-word" not in finished.stderr + finished.stdout


def test_help_and_version(tmp_path):
    """``--help`` lists every command and ``run --help`` every flag with its variable; status 0."""
    top, run = product.run("--help", folder=tmp_path), product.run("run", "--help", folder=tmp_path)
    assert (top.returncode, run.returncode) == (0, 0)
    for command in ("run", "demo", "enqueue", "status", "retry", "doctor"):
        assert f"  {command} " in top.stdout
    assert "[GCS_BUCKET; default: –]" in " ".join(run.stdout.split())
    assert product.run("--version", folder=tmp_path).stdout.startswith("text2img ")


def test_the_flag_beats_the_environment_beats_the_files(tmp_path):
    """The flag wins, then the environment, then ``.env.local``, then ``.env``; an empty one is unset."""
    (tmp_path / ".env").write_text("BATCH_SIZE=-1\nSEED=-1\nLIMIT=-1\nDEVICE=env\n")
    (tmp_path / ".env.local").write_text("SEED=-2\nLIMIT=-2\nDEVICE=local\n")
    named = {"BATCH_SIZE": "-3", "LIMIT": "", "DEVICE": "cpu"}

    def complaint(*arguments, **variables):
        return product.errors(product.run(*arguments, folder=tmp_path, **variables))[0]

    assert "'-3'" in complaint("--limit", "1", **named)
    assert "'-4'" in complaint("--limit", "1", "--batch-size", "-4", **named)
    assert "--limit" in complaint("--batch-size", "1", **named)
    assert "'-2'" in complaint("--batch-size", "1", **named)


def test_a_secret_may_stand_in_a_file(tmp_path):
    """``<NAME>_FILE`` names a file that holds the secret; one that cannot be read is status 2."""
    (tmp_path / "uri").write_text("sqlite:///prompts.db\n")
    (tmp_path / "prompts.txt").write_text("a large red circle on a blue background\n")
    found = product.run("enqueue", "prompts.txt", folder=tmp_path, DATABASE_URL_FILE=str(tmp_path / "uri"))
    assert (found.returncode, found.stdout) == (0, "added 1 of 1 prompts; 0 were there already\n")
    missing = product.run("status", folder=tmp_path, DATABASE_URL_FILE="/no/such/file")
    assert missing.returncode == 2
    assert "DATABASE_URL_FILE" in missing.stderr
