"""Prompts' own webhooks: one request to a backend that the operator has allowed, and to no other.

Knows HTTP, hosts and notices; knows no database, and not when anything is sent.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Final

from text2img.concurrency.timeouts import within
from text2img.databases import Notice, webhook_id
from text2img.errors import PromptFailed
from text2img.prompts.webhook_urls import Webhook, WebhookHosts
from text2img.webhooks.responses import Result, Verdict, fault, growing, judge

if TYPE_CHECKING:
    import requests

    from text2img.webhooks.milestones import Reached
    from text2img.webhooks.signing import Credentials

_log = logging.getLogger(__name__)
_NOT_HERE: Final = 60.0
"""Seconds until a notice to a host that this run may not tell is looked at again."""


class Webhooks:
    """Sends to ``hosts`` alone, by no proxy, following no redirect; a host that is not named exactly must
    have public addresses. ``timeout``: seconds for one try, from name lookup to status line. Safe to use from
    several threads.
    """

    def __init__(self, hosts: WebhookHosts, credentials: Credentials, timeout: float = 5.0) -> None:
        self.hosts = hosts
        self.timeout = timeout
        self._credentials = credentials

    def send(self, notice: Notice) -> Verdict:
        """POST a notice, once. Never raises; the answer's body is not read."""
        try:
            webhook = Webhook.of(notice.url)
        except PromptFailed:
            return Verdict(Result.REFUSED, "the webhook's address is none")
        if not self.hosts.allows(webhook):
            detail = f"{webhook.origin} is no host that --webhook-host names in this run"
            return Verdict(Result.LATER, detail, _NOT_HERE)
        try:
            status, retry_after = self._request("POST", webhook, notice)
        except Exception as exc:  # noqa: BLE001 - whatever a receiver does, the run goes on
            _log.debug("webhook %s failed", notice.id, exc_info=not isinstance(exc, TimeoutError))
            return Verdict(Result.LATER, fault(webhook.origin, exc, self.timeout), growing(notice.tries))
        return judge(webhook.origin, status, retry_after, notice.tries)

    def progress(self, address: str, generation_id: str, reached: Reached) -> None:
        """PATCH one milestone, once. Never raises: it is not tried again."""
        document = {
            "generation_id": generation_id,
            "progress": {
                "current_step": reached.step,
                "total_steps": reached.of,
                "progress_percent": reached.percent,
                "estimated_seconds": reached.left,
            },
        }
        webhook = Webhook.of(address)
        notice = Notice(id=webhook_id(), run_id="", body=json.dumps(document), url=webhook.to("progress"))
        try:
            status, _ = self._request("PATCH", webhook, notice)
        except Exception as exc:  # noqa: BLE001 - as above
            _log.debug("progress of %s: %s", generation_id, fault(webhook.origin, exc, self.timeout))
            return
        if not 200 <= status < 300:
            _log.debug("progress of %s: %s answered %d", generation_id, webhook.origin, status)

    def _request(self, method: str, webhook: Webhook, notice: Notice) -> tuple[int, str | None]:
        return within(self.timeout + 1, lambda: self._exchange(method, webhook, notice))

    def _exchange(self, method: str, webhook: Webhook, notice: Notice) -> tuple[int, str | None]:
        """The answer's status and its Retry-After."""
        import requests

        from text2img.webhooks.public_only import Direct, Public

        with requests.Session() as session:
            way = Direct() if self.hosts.trusts(webhook) else Public()
            session.mount("http://", way)
            session.mount("https://", way)
            with session.request(
                method,
                str(notice.url),
                data=notice.body.encode(),
                headers={**self._credentials.headers(notice), "X-Request-Source": "inference-server"},
                auth=self._authorize,
                timeout=self.timeout,
                allow_redirects=False,
                stream=True,
            ) as response:
                return response.status_code, response.headers.get("retry-after")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Set the token. That this is given at all keeps requests from reading netrc."""
        if self._credentials.token is not None:
            request.headers["Authorization"] = f"Bearer {self._credentials.token}"
        return request
