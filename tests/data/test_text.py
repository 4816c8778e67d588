"""Texts and tasks on sequences: windows, vocabularies, splits; and counts, against counting slowly by hand."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from apical import data
from apical.data import Split
from apical.data.text import counts, python_source, sequences, tasks
from apical.errors import ConfigError, DataError


def test_windows_are_the_text_and_targets_the_token_behind() -> None:
    text = "the quick brown fox jumps over the lazy dog, " * 40
    made = sequences.of_text(text, text[:300], 16, "characters", where="fox", source="fox")
    inputs, targets = made.train
    whole = sequences.decoded(inputs.flatten().tolist(), made.names)
    assert text.startswith(whole)
    assert len(whole) == (len(text) - 1) // 16 * 16
    assert sequences.decoded(targets.flatten().tolist(), made.names) == text[1 : len(whole) + 1]
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_characters_are_the_commonest_and_others_are_one_token() -> None:
    train = "".join(chr(0x4E00 + i) * (200 - i) for i in range(120))
    made = sequences.of_text(train, train + "\U0001f600" * 20, 8, "characters", where="", source="")
    expected = [character for character, _ in Counter(train).most_common(95)]
    assert list(made.names) == [*expected, sequences.OTHER]
    assert made.classes == 96
    assert int(made.train[0].max()) == 95
    assert made.test[0][-1].tolist() == [95] * 8


def test_bytes_are_the_bytes_of_the_text() -> None:
    text = "Zürich, naïve ☃ " * 30
    made = sequences.of_text(text, text, 8, "bytes", where="", source="")
    raw = text.encode()
    assert made.classes == len(made.names) == 256
    assert bytes(made.train[0].flatten().tolist()) == raw[: (len(raw) - 1) // 8 * 8]


def test_the_checksum_is_of_the_text() -> None:
    one, same, other = (
        sequences.of_text(text * 20, text * 20, 4, level, where="", source="").sha256
        for text, level in (("abc", "characters"), ("abc", "bytes"), ("abd", "characters"))
    )
    assert one == same != other
    assert len(one) == 16


@pytest.mark.parametrize(("context", "said"), [(0, "--context must be positive"), (40, "too few for a window of 40")])
def test_a_window_must_fit(context: int, said: str) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        sequences.of_text("a" * 100, "a" * 40, context, "characters", where="mine", source="")


def test_pythons_own_sources() -> None:
    train, test = python_source.texts()
    whole = data.load("text-python", validation=100, train_limit=200, test_limit=50)
    assert (whole.classes, whole.input_shape, whole.is_text, whole.is_sequences) == (96, (64,), True, True)
    assert [len(part) for part in (whole.train, whole.validation, whole.test) if part is not None] == [200, 100, 50]
    assert whole.test.inputs.dtype == torch.int64
    said = sequences.decoded(whole.test.inputs[0].tolist(), whole.class_names)
    assert said.replace(sequences.OTHER, "") in test or sequences.OTHER in said
    assert len(train) > 5 * len(test) > 0  # one file in ten, of sizes that differ with the version of Python
    assert len(whole.sha256) == 16


def test_a_text_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("\ufeff" + "Once upon a time. " * 100, encoding="utf-8")
    mine = data.load(str(path), context=10)
    assert mine.input_shape == (10,)
    assert mine.classes == len(set("Once upon a time. ")) + 1
    assert "story.txt: 1,620 training and 180 test characters" in mine.about
    assert data.load(str(path), context=10, tokens="bytes").classes == 256
    path.write_bytes(b"\xff\xfe\xff" * 100)
    with pytest.raises(DataError, match="not a text in UTF-8"):
        data.load(str(path))
    with pytest.raises(DataError, match="no such file"):
        data.load(str(tmp_path / "other.txt"))


def test_copy_asks_for_the_word_and_nothing_else() -> None:
    made = data.load("copy", context=21)
    inputs, targets = made.train.inputs, made.train.targets
    assert (made.classes, made.is_text, made.counts_hits, made.train.answers) == (10, False, True, 10)
    assert torch.equal(targets[:, 10:20], inputs[:, :10])
    assert bool((targets[:, :10] == -100).all())
    assert bool((inputs[:, 10] == 9).all())
    assert bool((inputs[:, 11:] == 8).all())
    assert not torch.equal(inputs[: len(made.test)], made.test.inputs)


def test_recall_asks_each_key_for_its_value() -> None:
    made = data.load("recall", context=16)
    for tokens, targets in zip(made.test.inputs[:20].tolist(), made.test.targets[:20].tolist(), strict=True):
        value_of = dict(zip(tokens[0:8:2], tokens[1:8:2], strict=True))
        assert len(value_of) == 4
        assert sorted(tokens[8::2]) == sorted(value_of)
        assert targets == [-100] * 8 + [t for key in tokens[8::2] for t in (value_of[key], -100)]
        assert tokens[9::2] == [value_of[key] for key in tokens[8::2]]


@pytest.mark.parametrize(("name", "context"), [("copy", 1), ("recall", 3), ("recall", 68)])
def test_a_task_must_fit_its_window(name: str, context: int) -> None:
    with pytest.raises(ConfigError, match="--context"):
        data.load(name, context=context)


def test_tasks_are_the_same_every_time() -> None:
    for make in (tasks.copying, tasks.recalling):
        (a, b), (c, d) = make(5, 12, 3), make(5, 12, 3)
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert not torch.equal(a, make(5, 12, 4)[0])


def test_counts_against_counting_by_hand() -> None:
    V, draw = 5, torch.Generator().manual_seed(0)

    def windows(number: int) -> Split:
        tokens = torch.randint(V, (number, 7), generator=draw)
        return Split(tokens[:, :-1], tokens[:, 1:])

    train, test = windows(40), windows(9)
    one, two, three, before = (
        Counter[int](),
        Counter[tuple[int, ...]](),
        Counter[tuple[int, ...]](),
        Counter[tuple[int, ...]](),
    )
    for row, said in zip(train.inputs.tolist(), train.targets.tolist(), strict=True):
        for t, (a, x) in enumerate(zip(row, said, strict=True)):
            one[x] += 1
            two[a, x] += 1
            if t:
                three[row[t - 1], a, x] += 1
                before[row[t - 1], a] += 1
    total = sum(one.values())
    losses: dict[str, list[float]] = {"unigram": [], "bigram": [], "trigram": []}
    for row, said in zip(test.inputs.tolist(), test.targets.tolist(), strict=True):
        for t, (a, x) in enumerate(zip(row, said, strict=True)):
            losses["unigram"].append(-math.log((one[x] + 0.5) / (total + 0.5 * V)))
            bigram = (two[a, x] + 0.5) / (sum(two[a, y] for y in range(V)) + 0.5 * V)
            losses["bigram"].append(-math.log(bigram))
            seen = (three[row[t - 1], a, x], before[row[t - 1], a]) if t else (0, 0)
            losses["trigram"].append(-math.log((seen[0] + 5 * bigram) / (seen[1] + 5)))
    found = counts.count_losses(train, test, V)
    for name, values in losses.items():
        assert found[name] == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_counts_of_pythons_sources_fall_with_what_they_see() -> None:
    whole = data.load("text-python", test_limit=200)
    found = counts.count_losses(whole.train, whole.test, whole.classes)
    assert found["trigram"] < found["bigram"] - 0.3 < found["unigram"] - 0.6
