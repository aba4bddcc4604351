"""What becomes of messages besides prompts: repeated ones are answered again, invalid ones are reported.

A message for an id that the database holds never changes the prompt, and never decides who is notified: only
the ``webhook_url`` that is stored with the prompt receives its outcome.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from text2img.errors import PromptFailed
from text2img.intake.entries import sender_of
from text2img.webhooks.delivery import save_rejection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.databases import Database, NewPrompt
    from text2img.prompts.ids import HostAllowlist

log = logging.getLogger(__name__)

_DIFFERS: Final = (
    "generation_id is that of a prompt that the database holds, and this message differs from it; use a new"
    " generation_id"
)


class Admission:
    """Adds the prompts of messages to the database, for the intake's thread.

    ``hosts`` may be notified. ``arrived`` is called when there are new prompts, ``notify`` when there are
    notifications to send. Each method may be called again with the same messages; both raise DatabaseFailed.
    """

    def __init__(
        self,
        database: Database,
        hosts: HostAllowlist,
        *,
        arrived: Callable[[], None],
        notify: Callable[[], None],
    ) -> None:
        self._database, self._hosts = database, hosts
        self._arrived, self._notify = arrived, notify

    def add(self, prompts: Sequence[NewPrompt]) -> dict[int, str]:
        """Add the new prompts, and send the outcomes of repeated messages' prompts again.

        Return the reasons to reject messages, by their position: they differ from the prompt that exists.
        """
        added = self._database.runs.enqueue(prompts, restore=False)
        if added:
            self._arrived()
        if added == len(prompts):
            return {}
        stored = self._database.runs.stored([prompt.id for prompt in prompts])
        differing = {
            position: _DIFFERS
            for position, prompt in enumerate(prompts)
            if stored.get(prompt.id, prompt) != prompt
        }
        same = [prompt for position, prompt in enumerate(prompts) if position not in differing]
        repeated = [prompt.id for prompt in same if self._is_allowed(prompt.webhook_url)]
        if repeated and self._database.outbox.repeat_webhooks(repeated):
            self._notify()
        duplicates = len(prompts) - added
        log.info("%d of %d messages are for prompts that already exist", duplicates, len(prompts))
        return differing

    def reject(self, body: bytes, reasons: Sequence[str]) -> None:
        """Notify a dead letter's sender, if the id is new and the host is allowed."""
        sender = sender_of(body)
        if sender is None or not self._is_allowed(sender.webhook_url):
            return
        if self._database.runs.stored([sender.id]):
            return
        outbox = self._database.outbox
        save_rejection(outbox, sender.id, sender.webhook_url, sender.code, "; ".join(reasons))
        self._notify()

    def _is_allowed(self, webhook_url: str | None) -> bool:
        if webhook_url is None:
            return False
        try:
            self._hosts.check(webhook_url)
        except PromptFailed:
            return False
        return True
