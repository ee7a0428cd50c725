"""`sae app`: the workbench in the browser, a Streamlit server that is this process's child.

Started with `-P` and an absolute path, so that files named data.py, app.py or sae.py in the user's folder hide nothing.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import FrameType

import click

from app.theme import streamlit_options

MAIN = Path(__file__).resolve().parent.parent / "main.py"
START_SECONDS = 60.0


@click.command()
@click.argument("runs_dir", type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--port", type=click.IntRange(1, 65535), default=8501, show_default=True, help="Port to listen on.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every network.")
@click.option("--open/--no-open", "open_browser", default=False, show_default=True, help="Open the page in a browser.")
def command(runs_dir: Path, port: int, host: str, open_browser: bool) -> None:
    """Open the workbench on the runs in RUNS_DIR (by default ./runs); where there are none, on those that ship.

    Example: sae app runs --port 8600
    """
    if runs_dir.exists() and not runs_dir.is_dir():
        raise click.ClickException(f"{runs_dir} is a file, expected the folder that holds the runs: give its parent.")
    refuse_busy_port(host, port)
    runs_dir = or_shipped(runs_dir)
    address = f"http://{_in_address(_reachable(host))}:{port}"
    signal.signal(signal.SIGTERM, _leave)
    server = subprocess.Popen(server_command(host, port), env=server_environment(runs_dir))
    try:
        wait_until_ready(server, _reachable(host), port)
        click.echo(f"The workbench is at {address} (Ctrl-C stops it).")
        if open_browser:
            webbrowser.open(address)
        status = server.wait()
    except KeyboardInterrupt:  # the server got it too, and says that it is stopping
        return
    finally:
        stop(server)
    if status != 0:
        raise click.ClickException(f"The server stopped with status {status}: see its output above.")


def or_shipped(runs_dir: Path) -> Path:
    """`runs_dir`, or the runs that ship where it has none."""
    from app.runs import list_runs, shown_path

    if list_runs(runs_dir):
        return runs_dir
    from app.shipped import shipped_runs

    click.echo(
        f"No run in {shown_path(runs_dir)} yet: these ship with the workbench. `sae demo` makes one of your own."
    )
    return shipped_runs()


def server_command(host: str, port: int) -> list[str]:
    """The command line of the Streamlit server: no telemetry, no browser of its own, no watching of files."""
    options = [
        f"--server.address={host}",
        f"--server.port={port}",
        "--server.headless=true",
        "--server.fileWatcherType=none",
        "--browser.gatherUsageStats=false",
        "--client.toolbarMode=minimal",
        "--logger.level=warning",
        "--logger.hideWelcomeMessage=true",
        *streamlit_options(),
    ]
    return [sys.executable, "-P", "-m", "streamlit", "run", str(MAIN), *options]


def server_environment(runs_dir: Path) -> dict[str, str]:
    """The server's environment variables: ours, and where the runs are."""
    return {**os.environ, "SAE_RUNS_DIR": str(runs_dir.resolve())}


def refuse_busy_port(host: str, port: int) -> None:
    """Raise ClickException when `port` cannot be listened on, before anything slow starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise click.ClickException(
                f"Port {port} on {host} cannot be used ({error.strerror}): "
                f"choose another, such as --port {port % 65535 + 1}."
            ) from None


def wait_until_ready(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Return once the server answers; raise ClickException when it ends before or takes over a minute."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise click.ClickException(
                f"The server ended at once with status {server.returncode}: see its output above."
            )
        if _answers(host, port):
            return
        time.sleep(0.1)
    raise click.ClickException(f"The server did not answer within {START_SECONDS:.0f} seconds: see its output above.")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server: politely, then after five seconds for certain."""
    if server.poll() is not None:
        return
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _answers(host: str, port: int) -> bool:
    """Does the server say that it is well? Asked directly: a proxy named in the environment is not for this machine."""
    connection = HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/_stcore/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _leave(_signal: int, _frame: FrameType | None) -> None:
    """On SIGTERM, leave by an exception, so that the server is stopped too."""
    sys.exit(128 + signal.SIGTERM)


def _reachable(host: str) -> str:
    """Where a browser on this machine finds a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
