"""Intake of new prompts, from files and from RabbitMQ messages; independent of databases.

``files`` reads a file twice: to check all of it before the first prompt is added, and to return the checked
prompts. ``formats`` parses a file into entries with their lines; ``yaml_stream`` does so for YAML, and
``webui`` for text, also that of the common web UI.
``entries`` turns an entry or a message into a new prompt, or lists its errors. ``schema`` is the JSON Schema
of a file, and ``rabbitmq`` consumes messages.
"""

from __future__ import annotations

from text2img.intake.files import FORMATS, Prompts, read_prompts

__all__ = ["FORMATS", "Prompts", "read_prompts"]
