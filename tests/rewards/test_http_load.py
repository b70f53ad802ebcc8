"""Thousands of completions scored by a server of whose answers three in ten fail."""

from __future__ import annotations

import random
import threading
import time

import pytest

ITEMS, SIZE, SILENT = 4000, 8, 0.5
FAULTS = ("500", "429", "reset", "time-out")


@pytest.mark.slow
def test_three_in_ten_requests_fail_and_every_item_gets_its_score(http, capsys):
    draw, over = random.Random(0), threading.Event()
    faults = dict.fromkeys(FAULTS, 0)

    def answer(request):
        with stub.lock:
            fault = draw.choice(FAULTS) if draw.random() < 0.3 else None
            if fault:
                faults[fault] += 1
        if fault == "time-out":
            over.wait(20 * SILENT)
        if fault == "429":
            return http.reply(status=429, Retry_After="0")
        if fault == "500":
            return http.reply(status=500)
        return http.RESET if fault else http.lengths(request)

    texts = [f"{n:x}" * (n % 50) for n in range(ITEMS)]
    options = {"batch_size": SIZE, "concurrency": 16, "retries": 20, "read_timeout": SILENT}
    stub = clean = http.stub()
    seconds = []
    for stub in (clean, http.stub(answer)):
        began = time.perf_counter()
        scored = http.score(stub.url, texts, **options)
        seconds.append(time.perf_counter() - began)
        assert scored.rewards["http"].tolist() == [float(len(text)) for text in texts]
        assert scored.metrics["reward/http/failed"] == [0.0]
    over.set()
    requests, retries = len(stub.requests), int(scored.metrics["reward/http/retries"][0])
    assert retries >= sum(faults.values())  # more where this machine itself was silent for too long
    assert 0.25 < retries / requests < 0.35 and min(faults.values()) > 20  # the faults did happen
    told = ", ".join(f"{fault} {count} times" for fault, count in faults.items())
    # Without repetitions the same server loses items: they are counted, and none becomes a number.
    over.clear()
    with pytest.warns(UserWarning, match="counted as not applicable"):
        lost = http.score(stub.url, texts, on_error="none", **{**options, "retries": 0})
    over.set()
    values = lost.rewards["http"].tolist()
    assert 0.2 * ITEMS < sum(value != value for value in values) == lost.metrics["reward/http/failed"][0]
    assert all(
        value in (float(len(text)),) or value != value for value, text in zip(values, texts, strict=True)
    )
    with capsys.disabled():
        print(
            f"\n{ITEMS} completions, {SIZE} a request, 16 at a time: {requests} requests, {retries} repeated "
            f"({told}); {seconds[1]:.1f} s, without faults {seconds[0]:.1f} s"
        )
