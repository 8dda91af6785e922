"""`k42 compress`: what it writes can be mapped, and what ends it leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from k42 import cli, vm
from k42.vm.fr import compress
from k42.vm.fr import compressed as module

TEXT = b"the same again and again\n" * 40_000


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["compress", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def plain(folder: Path) -> Path:
    made = folder / "plain"
    made.write_bytes(TEXT)
    made.chmod(0o640)
    return made


def test_what_is_written_can_be_mapped(plain, shared_kernel):
    code, out, err = run(plain, "--level", 7, "--group", "64K")
    packed = plain.with_name("plain.zst")
    assert (code, err) == (0, "")
    assert out.startswith(f"{packed}: 1.0 MB in ")
    assert packed.stat().st_size < len(TEXT) // 10
    assert packed.stat().st_mode & 0o777 == 0o640
    with vm.connect(shared_kernel.socket) as client, client.open(f"zstd+file://{packed}") as mapping:
        assert bytes(mapping) == TEXT
    assert plain.read_bytes() == TEXT


@pytest.mark.parametrize("group", ["4K", "128K", "64M"])
def test_every_size_of_a_group_can_be_read(plain, shared_kernel, group):
    assert run(plain, "--group", group, "-o", plain.with_name("out"))[0] == 0
    with vm.connect(shared_kernel.socket) as client, client.open(f"zstd+file://{plain.with_name('out')}") as mapping:
        assert mapping[500_000:500_100] == TEXT[500_000:500_100]


@pytest.mark.parametrize("group", ["1K", "5000", "65M", "x"])
def test_other_sizes_are_refused(plain, group):
    code, _, err = run(plain, "--group", group)
    assert code == 2
    assert "--group" in err or "size" in err
    assert os.listdir(plain.parent) == ["plain"]


def test_nothing_is_overwritten_unless_forced(plain):
    target = plain.with_name("plain.zst")
    target.write_bytes(b"precious")
    cure = "--force replaces it, --output writes elsewhere"
    assert run(plain) == (2, "", f"k42: {target} is there already: {cure}\n")
    assert target.read_bytes() == b"precious"
    assert run(plain, "--force")[0] == 0
    assert target.stat().st_size > 8
    code, _, err = run(plain, "--force", "--output", plain)
    assert (code, err) == (2, f"k42: {plain} is there already: choose another --output\n")
    assert plain.read_bytes() == TEXT
    assert sorted(os.listdir(plain.parent)) == ["plain", "plain.zst"]


def test_what_comes_meanwhile_is_not_overwritten_either(plain):
    target = plain.with_name("target")
    with pytest.raises(FileExistsError):
        compress(plain, target, overwrite=False, progress=lambda _: target.write_bytes(b"precious"))
    assert target.read_bytes() == b"precious"
    assert sorted(os.listdir(plain.parent)) == ["plain", "target"]


def test_errors_are_one_line(plain, monkeypatch):
    missing, beyond = plain.with_name("missing"), plain.parent / "no" / "where"
    assert run(missing) == (2, "", f"k42: {missing}: No such file or directory\n")
    assert run(plain.parent) == (2, "", f"k42: {plain.parent}: Is a directory\n")
    code, _, err = run(plain, "-o", beyond)
    assert code == 2
    assert err.startswith(f"k42: {beyond.parent}")
    assert err.endswith("No such file or directory\n")

    def absent() -> None:
        raise vm.Unsupported("compressed stores need zstd: pip install 'k42[zstd]'")

    monkeypatch.setattr(module, "_zstd", absent)
    assert run(plain) == (2, "", "k42: compressed stores need zstd: pip install 'k42[zstd]'\n")
    assert os.listdir(plain.parent) == ["plain"]


def test_ctrl_c_leaves_nothing_behind(folder):
    # As large as it likes: a sparse file, and the highest level.
    source = folder / "source"
    with source.open("wb") as file:
        file.truncate(1 << 40)
    process = subprocess.Popen(
        [sys.executable, "-m", "k42", "compress", str(source), "--level", "19"], stderr=subprocess.PIPE, text=True
    )
    while len(os.listdir(folder)) < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "")
    assert os.listdir(folder) == ["source"]
