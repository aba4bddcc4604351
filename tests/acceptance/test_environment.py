"""Variables and files that libraries read by themselves: a wrong one is named, before anything is claimed."""

from __future__ import annotations

import pytest

from tests.acceptance import product

RUN = ("run", "--database", "sqlite:///prompts.db", "--log-format", "text")
MONGO = "mongodb://127.0.0.1:9/db?tls=true&serverSelectionTimeoutMS=500"
AWS = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def folder(tmp_path):
    """A folder with a prompt, and a file that is no certificate."""
    product.add(tmp_path, "a cat")
    (tmp_path / "garbage.pem").write_text("garbage")
    return tmp_path


def refused(done, named: str) -> None:
    """Check that the process ended as by wrong usage, with one line that has this name."""
    assert done.returncode == 2, done.stderr
    assert named in done.stderr.splitlines()[-1]
    assert "unexpected" not in done.stderr


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("tlsCAFile=none.pem", "tlsCAFile in the MongoDB URI names 'none.pem'"),
        ("TLSCAFILE=%2Fnone.pem", "tlsCAFile in the MongoDB URI names '/none.pem'"),
        ("tlsCAFile=.", "tlsCAFile"),
        ("tlsCAFile=garbage.pem", "tlsCAFile 'garbage.pem'"),
        ("tlsCertificateKeyFile=none.pem", "tlsCertificateKeyFile"),
        ("tlsCRLFile=none.pem", "tlsCRLFile"),
    ],
)
def test_a_certificate_file_of_mongodb_s_is_named(folder, option, named) -> None:
    """One that is missing, a folder, or no certificate; the option's name is in the message."""
    refused(product.run("status", "--mongo-uri", f"{MONGO}&{option}", folder=folder), named)


@pytest.mark.parametrize("command", ["run", "doctor"])
@pytest.mark.parametrize(
    ("output", "variable", "value"),
    [
        ("--gcs-bucket", "STORAGE_EMULATOR_HOST", "localhost:4443"),
        ("--gcs-bucket", "STORAGE_EMULATOR_HOST", "//localhost:4443"),
        ("--gcs-bucket", "REQUESTS_CA_BUNDLE", "/none.pem"),
        ("--s3-bucket", "AWS_ENDPOINT_URL", "localhost:9000"),
        ("--s3-bucket", "AWS_ENDPOINT_URL_S3", "minio:9000"),
        ("--s3-bucket", "AWS_CA_BUNDLE", "/none.pem"),
    ],
)
def test_a_variable_of_a_storage_s_client_is_named(folder, command, output, variable, value) -> None:
    """The scheme that its URL lacks, or the certificates that are not there; also by doctor."""
    words = (command, *RUN[1:], output, "pictures-of-ours", "--model-id", str(product.MODEL))
    done = product.sleeping.run(*words, folder=folder, **{**AWS, variable: value})
    assert done.returncode == 2, done.stderr
    assert variable in done.stdout + done.stderr
    assert "unexpected" not in done.stderr


def test_a_variable_that_is_not_used_does_not_matter(folder) -> None:
    """Images go to a folder here: what is wrong with a bucket's variables is not this run's concern."""
    wrong = {"STORAGE_EMULATOR_HOST": "localhost:4443", "AWS_ENDPOINT_URL": "x", "AWS_CA_BUNDLE": "/none"}
    done = product.sleeping.run(*RUN, "--output", "pictures", folder=folder, **wrong)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["tcp://10.96.0.12:9090", "udp://[fd00::1]:53"])
def test_the_port_of_a_service_called_metrics_is_passed_over(folder, value) -> None:
    """Kubernetes sets METRICS_PORT beside a Service of that name: the server serves, and says so."""
    words = ("serve", *RUN[1:], "--output", "pictures", "--idle-exit", "0.2")
    done = product.sleeping.run(*words, folder=folder, METRICS_PORT=value)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("completed 1")
    assert f"METRICS_PORT is passed over: it is {value}" in done.stderr


def test_a_flag_that_is_no_port_is_wrong_usage(folder) -> None:
    """What the operator writes is not passed over, and neither is another form in the variable."""
    flag = product.run("serve", *RUN[1:], "--metrics-port", "tcp://10.96.0.12:9090", folder=folder)
    refused(flag, "--metrics-port")
    refused(product.run("serve", *RUN[1:], folder=folder, METRICS_PORT="http://x:y"), "METRICS_PORT")
