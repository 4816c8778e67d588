"""Augmentation against a slow loop, and its statistics."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apical.data import Augment
from apical.errors import ConfigError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def slow(image, flipped, down, right, crop):
    """Pad, cut and then mirror one image (C, H, W), pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                row, column = i + down - crop, (width - 1 - j if flipped else j) + right - crop
                if 0 <= row < height and 0 <= column < width:
                    out[c, i, j] = image[c, row, column]
    return out


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(2, 6), st.integers(2, 6)),
    flip=st.booleans(),
    crop=st.integers(0, 3),
)
def test_every_image_is_one_of_the_possible_moves(seed, shape, flip, crop):
    batch = torch.randn(shape, generator=seeded(seed))
    out = Augment(flip, crop)(batch, seeded(seed))
    assert out.shape == batch.shape
    moves = range(2 * crop + 1)
    for image, moved in zip(batch, out, strict=True):
        candidates = (slow(image, f, i, j, crop) for f in {False, flip} for i in moves for j in moves)
        assert any(torch.equal(candidate, moved) for candidate in candidates)


def test_the_moves_are_those_the_generator_draws():
    batch = torch.randn(64, 3, 7, 5, generator=seeded(1))
    out = Augment(flip=True, crop=2)(batch, seeded(2))
    again = seeded(2)
    flipped = torch.rand((64, 1), generator=again) < 0.5
    down, right = torch.randint(0, 5, (2, 64, 1), generator=again)
    for k in range(64):
        assert torch.equal(out[k], slow(batch[k], bool(flipped[k]), int(down[k]), int(right[k]), 2))


def test_half_the_images_are_mirrored_and_all_shifts_occur_equally():
    batch = torch.zeros(20000, 1, 9, 9)
    batch[:, :, 4, 3] = 1
    out = Augment(flip=True, crop=1)(batch, seeded(0))
    rows, columns = out[:, 0].flatten(1).argmax(1) // 9, out[:, 0].flatten(1).argmax(1) % 9
    assert bool((out.sum((1, 2, 3)) == 1).all())
    counts = torch.bincount(rows * 9 + columns, minlength=81).view(9, 9)[3:6, 2:7] / 20000
    once = torch.tensor([1 / 18, 1 / 18, 1 / 9, 1 / 18, 1 / 18])  # a mirrored 3 is a 5; both reach column 4
    torch.testing.assert_close(counts, once.expand(3, -1), rtol=0, atol=0.01)


def test_generator_fixes_the_result_and_advances():
    batch = torch.randn(32, 3, 8, 8)
    augment = Augment(flip=True, crop=2)
    generator = seeded(3)
    first, second = augment(batch, generator), augment(batch, generator)
    assert torch.equal(first, augment(batch, seeded(3)))
    assert not torch.equal(first, second)


def test_input_is_untouched_and_global_generator_is_the_default():
    batch = torch.randn(8, 1, 6, 6)
    before = batch.clone()
    torch.manual_seed(5)
    first = Augment(flip=True, crop=1)(batch)
    torch.manual_seed(5)
    assert torch.equal(first, Augment(flip=True, crop=1)(batch))
    assert torch.equal(batch, before)


def test_nothing_to_do_returns_the_batch():
    batch = torch.randn(2, 1, 4, 4)
    assert Augment()(batch, seeded(0)) is batch


def test_refusals():
    with pytest.raises(ConfigError, match="crop"):
        Augment(crop=-1)
    with pytest.raises(ConfigError, match="N, C, H, W"):
        Augment(flip=True)(torch.randn(3, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_generator_may_be_on_either_device(device):
    batch = torch.randn(16, 3, 8, 8)
    out = Augment(flip=True, crop=2)(batch.cuda(), torch.Generator(device).manual_seed(0))
    assert out.is_cuda
    if device == "cpu":
        assert torch.equal(out.cpu(), Augment(flip=True, crop=2)(batch, seeded(0)))
