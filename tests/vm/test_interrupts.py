"""A request that Ctrl-C interrupts leaves the connection in order; a kernel that died is replaced at the next call."""

from __future__ import annotations

import os

CTRL_C = """
    import time
    armed = False
    def on_interrupt(*_):
        global armed
        if armed:  # only in the midst of what is tested
            armed = False
            raise KeyboardInterrupt
    signal.signal(signal.SIGINT, on_interrupt)
    client = vm.connect(sys.argv[1])
    path = sys.argv[2]
    content = open(path, "rb").read()
    interrupted = opened = 0
    over = threading.Event()
    def strike():
        for _ in range(500):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.0007)
        over.set()
    thread = threading.Thread(target=strike)
    thread.start()
    while not over.is_set():
        try:
            armed = True
            mapping = client.open(path, page_size=65536)
            if mapping[:] != content:
                say("wrong bytes")
            mapping.close()
            opened += 1
        except KeyboardInterrupt:
            interrupted += 1
        armed = False
    thread.join()
    mapping = None
    # Each question gets its own answer.
    for size in range(1, 20):
        with client.anonymous(size * 4096) as memory:
            memory[:1] = b"x"
            frames = client.stat()["frames"]
            if frames["promised_anonymous"] != size:
                say("a stale reply", frames)
    say("interrupted", interrupted > 0)
    """


def test_interrupted_requests(kernels, script, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    assert script(CTRL_C, kernels().socket, path).good() == "interrupted True\n"


NEW_KERNEL = """
    import signal
    first = vm.anonymous(4096)
    pid = vm.client.default_client().kernel_pid
    first[0] = 7
    os.kill(pid, signal.SIGKILL)
    second = vm.anonymous(4096)
    second[0] = 8
    say(first[0], second[0], vm.client.default_client().kernel_pid != pid)
    """


def test_the_default_client_finds_a_new_kernel(script, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert script(NEW_KERNEL).good() == "7 8 True\n"
