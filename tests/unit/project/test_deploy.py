"""deploy/: each manifest by its platform's own schema, and all of them against what the job really is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from google.cloud import batch_v1, run_v2, scheduler_v1
from google.protobuf import json_format

from tests.unit.project.test_container import arguments, environment
from tests.unit.project.test_pages import table
from text2img import cli
from text2img.settings import options
from text2img.settings.loader import load
from text2img.worker.watchdog import GRACE

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
GUIDE = (ROOT / "docs" / "deploy.md").read_text()
KUBERNETES = sorted(f"kubernetes/{path.name}" for path in (DEPLOY / "kubernetes").glob("*.yaml"))
FOREIGN = {"HF_HUB_OFFLINE"}
"""Variables that are other programs', which the job's libraries read."""


FILLED = {
    "PROJECT": "my-project",
    "REGION": "europe-west4",
    "REGISTRY": "europe-west4-docker.pkg.dev/my-project/images",
    "DIGEST": "0123456789abcdef" * 4,
    "PICTURES": "pictures",
    "MODELS": "models",
    "NETWORK": "art",
    "SUBNETWORK": "art-west",
    "MONGODB_CIDR": "10.20.0.0/28",
    "DATABASE": "art",
}


def read(name):
    """The document, its placeholders filled in as envsubst does."""
    text = re.sub(r"\$\{(\w+)\}", lambda found: FILLED[found[1]], (DEPLOY / name).read_text())
    return yaml.safe_load(text)


def job():
    return read("kubernetes/job.yaml")["spec"]


def pod():
    return job()["template"]["spec"]


def container(platform):
    """The job's container on each platform."""
    if platform == "kubernetes":
        return pod()["containers"][0]
    if platform == "cloud-run":
        return read("cloud-run/job.yaml")["template"]["template"]["containers"][0]
    return read("batch/job.yaml")["taskGroups"][0]["taskSpec"]["runnables"][0]["container"]


def variables(platform):
    """What the container finds in its environment; secrets from the store count as text."""
    if platform == "batch":
        found = read("batch/job.yaml")["taskGroups"][0]["taskSpec"]["environment"]
        return {**found["variables"], **found["secretVariables"]}
    return {each["name"]: each.get("value", "from the store") for each in container(platform)["env"]}


def secret_names(platform):
    """Those of them that come from the platform's store."""
    if platform == "batch":
        return set(read("batch/job.yaml")["taskGroups"][0]["taskSpec"]["environment"]["secretVariables"])
    return {
        each["name"] for each in container(platform)["env"] if "valueSource" in each or "valueFrom" in each
    }


platforms = pytest.mark.parametrize("platform", ["kubernetes", "cloud-run", "batch"])


@pytest.mark.parametrize("version", ["1.31", "1.37"])
@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_schema(name, version):
    """Every manifest fits Kubernetes' own schema, strictly: a field that is misspelt would not."""
    document = read(name)
    kubernetes_validate.validate(document, version, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**document, "sepc": {}}, version, strict=True)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("cloud-run/job.yaml", run_v2.Job),
        ("cloud-run/scheduler.yaml", scheduler_v1.Job),
        ("batch/job.yaml", batch_v1.Job),
    ],
)
def test_google_schema(file, message):
    """Every field is one of the message that the platform's API takes, of its type."""
    document = read(file)
    message.from_json(json.dumps(document), ignore_unknown_fields=False)
    with pytest.raises(json_format.ParseError):
        message.from_json(json.dumps({**document, "taskGruops": []}), ignore_unknown_fields=False)


def test_the_cron_job_is_the_job():
    """Whoever changes one of the two changes the other."""
    assert read("kubernetes/cronjob.yaml")["spec"]["jobTemplate"]["spec"] == job()


def again():
    """Return for each exit status in docs/errors.md whether it is worth another try."""
    rows = table("docs/errors.md", "## Exit status", "Errors are one line")
    return {
        int(number): row[2].startswith("yes")
        for row in rows
        for number in row[0].split(", ")
        if number != "0"
    }


def kubernetes_decision(status):
    for rule in job()["podFailurePolicy"]["rules"]:
        asked = rule.get("onExitCodes")
        if asked and (status in asked["values"]) == (asked["operator"] == "In"):
            return rule["action"] == "Count"
    return True  # counted, and tried again


def batch_decision(status):
    (policy,) = read("batch/job.yaml")["taskGroups"][0]["taskSpec"]["lifecyclePolicies"]
    assert policy["action"] == "FAIL_TASK"
    return status not in policy["actionCondition"]["exitCodes"]


@pytest.mark.parametrize("decision", [kubernetes_decision, batch_decision])
def test_exit_statuses_are_mapped_to_retries(decision):
    """What docs/errors.md calls worth another try is tried again, and nothing else; a killed process is."""
    assert set(again()) == {1, 2, 3, 130, 143}
    assert {status: decision(status) for status in again()} == again()
    assert decision(137)


def test_the_job_s_fields_go_together():
    """What the documentation of the fields asks of them together, and a schema cannot: a failure policy wants
    pods that are never restarted, and replaced only once they have failed; FailIndex wants a limit an index.
    """
    spec, rules = job(), job()["podFailurePolicy"]["rules"]
    assert pod()["restartPolicy"] == "Never"
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["completionMode"] == "Indexed"
    assert "FailIndex" in {rule["action"] for rule in rules}
    assert spec["backoffLimitPerIndex"] > 0
    names = {each["name"] for each in pod()["containers"]}
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} <= names
    assert all(("onExitCodes" in rule) != ("onPodConditions" in rule) for rule in rules)
    mounted = {mount["name"] for mount in container("kubernetes")["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod()["volumes"]}


def test_what_is_drained_is_not_blamed():
    """A pod that is drained ends with 143: the rule that ignores it must come first."""
    first = job()["podFailurePolicy"]["rules"][0]
    assert (first["action"], first["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")


@platforms
def test_variables_are_the_job_s(platform):
    """Every variable is one that the settings read, and the settings take them all together."""
    known = {option.variable for option in options()}
    files = {f"{option.variable}_FILE" for option in options() if option.secret}
    assert set(variables(platform)) <= known | files | FOREIGN


@platforms
def test_the_settings_take_them(platform, monkeypatch, tmp_path):
    """The environment as it stands, with its placeholders filled in, is a configuration without a fault."""
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "mongo-uri"
    secret.write_text("mongodb://db.internal/art")
    for name, value in variables(platform).items():
        monkeypatch.setenv(name, str(secret) if name.endswith("_FILE") else value)
    settings = load({})
    assert settings.database_url
    assert settings.output_url == "gs://pictures/generated"
    assert settings.model_id == "gs://models/sd15"


@platforms
def test_arguments_are_the_command_line_s(platform):
    """Commands and flags are those that there are."""
    words = container(platform).get("args") or container(platform)["commands"]
    assert cli._parse(words).command == "run"


@platforms
def test_secrets_come_from_the_store(platform):
    """No secret stands in a manifest; each comes from the platform's store, or from a file that it mounts."""
    secrets = {option.variable for option in options() if option.secret}
    given = set(variables(platform))
    assert given & secrets == secret_names(platform) & secrets
    assert (given & secrets) or (given & {f"{name}_FILE" for name in secrets})
    for path in DEPLOY.rglob("*.yaml"):
        assert not re.search(r"mongodb(\+srv)?://|whsec_|AKIA", path.read_text()), path


@platforms
def test_images_are_pinned_by_digest(platform):
    """No tag, which could be another image tomorrow."""
    image = container(platform).get("image") or container(platform)["imageUri"]
    assert re.search("@sha256:[0-9a-f]{64}$", image)


def test_the_pod_has_no_privileges():
    """Not root but the image's user, nothing to gain, a root file system that it cannot write, no token."""
    user = int(arguments("USER")[-1].split(":")[0])
    assert (pod()["securityContext"]["runAsNonRoot"], pod()["securityContext"]["runAsUser"]) == (True, user)
    assert container("kubernetes")["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False
    assert read("kubernetes/service-account.yaml")["automountServiceAccountToken"] is False
    options_of_batch = container("batch")["options"].split()
    assert {"--read-only", "--cap-drop", "no-new-privileges"} <= set(options_of_batch)
    assert "--privileged" not in options_of_batch


@platforms
def test_what_the_image_writes_is_mounted(platform):
    """Every folder that the image's environment names for writing lies in a volume, and so does /tmp where
    the root file system is read-only.
    """
    found = container(platform)
    mounts = [each.split(":")[1] for each in found["volumes"]] if platform == "batch" else []
    mounts = mounts or [each["mountPath"] for each in found["volumeMounts"]]
    written = {value for value in environment().values() if value.startswith("/cache")}
    assert written
    assert all(
        any(folder == mount or folder.startswith(f"{mount}/") for mount in mounts) for folder in written
    )
    assert platform != "kubernetes" or "/tmp" in mounts  # noqa: S108 - the container's
    assert platform != "batch" or "--tmpfs /tmp" in found["options"]


def test_there_is_time_to_stop():
    """Each platform waits longer before it kills than a run takes: eight seconds."""
    takes = GRACE + 3
    assert pod()["terminationGracePeriodSeconds"] > takes
    assert int(re.search(r"--stop-timeout (\d+)", container("batch")["options"])[1]) > takes
    assert takes < 10, "what Cloud Run grants, and cannot be told"


@platforms
def test_one_gpu_a_task(platform):
    """A process drives one GPU, and so each task asks for one."""
    if platform == "batch":
        assert read("batch/job.yaml")["allocationPolicy"]["instances"][0]["policy"]["machineType"].startswith(
            "g2-"
        )
        assert read("batch/job.yaml")["taskGroups"][0]["taskCountPerNode"] == 1
    else:
        assert container(platform)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_network_is_closed():
    """The policy is about the job's pods, lets nobody in, and names every network that it lets them reach."""
    policy = read("kubernetes/network-policy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= job()["template"]["metadata"]["labels"].items()
    assert (set(policy["policyTypes"]), policy["ingress"]) == ({"Ingress", "Egress"}, [])
    for rule in policy["egress"]:
        assert rule["ports"], "every rule names its ports"
        for to in rule["to"]:
            assert to.get("ipBlock", {}).get("cidr", "") != "0.0.0.0/0"
            assert to.get("ipBlock") or to.get("podSelector")
    access = read("cloud-run/job.yaml")["template"]["template"]["vpcAccess"]
    assert access["egress"] == "ALL_TRAFFIC"
    (network,) = read("batch/job.yaml")["allocationPolicy"]["network"]["networkInterfaces"]
    assert network["noExternalIpAddress"]
    tags = (*access["networkInterfaces"][0]["tags"], *read("batch/job.yaml")["allocationPolicy"]["tags"])
    assert set(tags) == {"text2img"}
    assert "--target-tags=text2img" in GUIDE


def test_rights_are_the_least():
    """Pictures can be created, compared and replaced, but not listed; models only looked at."""
    assert set(read("google/pictures-role.yaml")["includedPermissions"]) == {
        f"storage.objects.{right}" for right in ("create", "get", "delete")
    }
    assert set(read("google/models-role.yaml")["includedPermissions"]) == {
        f"storage.objects.{right}" for right in ("list", "get")
    }


def test_every_placeholder_is_explained():
    """What envsubst fills in stands in the guide's table, and nothing else stands there."""
    used = {name for path in DEPLOY.rglob("*.yaml") for name in re.findall(r"\$\{(\w+)\}", path.read_text())}
    explained = set(
        re.findall(r"^\| `(\w+)` \|", GUIDE.split("## Placeholders")[1].split("\n## ")[0], re.MULTILINE)
    )
    assert used == explained == set(FILLED)


def test_the_guide_names_every_file():
    """Each file of deploy/ has its place in the walk-throughs."""
    for path in DEPLOY.rglob("*.yaml"):
        assert f"deploy/{path.relative_to(DEPLOY)}" in GUIDE, path
