"""What is delivered and how: collect outcomes in notifications, classify responses; the two policies.

The dispatcher delivers both kinds of notification. What differs between the callback and the prompts' own
webhooks is a DeliveryPolicy.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

from text2img.concurrency import timeouts
from text2img.databases import Notification, PendingWebhook, UndeliveredOutcome, webhook_id
from text2img.errors import PromptFailed
from text2img.prompts.ids import Webhook
from text2img.prompts.quoting import json_text, plain_text
from text2img.settings import tls_fault
from text2img.webhooks.payloads import callback_payload, split_payload, webhook_payload
from text2img.webhooks.progress import Milestones, ProgressSender

if TYPE_CHECKING:
    from text2img.databases import Outbox
    from text2img.errors import ErrorCode
    from text2img.prompts import Failed, PromptId
    from text2img.webhooks.client import CallbackClient, Webhooks
    from text2img.webhooks.progress import Wait

_MAX_BACKOFF = 60.0  # seconds between attempts, unless the receiver asks for more
_MAX_RETRY_AFTER = 3600.0  # seconds that a receiver may ask us to wait
_RETRYABLE = frozenset({408, 429})


class DeliveryStatus(StrEnum):
    """The kind of result of one delivery attempt."""

    DELIVERED = "delivered"  # 2xx: the receiver has it
    REJECTED = "rejected"  # the receiver will never accept it: 3xx, 410, other 4xx
    TOO_LARGE = "too large"  # 413: the receiver may accept parts of it
    RETRY = "retry"  # 408, 429, 5xx, or no answer


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The result of one delivery attempt; ``detail`` gives the reason, without anything secret.

    For RETRY, in seconds: ``wait`` is our own backoff, ``retry_after`` what the receiver asked for
    (Retry-After; 0 without it). The next attempt is due after the longer of the two.
    """

    status: DeliveryStatus
    detail: str
    wait: float = 0.0
    retry_after: float = 0.0


def classify_response(origin: str, status: int, retry_after: str | None, tries: int) -> DeliveryResult:
    """Return what the status that ``origin`` answered to attempt number ``tries`` means."""
    detail = f"{origin} answered {status}"
    if 200 <= status < 300:
        return DeliveryResult(DeliveryStatus.DELIVERED, detail)
    if status in _RETRYABLE or status >= 500:
        return DeliveryResult(
            DeliveryStatus.RETRY,
            detail,
            exponential_backoff(tries),
            timeouts.parse_retry_after(retry_after, _MAX_RETRY_AFTER),
        )
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return DeliveryResult(DeliveryStatus.TOO_LARGE, detail)
    if 300 <= status < 400:
        detail += "; redirects are not followed, give the final address"
    return DeliveryResult(DeliveryStatus.REJECTED, detail)


def describe_error(origin: str, exc: Exception, timeout: float) -> str:
    """Return a message by the kind of error: the libraries' own messages contain the whole URL."""
    import requests

    if isinstance(exc, (TimeoutError, requests.Timeout)):
        return f"{origin} did not answer within {timeout:g} s"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, TimeoutError):
            return f"{origin} did not answer within {timeout:g} s"
        if isinstance(cause, AddressRefused):
            return f"{origin} {cause}"
        if isinstance(cause, socket.gaierror):
            return f"{origin} has no address: the host name is unknown"
        if isinstance(cause, ConnectionRefusedError):
            return f"{origin} refuses connections"
        cause = cause.__cause__ or cause.__context__
    kinds = (
        (requests.exceptions.ProxyError, "the proxy fails"),
        (requests.exceptions.SSLError, "TLS fails"),
    )
    reason = tls_fault(exc, "REQUESTS_CA_BUNDLE") or next(
        (text for kind, text in kinds if isinstance(exc, kind)), type(exc).__name__
    )
    return f"{origin} cannot be reached ({reason})"


class AddressRefused(OSError):  # noqa: N818 - named after the event
    """A host name resolves to an address that is not allowed."""


def exponential_backoff(tries: int) -> float:
    """Return the seconds to the next attempt: 1, 2, 4 … 60, less up to a quarter."""
    return timeouts.exponential_backoff(tries, _MAX_BACKOFF)


MAX_OUTCOMES = 1_000
"""Maximum number of outcomes in one notification."""
_MAX_BYTES: Final = 1_000_000
"""Approximate maximum size of a notification of several outcomes."""
_MAX_RUN_ID: Final = 1_000
"""Characters of a run's id in a notification."""
_POLL_INTERVAL: Final = 20.0
"""Seconds between queries for what other workers have left."""
_PROGRESS_TIMEOUT: Final = 2.0
"""Seconds that the end of a generation waits for its progress updates to arrive first."""


def collect(outbox: Outbox, run_id: str, status: str, *, final: bool, limit: int = MAX_OUTCOMES) -> int:
    """Collect a run's undelivered outcomes in notifications; return how many outcomes.

    A notification has up to ``limit`` outcomes and about 1 MB, unless one outcome is larger. Before the end
    (``final`` false) one notification is made: call it when more than ``limit`` outcomes wait, so that the
    last notification is not empty. At the end all remaining outcomes are collected and the last notification
    is marked as final; without outcomes there is none. A crash in between loses nothing: outcomes marked for
    a notification that was never saved become undelivered again. Raises DatabaseFailed.
    """
    collected = 0
    more = True
    while more:
        notification_id = webhook_id()
        outcomes, left = outbox.collect(run_id, notification_id, limit, _MAX_BYTES)
        if not outcomes:
            break
        name = _name(run_id)
        body = callback_payload(name, status, outcomes, final=final and not left)
        outbox.save_notification(Notification(id=notification_id, run_id=name, body=body))
        collected += len(outcomes)
        more = left and final
    return collected


def collect_orphaned(outbox: Outbox) -> int:
    """Collect the outcomes of runs that ended before they could, as ``interrupted``; return how many.

    Raises DatabaseFailed.
    """
    runs = outbox.undelivered_runs()
    return sum(collect(outbox, run_id, "interrupted", final=True) for run_id in runs)


def collect_webhooks(outbox: Outbox, limit: int = MAX_OUTCOMES) -> int:
    """Make a notification of every outcome with a pending webhook; return how many were pending.

    Any worker may, at any time: even if several do, an outcome has one notification. Raises DatabaseFailed.
    """
    collected = 0
    seen: list[PendingWebhook] = []
    # Until nothing is left, or nothing is removed: marks that the job did not write may stay.
    while (pending := outbox.pending_webhooks(limit)) and pending != seen:
        notifications = [made for item in pending if (made := _webhook_notification(item))]
        outbox.enqueue_webhooks(pending, notifications)
        collected, seen = collected + len(pending), pending
    return collected


def _webhook_notification(pending: PendingWebhook) -> Notification | None:
    """Return the notification; None if the prompt no longer has a valid webhook URL."""
    try:
        webhook = Webhook.of(pending.webhook_url)
    except PromptFailed:
        return None
    endpoint, body = webhook_payload(pending.outcome)
    notification_id, url, origin = plain_text(pending.notification_id), webhook.to(endpoint), webhook.origin
    return Notification(id=notification_id, run_id=_name(pending.run_id), body=body, url=url, origin=origin)


def _name(run_id: str) -> str:
    """Return the run's id as it is sent: another program may have written it into an outcome."""
    return plain_text(run_id)[:_MAX_RUN_ID]


def split(notification: Notification) -> tuple[Notification, Notification] | None:
    """Return two notifications with half of the outcomes each; None for one that has a single outcome.

    Their ids derive from its id: after a crash the same notification is split into the same two.
    """
    bodies = split_payload(notification.body)
    if bodies is None:
        return None
    run_id = _name(str(notification.run_id))
    first, second = (
        replace(notification, id=f"{notification.id}_{number}", run_id=run_id, body=body, tries=0)
        for number, body in enumerate(bodies, 1)
    )
    return first, second


def save_unwritable(outbox: Outbox, failed: Failed, run_id: str, *, notify: bool) -> None:
    """Save the notifications of a failure that its prompt's document does not take.

    Their ids are made from the prompt and the code: however many runs meet the document, each is sent once.
    ``notify``: one for the callback's receiver, beside that for the prompt's own webhook, if it has one.
    """
    outcome = UndeliveredOutcome(
        id=failed.claim.id,
        text=failed.prompt.text,
        code=failed.code.value,
        message=failed.message,
        attempts=failed.attempts,
    )
    name = f"{failed.claim.id.kind}:{failed.claim.id.text}:{failed.code.value}"
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    if notify:
        body = callback_payload(run_id, "running", [outcome], final=False)
        outbox.save_notification(Notification(id=f"msg_{digest[:32]}", run_id=run_id, body=body))
    pending = PendingWebhook(
        notification_id=f"msg_{digest[32:]}",
        run_id=run_id,
        webhook_url=failed.prompt.webhook_url,
        outcome=outcome,
    )
    if failed.prompt.webhook_url is not None and (made := _webhook_notification(pending)) is not None:
        outbox.enqueue_webhooks([], [made])


def save_rejection(
    outbox: Outbox, prompt_id: PromptId, webhook_url: str, code: ErrorCode, reason: str
) -> None:
    """Save the notification of a message that became no prompt, for its sender; again if it was sent before.

    Its id is made from what it holds: the same message has the same. Raises DatabaseFailed.
    """
    outcome = UndeliveredOutcome(id=prompt_id, text=None, code=code.value, message=reason, attempts=1)
    content = json_text([prompt_id.kind, prompt_id.text, webhook_url, reason])
    name = f"msg_{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    pending = PendingWebhook(notification_id=name, run_id="", webhook_url=webhook_url, outcome=outcome)
    if (made := _webhook_notification(pending)) is not None:
        outbox.repeat_notification(made)


class DeliveryPolicy(Protocol):
    """What differs between the callback and the prompts' own webhooks."""

    @property
    def name(self) -> str:
        """``callback`` or ``webhook``, in log lines."""
        ...

    @property
    def webhooks(self) -> bool:
        """The kind of notification; True: those for prompts' own webhooks (see Outbox.claim_notification)."""
        ...

    @property
    def max_concurrency(self) -> int:
        """The number of receivers that are served at once, each by one request at a time."""
        ...

    @property
    def timeout(self) -> float:
        """Seconds that one request may take."""
        ...

    @property
    def poll_interval(self) -> float:
        """Seconds between two calls of ``collect``, unless the dispatcher is woken."""
        ...

    def collect(self) -> None:
        """Make notifications of the outcomes that are to be sent now. Raises DatabaseFailed."""
        ...

    def send(self, notification: Notification) -> DeliveryResult:
        """Send the notification once. Never raises for what a receiver does."""
        ...

    def split(self, notification: Notification) -> tuple[Notification, Notification] | None:
        """Return the parts of a notification that is too large; None if it cannot be divided."""
        ...


class CallbackPolicy:
    """A run's callback: its outcomes go to one receiver in batches, of which the last is marked as final.

    A batch is made of more than 1,000 outcomes or, with ``interval``, of what has gathered in that many
    seconds. What runs left that have died is sent as well, as ``interrupted``.
    """

    name: Final = "callback"
    webhooks: Final = False
    max_concurrency: Final = 1

    def __init__(
        self, outbox: Outbox, client: CallbackClient, run_id: str, interval: float | None = None
    ) -> None:
        self._outbox, self._client, self._run_id, self._interval = outbox, client, run_id, interval
        self.timeout = client.timeout
        self.poll_interval = _POLL_INTERVAL if interval is None else interval
        self._lock = threading.Lock()
        self._uncollected = 0
        self._orphans_collected = False

    def recorded(self, count: int) -> bool:
        """Count outcomes that have been recorded; return True if they are enough for a batch."""
        with self._lock:
            self._uncollected += count
            # More than one batch: something is left for the last notification, which is marked as final.
            return self._uncollected > MAX_OUTCOMES

    def collect(self) -> None:
        """See DeliveryPolicy.collect: what dead runs left, once; then this run's next batch."""
        if not self._orphans_collected:
            collect_orphaned(self._outbox)
            self._orphans_collected = True
        collected = 1
        while collected and (self.recorded(0) or (self._interval is not None and self._uncollected)):
            collected = collect(self._outbox, self._run_id, "running", final=False)
            self.recorded(-collected)

    def collect_last(self, status: str) -> None:
        """Make the last notifications of the run, which ended as ``status``. Raises DatabaseFailed.

        Call it while the run still counts as alive: otherwise another run collects the outcomes as those of
        a dead one.
        """
        self.recorded(-collect(self._outbox, self._run_id, status, final=True))

    def send(self, notification: Notification) -> DeliveryResult:
        """See DeliveryPolicy.send."""
        return self._client.send(notification)

    def split(self, notification: Notification) -> tuple[Notification, Notification] | None:
        """See DeliveryPolicy.split: two halves."""
        return split(notification)


class WebhookPolicy:
    """Prompts' own webhooks: one notification an outcome, each backend served by itself, progress first.

    ``progress`` receives the run's progress and sends it on.
    """

    name: Final = "webhook"
    webhooks: Final = True
    max_concurrency: Final = 8
    poll_interval: Final = _POLL_INTERVAL

    def __init__(
        self, outbox: Outbox, client: Webhooks, wait_for: Wait = threading.Condition.wait_for
    ) -> None:
        self._outbox, self._client = outbox, client
        self.timeout = client.timeout
        self._progress_sender = ProgressSender(client.progress, wait_for)
        self.progress = Milestones(self._progress_sender.put)

    def collect(self) -> None:
        """See DeliveryPolicy.collect: outcomes of any run."""
        collect_webhooks(self._outbox)

    def send(self, notification: Notification) -> DeliveryResult:
        """See DeliveryPolicy.send: after the prompt's progress updates, or two seconds."""
        # The notification may have been edited in the database; the client rejects it then.
        with suppress(Exception):
            address, body = str(Webhook.of(notification.url)), json.loads(notification.body)
            self._progress_sender.finish(address, json_text(body["generation_id"]), _PROGRESS_TIMEOUT)
        return self._client.send(notification)

    def split(self, notification: Notification) -> None:
        """See DeliveryPolicy.split: it has a single outcome."""
        del notification
