"""`sae app` as a command: its options, a busy port, and a server that starts and stops like one."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from click.testing import CliRunner

from app.cli.app import MAIN, command, or_shipped, server_command, server_environment
from app.runs import list_runs

HOME = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def sae_app(runs: Path, port: int, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A running `sae app`, started in `cwd`; stopped and waited for at the end, whatever happened."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from app.cli import run; run()", "app", str(runs), "--port", str(port)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(HOME)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)


def test_a_busy_port_is_one_line_with_another_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(command, ["runs", "--port", str(port)])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert f"Port {port}" in line
    assert "--port" in line


def test_a_file_instead_of_a_folder_is_one_line(tmp_path: Path):
    (tmp_path / "f").write_text("")
    result = CliRunner().invoke(command, [str(tmp_path / "f")])
    assert result.exit_code == 1
    assert len(result.output.splitlines()) == 1


def test_a_port_out_of_range_is_wrong_usage():
    assert CliRunner().invoke(command, ["--port", "99999"]).exit_code == 2


def test_the_server_listens_on_this_machine_only_sends_nothing_and_ignores_the_working_folder():
    line = server_command("127.0.0.1", 8501)
    assert line[:5] == [sys.executable, "-P", "-m", "streamlit", "run"]
    assert line[5] == str(MAIN)
    assert MAIN.is_absolute()
    assert {"--server.address=127.0.0.1", "--browser.gatherUsageStats=false", "--server.headless=true"} <= set(line)


def test_the_server_is_told_where_the_runs_are_and_keeps_the_environment(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/somewhere")
    assert server_environment(tmp_path)["SAE_RUNS_DIR"] == str(tmp_path)
    assert server_environment(tmp_path)["HF_HOME"] == "/somewhere"


def test_where_there_is_no_run_those_that_ship_are_opened(tmp_path: Path, runs: Path, monkeypatch, capsys):
    monkeypatch.setenv("SAE_CACHE", str(tmp_path / "cache"))
    assert or_shipped(runs) == runs
    assert capsys.readouterr().out == ""
    opened = or_shipped(tmp_path / "nothing")
    assert "sae demo" in capsys.readouterr().out
    names = {f"{run.name}/{d.name}": d.has_store for run in list_runs(opened) for d in run.dictionaries}
    assert names["smollm2-l15/batchtopk"]
    assert len(names) == 4


def test_the_host_is_this_machine_unless_told_otherwise():
    (host,) = (option for option in command.params if option.name == "host")
    assert host.default == "127.0.0.1"


@pytest.mark.slow
def test_it_starts_beside_files_of_our_names_and_ends_on_ctrl_c(tmp_path: Path, runs: Path):
    for name in ("data", "app", "sae", "activations", "streamlit"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file was imported')")
    port = free_port()
    with sae_app(runs, port, tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/_stcore/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in out + err
    wait_until_free(port)


@pytest.mark.slow
def test_the_server_goes_with_its_parent(tmp_path: Path, runs: Path):
    port = free_port()
    with sae_app(runs, port, tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    wait_until_free(port)


def wait_until_free(port: int) -> None:
    """Raise unless nothing answers on `port` within five seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"something still listens on port {port}")
