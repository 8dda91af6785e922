"""Requests that span calls: k42.request(), generators, coroutines, asynchronous generators."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncGenerator, Coroutine, Generator

import pytest

import k42
from k42 import _native
from k42.testing import PausePoint, race, wait_until


class Source(k42.Object):
    """Things that go on after their call has returned; `log` tells what happened, `ended` that it was released."""

    class Root(k42.SharedRoot):
        def __init__(self):
            self.log, self.ended = [], []

    def touch(self):
        return self.root

    def run(self, function):
        return function()

    def on_release(self):
        self.root.ended.append(threading.get_ident())

    def count(self, n):
        try:
            for i in range(n):
                received = yield i
                if received is not None:
                    self.root.log.append(received)
            return "returned"
        except KeyError as error:
            self.root.log.append(repr(error))
            yield "caught"
        finally:
            self.root.log.append("finally")

    def delegated(self, n):
        return (yield from self.root.ref.count(n))

    def stubborn(self):
        try:
            yield 1
        except GeneratorExit:
            yield 2

    async def add(self, x, y):
        await asyncio.sleep(0)
        return x + y

    async def outer(self, n):
        return sum([await self.root.ref.add(i, i) for i in range(n)])

    async def wait(self, event):
        try:
            await event.wait()
        finally:
            self.root.log.append("finally")
        return "waited"

    async def fail(self):
        await asyncio.sleep(0)
        raise KeyError("inside")

    async def stream(self, n):
        try:
            for i in range(n):
                await asyncio.sleep(0)
                received = yield i
                if received is not None:
                    self.root.log.append(received)
        except KeyError:
            yield "caught"
        finally:
            await asyncio.sleep(0)
            self.root.log.append("finally")


@pytest.fixture
def source():
    ref = Source.create()
    yield ref
    try:
        k42.destroy(ref)
    except k42.Destroyed:
        pass


def held(ref):
    return _native.suspended(ref)


def destroyed_later(ref, *names):
    """Destroys what is held by generators or coroutines of these names."""
    with pytest.warns(RuntimeWarning, match=", ".join(names)) as warned:
        assert k42.destroy(ref) is False
    assert len(warned) == 1
    assert "Source" in str(warned[0].message)


# request()


def test_a_request_keeps_what_it_found(source):
    root = source.touch()
    with k42.request():
        rep = k42.local(source)
        with k42.request():
            assert k42.destroy(source) is False
        with pytest.raises(k42.Destroyed):
            source.touch()
        assert root.ended == []
        assert rep.touch() is root
    assert root.ended == [threading.get_ident()]


def test_a_request_without_the_object_holds_nothing_up(source):
    root, inside, leave = source.touch(), PausePoint(), threading.Event()

    def body():
        with k42.request():
            inside()
            leave.wait()

    thread = threading.Thread(target=body)
    thread.start()
    inside.reached()
    assert k42.destroy(source) is True  # the other thread's processor has never used it
    assert root.ended
    inside.resume()
    leave.set()
    thread.join()


def test_a_request_of_another_thread_delays(source):
    root = source.touch()
    with PausePoint() as inside:

        def body():
            with k42.request():
                source.touch()
                inside()
                return k42.local(source)

        def destroy():
            inside.reached()
            assert k42.destroy(source) is False
            assert root.ended == []
            inside.resume()

        with pytest.raises(k42.Destroyed):
            race(body, destroy)
    source_of_another = Source.create()
    source_of_another.touch()
    k42.destroy(source_of_another)
    assert len(root.ended) == 1


def test_a_request_is_entered_once_and_left_where_it_was_entered():
    scope = k42.request()
    with pytest.raises(RuntimeError, match="the thread that began it"):
        scope.__exit__(None, None, None)
    with scope:
        with pytest.raises(RuntimeError, match="begun already"), scope:
            pass

        def leave():
            with pytest.raises(RuntimeError, match="the thread that began it"):
                scope.__exit__(None, None, None)

        race(leave)
    with pytest.raises(RuntimeError, match="the thread that began it"):
        scope.__exit__(None, None, None)
    with scope:  # and again
        pass
    with pytest.raises(TypeError):
        _native.RequestScope()


def test_an_exception_ends_a_request(source):
    source.touch()
    with pytest.raises(KeyError, match="inside"), k42.request():
        source.run(lambda: {}["inside"])
    assert k42.destroy(source) is True


def test_a_request_that_is_dropped(source):
    source.touch()
    scope = k42.request()
    scope.__enter__()
    source.touch()
    del scope
    gc.collect()
    assert k42.destroy(source) is True


def test_a_thread_that_ends_within_a_request(source):
    root = source.touch()

    def body():
        scopes.append(k42.request())
        scopes[0].__enter__()
        source.touch()

    scopes = []
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    k42.destroy(source)
    # The end of the operating system's thread comes a little later than join(); then the next owner of its processor
    # sees that a destruction has waited for it.
    other = Source.create()
    wait_until(lambda: race(other.touch, other.touch) and other.touch() and root.ended)
    k42.destroy(other)
    assert len(root.ended) == 1


# Generators


def test_a_generator_as_any_other(source):
    root = source.touch()
    each = source.count(3)
    assert isinstance(each, Generator)
    assert iter(each) is each
    assert next(each) == 0
    assert each.send("sent") == 1
    assert each.gi_frame is not None
    assert "count" in repr(each)
    assert held(source) == ["count"]
    assert next(each) == 2
    with pytest.raises(StopIteration) as stopped:
        next(each)
    assert stopped.value.value == "returned"
    assert held(source) == []
    with pytest.raises(StopIteration):
        next(each)
    assert root.log == ["sent", "finally"]


def test_exceptions_thrown_into_a_generator(source):
    root = source.touch()
    for error in ((KeyError("k"),), (KeyError, "k"), (KeyError,), (KeyError, KeyError("k"), None)):
        each = source.count(3)
        next(each)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # also where Python's own generators warn of the old signature
            assert each.throw(*error) == "caught"
        assert held(source) == ["count"]
        each.close()
        assert held(source) == []
    each = source.count(3)
    next(each)
    with pytest.raises(ZeroDivisionError):
        each.throw(ZeroDivisionError)
    assert held(source) == []
    assert root.log.count("finally") == 5


def test_what_a_generator_refuses_does_not_end_it(source):
    each = source.count(2)
    with pytest.raises(TypeError, match="just-started"):
        each.send(1)
    assert held(source) == ["count"]

    assert list(each) == [0, 1]
    assert held(source) == []


def test_a_generator_that_resumes_itself():
    class Running(Source):
        def running(self):
            with pytest.raises(ValueError, match="already executing"):
                next(running)
            assert held(self.root.ref) == ["running"]
            yield 1

    ref = Running.create()
    running = ref.running()
    assert next(running) == 1
    assert held(ref) == ["running"]
    assert list(running) == []
    assert held(ref) == []
    k42.destroy(ref)


def test_yield_from(source):
    each = source.delegated(2)
    assert next(each) == 0
    assert sorted(held(source)) == ["count", "delegated"]
    assert each.send("sent") == 1
    with pytest.raises(StopIteration) as stopped:
        next(each)
    assert stopped.value.value == "returned"
    assert held(source) == []
    each = source.delegated(2)
    next(each)
    assert each.throw(KeyError("k")) == "caught"
    each.close()
    assert held(source) == []


def test_a_generator_that_was_never_begun_or_is_dropped(source):
    root = source.touch()
    each = source.count(3)
    assert held(source) == ["count"]
    del each
    gc.collect()
    assert held(source) == []
    assert root.log == []
    each = source.count(3)
    next(each)
    del each
    gc.collect()
    assert held(source) == []
    assert root.log == ["finally"]


def test_a_generator_in_a_cycle(source):
    root = source.touch()

    class Holder:
        pass

    holder = Holder()
    holder.me, holder.each = holder, source.count(3)
    next(holder.each)
    del holder
    gc.collect()
    assert held(source) == []
    assert root.log == ["finally"]


def test_a_generator_that_will_not_close(source):
    each = source.stubborn()
    next(each)
    with pytest.raises(RuntimeError, match="ignored GeneratorExit"):
        each.close()
    assert held(source) == ["stubborn"]
    with pytest.raises(StopIteration):
        next(each)
    assert held(source) == []


def test_a_generator_that_other_threads_resume(source):
    each, n = source.count(40), 4
    turn = threading.Barrier(n)

    def work(i):
        got = []
        for k in range(40):
            turn.wait()
            if k % n == i:
                got.append(next(each))
            turn.wait()
        return got

    results = race(*[lambda i=i: work(i) for i in range(n)])
    assert results == [list(range(i, 40, n)) for i in range(n)]
    assert held(source) == ["count"]
    assert list(each) == []
    assert held(source) == []


def test_destroyed_under_a_generator(source):
    root = source.touch()
    first, second = source.count(3), source.count(3)
    next(first)
    next(second)
    destroyed_later(source, "count", "count")
    with pytest.raises(k42.Destroyed):
        source.touch()
    assert list(first) == [1, 2]
    assert root.ended == []
    second.close()
    assert len(root.ended) == 1
    assert root.log == ["finally", "finally"]


def test_destroyed_under_a_generator_that_is_dropped(source):
    root = source.touch()
    each = source.count(3)
    next(each)
    destroyed_later(source, "count")
    del each
    gc.collect()
    assert root.log == ["finally"]
    assert len(root.ended) == 1


def test_destroyed_within_a_generator(source):
    class Own(Source):
        def own(self):
            yield 1
            k42.destroy(self.root.ref)
            yield 2

    ref = Own.create()
    root = ref.touch()
    each = ref.own()
    assert next(each) == 1
    with pytest.warns(RuntimeWarning, match="own"):
        assert next(each) == 2
    assert root.ended == []
    assert list(each) == []
    assert len(root.ended) == 1


def test_a_warning_that_is_an_error_comes_after_the_destruction(source):
    each = source.count(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            k42.destroy(source)
    with pytest.raises(k42.Destroyed):
        source.touch()
    assert list(each) == [0, 1, 2]


# Coroutines


def test_coroutines(source):
    coroutine = source.add(1, 2)
    assert isinstance(coroutine, Coroutine)
    assert inspect.isawaitable(coroutine)
    assert held(source) == ["add"]
    assert asyncio.run(coroutine) == 3
    assert held(source) == []
    with pytest.raises(RuntimeError, match="reuse"):
        asyncio.run(coroutine)
    assert asyncio.run(source.outer(5)) == 20
    with pytest.raises(KeyError, match="inside"):
        asyncio.run(source.fail())
    assert held(source) == []
    with pytest.warns(RuntimeWarning, match="never awaited"):
        (source.add(1, 2), gc.collect())
    assert held(source) == []


def test_many_tasks(source):
    async def main():
        sums = await asyncio.gather(*(source.add(i, i) for i in range(50)), source.outer(3))
        failed = await asyncio.gather(source.fail(), source.add(1, 1), return_exceptions=True)
        task = asyncio.create_task(source.add(2, 2), name="of mine")
        return sums, failed, await task

    sums, (error, two), four = asyncio.run(main())
    assert sums == [2 * i for i in range(50)] + [6]
    assert isinstance(error, KeyError)
    assert (two, four) == (2, 4)
    assert held(source) == []


@pytest.mark.parametrize("way", ["cancel", "wait_for", "timeout", "group"])
def test_cancelled(source, way):
    root = source.touch()

    async def main():
        event = asyncio.Event()
        if way == "cancel":
            task = asyncio.create_task(source.wait(event))
            await asyncio.sleep(0.001)
            assert held(source) == ["wait"]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif way == "wait_for":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(source.wait(event), 0.01)
        elif way == "timeout":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await source.wait(event)
        else:

            async def grouped():
                async with asyncio.TaskGroup() as group:
                    group.create_task(source.wait(event))
                    group.create_task(source.fail())

            with pytest.raises(ExceptionGroup):
                await grouped()
        assert held(source) == []

    asyncio.run(main())
    assert root.log == ["finally"]


def test_destroyed_under_a_coroutine(source):
    root = source.touch()

    async def main():
        event = asyncio.Event()
        task = asyncio.create_task(source.wait(event))
        await asyncio.sleep(0.001)
        destroyed_later(source, "wait")
        assert root.ended == []
        event.set()
        assert await task == "waited"
        assert len(root.ended) == 1

    asyncio.run(main())


def test_event_loops_in_several_threads(source):
    def work():
        return asyncio.run(source.outer(20))

    assert race(*[work] * 4) == [380] * 4
    assert held(source) == []


# Asynchronous generators


def test_asynchronous_generators(source):
    root = source.touch()

    async def main():
        stream = source.stream(3)
        assert isinstance(stream, AsyncGenerator)
        assert held(source) == ["stream"]
        assert [x async for x in stream] == [0, 1, 2]
        assert held(source) == []
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        stream = source.stream(3)
        assert await anext(stream) == 0
        assert await stream.asend("sent") == 1
        assert await stream.athrow(KeyError("k")) == "caught"
        assert held(source) == ["stream"]
        await stream.aclose()
        assert held(source) == []
        stream = source.stream(3)
        assert await anext(stream) == 0
        with pytest.raises(ZeroDivisionError):
            await stream.athrow(ZeroDivisionError)
        assert held(source) == []

    asyncio.run(main())
    assert root.log == ["finally", "sent", "finally", "finally"]


def test_an_asynchronous_generator_that_is_dropped_is_closed_by_the_loop(source):
    root = source.touch()

    async def main():
        stream = source.stream(3)
        assert await anext(stream) == 0
        destroyed_later(source, "stream")
        del stream
        gc.collect()
        assert root.ended == []  # it has not ended: its finally awaits
        for _ in range(10):
            await asyncio.sleep(0)
        assert root.log == ["finally"]
        assert len(root.ended) == 1

    asyncio.run(main())


def test_an_asynchronous_generator_that_the_end_of_the_loop_closes(source):
    root, kept = source.touch(), []

    async def main():
        kept.append(source.stream(3))
        assert await anext(kept[0]) == 0

    asyncio.run(main())
    assert root.log == ["finally"]
    assert held(source) == []


def test_an_asynchronous_generator_without_a_loop(source):
    stream = source.stream(3)
    assert held(source) == ["stream"]
    del stream
    gc.collect()
    assert held(source) == []
    stream = source.stream(1)

    def step():
        awaited = anext(stream)
        try:
            while True:
                assert awaited.send(None) is None  # at a sleep
        except StopIteration as stopped:
            return stopped.value

    assert step() == 0
    assert held(source) == ["stream"]
    with pytest.raises(StopAsyncIteration):
        step()
    assert held(source) == []


def test_a_cancelled_step_of_an_asynchronous_generator(source):
    root = source.touch()

    async def main():
        stream = source.stream(3)
        assert await anext(stream) == 0
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held(source) == []

    asyncio.run(main())
    assert root.log == ["finally"]


def test_hooks_of_the_thread_are_as_they_were(source):
    seen = []

    async def main():
        mine = (lambda agen: seen.append(agen), lambda agen: None)
        before = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(*mine)
        stream = source.stream(1)
        assert [x async for x in stream] == [0]
        assert tuple(sys.get_asyncgen_hooks()) == mine
        sys.set_asyncgen_hooks(*before)
        assert seen == [stream]

    asyncio.run(main())


# The end of the program


AT_EXIT = """
import threading, time
import k42
from k42.structures import SharedCounter

class Slow(k42.Object):
    transfers = ("n",)
    def __init__(self): self.lock = threading.Lock()
    def spin(self):
        return sum(range(100))
    def export_state(self, form):
        quiet.set()
        time.sleep(100)
    def each(self):
        yield from range(1000)
quiet = threading.Event()
counter, slow, swapped = SharedCounter.create(), Slow.create(), Slow.create()
swapped.spin()
def loop(function):
    def body():
        while True:
            function()
    threading.Thread(target=body, daemon=True).start()
loop(counter.value)
loop(slow.spin)
loop(lambda: list(slow.each()))
loop(lambda: k42.swap(swapped, Slow))
quiet.wait()
loop(swapped.spin)
each = slow.each()
next(each)
time.sleep(0.1)
print("leaving", flush=True)
"""


@pytest.mark.parametrize("_", range(3))
def test_daemon_threads_at_the_end_of_the_program(_):
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "leaving\n"
    assert done.stderr == ""
