"""A text that comes with every Python: sources of its standard library."""

import sysconfig
from functools import lru_cache
from pathlib import Path

from apical.data.dataset import Samples
from apical.data.text.sequences import Level, of_text
from apical.errors import DataError

_MODULES = (
    "argparse ast asyncio/base_events bdb calendar codecs collections/__init__ configparser csv dataclasses "
    "datetime decimal difflib dis doctest email/message enum fractions ftplib functools gzip heapq html/parser "
    "http/client imaplib inspect ipaddress json/decoder locale logging/__init__ mailbox mimetypes nntplib optparse "
    "os pathlib pdb pickle pickletools platform plistlib poplib pprint random shutil smtplib socket ssl statistics "
    "string subprocess tarfile tempfile textwrap threading tokenize traceback turtle typing unittest/case "
    "unittest/mock urllib/request uuid warnings weakref zipfile "
)
MODULES = tuple(_MODULES.split())
"""Modules whose sources are read, if this Python has them; every tenth of those is test text."""
_EVERY = 10


def texts() -> tuple[str, str]:
    """Return the training text and the test text.

    Raises:
        DataError: this Python was installed without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path for name in MODULES if (path := folder / f"{name}.py").is_file()]
    if len(files) < _EVERY:
        raise DataError(
            f"text-python: {folder} lacks the sources of Python's standard library; pass your own text with --data FILE.txt"
        )
    read = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    test = read[_EVERY - 1 :: _EVERY]
    return "".join(part for i, part in enumerate(read) if i % _EVERY != _EVERY - 1), "".join(test)


@lru_cache(maxsize=2)
def make(context: int, level: Level) -> Samples:
    """Return windows of these texts.

    Raises:
        DataError: see :func:`texts`.
    """
    return of_text(*texts(), context, level, where="text-python", source="this Python's standard library")
