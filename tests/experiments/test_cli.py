from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import k42
from k42 import cli, experiments
from k42.experiments import Options, Report
from k42.experiments._record import Record

RECORD = Record("faults", "real", "linux", 1, "time_per_page", "us", 1.25, 5, 0.5, {"page_size": 4096})


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The experiment `faults` measures nothing: it keeps the options that it is asked with."""
    seen: list[Options] = []

    def measure(options: Options) -> Report:
        seen.append(options)
        return Report("what it is", [RECORD], ["a / b = 1.00"])

    monkeypatch.setitem(experiments.EXPERIMENTS, "faults", measure)
    return seen


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4096", 4096),
        ("1B", 1),
        ("512M", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("2gib", 2 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("64k", 65536),
        ("1KB", 1000),
        ("1T", 2**40),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert cli.parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "M", "12X", "-5M", "1e3", "5 M B", "0", "0.1", "nan", "٣M"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        cli.parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "1,", "-1", "a", "1.5"])
def test_what_is_no_list_of_processors(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        cli.parse_processors(text)


def test_version() -> None:
    assert run("--version") == (0, f"k42 {k42.__version__}\n", "")


def test_an_unknown_experiment_is_told_which_there_are() -> None:
    code, out, err = run("experiment", "nonsense")
    assert (code, out) == (2, "")
    known = ", ".join(sorted(experiments.EXPERIMENTS))
    assert err == f"k42: there is no experiment 'nonsense'; there are: {known}\n"


def test_the_help_names_the_experiments() -> None:
    _, out, _ = run("experiment", "--help")
    text = " ".join(out.replace("│", " ").split()).replace("- ", "-")  # lines of a frame, broken at hyphens too
    assert "One of: " + ", ".join(sorted(experiments.EXPERIMENTS)) in text


def test_the_simulated_machine_is_refused() -> None:
    code, _, err = run("experiment", "faults", "--machine", "sim")
    assert code == 2
    assert "--machine real" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--budget", "12X"],
        ["serve", "--linger", "-1"],
        ["experiment", "faults", "--processors", "none"],
        ["experiment"],
        ["nonsense"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_options_arrive(asked: list[Options]) -> None:
    assert run("experiment", "faults", "--processors", "2,1", "--quick")[0] == 0
    assert asked == [Options((1, 2), quick=True)]


def test_a_table_is_shown_and_files_are_written(asked: list[Options], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    records, plot = tmp_path / "records.json", tmp_path / "plot.svg"
    code, out, _ = run("experiment", "faults", "--json", str(records), "--plot", str(plot))
    assert code == 0
    assert "what it is" in out
    assert "a / b = 1.00" in out
    assert records.read_text() == RECORD.to_json() + "\n"
    assert plot.exists()


def test_records_on_stdout_stand_alone(asked: list[Options]) -> None:
    code, out, err = run("experiment", "faults", "--json", "-")
    assert code == 0
    assert Record(**json.loads(out)) == RECORD
    assert "what it is" in err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [(k42.Error("no [memory] left"), 2, "k42: no [memory] left\n"), (KeyboardInterrupt(), 130, "")],
)
def test_how_a_command_ends(monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, message: str) -> None:
    def fail(_options: Options) -> Report:
        raise raised

    monkeypatch.setitem(experiments.EXPERIMENTS, "faults", fail)
    assert run("experiment", "faults") == (code, "", message)


def test_serve_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel = pytest.importorskip("k42.vm.kernel")
    seen: list[dict[str, object]] = []
    monkeypatch.setattr(kernel, "serve", lambda **options: seen.append(options))
    assert run("serve")[0] == 0
    assert run("serve", "--budget", "512M", "--socket", str(tmp_path / "s"), "--linger", "2.5")[0] == 0
    assert run("serve", "--all-cpus")[0] == 0
    defaults = {
        "socket": None,
        "budget": None,
        "linger": None,
        "all_cpus": False,
        "objects": "default",
        "adapt": False,
        "homing": True,
        "sticky": True,
        "swap": True,
        "policy": "fifo",
        "client_limit": None,
    }
    assert run("serve", "--objects", "shared", "--adapt", "--no-homing", "--no-sticky")[0] == 0
    assert run("serve", "--no-swap", "--policy", "s3fifo")[0] == 0
    assert seen == [
        defaults,
        defaults | {"socket": str(tmp_path / "s"), "budget": 512 * 2**20, "linger": 2.5},
        defaults | {"all_cpus": True},
        defaults | {"objects": "shared", "adapt": True, "homing": False, "sticky": False},
        defaults | {"swap": False, "policy": "s3fifo"},
    ]
