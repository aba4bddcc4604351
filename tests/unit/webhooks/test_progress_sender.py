"""Progress beside the work: in order, never in its way, and dropped only where a backend is slower."""

from __future__ import annotations

import threading

from text2img.webhooks.progress import MILESTONES, ProgressSender, ProgressUpdate

URL = "http://backend.example"
MANY = 300.0  # seconds until a test gives up


def reached(*percents):
    return [ProgressUpdate(percent, percent, 100, 0) for percent in percents]


class Backend:
    """Hears milestones; those of ``slow`` addresses wait until ``go`` is set."""

    def __init__(self, *slow):
        self.slow, self.go, self.busy = slow, threading.Event(), threading.Semaphore(0)
        self.heard, self.now, self.most = [], [], 0
        self.lock = threading.Lock()  # several threads send at once

    def send(self, address, generation_id, milestone):
        with self.lock:
            assert (address, generation_id) not in self.now
            self.now.append((address, generation_id))
            self.most = max(self.most, len(self.now))
        if address in self.slow:
            self.busy.release()
            self.go.wait()
        with self.lock:
            self.heard.append((generation_id, milestone.percent))
            self.now.remove((address, generation_id))

    def percents(self, generation_id="a"):
        return [percent for name, percent in self.heard if name == generation_id]


def test_a_quick_backend_hears_all_in_order():
    """Each milestone of each generation arrives, in order, whoever else is told at the same time."""
    backend = Backend()
    beside = ProgressSender(backend.send)
    names = [str(number) for number in range(30)]
    for percent in MILESTONES:
        for name in names:
            beside.put(URL, name, reached(percent))
        for name in names:
            beside.finish(URL, name, MANY)
    assert all(backend.percents(name) == list(MILESTONES) for name in names)


def test_milestones_of_one_step_are_all_told():
    """A batch of one step passes four at once: none of them drops another."""
    backend = Backend()
    beside = ProgressSender(backend.send)
    beside.put(URL, "a", reached(0))
    beside.finish(URL, "a", MANY)
    beside.put(URL, "a", reached(25, 50, 75, 90))
    beside.finish(URL, "a", MANY)
    assert backend.percents() == list(MILESTONES)


def test_of_what_waits_for_a_slow_backend_the_newest_stays():
    """While it hears of 0 %, 25 and 50 come and go; 75 is what it hears next. Who puts never waits."""
    backend = Backend(URL)
    beside = ProgressSender(backend.send)
    beside.put(URL, "a", reached(0))
    assert backend.busy.acquire(timeout=MANY)
    for percent in (25, 50, 75):
        beside.put(URL, "a", reached(percent))
    assert backend.heard == []
    backend.go.set()
    beside.finish(URL, "a", MANY)
    assert backend.percents() == [0, 75]


def test_the_end_of_a_generation_waits_for_its_progress_but_not_for_ever():
    """What still waits when the time is over is dropped; what was under way arrives."""
    backend = Backend(URL)
    beside = ProgressSender(backend.send)
    beside.put(URL, "a", reached(0))
    assert backend.busy.acquire(timeout=MANY)
    beside.put(URL, "a", reached(25))
    beside.finish(URL, "a", 0.05)
    backend.go.set()
    beside.finish(URL, "a", MANY)
    assert backend.percents() == [0]


def test_a_backend_that_hangs_holds_up_no_other():
    """Though many generations wait for it, those of another backend are told at once."""
    backend = Backend(URL)
    beside = ProgressSender(backend.send)
    for number in range(50):
        beside.put(URL, f"slow {number}", reached(0))
    assert backend.busy.acquire(timeout=MANY)
    for number in range(10):
        beside.put("http://other.example", str(number), reached(0))
        beside.finish("http://other.example", str(number), MANY)
    assert [name for name, _ in backend.heard] == [str(number) for number in range(10)]
    assert backend.most <= 9
    backend.go.set()
    for number in range(50):
        beside.finish(URL, f"slow {number}", MANY)
    assert len(backend.heard) == 60


def test_memory_is_bounded_where_nobody_answers():
    """Of many generations that wait, those that have waited longest are dropped."""
    backend = Backend(URL)
    beside = ProgressSender(backend.send)
    for number in range(3_000):
        beside.put(URL, str(number), reached(0))
    assert len(beside._waiting) <= 1_000
    assert (URL, "2999") in beside._waiting
    backend.go.set()
    beside.finish(URL, "2999", MANY)
