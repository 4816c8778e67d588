"""How pytest-xdist shares the tests out: by groups and by pieces of files, for a module makes things that its tests share.

By itself it hands out test after test, and looks through all that a worker had so far for each: with ten thousand tests
that takes longer than many of them.
"""

from collections import Counter

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadGroupScheduling

SIZE = 40
"""Tests in a piece at most: the last one must not keep one worker busy for long."""


class Pieces(LoadGroupScheduling):
    """Tests of one `xdist_group` stay together, and so do those that follow each other in a file, up to `SIZE`."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # conftest's order it is, not that of sizes
        self.pieces: dict[str, str] = {}
        self.lengths: Counter[str] = Counter()

    def _split_scope(self, nodeid: str) -> str:
        """The piece that a test belongs to; first asked for each in the order in which they were collected."""
        if nodeid not in self.pieces:
            piece = super()._split_scope(nodeid)
            if piece == nodeid:
                file = nodeid.partition("::")[0]
                piece = f"{file}::{self.lengths[file] // SIZE}"
                self.lengths[file] += 1
            self.pieces[nodeid] = piece
        return self.pieces[nodeid]
