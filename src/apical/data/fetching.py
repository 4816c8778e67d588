"""Checksummed, resumable downloads with a progress bar, on top of pooch."""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from apical.data.catalogue import Remote, entry
from apical.data.roots import cache_folder
from apical.errors import ConfigError, DataError

_CHUNK = 1 << 16
_TIMEOUT = (10, 60)  # seconds to connect, seconds without a byte


def fetch(name: str, root: Path | None = None) -> Path:
    """Download the data set `name` into `root` (the cache folder if None) and return the folder that holds it.

    Existing files with the right checksum are kept, and interrupted downloads are resumed.
    Raises `ConfigError` for an unknown or embedded set, `DataError` (one line) if a download fails.
    """
    dataset = entry(name)
    remote = dataset.remote
    if remote is None:
        source = dataset.made.source if dataset.made is not None else "the user"
        raise ConfigError(f"{name} comes from {source}: there is nothing to fetch")
    top = cache_folder() if root is None else Path(root).expanduser()
    folder = top / remote.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if remote.members is None:
            for file, checksum in remote.files.items():
                _download(remote.base + file, checksum, folder / file)
        elif not _whole(folder, remote.members):
            ((file, checksum),) = remote.files.items()
            archive = _download(remote.base + file, checksum, top / file)
            _extract(archive, folder, remote)
            archive.unlink()
    except OSError as error:
        raise DataError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error
    return folder


def _download(url: str, checksum: str, target: Path) -> Path:
    """Download one file with pooch; a resumed download that fails its checksum is retried once from the start."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    part = target.with_name(target.name + ".part")
    for attempt in (1, 2):
        resumed = part.exists()
        try:
            digest = f"{_algorithm(checksum)}:{checksum}"
            pooch.retrieve(url, known_hash=digest, fname=target.name, path=target.parent, downloader=Resume(part))
            return target
        except requests.RequestException as error:
            raise DataError(_reason(url, part, error)) from error
        except ValueError as error:  # raised by pooch for a wrong checksum
            if attempt == 2 or not resumed:
                raise DataError(f"{url} fails its checksum; try again later or report it") from error
    raise AssertionError("unreachable")


def _reason(url: str, part: Path, error: requests.RequestException) -> str:
    """Describe a failed request in one line, with the bytes kept for the next try."""
    host = urlsplit(url).hostname
    if isinstance(error, requests.HTTPError) and error.response is not None:
        problem = f"{host} answers {error.response.status_code} {error.response.reason}"
    elif part.exists():
        problem = f"the connection to {host} was lost"
    else:
        problem = f"cannot reach {host}; are you offline?"
    remainder = f" ({part.stat().st_size:,} bytes are kept: run the command again to continue)" if part.exists() else ""
    return f"download of {url} failed: {problem}{remainder}"


class Resume:
    """A pooch downloader that stores received bytes in the file `part` and resumes from it with a Range request.

    If the server ignores the range, or returns a different one, the whole file is requested.
    """

    def __init__(self, part: Path) -> None:
        self.part = part

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Download `url`; create `output_file` only once every announced byte has been received."""
        if not self._receive(url, self.part.stat().st_size if self.part.exists() else 0):
            self._receive(url, 0)
        os.replace(self.part, output_file)

    def _receive(self, url: str, offset: int) -> bool:
        """Write the bytes from `offset` on to the part file; return False if the server cannot resume there."""
        headers = {"Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            span = response.headers.get("Content-Range", "")
            starts = re.match(rf"bytes {offset}\b", span)
            if offset and (response.status_code == 416 or (response.status_code == 206 and not starts)):
                return span == f"bytes */{offset}"
            response.raise_for_status()
            continues = offset > 0 and response.status_code == 206
            length = int(response.headers.get("Content-Length", 0)) + (offset if continues else 0)
            with self.part.open("ab" if continues else "wb") as file, _bar() as bar:
                task = bar.add_task(url.rsplit("/", 1)[-1], total=length or None, completed=file.tell())
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    bar.update(task, advance=len(chunk))
                received = file.tell()
        if length and received < length:
            raise requests.ConnectionError(f"{received} of {length} bytes")
        return True


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _algorithm(checksum: str) -> str:
    return {32: "md5", 64: "sha256"}[len(checksum)]


def _is_whole(path: Path, checksum: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, _algorithm(checksum)).hexdigest() == checksum


def _whole(folder: Path, members: dict[str, str]) -> bool:
    return all(_is_whole(folder / name, checksum) for name, checksum in members.items())


def _extract(archive: Path, folder: Path, remote: Remote) -> None:
    """Extract the required members of a .tar.gz into `folder`, after checking all of them."""
    assert remote.members is not None
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in remote.members:
                tar.extract(f"{folder.name}/{name}", scratch, filter="data")
        if not _whole(scratch / folder.name, remote.members):
            raise DataError(f"{archive.name} contains files that fail their checksum; please report this")
        for name in remote.members:
            os.replace(scratch / folder.name / name, folder / name)
    except (tarfile.TarError, KeyError, EOFError) as error:
        raise DataError(f"{archive.name} is not the expected archive ({error}); please report this") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
