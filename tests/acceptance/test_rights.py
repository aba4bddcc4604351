"""The job with the rights that deploy/ gives it, and not one more: none is missing, and none is to spare."""

from __future__ import annotations

from dataclasses import replace

import pytest
import requests
import yaml
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.servers.models import Depot
from tests.servers.rights import gcs_with_rights, mongodb_with_role

DEPLOY = product.ROOT / "deploy"
TEXT = "a large red circle on a yellow background"


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text().replace("${DATABASE}", "art"))


def test_the_rights_of_deploy_are_what_a_fleet_needs(tmp_path, gcs_server):
    """doctor, enqueue, a run that tells, a retry that replaces a picture, and status: all by an account with
    the roles of deploy/, on MongoDB and both buckets; each right is used, and the account can drop nothing.
    """
    requests.post(f"{gcs_server.host}/storage/v1/b", json={"name": "models"}, timeout=10)
    rights = {
        gcs_server.bucket: set(read("google/pictures-role.yaml")["includedPermissions"]),
        "models": set(read("google/models-role.yaml")["includedPermissions"]),
    }
    with (
        gcs_with_rights(gcs_server, rights) as tap,
        mongodb_with_role(tmp_path / "mongodb", "art", read("mongodb/role.yaml")) as (owner, account),
    ):
        depot = Depot("gs", replace(gcs_server, bucket="models"), tap)
        job = ("--gcs-bucket", gcs_server.bucket, "--model-id", depot.url)
        told = ("--callback-url", "http://127.0.0.1:9/", "--callback-patience", "0")

        def do(*arguments, status=0, **more):
            variables = {"MONGO_URI": account, "DEVICE": "cpu", "STORAGE_EMULATOR_HOST": tap.url, **more}
            done = sleeping.run(*arguments, folder=tmp_path, **variables)
            assert done.returncode == status, done.stdout + done.stderr
            return done.stdout

        (tmp_path / "prompts.txt").write_text(TEXT)
        assert "added 1 of 1" in do("enqueue", "prompts.txt")
        assert "is writable" in do("doctor", *job)
        assert do("run", *job, *told).startswith("completed 1, failed 0")
        with MongoClient(owner, uuidRepresentation="standard") as client:
            client.art.datasets.update_many({}, {"$set": {"status": "error", "seed": 9}})
        assert "1 " in do("retry")
        assert do("run", *job, *told).startswith("completed 1, failed 0"), "the other picture is replaced"
        assert "completed" in do("status")
        with MongoClient(account) as client, pytest.raises(OperationFailure, match="not authorized"):
            client.art.datasets.drop()
        assert {bucket: tap.used[bucket] for bucket in rights} == rights
