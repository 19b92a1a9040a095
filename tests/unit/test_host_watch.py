"""Who still answers, with a board and a clock of our own."""

import pytest

from sparseinst_jax.runtime import host_watch
from sparseinst_jax.runtime.host_watch import DONE, LOST_HOST, HostWatch


class Board:
    """What all hosts have written."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, key):
        return [(k, v) for k, v in self.values.items() if k.startswith(key)]


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(host_watch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(host_watch.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    return now


@pytest.fixture
def pair(clock):
    """Two hosts of one job; what they end with."""
    board, ended = Board(), []
    hosts = [
        HostWatch(board, i, 2, f"node{i}", 10.0, lambda code, i=i: ended.append((i, code)))
        for i in range(2)
    ]
    return *hosts, ended


def live(clock, hosts, seconds, doing=None):
    """Let hosts write and read for so many seconds."""
    for _ in range(seconds):
        clock[0] += 1
        for host in hosts:
            if doing:
                host.report(doing)
            host.exchange()


def test_hosts_that_write_are_left_alone(clock, pair):
    first, second, _ = pair
    live(clock, [first, second], 50, "step 1")
    assert first.verdict() is None and second.verdict() is None


def test_a_silent_host_is_named_after_the_time_out_with_what_it_did_last(clock, pair):
    first, second, _ = pair
    live(clock, [first, second], 3, "training, step 7")
    live(clock, [first], 11)  # the last writing was read a second after it
    assert first.verdict() is None
    live(clock, [first], 1)
    assert first.verdict() == (
        "host 1 (node1) has not answered for 11 s; its last report: training, step 7"
    )


def test_a_host_that_never_came_is_silent_too(clock, pair):
    first, _, _ = pair
    live(clock, [first], 11)
    assert first.verdict() == ("host 1 has not answered for 11 s; its last report: none")


def test_hosts_that_live_but_do_not_get_on_are_told_with_what_each_does(clock, pair):
    first, second, _ = pair
    first.report("training, step 7")
    second.report("waiting for the images of step 7")
    live(clock, [first, second], 60)
    assert first.verdict() is None
    live(clock, [first, second], 1)
    assert first.verdict() == (
        "no progress for 61 s. What each host was doing:\n"
        "  host 0 (node0): training, step 7\n"
        "  host 1 (node1): waiting for the images of step 7"
    )
    assert "\n  host 0 (node0): training, step 7\n  host 1" in second.verdict()


def test_a_host_that_is_done_may_wait_for_ever(clock, pair):
    first, second, _ = pair
    second.report(DONE)
    for step in range(20):
        first.report(f"picture {step}")
        live(clock, [first, second], 10)
    assert first.verdict() is None and second.verdict() is None


def test_a_failure_is_told_and_stays_told(clock, pair):
    first, second, _ = pair
    live(clock, [first, second], 2, "step 1")
    second.report_failure("image a.jpg cannot be read")
    live(clock, [first, second], 2)
    assert first.verdict() == "host 1 (node1) has failed: image a.jpg cannot be read"


def test_a_board_that_is_gone_counts_as_silence_of_the_first_host(clock, pair):
    first, second, _ = pair
    live(clock, [first, second], 2, "step 1")

    def unreachable(*_, **__):
        raise RuntimeError("UNAVAILABLE")

    second._board.key_value_dir_get = unreachable
    clock[0] += 11
    with pytest.raises(RuntimeError):
        second.exchange()
    assert second.verdict().startswith("host 0 (node0) has not answered for 11 s")
    second._board.key_value_set = unreachable
    second.report_failure("not heard by anybody")


def test_the_judge_prints_the_verdict_and_ends_with_the_code(clock, pair, capsys):
    first, second, ended = pair
    live(clock, [first, second], 2, "step 1")
    first._judge_forever()  # the clock runs by its sleeping alone
    assert ended == [(0, LOST_HOST)]
    text = capsys.readouterr().err
    assert text.startswith("error: host 1 (node1) has not answered for ")
    assert "exit code 75" in text and "same command continues" in text
