"""The prompts of the acceptance tests: good ones whose pictures can be judged by colour, and bad ones."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime

from bson import ObjectId

from text2img.demo.scenes import Scene


@dataclass(frozen=True)
class Good:
    """A prompt that must get its picture, and the name of the object that holds it."""

    id: object
    name: str
    scene: Scene
    fields: dict[str, object]

    @property
    def document(self):
        return {"_id": self.id, "text": self.scene.caption, **self.fields}


GOOD = [
    Good(id_, name, Scene(size, colour, shape, background), fields)
    for id_, name, size, colour, shape, background, fields in [
        (1, "1", "large", "red", "circle", "yellow", {}),
        (2, "2", "large", "blue", "square", "white", {"seed": 7}),
        ("1", "1~str", "large", "green", "triangle", "white", {"seed": 2**40}),
        ("spring-1", "spring-1", "large", "white", "circle", "black", {"negative_prompt": "blurry"}),
        (
            ObjectId("64b7f0c2a1b2c3d4e5f60718"),
            "64b7f0c2a1b2c3d4e5f60718",
            "large",
            "cyan",
            "square",
            "black",
            {},
        ),
        (
            uuid.UUID("12345678-1234-5678-9234-567812345678"),
            "12345678-1234-5678-9234-567812345678~uuid",
            "large",
            "yellow",
            "star",
            "blue",
            {},
        ),
        ("../../up/and/away", "~2E.~2F..~2Fup~2Fand~2Faway", "large", "black", "circle", "white", {}),
        ("bild/äöü ✓", "bild~2F~C3~A4~C3~B6~C3~BC~20~E2~9C~93", "large", "purple", "square", "white", {}),
        (10, "10", "large", "red", "square", "white", {"num_inference_steps": 10}),
        (11, "11", "large", "yellow", "circle", "black", {"num_inference_steps": 10}),
        (12, "12", "large", "green", "circle", "black", {"guidance_scale": 4}),
        (13, "13", "large", "white", "triangle", "blue", {"guidance_scale": 4.0}),
        (14, "14", "large", "blue", "circle", "yellow", {"scheduler": "euler"}),
        (15, "15", "large", "red", "triangle", "cyan", {"scheduler": "ddim"}),
        (16, "16", "large", "white", "star", "red", {"width": 128, "height": 128.0}),
        (17, "17", "large", "yellow", "square", "purple", {"priority": 5}),
        (18.5, "18.5~double", "large", "blue", "triangle", "white", {}),
        (
            datetime(2026, 11, 20, tzinfo=UTC),
            None,
            "large",
            "black",
            "square",
            "yellow",
            {"owner": {"team": "spring", "tags": [1, "two"]}},
        ),
        ("status-said", "status-said", "large", "green", "square", "white", {"status": "pending"}),
    ]
]

BAD = [
    ({"_id": 101, "text": ""}, "invalid_prompt", "text"),
    ({"_id": 102, "text": 42}, "invalid_prompt", "text"),
    (
        {"_id": 103, "text": "a large red circle on a blue background", "width": 65},
        "invalid_parameters",
        "width",
    ),
    (
        {"_id": 104, "text": "a large red circle on a blue background", "num_inference_steps": 0},
        "invalid_parameters",
        "num_inference_steps",
    ),
    (
        {"_id": 105, "text": "a large red circle on a blue background", "guidance_scale": math.nan},
        "invalid_parameters",
        "guidance_scale",
    ),
]
