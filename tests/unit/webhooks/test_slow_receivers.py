"""Receivers that answer without end: they cost neither a thread nor a socket beyond their time."""

from __future__ import annotations

import threading

import pytest

from tests.servers.slow import HEADERS, slow_server
from tests.waiting import until
from text2img.databases import Notification, webhook_id
from text2img.prompts.ids import HostAllowlist
from text2img.webhooks.client import CallbackClient, Webhooks
from text2img.webhooks.delivery import DeliveryStatus
from text2img.webhooks.payloads import Credentials
from text2img.webhooks.progress import ProgressUpdate

PLACE = "api/webhooks/inference"


def _waiting():
    """The threads that an exchange has left behind."""
    return [thread for thread in threading.enumerate() if thread.name == "with-timeout"]


def notification(url):
    return Notification(id=webhook_id(), run_id="r", body="{}", url=url)


def _webhooks():
    return Webhooks(HostAllowlist.parse("127.0.0.1"), Credentials(None, None), timeout=0.2)


def _callback(url):
    return CallbackClient(url, timeout=0.2).send(notification(None))


def _webhook(url):
    return _webhooks().send(notification(f"{url}{PLACE}/complete"))


@pytest.mark.parametrize("start", [b"", HEADERS])
@pytest.mark.parametrize("send", [_callback, _webhook])
def test_a_receiver_that_trickles_is_hung_up_on(start, send):
    """Each attempt ends at its timeout, whatever it has heard by then, and leaves nothing behind."""
    with slow_server(start, b"H") as server:
        results = [send(server.url) for _ in range(5)]
        until(lambda: server.closed == server.connections == 5)
        until(lambda: not _waiting())
    assert {result.status for result in results} == {DeliveryStatus.RETRY}
    assert all(result.detail.endswith("did not answer within 0.2 s") for result in results)


def test_progress_to_a_backend_that_trickles_is_hung_up_on():
    """Progress is sent once, and a backend that answers slowly costs it no more than its timeout."""
    with slow_server(HEADERS) as server:
        for step in range(5):
            update = ProgressUpdate(step=step, total_steps=5, percent=0, seconds_left=0)
            _webhooks().progress(f"{server.url}{PLACE}", '"a"', update)
        until(lambda: server.closed == server.connections == 5)
        until(lambda: not _waiting())
