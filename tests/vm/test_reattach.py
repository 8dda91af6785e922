"""Forked children of clients that were connected with ``fork="reattach"``."""

from __future__ import annotations

import signal

import pytest
from vm_support import PAGE, PAGES, Raw, descriptors_of, until, words

from k42 import vm
from k42.vm.fr import compress

# Forking a process that has threads is what is tested here.
FORKING = ("-W", "ignore::DeprecationWarning")
NOT_OURS = "this mapping belongs to the parent process: open it again in the forked child"

# In scripts: runs a function in a forked child, and says how it ended.
IN_CHILD = """
socket, path, *more = sys.argv[1:]
def in_child(work):
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
"""


@pytest.fixture
def parent(shared_kernel, script, path):
    """Starts a process with such a client, and some mappings of its own."""

    def start(code: str, *arguments: object):
        return script(IN_CHILD + code, shared_kernel.socket, path, *arguments, options=FORKING)

    return start


def test_what_was_mapped_goes_on_in_the_child_and_is_shared(parent, path):
    code = """
wanted = open(path, "rb").read()
client = vm.connect(socket, fork="reattach")
reader, writer = client.open(path, offset=100), client.open(path, "r+")
views = memoryview(reader), memoryview(writer)
address = writer.base
views[1][4096:4104] = b"parent 1"

def child():
    assert writer.base == address
    assert bytes(views[0][:2000]) == wanted[100:2100]
    assert bytes(views[0]) == bytes(writer)[100:] == wanted[100:4096] + b"parent 1" + wanted[4104:]
    views[1][8192:8200] = b"child  1"       # there already
    writer[50 * 4096 : 50 * 4096 + 8] = b"child  2"
    writer.flush()
    assert in_child(grandchild) == 0
    assert writer[12288:12296] == b"grand  1"
    reader.seek(0)
    assert reader.read(4) == wanted[100:104]
    del views[:]
    with client.open(path) as other, client.anonymous(4096) as memory:
        memory[0] = 1
        assert other[8192:8200] == b"child  1"
    writer.close()
    client.close()

def grandchild():
    assert views[1][8192:8200] == b"child  1"
    views[1][12288:12296] = b"grand  1"

views = list(views)
say(in_child(child), in_child(lambda: None))
assert views[1][8192:8200] == b"child  1" and views[0][50 * 4096 - 100 :][:8] == b"child  2"
views[1][16384:16392] = b"parent 2"
assert bytes(reader) == bytes(writer)[100:]
del views[:]
writer.close()
client.close()
"""
    process = parent(code)
    assert process.line() == "0 0"
    process.good()
    content = bytearray(words(PAGES * PAGE))
    for at, text in ((4096, b"parent 1"), (8192, b"child  1"), (12288, b"grand  1"), (16384, b"parent 2")):
        content[at : at + 8] = text
    content[50 * 4096 : 50 * 4096 + 8] = b"child  2"
    assert path.read_bytes() == content


def test_memory_of_the_parents_own_stays_its_own(parent):
    code = """
client = vm.connect(socket, fork="reattach")
mapping, copies, memory = client.open(path), client.open(path, "c"), client.anonymous(8192)
copies[0:1], memory[0:1] = b"c", b"m"
snapshot = memory.snapshot()
private = copies, memory, snapshot
views = [memoryview(each) for each in private]

def child():
    assert mapping[:8] == open(path, "rb").read(8)
    for each in private:
        try:
            bytes(each)
        except BufferError as error:
            say(error)
        for use in (each.local, each.snapshot, lambda: each.resize(4096), each.flush):
            try:
                use()
            except ValueError as error:
                assert str(error) == sys.argv[3]
            except TypeError:
                assert each is copies  # cannot be resized anyway
        each.close()

signal.alarm(30)
say(in_child(child))
for view in views:
    say(in_child(lambda: view[0]))
say([view[0:1].tobytes() for view in views])
"""
    process = parent(code, NOT_OURS)
    assert [process.line() for _ in range(4)] == [NOT_OURS] * 3 + ["0"]
    assert [process.line() for _ in range(3)] == [str(-signal.SIGSEGV)] * 3
    assert process.line() == "[b'c', b'm', b'm']"
    process.good()
    assert process.stderr().count("it belongs to the parent process") == 3


def test_what_ends_an_access_in_the_child_is_said(parent):
    code = """
import ctypes
client = vm.connect(socket, fork="reattach")
mapping = client.open(path)
def write():
    ctypes.c_char.from_address(mapping.base).value = b"x"
say(in_child(write))
"""
    process = parent(code)
    assert process.line() == str(-signal.SIGSEGV)
    process.good()
    assert "it is mapped for reading only" in process.stderr()


def test_urls_and_local_windows(parent, path, folder):
    compress(path, folder / "packed")
    code = """
wanted = open(path, "rb").read()
client = vm.connect(socket, fork="reattach")
mapping, url = client.open(path, "r+"), client.open("zstd+file://" + more[0])
windows = []
for cpu in sorted(os.sched_getaffinity(0)):
    def local(cpu=cpu):
        os.sched_setaffinity(0, {cpu})
        windows.append(mapping.local())
    thread = threading.Thread(target=local)
    thread.start()
    thread.join()
views = [memoryview(window) for window in windows]

def child():
    assert bytes(url) == wanted
    for number, view in enumerate(views):
        view[number * 4096] = 200 + number
    for number in range(len(views)):
        assert all(view[number * 4096] == 200 + number for view in views)

say(in_child(child))
say([mapping[number * 4096] - 200 for number in range(len(views))] == list(range(len(views))))
"""
    process = parent(code, folder / "packed")
    assert [process.line(), process.line()] == ["0", "True"]
    process.good()


def test_a_child_has_what_it_needs_and_its_end_frees_it(shared_kernel, parent):
    code = """
client = vm.connect(socket, fork="reattach")
mapping = client.open(path)
mapping[0]
def child():
    say(os.getpid())
    sys.stdin.readline()
in_child(child)
say("ended")
sys.stdin.readline()
"""
    process = parent(code)
    child = int(process.line())

    def of(kind: str, pid: int) -> int:
        return sum(kind in link for link in descriptors_of(pid))

    for kind in ("userfaultfd", "memfd:k42:"):
        assert of(kind, child) == of(kind, process.pid)
    with vm.connect(shared_kernel.socket) as client:

        def regions() -> dict[int, int]:
            return {each["pid"]: each["regions"] for each in client.stat()["clients"]}

        assert regions()[child] == regions()[process.pid] == 1
        process.tell()
        assert process.line() == "ended"
        until(lambda: child not in regions(), "the child is forgotten")
        assert regions()[process.pid] == 1
    process.tell()
    process.good()


def test_a_kernel_that_has_gone(kernels, script, path):
    kernel = kernels()
    code = """
client = vm.connect(socket, fork="reattach", grace=0.1)
mapping = client.open(path)
say("ready")
sys.stdin.readline()
def child():
    try:
        mapping[0]
    except BufferError as error:
        say(error)
say(in_child(child))
"""
    process = script(IN_CHILD + code, kernel.socket, path, options=FORKING)
    assert process.line() == "ready"
    kernels.kill(kernel)
    process.tell()
    assert [process.line(), process.line()] == [NOT_OURS, "0"]
    process.good()
    assert "ForkWarning: in this forked child the mappings are not there: no kernel listens" in process.stderr()


def test_a_warning_that_is_an_error_leaves_no_client_with_the_parents_connection(kernels, shared_kernel, script, path):
    kernel = kernels()
    code = """
warnings.simplefilter("error", vm.ForkWarning)
clients = [vm.connect(more[0]) for _ in range(3)] + [vm.connect(socket, fork="reattach")]
clients += [vm.connect(more[0]) for _ in range(3)]
say("ready")
sys.stdin.readline()
def child():
    for client in clients:
        try:
            client.stat()
        except vm.KernelUnavailable as error:
            say(error)
say(in_child(child))
"""
    process = script(IN_CHILD + code, kernel.socket, path, shared_kernel.socket, options=FORKING)
    assert process.line() == "ready"
    kernels.kill(kernel)
    process.tell()
    assert [process.line() for _ in range(8)] == ["this client is closed"] * 7 + ["0"]
    process.good()


def test_a_thread_that_forks_within_a_call_does_not_wait_for_itself(parent):
    code = """
import k42.vm.client
k42.vm.client._FORK_WAIT = 0.05
client = vm.connect(socket, fork="reattach")
mapping = client.open(path)
def child():
    try:
        mapping[0]
    except BufferError as error:
        say(error)
for lock in (client._lock, mapping._lock):
    with lock:
        say(in_child(child))
client.stat()
assert in_child(lambda: mapping[0]) == 0
"""
    process = parent(code)
    assert [process.line() for _ in range(4)] == [NOT_OURS, "0"] * 2
    process.good()
    assert process.stderr().count("ForkWarning: in this forked child another thread was changing mappings") == 2


def test_forks_while_others_open_close_and_resize(parent):
    code = """
import contextlib
wanted = open(path, "rb").read()
client = vm.connect(socket, fork="reattach")
mapping = client.open(path, "r+")
ends = threading.Event()
def change(number):
    name = f"{path}.{number}"
    while not ends.is_set():
        with client.open(name, "w+", length=8192) as other:
            other[:4] = b"here"
            other.resize(40960)
            other.resize(4096)
            assert other[:4] == b"here"
threads = [threading.Thread(target=change, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
def child():
    assert bytes(mapping) == wanted
    for other in list(client._mappings):
        with contextlib.suppress(vm.StoreError):  # the parent has made the file shorter since
            assert other is mapping or other[:4] in (b"here", bytes(4))
statuses = [in_child(child) for _ in range(20)]
ends.set()
for thread in threads:
    thread.join()
say(statuses)
assert bytes(mapping) == wanted
"""
    process = parent(code)
    assert process.line() == str([0] * 20)
    process.good()
    assert "was changing mappings" not in process.stderr()


def test_data_loader_with_many_workers(shared_kernel, script, folder):
    """As torch's: workers are forked, inherit the dataset, and send batches back; no worker opens anything."""
    rows, width = 512, 1024
    path = folder / "rows"
    path.write_bytes(words(rows * width))
    code = """
import multiprocessing
socket, path = sys.argv[1:]
ROWS, WIDTH, BATCH = 512, 1024, 16

class Rows:
    def __init__(self):
        self.client = vm.connect(socket, fork="reattach")
        self.memory = memoryview(self.client.open(path))
    def __getitem__(self, index):
        return bytes(self.memory[index * WIDTH : (index + 1) * WIDTH])

def work(dataset, todo, done):
    while (start := todo.get()) is not None:
        done.put((start, [dataset[index] for index in range(start, start + BATCH)]))

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    dataset = Rows()
    first = dataset[0]
    todo, done = context.Queue(), context.Queue()
    workers = [context.Process(target=work, args=(dataset, todo, done)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for start in range(0, ROWS, BATCH):
        todo.put(start)
    batches = dict(done.get() for _ in range(0, ROWS, BATCH))
    for _ in workers:
        todo.put(None)
    for worker in workers:
        worker.join()
    content = b"".join(row for _, batch in sorted(batches.items()) for row in batch)
    say([worker.exitcode for worker in workers], content == open(path, "rb").read(), dataset[0] == first)
    with context.Pool(2) as pool:
        say(pool.map(dataset.memory.__getitem__, range(3)) == list(content[:3]))
"""
    program = folder / "loader.py"
    program.write_text("import k42.vm as vm\nimport sys\ndef say(*words):\n    print(*words, flush=True)\n" + code)
    process = script(
        "import runpy\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')\n",
        program,
        shared_kernel.socket,
        path,
        options=FORKING,
    )
    assert process.line() == "[0, 0, 0, 0, 0, 0] True True"
    process.stderr()


def test_the_default_and_closed_clients_are_as_ever(parent):
    code = """
plain, closed = vm.connect(socket), vm.connect(socket, fork="reattach")
mapping = plain.open(path)
closed.close()
def child():
    try:
        mapping[0]
    except BufferError as error:
        say(error)
    try:
        closed.stat()
    except vm.KernelUnavailable as error:
        say(error)
say(in_child(child))
try:
    vm.connect(socket, fork="copy")
except ValueError as error:
    say(error)
"""
    process = parent(code)
    wanted = [NOT_OURS, "this client is closed", "0", "fork must be None or 'reattach', not 'copy'"]
    assert [process.line() for _ in range(4)] == wanted
    process.good()


def test_the_kernel_hears_of_no_reattached_region_twice(shared_kernel, parent):
    # A child's regions are its own: at their addresses the parent's go on.
    code = """
client = vm.connect(socket, fork="reattach")
mapping = client.open(path, "r+")
def child():
    mapping[0:1] = b"1"
    mapping.close()
for _ in range(3):
    assert in_child(child) == 0
mapping[1:2] = b"2"
say(mapping[:2])
sys.stdin.readline()
"""
    process = parent(code)
    assert process.line() == "b'12'"
    with Raw(shared_kernel.socket), vm.connect(shared_kernel.socket) as client:
        assert [each["regions"] for each in client.stat()["clients"] if each["pid"] == process.pid] == [1]
    process.tell()
    process.good()
