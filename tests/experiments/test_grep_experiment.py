from __future__ import annotations

from pathlib import Path

import pytest

from k42.errors import Error
from k42.experiments import _grep, grep
from k42.experiments._record import PAGE
from k42.experiments._runner import default_processors


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    grep.write_corpus(path, 300_001)
    return path


def test_the_corpus_is_of_its_size_and_always_the_same(corpus: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    grep.write_corpus(again, 300_001)
    assert corpus.stat().st_size == 300_001
    assert corpus.read_bytes() == again.read_bytes()


def test_linux_processes_search_it(corpus: Path) -> None:
    assert grep.time_per_process("linux", default_processors()[-1], corpus, PAGE, None) > 0


def test_what_a_process_finds_wrong_is_an_error(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grep, "PATTERN", "import")
    with pytest.raises(Error, match="grep: the pattern was found at byte"):
        grep.time_per_process("linux", 1, corpus, PAGE, None)
    with pytest.raises(Error, match=r"grep: .*No such file"):
        grep.time_per_process("linux", 1, corpus.with_name("absent"), PAGE, None)
    assert capfd.readouterr() == ("", "")


def test_contents_are_compared(corpus: Path) -> None:
    text = bytearray(corpus.read_bytes())
    _grep._check(text, str(corpus))
    with pytest.raises(Error, match="has 300000 bytes, and the file has 300001"):
        _grep._check(text[:-1], str(corpus))
    text[1000] ^= 1
    with pytest.raises(Error, match="differs from the file"):
        _grep._check(text, str(corpus))
