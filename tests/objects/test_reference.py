"""What a reference looks like to its user: methods, special methods, identity, refusals."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from abc import ABC, abstractmethod

import pytest

import k42


class Bag(k42.Object):
    """A bag of things."""

    LIMIT = 3

    def __init__(self):
        self.items = {}
        self.entered = 0
        self._label = "none"

    def put(self, key, value=None, *rest, scale=1, **more):
        """Put it in."""
        self.items[key] = value
        return (key, value, rest, scale, more)

    def me(self):
        return self

    def down(self, n):
        return 0 if n == 0 else 1 + self.root.ref.down(n - 1)

    def fail(self):
        raise KeyError("inside")

    def each(self):
        yield from self.items

    @property
    def label(self):
        return self._label

    @label.setter
    def label(self, value):
        self._label = value

    @property
    def size(self):
        return len(self.items)

    @staticmethod
    def double(x):
        return 2 * x

    @classmethod
    def name(cls):
        return cls.__name__

    def __len__(self):
        return len(self.items)

    def __bool__(self):
        return True

    def __getitem__(self, key):
        return self.items[key]

    def __setitem__(self, key, value):
        self.items[key] = value

    def __delitem__(self, key):
        del self.items[key]

    def __contains__(self, key):
        return key in self.items

    def __iter__(self):
        return iter(self.items)

    def __call__(self, *args, **kwargs):
        return args, kwargs

    def __enter__(self):
        self.entered += 1
        return self

    def __exit__(self, *error):
        self.entered -= 1

    def __add__(self, other):
        return len(self.items) + other

    def __radd__(self, other):
        return other - len(self.items)

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 1

    def __str__(self):
        return "a bag"


@pytest.fixture
def bag():
    ref = Bag.create()
    yield ref
    try:
        k42.destroy(ref)
    except k42.Destroyed:
        pass


def test_arguments_pass_unchanged(bag):
    assert bag.put("a") == ("a", None, (), 1, {})
    assert bag.put("a", 2, scale=3) == ("a", 2, (), 3, {})
    assert bag.put("a", 1, 2, 3, 4, 5, 6, 7, 8, 9, x=1, y=2) == (
        "a",
        1,
        (2, 3, 4, 5, 6, 7, 8, 9),
        1,
        {"x": 1, "y": 2},
    )
    assert bag.put(*["k", "v"], scale=5) == ("k", "v", (), 5, {})
    with pytest.raises(TypeError):
        bag.put()
    with pytest.raises(TypeError):
        bag.me(1)


def test_the_callers_arguments_are_left_alone(bag):
    arguments = ("a", [1])
    for _ in range(3):
        assert bag(*arguments) == (arguments, {})
    method = bag.put
    assert method("b")[0] == "b"
    assert method("c")[0] == "c"


def test_special_methods(bag):
    assert len(bag) == 0
    assert bool(bag)
    bag["x"] = 1
    assert bag["x"] == 1
    assert "x" in bag
    assert "y" not in bag
    assert list(bag) == ["x"]
    assert bag(1, k=2) == ((1,), {"k": 2})
    with bag as entered:
        assert entered is bag
        assert k42.local(bag).entered == 1
    assert k42.local(bag).entered == 0
    assert bag + 1 == 2
    assert 1 + bag == 0
    assert str(bag) == "a bag"
    del bag["x"]
    assert len(bag) == 0


def test_what_the_class_does_not_define_fails_as_usual():
    class Bare(k42.Object):
        pass

    bare = Bare.create()
    with pytest.raises(TypeError):
        len(bare)
    with pytest.raises(TypeError):
        bare()
    with pytest.raises(AttributeError, match="nothing"):
        bare.nothing  # noqa: B018
    k42.destroy(bare)


def test_properties_and_class_attributes(bag):
    assert bag.label == "none"
    bag.label = "fruit"
    assert bag.label == "fruit"
    assert k42.local(bag)._label == "fruit"
    assert bag.size == 0
    assert bag.LIMIT == 3
    assert bag.double(4) == 8
    assert bag.name() == "Bag"
    with pytest.raises(AttributeError):
        bag.size = 3
    with pytest.raises(AttributeError):
        bag.LIMIT = 3


def test_setting_attributes_is_refused(bag):
    with pytest.raises(AttributeError, match=r"k42\.local"):
        bag.anything = 1
    with pytest.raises(AttributeError):
        bag.put = 1
    with pytest.raises(AttributeError):
        del bag.put
    with pytest.raises(AttributeError):
        bag.__class__ = int


def test_return_self_is_the_reference(bag):
    assert bag.me() is bag
    assert k42.local(bag) is not bag
    assert type(k42.local(bag)) is Bag


def test_recursion_through_the_reference(bag):
    assert bag.down(50) == 50
    with pytest.raises(RecursionError):
        bag.down(1_000_000)
    assert bag.down(3) == 3


def test_exceptions_pass_through(bag):
    for _ in range(3):
        with pytest.raises(KeyError, match="inside"):
            bag.fail()
    assert k42.destroy(bag)  # nothing is left inside


def test_a_generator_is_a_request_until_it_ends(bag):
    bag["x"], bag["y"] = 1, 2
    each = bag.each()
    assert next(each) == "x"
    with pytest.warns(RuntimeWarning, match="each"):
        assert k42.destroy(bag) is False
    assert list(each) == ["y"]


def test_identity(bag):
    other = Bag.create()
    assert bag == bag
    assert bag != other
    assert len({bag, other}) == 2
    assert hash(bag) == object.__hash__(bag)
    assert isinstance(bag, Bag)
    assert isinstance(bag, k42.Object)
    k42.destroy(other)


def test_repr(bag):
    assert repr(bag).startswith(f"<reference to {__name__}.Bag, ")
    k42.destroy(bag)
    assert repr(bag) == f"<reference to {__name__}.Bag, destroyed>"


def test_introspection(bag):
    assert bag.put.__doc__ == "Put it in."
    assert bag.put.__name__ == "put"
    assert str(inspect.signature(bag.put)) == "(key, value=None, *rest, scale=1, **more)"
    assert bag.__doc__ == "A bag of things."
    assert "put" in dir(bag)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_is_refused(bag, protocol):
    with pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(bag, protocol)


@pytest.mark.parametrize("function", [copy.copy, copy.deepcopy])
def test_copying_is_refused(bag, function):
    with pytest.raises(TypeError, match="cannot pickle or copy"):
        function(bag)


def test_weak_references(bag):
    assert weakref.ref(bag)() is bag


def test_an_object_that_nobody_refers_to_is_collected():
    class Leaf(k42.Object):
        def __init__(self):
            pass

        def touch(self):
            pass

    ref = Leaf.create()
    ref.touch()
    rep, handle = weakref.ref(k42.local(ref)), weakref.ref(ref)
    del ref
    gc.collect()
    assert handle() is None
    gc.collect()
    assert rep() is None


def test_abstract_interfaces():
    class Process(k42.Object):
        def handle_fault(self, address):
            raise NotImplementedError

        def both(self, address):
            return self.handle_fault(address)

    class SharedProcess(Process):
        def handle_fault(self, address):
            return address + 1

    class DistributedProcess(SharedProcess):
        class Root(k42.DistributedRoot):
            pass

        def handle_fault(self, address):
            return super().handle_fault(address) + 1

    class Heir(DistributedProcess):
        pass

    assert [c.create().handle_fault(1) for c in (SharedProcess, DistributedProcess, Heir)] == [2, 3, 3]
    assert [c.create().both(1) for c in (SharedProcess, DistributedProcess, Heir)] == [2, 3, 3]
    with pytest.raises(NotImplementedError):
        Process.create().handle_fault(1)
    assert isinstance(SharedProcess.create(), Process)


def test_abc_interfaces():
    class Interface(k42.Object, ABC):
        @abstractmethod
        def work(self): ...

    class Worker(Interface):
        def work(self):
            return 1

    assert Worker.create().work() == 1
    with pytest.raises(TypeError, match="abstract"):
        Interface.create().work()


def test_a_root_may_choose_another_class():
    class First(k42.Object):
        class Root(k42.SharedRoot):
            def create_rep(self):
                self.rep_class = Second
                return super().create_rep()

        def which(self, *, suffix=""):
            return "first" + suffix

    class Second(k42.Object):
        def which(self, *, suffix=""):
            return "second" + suffix

    assert First.create().which(suffix="!") == "second!"


def test_native_functions_refuse_other_things(bag):
    for function in (k42.destroy, k42.local):
        with pytest.raises(TypeError, match="needs a reference"):
            function(Bag())
    with pytest.raises(TypeError, match="reference"):
        type(bag).put()
    with pytest.raises(TypeError, match="reference"):
        type(bag).put(3)
    with pytest.raises(TypeError):
        type(bag)()


def test_create_passes_arguments_to_the_root():
    class Sized(k42.Object):
        class Root(k42.SharedRoot):
            def __init__(self, size, *, name="x"):
                if size < 0:
                    raise ValueError(size)
                self.size, self.name, self.early = size, name, self.ref

        def get(self):
            return self.root.size, self.root.name, self.root.early, self.root.rep_class

    ref = Sized.create(3, name="y")
    assert ref.get() == (3, "y", ref, Sized)
    with pytest.raises(ValueError, match="-1"):
        Sized.create(-1)
    with pytest.raises(TypeError):
        Sized.create()
    with pytest.raises(TypeError):
        Bag.create(1)
    assert k42.destroy(ref)
