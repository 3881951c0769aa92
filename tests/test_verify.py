"""Verification of what can run here."""

from mitnet_fast.verify import verify


def test_calls_that_no_time_is_left_for_are_said():
    everything = []
    verification = verify("dynamic_filter", "cpp", devices=["cpu"], seconds=0, progress=lambda *n: everything.append(n))
    assert verification.checks == ()
    assert not everything
    assert not verification.passed
    ((what, reason),) = verification.not_run.items()
    calls = int(what.split()[2])
    assert what == f"the last {calls} of {calls} calls"
    assert calls > 100
    assert reason == "0 s are over"
