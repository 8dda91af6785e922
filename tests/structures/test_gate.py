"""Gates: against the model one step at a time, with real threads for what must hold among them, and by histories."""

from __future__ import annotations

import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import k42
from k42 import GateClosed
from k42.sim.models import gate as models
from k42.structures import DistributedGate, Gate, SharedGate
from k42.structures.gate import IMPLEMENTATIONS
from k42.testing import Blocked, History, NotLinearizable, Operation, check, frequent_switches, race, wait_until

MODELS = {SharedGate: models.SharedGate, DistributedGate: models.DistributedGate}

every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
def gate(request):
    gate = request.param.create()
    yield gate
    try:
        k42.destroy(gate)
    except k42.Destroyed:
        pass


def elsewhere(function, *args):
    """What the function returns, or raises, on a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def state(gate):
    """Which state the gate is in, by what a newcomer finds."""

    def look():
        try:
            if not gate.try_enter():
                return "stopped"
            gate.leave()
            return "normal"
        except GateClosed:
            return "shutdown"

    return elsewhere(look)


# Against the model

steps = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("enter", "enter", "try_enter", "leave", "leave", "with", "inside"),
                *("stop", "stopped", "restart", "restart", "shutdown", "new_thread"),
            ]
        ),
        st.integers(0, 2),
    ),
    max_size=40,
)


def outcome(call, *args):
    """What a call returns, or the type of what it raises."""
    try:
        return call(*args)
    except (GateClosed, RuntimeError, TimeoutError) as error:
        return type(error)
    except models.Waits:
        return TimeoutError


def within(gate):
    with gate:
        return gate.inside()


def stopped(gate):
    with gate.stopped(0):
        return gate.inside()


def model_step(model, step, processor):
    if step == "with":
        model.enter(processor)
        inside = model.inside()
        model.leave(processor)
        return inside
    if step == "stopped":
        model.stop(processor)
        model.restart()
        return 0
    if step in ("inside", "restart"):
        return getattr(model, step)()
    return getattr(model, step)(processor)


@every
@settings(deadline=None, max_examples=60)
@given(steps=steps)
def test_as_the_model_says(implementation, steps):
    gate, model = implementation.create(), MODELS[implementation]()
    threads = [ThreadPoolExecutor(1) for _ in range(3)]
    calls = {
        "with": lambda: within(gate),
        "stopped": lambda: stopped(gate),
        "stop": lambda: gate.stop(timeout=0),
        "shutdown": lambda: gate.shutdown(timeout=0.0),
    }
    try:
        for step, i in steps:
            # A processor goes from thread to thread, with what is inside on it; only it knows which one it has.
            processor = threads[i].submit(k42.processors.current).result()
            if step == "new_thread":
                threads[i].shutdown()
                threads[i] = ThreadPoolExecutor(1)
                continue
            if step in ("enter", "with") and model.state == "stopped" and processor not in model.requests:
                step = "try_enter"  # enter() would wait
            actual = threads[i].submit(outcome, calls.get(step) or getattr(gate, step)).result()
            assert actual == outcome(model_step, model, step, processor), step
            assert gate.inside() == model.inside()
    finally:
        for thread in threads:
            thread.shutdown()
        k42.destroy(gate)


# Who waits for whom


def test_newcomers_wait_for_the_restart(gate):
    gate.stop()
    order = []
    with ThreadPoolExecutor(3) as threads:
        entering = [threads.submit(lambda: (gate.enter(), order.append("in"), gate.leave())) for _ in range(3)]
        time.sleep(0.25)  # more than a slice of the wait
        order.append("restart")
        gate.restart()
        for each in entering:
            each.result()
    assert order == ["restart", "in", "in", "in"]


def test_stop_waits_for_those_inside(gate):
    order = []
    gate.enter()
    stopper = threading.Thread(target=lambda: (gate.stop(), order.append("alone"), gate.restart()))
    stopper.start()
    wait_until(lambda: state(gate) == "stopped")
    assert gate.inside() == 1
    order.append("leave")
    gate.leave()
    stopper.join()
    assert order == ["leave", "alone"]


def test_who_is_inside_enters_again_while_a_stop_waits(gate):
    gate.enter()
    stopper = threading.Thread(target=gate.stop)
    stopper.start()
    wait_until(lambda: state(gate) == "stopped")
    assert gate.try_enter()
    with gate:
        gate.enter()
        assert gate.inside() == 4
    for _ in range(3):
        gate.leave()
    stopper.join()
    assert not gate.try_enter()
    gate.restart()


def test_who_is_inside_enters_again_while_a_shutdown_waits(gate):
    gate.enter()
    closer = threading.Thread(target=gate.shutdown)
    closer.start()
    wait_until(lambda: state(gate) == "shutdown")
    with gate:
        pass
    gate.leave()
    closer.join()
    with pytest.raises(GateClosed):
        gate.enter()


def test_a_stop_that_times_out_opens_the_gate_again(gate):
    gate.enter()
    done = []

    def come():
        wait_until(lambda: state(gate) == "stopped" or done)
        gate.enter()
        gate.leave()

    newcomer = threading.Thread(target=come)
    newcomer.start()
    with pytest.raises(TimeoutError, match="as before"):
        elsewhere(gate.stop, 0.05)
    done.append(True)
    newcomer.join()
    assert state(gate) == "normal"
    gate.leave()
    gate.stop(5)
    with pytest.raises(TimeoutError, match="as before"):
        gate.stop(timeout=0.01)
    assert state(gate) == "stopped"
    gate.restart()


def test_a_shutdown_that_times_out_stays_shut_and_says_who_is_inside(gate):
    gate.enter()
    gate.enter()
    with pytest.raises(TimeoutError, match="2 requests were still inside"):
        elsewhere(gate.shutdown, 0.01)
    assert state(gate) == "shutdown"
    gate.leave()
    gate.leave()
    gate.shutdown()
    assert gate.inside() == 0


def test_shutdown_rejects_all_who_wait(gate):
    gate.stop()

    def rejected(call):
        with pytest.raises(GateClosed, match="shut down"):
            call()

    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(rejected, call) for call in (gate.enter, gate.enter, gate.stop)]
        time.sleep(0.01)
        gate.shutdown()
        for each in waiting:
            each.result()
    for call in (gate.enter, gate.try_enter, gate.stop, gate.restart):
        rejected(call)
    with pytest.raises(GateClosed), gate:
        pass
    gate.shutdown()


def test_shut_down_within_the_block_of_a_stop(gate):
    with gate.stopped():
        gate.shutdown()
    assert state(gate) == "shutdown"


def test_a_stop_is_ended_on_the_way_out(gate):
    with pytest.raises(KeyError), gate.stopped(timeout=1):
        raise KeyError(state(gate))
    assert state(gate) == "normal"
    with pytest.raises(KeyError), gate:
        raise KeyError
    assert gate.inside() == 0


def test_nobody_starves(gate):
    """Stops that follow one another at once let those in who have waited: else this would not end."""
    done = threading.Event()

    def stopper():
        while not done.is_set():
            with gate.stopped():
                pass

    def requests():
        for _ in range(100):
            with gate:
                pass
        done.set()

    with frequent_switches():
        race(stopper, stopper, requests)


def test_who_stops_is_alone(gate):
    n, rounds = 4, 400
    numbers = [0, 0]  # equal, but for a stopper

    def requests(seed):
        random_ = random.Random(seed)
        for _ in range(rounds):
            with gate:
                assert numbers[0] == numbers[1]
                if random_.random() < 0.1:
                    with gate:
                        assert numbers[0] == numbers[1]

    def stopper():
        for _ in range(rounds // 4):
            with gate.stopped():
                numbers[0] += 1
                time.sleep(0)
                numbers[1] += 1

    with frequent_switches():
        race(stopper, stopper, *(partial(requests, i) for i in range(n)))
    assert numbers == [rounds // 2] * 2
    assert gate.inside() == 0


def test_requests_of_threads_that_end_stay_counted(gate):
    """They are their processor's, and the next thread that has it can end them."""
    elsewhere(gate.enter)
    assert gate.inside() == 1
    with pytest.raises(TimeoutError):
        gate.stop(0)
    elsewhere(gate.leave)
    assert gate.inside() == 0
    gate.stop()


def test_what_was_done_before_restart_is_seen(gate):
    """Plain data that a stopper writes and requests read, and the other way round."""
    written = []
    for i in range(50):

        def request(i=i):
            gate.enter()
            written.append(i)
            gate.leave()

        thread = threading.Thread(target=request)
        with gate.stopped():
            thread.start()
            written.append("stop")
        thread.join()
        assert written[-2:] == ["stop", i]


# Signals and destruction


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt():
    """Calls the function in the main thread, and raises Interrupted there while it waits."""

    def handler(*_):
        raise Interrupted

    def during(call):
        before = signal.signal(signal.SIGUSR1, handler)
        main = threading.main_thread().ident
        called = threading.Event()

        def kill():
            called.wait()
            time.sleep(0.05)  # however late the call is then, it ends
            signal.pthread_kill(main, signal.SIGUSR1)

        def attempt():
            called.set()
            call()
            pytest.fail("it did not wait")

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            with pytest.raises(Interrupted):
                attempt()
        finally:
            thread.join()
            signal.signal(signal.SIGUSR1, before)

    return during


def test_a_signal_ends_the_wait_of_enter(gate, interrupt):
    gate.stop()
    interrupt(gate.enter)
    assert gate.inside() == 0
    gate.restart()
    gate.enter()
    gate.leave()


def test_a_signal_ends_a_stop_and_opens_the_gate_again(gate, interrupt):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(gate.enter).result()
        interrupt(gate.stop)
        assert state(gate) == "normal"
        interrupt(lambda: gate.stop(timeout=1000))
        thread.submit(gate.leave).result()
    with gate.stopped():
        interrupt(gate.stop)


def test_a_signal_ends_the_wait_of_a_shutdown(gate, interrupt):
    with ThreadPoolExecutor(1) as thread:
        thread.submit(gate.enter).result()
        with pytest.raises(TimeoutError):
            gate.shutdown(0)  # shut already, should the signal come before the next call
        interrupt(gate.shutdown)
        assert state(gate) == "shutdown"
        thread.submit(gate.leave).result()


def test_newcomers_that_wait_find_the_gate_destroyed(gate):
    gate.stop()
    started = threading.Barrier(2)

    def wait():
        started.wait()
        with pytest.raises(k42.Destroyed, match="Gate"):
            gate.enter()

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    k42.destroy(gate)
    thread.join()
    for call in (gate.enter, gate.try_enter, gate.leave, gate.stop, gate.restart, gate.shutdown, gate.inside):
        with pytest.raises(k42.Destroyed, match="Gate"):
            call()


# The interface


def test_the_default_is_distributed():
    gate = Gate.create()
    assert isinstance(gate, DistributedGate)
    assert isinstance(gate, Gate)
    k42.destroy(gate)


@every
def test_the_type_that_was_asked_for(implementation):
    gate = implementation.create()
    assert isinstance(gate, implementation)
    gate.enter()
    k42.local(gate).leave()
    with pytest.raises(TypeError):
        implementation.create(1)
    k42.destroy(gate)


def test_misuse_changes_nothing(gate):
    with pytest.raises(RuntimeError, match="without enter"):
        gate.leave()
    with pytest.raises(RuntimeError, match="not stopped"):
        gate.restart()
    gate.enter()
    with pytest.raises(RuntimeError, match="without enter"):
        elsewhere(gate.leave)
    for call in (gate.stop, gate.shutdown, lambda: gate.stop(0), gate.stopped().__enter__):
        with pytest.raises(RuntimeError, match="wait for its own caller"):
            call()
    assert gate.inside() == 1
    stopper = threading.Thread(target=gate.stop)
    stopper.start()
    wait_until(lambda: state(gate) == "stopped")
    with pytest.raises(RuntimeError, match="not stopped"):  # not yet
        gate.restart()
    gate.leave()
    stopper.join()
    gate.restart()
    assert state(gate) == "normal"


@pytest.mark.parametrize("method", ["stop", "shutdown", "stopped"])
def test_timeouts(gate, method):
    call = getattr(gate, method)
    for timeout, error in ((-1, ValueError), (float("nan"), ValueError), ("1", TypeError), ([], TypeError)):
        with pytest.raises(error):
            call(timeout)
    for wrong in (lambda: call(1, 2), lambda: call(patience=1), lambda: call(1, timeout=1)):
        with pytest.raises(TypeError, match=method):
            wrong()
    assert state(gate) == "normal"
    for timeout in (None, 0, 0.5, float("inf"), 1e300):
        with gate.stopped(timeout=timeout):
            pass


@pytest.mark.parametrize("method", ["enter", "try_enter", "leave", "restart", "inside"])
def test_no_arguments(gate, method):
    for wrong in (lambda: getattr(gate, method)(1), lambda: getattr(gate, method)(x=1)):
        with pytest.raises(TypeError):
            wrong()
    assert gate.inside() == 0


@every
@pytest.mark.parametrize("target", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("was", ["normal", "stopped", "shutdown"])
def test_state_is_transferred(implementation, target, was):
    assert implementation.transfers == target.transfers == ("gate",)
    root, other = implementation.Root(), target.Root()
    gate = root.create_rep()
    if was == "stopped":
        gate.stop()
    elif was == "shutdown":
        gate.shutdown()
    exported = root.export_state("gate")
    assert exported == was
    other.import_state("gate", exported)
    assert other.export_state("gate") == root.export_state("gate") == was
    assert state(other.create_rep()) == was
    if was == "stopped":
        rep = other.create_rep()
        rep.restart()
        rep.enter()


@every
def test_state_is_not_transferred_with_requests_inside(implementation):
    root = implementation.Root()
    gate = root.create_rep()
    gate.enter()
    with pytest.raises(k42.Error, match=r"inside the gate \(1\)"):
        root.export_state("gate")
    gate.leave()
    assert root.export_state("gate") == "normal"
    with pytest.raises(ValueError, match="no state of a gate"):
        root.import_state("gate", "ajar")


@every
@pytest.mark.parametrize("target", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
def test_a_swap_waits_until_nobody_is_inside(implementation, target):
    gate = implementation.create()
    inside, go = threading.Event(), threading.Event()

    def request():
        with gate:
            inside.set()
            go.wait()

    thread = threading.Thread(target=request)
    thread.start()
    inside.wait()
    threading.Timer(0.05, go.set).start()
    k42.swap(gate, target, timeout=60)
    assert go.is_set()
    assert isinstance(gate, target)
    thread.join()
    k42.destroy(gate)


@every
@pytest.mark.parametrize("target", IMPLEMENTATIONS, ids=lambda cls: cls.__name__)
def test_swapped_while_requests_come(implementation, target):
    """Whoever swaps a gate stops it first; those who come meanwhile wait, and enter the new one."""
    gate = implementation.create()
    done = threading.Event()

    def requests():
        while not done.is_set():
            with gate:
                assert not gate.try_enter() or gate.leave() is None

    def swapper():
        try:
            with pytest.raises(k42.SwapRefused, match="stays as it is"), gate:
                k42.swap(gate, target, timeout=0.05)
            for _ in range(3):
                for cls in (target, implementation):
                    with gate.stopped():
                        k42.swap(gate, cls)
                        assert isinstance(gate, cls)
                        assert gate.inside() == 0
        finally:
            done.set()

    race(swapper, requests, requests)
    gate.shutdown()
    k42.swap(gate, target)
    assert state(gate) == "shutdown"
    k42.destroy(gate)


def test_an_implementation_in_python():
    class Plain(Gate):
        class Root(k42.SharedRoot):
            pass

        def __init__(self):
            self.n = 0

        def enter(self):
            self.n += 1

        def leave(self):
            self.n -= 1

        def inside(self):
            return self.n

        def stop(self, timeout=None):
            self.n = -1

        def restart(self):
            self.n = 0

    plain = Plain.create()
    with plain:
        assert plain.inside() == 1
    with plain.stopped():
        assert plain.inside() == -1
    assert plain.inside() == 0
    with pytest.raises(NotImplementedError, match=r"try_enter\(\)"):
        plain.try_enter()
    k42.destroy(plain)


# Histories


class Specification:
    """The model, for calls whose thread is an argument; a stop has two effects, the second when it returns."""

    def __init__(self):
        self.model = models.Gate()
        self.stopper = None
        self.over = frozenset()  # stops that gave up

    def _call(self, name, *args):
        try:
            return getattr(self.model, name)(*args)
        except models.Waits:
            raise Blocked from None

    def enter(self, thread):
        return self._call("enter", thread)

    def try_enter(self, thread):
        return self._call("try_enter", thread)

    def leave(self, thread):
        return self._call("leave", thread)

    def restart(self, thread):
        self.stopper = None
        return self._call("restart")

    def inside(self, thread):
        return self._call("inside")

    def begin_stop(self, thread, stop):
        if stop in self.over:
            raise Blocked
        self._call("begin_stop", thread)
        self.stopper = stop

    def end_stop(self, thread, stop):
        if self.stopper != stop and self.model.state != "shutdown":
            raise Blocked
        self._call("end_stop")

    def give_up_stop(self, thread, stop):
        if self.stopper == stop:
            self._call("give_up_stop")
            self.stopper = None
        self.over |= {stop}
        raise TimeoutError

    def shut(self, thread):
        self.model.state = "shutdown"

    def drained(self, thread):
        if self.model.state != "shutdown" or self.model.requests:
            raise Blocked


def split(operations):
    """The operations for the specification: a stop and a shutdown are two, each somewhere between call and return."""
    for number, op in enumerate(operations):
        args = (op.thread,)
        if op.name == "stop":
            # One that was rejected or gave up may have begun to stop the gate, or not.
            begun = op if op.error is None else replace(op, returned=None)
            yield replace(begun, name="begin_stop", args=(*args, number), error=None)
            last = "give_up_stop" if isinstance(op.error, TimeoutError) else "end_stop"
            yield replace(op, name=last, args=(*args, number))
        elif op.name == "shutdown":
            yield replace(op, name="shut", args=args)
            yield replace(op, name="drained", args=args)
        else:
            yield replace(op, args=args)


def recorded(implementation, seed, closes, counts):
    history = History()
    reference = implementation.create()
    gate = history.record(reference)

    def work(thread):
        random_ = random.Random(seed * 10 + thread)

        def enter():
            if random_.random() < 0.5:
                gate.enter()
                return True
            return gate.try_enter()

        try:
            for _ in range(8):
                if random_.random() < 0.25:
                    try:
                        gate.stop(random_.choice([None, 0, 0.001]))
                    except TimeoutError:
                        continue
                    if counts:
                        gate.inside()
                    gate.restart()
                elif enter():
                    again = random_.random() < 0.3 and enter()
                    if counts:
                        gate.inside()
                    if again:
                        gate.leave()
                    gate.leave()
            if closes and thread == 0:
                gate.shutdown()
        except GateClosed:
            pass

    with frequent_switches():
        race(*(partial(work, thread) for thread in range(4)))
    k42.destroy(reference)
    return history.operations()


@every
@pytest.mark.parametrize("closes", [False, True], ids=["stops", "shutdown"])
def test_histories(implementation, closes):
    """Linearizable, but for `inside` of the distributed one: that sums counts of different moments."""
    for seed in range(12):
        check(split(recorded(implementation, seed, closes, counts=implementation is SharedGate)), Specification)


def test_histories_that_are_wrong():
    def op(thread, invoked, returned, name, result=None):
        return Operation(thread, name, result=result, invoked=invoked, returned=returned)

    entered_while_stopped = [op(0, 0, 1, "stop"), op(1, 2, 3, "enter")]
    stopped_while_inside = [op(1, 0, 1, "enter"), op(0, 2, 3, "stop")]
    two_stoppers = [op(0, 0, 1, "stop"), op(1, 2, 3, "stop")]
    turned_away_for_nothing = [op(1, 0, 1, "try_enter", False)]
    for operations in (entered_while_stopped, stopped_while_inside, two_stoppers, turned_away_for_nothing):
        with pytest.raises(NotLinearizable):
            check(split(operations), Specification)
    turned_away_by_a_stop_that_waits = [
        op(1, 0, 1, "enter"),
        op(0, 2, 7, "stop"),
        op(2, 3, 4, "try_enter", False),
        op(1, 5, 6, "leave"),
    ]
    check(split(turned_away_by_a_stop_that_waits), Specification)
