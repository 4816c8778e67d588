import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from apical.bench import checkpoint
from apical.errors import CheckpointError


def state() -> dict[str, Any]:
    rule = {"weight": torch.arange(100.0)}
    return {
        "config": {},
        "rule": rule,
        "optimizer": {},
        "rng": checkpoint.rng_state(torch.device("cpu")),
        "epoch": 2,
        "step": 0,
        "partial": {},
        "seconds": 1.0,
        "metrics": {},
        "peak_memory_mb": None,
    }


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.pt", state())
    loaded = checkpoint.load(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded["rule"]["weight"], torch.arange(100.0))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("damage", ["empty", "cut", "end", "noise", "flipped"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, state())
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        for i in range(0, len(content), 40):
            content[i] ^= 0xFF
    pieces = {"empty": b"", "cut": content[: len(content) // 2], "end": content[:-99], "noise": b"x" * 999}
    path.write_bytes(pieces.get(damage, content))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({"rule": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "evil").exists()


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    broken = state()
    del broken["rng"]
    checkpoint.save(tmp_path / "checkpoint.pt", broken)
    with pytest.raises(CheckpointError, match="'rng'"):
        checkpoint.load(tmp_path / "checkpoint.pt")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
