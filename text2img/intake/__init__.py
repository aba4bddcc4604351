"""Files of prompts → new prompts, all of them checked before the first is added. Knows no database.

``files`` reads a file twice, to check it and to hand out what was checked; ``formats`` turns its text into
entries, each with its line, JSON's lists by ``windows`` and YAML's by ``yaml_items``; ``entries`` turns one
into a new prompt, or says all that is wrong with it; ``schema`` writes down what an entry may hold.
"""

from __future__ import annotations

from text2img.intake.files import Prompts, read_prompts

__all__ = ["Prompts", "read_prompts"]
