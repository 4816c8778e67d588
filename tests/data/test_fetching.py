"""Downloads from a local server: fresh, resumed, refused ranges, wrong checksums, broken and absent connections."""

import dataclasses
import gzip
import hashlib
import io
import re
import struct
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from apical import data
from apical.data import fetching
from apical.data.catalogue import ENTRIES, Remote
from apical.data.idx import FILES
from apical.errors import ConfigError, DataError


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.mode` is "range", "ignore", "wrong" (another range), or "break" (half a body)."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.requests.append((self.path, asked))
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        total, start, mode = len(content), 0, self.server.mode
        if asked and mode != "ignore":
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0 if mode == "wrong" else start
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if mode == "break" else body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(files, mode="range"):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.mode, server.requests = files, mode, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def address(server):
    return f"http://127.0.0.1:{server.server_address[1]}/"


def md5(content):
    return hashlib.md5(content).hexdigest()


CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("APICAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("APICAL_DATA", raising=False)
    return tmp_path


@pytest.fixture
def known(monkeypatch):
    """Replace where a set is fetched from."""

    def replace(name, server, folder, files, members=None):
        base = server if isinstance(server, str) else address(server)
        remote = Remote(base, folder, {file: md5(content) for file, content in files.items()}, members)
        monkeypatch.setitem(ENTRIES, name, dataclasses.replace(ENTRIES[name], remote=remote))

    return replace


def one(server, places, known, part=None, content=CONTENT):
    """Fetch one file, with `part` received before."""
    known("mnist", server, "MNIST/raw", {"file": content})
    folder = places / "cache/MNIST/raw"
    folder.mkdir(parents=True)
    if part is not None:
        (folder / "file.part").write_bytes(part)
    try:
        return data.fetch("mnist")
    finally:
        left = {path.name for path in folder.iterdir()}
        assert left in ({"file"}, {"file.part"}, set()), left


def test_fresh_download_and_nothing_on_the_second(places, known):
    with serving({"file": CONTENT}) as server:
        folder = one(server, places, known)
        assert folder == places / "cache/MNIST/raw"
        assert (folder / "file").read_bytes() == CONTENT
        data.fetch("mnist")
        assert server.requests == [("/file", None)]
        (folder / "file").write_bytes(b"damaged")
        data.fetch("mnist")
        assert (folder / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("mode", "requests"),
    [("range", ["bytes=100000-"]), ("ignore", ["bytes=100000-"]), ("wrong", ["bytes=100000-", None])],
)
def test_interrupted_download_continues_or_starts_again(places, known, mode, requests):
    with serving({"file": CONTENT}, mode) as server:
        folder = one(server, places, known, part=CONTENT[:100_000])
        assert (folder / "file").read_bytes() == CONTENT
        assert [asked for _, asked in server.requests] == requests


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", bytes(100_000), b""])
def test_whole_overlong_wrong_and_empty_parts(places, known, part):
    with serving({"file": CONTENT}) as server:
        folder = one(server, places, known, part=part)
        assert (folder / "file").read_bytes() == CONTENT
        whole = [asked for _, asked in server.requests if asked is None]
        assert len(whole) == (0 if part == CONTENT else 1)


def test_broken_connection_keeps_what_came_and_the_next_try_continues(places, known):
    with serving({"file": CONTENT}, "break") as server:
        with pytest.raises(
            DataError, match=r"connection to 127\.0\.0\.1 was lost \([1-9][\d,]+ bytes are kept.*again"
        ) as caught:
            one(server, places, known)
        assert "\n" not in str(caught.value)
        assert not (places / "cache/MNIST/raw/file").exists()
        server.mode = "range"
        assert (data.fetch("mnist") / "file").read_bytes() == CONTENT
        assert 0 < int(server.requests[-1][1].removeprefix("bytes=").removesuffix("-")) <= 150_000


def test_wrong_checksum_leaves_nothing(places, known):
    with serving({"file": CONTENT[::-1]}) as server:
        with pytest.raises(DataError, match="fails its checksum"):
            one(server, places, known)
        assert not list((places / "cache/MNIST/raw").iterdir())


def test_missing_file_on_the_server(places, known):
    with serving({}) as server, pytest.raises(DataError, match=r"failed: 127\.0\.0\.1 answers 404"):
        one(server, places, known)


def test_offline_is_one_clear_line(places, known):
    with serving({}) as server:
        gone = address(server)
    with pytest.raises(DataError, match=r"cannot reach 127\.0\.0\.1; are you offline\?") as caught:
        one(gone, places, known)
    assert "\n" not in str(caught.value)


def test_unwritable_folder(places, known):
    (places / "cache").write_text("a file")
    known("mnist", "http://127.0.0.1:9/", "MNIST/raw", {})
    with pytest.raises(DataError, match="cannot write"):
        data.fetch("mnist")


def test_embedded_set_needs_no_fetching():
    with pytest.raises(ConfigError, match="nothing to fetch"):
        data.fetch("digits")


def test_a_fetched_set_can_be_loaded(places, known):
    generator = np.random.default_rng(0)
    files = {}
    for name, count in zip(FILES, (12, 12, 10, 10), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        values = generator.integers(0, 10, shape, dtype=np.uint8)
        head = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        files[f"{name}.gz"] = gzip.compress(head + values.tobytes())
    with serving(files) as server:
        known("fashion-mnist", server, "FashionMNIST/raw", files)
        assert data.fetch("fashion-mnist", places / "mine") == places / "mine/FashionMNIST/raw"
        assert len(data.load("fashion-mnist", root=places / "mine").train) == 12
        data.fetch("fashion-mnist")
    assert data.load("fashion-mnist").source == "FashionMNIST/raw (cache folder)"


def archive(folder, files, **extra):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in (files | extra).items():
            member = tarfile.TarInfo(name if name.startswith("..") else f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_archive_is_extracted_checked_and_removed(places, known):
    files = {"train": b"a" * 1000, "test": b"b" * 500, "meta": b"c"}
    content = archive("cifar-100-python", files, **{"../outside": b"x", "unwanted": b"y"})
    members = {name: md5(value) for name, value in files.items()}
    with serving({"cifar.tar.gz": content}) as server:
        known("cifar-100", server, "cifar-100-python", {"cifar.tar.gz": content}, members)
        folder = data.fetch("cifar-100")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
        assert [path.name for path in (places / "cache").iterdir()] == ["cifar-100-python"]
        data.fetch("cifar-100")
        assert len(server.requests) == 1
        (folder / "test").write_bytes(b"damaged")
        data.fetch("cifar-100")
        assert (folder / "test").read_bytes() == files["test"]
    assert not (places / "outside").exists()


@pytest.mark.parametrize("case", ["wrong file", "missing file", "no archive"])
def test_wrong_archive_puts_nothing_in_place(places, known, case):
    files = {"train": b"a" * 1000, "test": b"b" * 500}
    members = {name: md5(value) for name, value in files.items()}
    if case == "wrong file":
        files["test"] = b"other"
    if case == "missing file":
        del files["test"]
    content = b"text" if case == "no archive" else archive("cifar-100-python", files)
    with serving({"cifar.tar.gz": content}) as server:
        known("cifar-100", server, "cifar-100-python", {"cifar.tar.gz": content}, members)
        with pytest.raises(DataError, match=r"cifar\.tar\.gz"):
            data.fetch("cifar-100")
    assert not list((places / "cache/cifar-100-python").iterdir())
    assert not [path for path in (places / "cache").iterdir() if path.name.startswith(".")]


def test_a_link_in_an_archive_does_not_lead_out(places, known):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        link = tarfile.TarInfo("cifar-100-python/train")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    with serving({"cifar.tar.gz": buffer.getvalue()}) as server:
        known("cifar-100", server, "cifar-100-python", {"cifar.tar.gz": buffer.getvalue()}, {"train": "0" * 32})
        with pytest.raises(DataError, match="not the expected archive"):
            data.fetch("cifar-100")


def test_progress_needs_no_terminal(capsys):
    with fetching._bar() as bar:
        bar.update(bar.add_task("file", total=10), advance=10)
    assert capsys.readouterr().out == ""
