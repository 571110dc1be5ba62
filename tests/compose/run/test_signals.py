"""What a signal does: asked once, a run ends in order; asked twice, at once; outside of it there is nothing to keep."""

import asyncio
import contextlib
import os
import signal

import pytest

from topkd.compose.run.signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_and_the_second_interrupts(number):
    with StopSignals() as stops, stops.listen() as event:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(event.wait(), timeout=240)
        assert stops.name == number.name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_before_the_run_a_signal_leaves_at_once(number, leaves):
    with StopSignals() as stops, pytest.raises(leaves) as caught:
        os.kill(os.getpid(), number)
    assert stops.name == ""
    assert getattr(caught.value, "code", 0) == 0


@pytest.mark.parametrize(("number", "leaves"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
async def test_a_signal_whose_exception_was_lost_is_obeyed_at_the_next_step(number, leaves):
    with StopSignals() as stops:
        stops.obey()
        with contextlib.suppress(leaves):  # as Python does in a __del__
            os.kill(os.getpid(), number)
        with pytest.raises(leaves):
            stops.obey()
        with pytest.raises(leaves), stops.listen():
            pass


def test_the_former_handlers_are_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals():
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] != before
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
