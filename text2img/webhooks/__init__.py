"""Telling the receiver what became of prompts: by HTTP, signed by Standard Webhooks 1.0, at least once.

Knows HTTP and the Telling half of the database; knows neither prompts' texts nor pictures.

    entry     outcomes → an entry's body
    credentials  token and signature
    receiver  one POST to --callback-url
    answers   what an answer, or none, means
    telling   gather outcomes into entries, deliver the entries that are due
    teller    does the telling beside a run's work
"""

from text2img.databases import webhook_id
from text2img.webhooks.client import Receiver, Result, Verdict
from text2img.webhooks.delivery import ENTRY_SIZE, Patience, deliver, gather, gather_left_over
from text2img.webhooks.payloads import compose

__all__ = [
    "ENTRY_SIZE",
    "Patience",
    "Receiver",
    "Result",
    "Verdict",
    "compose",
    "deliver",
    "gather",
    "gather_left_over",
    "webhook_id",
]
