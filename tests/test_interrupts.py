"""Ctrl-C at any moment: one line, exit status 130, no traceback; a full disk and odd folder names in one line too."""

import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.command import Command

from apical.bench.signals import StopSignals
from apical.cli.interrupts import Raise, end, handled
from apical.cli.main import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits are POSIX")
SMALL = ("--data", "digits", "--model", "mlp-4", "--train-limit", "64", "--test-limit", "32", "--device", "cpu")
SMALL = (*SMALL, "--probe", "0", "--threads", "1")
SAVING = "torch.utils.serialization"
"""Imported for the first checkpoint, when a training already listens: it stops after its first step."""


def start(*arguments: object, python: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, *python, "-m", "apical", *map(os.fsencode, map(str, arguments))],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def lines(process: "subprocess.Popen[bytes]", seconds: float = 300) -> Iterator[str]:
    """Lines of stderr as they come."""
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stderr, selectors.EVENT_READ)
        held, deadline = b"", time.monotonic() + seconds
        while time.monotonic() < deadline:
            if selector.select(1):
                piece = os.read(process.stderr.fileno(), 1 << 16)
                if not piece:
                    return
                *whole, held = (held + piece).split(b"\n")
                for line in whole:
                    yield line.decode()
    raise AssertionError("it hangs")


@pytest.mark.parametrize("module", ["apical.errors", "numpy", "torch", "apical.bench.loop", SAVING])
def test_an_interrupt_while_it_imports(module: str, tmp_path: Path) -> None:
    """The interpreter says on stderr what it has imported, so that the moment is certain."""
    if find_spec(module) is None:
        pytest.skip(f"this PyTorch has no {module}")
    process = start("train", *SMALL, "--epochs", "500", "--out", tmp_path / "run", python=("-X", "importtime"))
    assert process.stdout is not None
    said, sent = [], False
    for line in lines(process):
        if not line.startswith("import time:"):
            said.append(line)
        elif not sent and line.rpartition("|")[2].strip() == module:
            os.killpg(process.pid, signal.SIGINT)
            sent = True
    assert process.wait(240) == 130
    assert sent
    if module == SAVING:
        assert (said, b"Continue with" in process.stdout.read()) in (([], True), (["apical: interrupted"], False))
    else:
        assert said == ["apical: interrupted"]


@pytest.mark.parametrize("delay", [0.2, 1.0])
def test_an_interrupt_while_workers_start(delay: float, tmp_path: Path) -> None:
    arguments = ("compare", "--rules", "bp", "fa", "--seeds", "2", "--jobs", "2", *SMALL, "--epochs", "5000")
    process = start(*arguments, "--out", tmp_path / "out")
    deadline = time.monotonic() + 240
    while not (tmp_path / "out" / "compare.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors in (b"", b"apical: interrupted\n")
    assert output.count(b"Continue with") == (errors == b"")


def test_an_interrupt_that_got_lost_stops_the_training_that_follows() -> None:
    with handled(Raise()):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            pytest.fail("no KeyboardInterrupt")
        except KeyboardInterrupt:
            pass  # as an import that catches everything does
        with StopSignals() as stop:
            assert stop.signum == signal.SIGINT
    with handled(Raise()), StopSignals() as stop:
        assert stop.signum is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled(end):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, apical, apical.__main__; assert 'torch' not in sys.modules; assert callable(apical.compare); "
        "assert 'compare' in apical.__all__; apical.Backprop; apical.core.credit"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def limited() -> int:
    """What `apical` does where files may have 50 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return main()


def test_a_full_disk_names_the_folder_and_the_way_on(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; the checkpoint is larger than it."""
    out = tmp_path / "run"
    process = Command(["train", *SMALL[2:], "--model", "mlp-512", "--epochs", "2", "--out", str(out)], tmp_path, run=limited)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert said.startswith("apical: error: File too large: ")
    assert str(out / "checkpoint.pt") in said
    assert f"what was saved in {out} is kept" in said
    assert said.endswith("with --resume\n")
    assert said.count("\n") == 1
    assert not list(out.glob("*.tmp"))
    assert main(["train", *SMALL[2:], "--model", "mlp-512", "--epochs", "2", "--out", str(out), "--resume"]) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    out = tmp_path / os.fsdecode(b"caf\xe9")
    process = Command(["compare", "--rules", "bp", "--seeds", "1", *SMALL, "--epochs", "1", "--out", str(out)], tmp_path)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert errors == ""
    assert "caf\\udce9" in output
    assert "caf\\udce9" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="the shell and /dev/full")
@pytest.mark.parametrize("command", ["--version", "train --help-all"])
@pytest.mark.parametrize(
    ("streams", "status", "said"),
    [
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 141, ""),
        (">/dev/full", 2, "apical: error: No space left on device\n"),
    ],
)
def test_output_that_nobody_hears(command: str, streams: str, status: int, said: str) -> None:
    """Closed streams, as of a job without a terminal, readers that have gone, and full disks are no traceback."""
    shell = f"{sys.executable} -m apical {command} {streams}"
    shell = f"set -o pipefail; (sleep 0.05; {shell.partition(' |')[0]}) | true" if "|" in streams else shell
    done = subprocess.run(["bash", "-c", shell], stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, said)


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    """What C code prints would go into them."""
    code = (
        "import os, sys; from apical.__main__ import _open_closed; _open_closed(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); file.write(str(file.fileno()))"
    )
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], timeout=60)
    assert done.returncode == 0
    assert int((tmp_path / "file").read_text()) > 2
