"""P4: a signal is raised at once, though one operation lasts for ever; who computed ends at its next line."""

import gc
import os
import signal
import threading
import weakref

import pytest
import torch

from afina.errors import Interrupted, ResourceError
from afina.train.stop import Stop


class Long:
    """An operation that no signal reaches, as a product of large matrices is, until it is let go."""

    def __init__(self) -> None:
        self.begun, self.hold, self.went_on = threading.Event(), threading.Lock(), False
        self.hold.acquire()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.begun.set()
        self.hold.acquire()
        self.went_on = True

    def hit(self, number: int) -> None:
        """Send this process a signal once the operation has begun."""
        threading.Thread(target=lambda: (self.begun.wait(), os.kill(os.getpid(), number))).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_does_not_wait_for_a_long_operation(number):
    work = Long()
    with pytest.raises(Interrupted) as caught, Stop().handled() as stop:
        work.hit(number)
        stop.compute(work)
    assert caught.value.exit_status == 128 + number
    assert work.thread.is_alive() and work.hold.locked()
    work.hold.release()
    work.thread.join(60)
    assert not work.thread.is_alive() and not work.went_on


def test_between_steps_a_signal_waits():
    with Stop().handled() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(Interrupted):
            stop.compute(lambda: pytest.fail("asked to compute after a signal"))
        with pytest.raises(Interrupted):  # the second leaves at once, wherever we are
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                pass


@pytest.mark.parametrize("aside", [False, True])
def test_results_and_errors_come_through(aside):
    def fail():
        raise ResourceError("no")

    with Stop(aside=aside).handled() as stop:
        assert stop.compute(lambda: 3) == 3
        with pytest.raises(ResourceError, match="no"):
            stop.compute(fail)
        where = stop.compute(threading.current_thread)
    assert (where is not threading.main_thread()) == aside
    where.join() if aside else None


def test_the_thread_that_computes_keeps_no_tensor():
    with Stop().handled() as stop:
        kept = []

        def work():
            tensor = torch.ones(3)
            kept.append(weakref.ref(tensor))
            return tensor * 2

        assert stop.compute(work).sum() == 6
        gc.collect()
        assert kept[0]() is None


def test_outside_the_main_thread_nothing_is_handled_and_everything_computed():
    found = []

    def elsewhere():
        with Stop().handled() as stop:
            found.append(stop.compute(threading.current_thread))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [thread]


def test_threads_compute_alike():
    """The same bits aside as in the main thread, whatever number of threads the products take."""
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    expected = a @ b
    with Stop().handled() as stop:
        assert torch.equal(stop.compute(lambda: a @ b), expected)
        assert stop.compute(torch.get_num_threads) == torch.get_num_threads()
        assert stop.compute(torch.is_grad_enabled)
