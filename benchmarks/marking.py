"""What marks cost: encoding plain, with XMP and with a C2PA manifest, and the job's pace with and without.

Encoding is timed in one thread of this process, by its processor's clock. The pace is that of jobs with an
engine that costs nothing, SQLite and a folder, in pairs: each has one job with manifests and one without.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from PIL import Image

from benchmarks.job import apart, run_job
from benchmarks.places import places
from benchmarks.results import RESULTS, Check, Result, report
from benchmarks.stub import StubEngine, pictures
from text2img.images import FORMATS, Marking, encode
from text2img.images.provenance import ManifestSigner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.places import Place

SIDES = (512, 1024)
PARAMETERS = {"prompt": "a boat on a lake, " * 10, "seed": 7, "model": "owner/model", "software": "text2img"}
_XMP_TARGET = 1.05  # encoding with XMP, in encodings without
_PACE_TARGET = 0.9  # images/s with manifests, in those without, where the engine costs nothing


def credentials(folder: Path) -> tuple[str, str]:
    """Make a chain and a P-256 key in the folder; return the paths."""
    from tests.marks import Authority, key_pem

    chain, key = folder / "chain.pem", folder / "key.pem"
    chain.write_text(Authority().chain())
    key.write_text(key_pem("p256"))
    return str(chain), str(key)


def encodings(signer: ManifestSigner, rounds: int) -> list[dict[str, Any]]:
    """The median of the times for each format and size: plain, with XMP, with XMP and a manifest."""
    return [_encoding(signer, kind, side, rounds) for side in SIDES for kind in FORMATS]


def _encoding(signer: ManifestSigner, kind: str, side: int, rounds: int) -> dict[str, Any]:
    images = [Image.fromarray(pixels) for pixels in pictures(side)[:4]]
    file_format, text = FORMATS[kind], "{}"
    signed = encode(images[0], {}, file_format, None)

    def plain(image: Image.Image) -> object:
        return file_format.write(image, text, b"", None)

    def marked(image: Image.Image) -> object:
        return encode(image, PARAMETERS, file_format, None)

    def sign(image: Image.Image) -> object:
        del image
        return signer.sign(signed, file_format.content_type, text)

    times: dict[str, list[float]] = {"plain": [], "marked": [], "sign": []}
    for _ in range(rounds):
        for image in images:
            for name, each in (("plain", plain), ("marked", marked), ("sign", sign)):
                times[name].append(_seconds(each, image))
    xmp = [_seconds(lambda _: Marking().xmp(PARAMETERS), images[0]) for _ in range(100)]
    return {
        "format": kind,
        "pixels": f"{side}²",
        "plain, ms": round(1000 * median(times["plain"]), 2),
        "with XMP, ms": round(1000 * median(times["marked"]), 2),
        "XMP alone, ms": round(1000 * median(xmp), 3),
        "signing, ms": round(1000 * median(times["sign"]), 2),
        "XMP ÷ plain": round(median(times["marked"]) / median(times["plain"]), 3),
    }


def _seconds(action: Callable[[Image.Image], object], image: Image.Image) -> float:
    begun = time.process_time()
    action(image)
    return time.process_time() - begun


def pace(place: Place, prompts: int, side: int, variables: Mapping[str, str]) -> float:
    """Images a second of one job, from its first batch on."""
    place.add(prompts)
    engine = StubEngine(side)
    span = run_job(engine, list(place.arguments), {**place.variables, **variables}, place.folder)
    return prompts / (span.ended - engine.batches[0][0])


def pairs(prompts: int, side: int, rounds: int, variables: Mapping[str, str]) -> list[tuple[float, float]]:
    """The paces of each pair, without and with manifests; which of them is first alternates."""
    found = []
    for number in range(rounds):
        order: list[Mapping[str, str]] = [{}, variables] if number % 2 else [variables, {}]
        seen = {}
        for each in order:
            with places("sqlite", "folder") as place:
                seen[bool(each)] = apart(pace, place(), prompts, side, each)
        found.append((seen[False], seen[True]))
    return found


def result(
    rows: Sequence[Mapping[str, Any]], paces: Sequence[tuple[float, float]], **settings: int
) -> Result:
    """The rows, and the median of the pairs' quotients, against the targets."""
    quotient = median(signed / plain for plain, signed in paces)
    return Result(
        benchmark="marking",
        checks=[
            Check(
                figure="encoding with XMP ÷ without, median of formats and sizes",
                measured=median(row["XMP ÷ plain"] for row in rows),
                target=_XMP_TARGET,
                at_least=False,
            ),
            Check(figure="images/s with manifests ÷ without", measured=quotient, target=_PACE_TARGET),
        ],
        settings=settings,
        rows=rows,
        note="The engine of the jobs costs nothing: with a model, the device's thread sets the pace.",
        details={"pairs, images/s": [[round(each, 1) for each in pair] for pair in paces]},
    )


def main() -> int:
    """Read the options, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.marking", description=__doc__)
    parser.add_argument("--prompts", type=int, default=200, help="images of a job (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of jobs (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        chain, key = credentials(Path(folder))
        rows = encodings(ManifestSigner(chain, key), options.rounds)
        variables = {"C2PA_CERTIFICATE": chain, "C2PA_KEY": key, "PATH": os.environ["PATH"]}
        paces = pairs(options.prompts, SIDES[0], options.rounds, variables)
    measured = result(rows, paces, prompts=options.prompts, side=SIDES[0], rounds=options.rounds)
    measured.save(options.output)
    print(report(measured))
    return measured.status


if __name__ == "__main__":
    raise SystemExit(main())
