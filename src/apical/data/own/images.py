"""A folder of images: one folder per class, possibly within train/ and test/."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apical.data.own.targets import Raw
from apical.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_TESTS = ("test", "val", "valid", "validation")
_LARGEST = 1 << 32
"""Maximum bytes of pixels that are read into memory."""


def read(folder: Path) -> Raw:
    """Read images (N, C, H, W), grey or colour, and the index of each image's folder.

    Raises:
        DataError: a class folder is empty, an image is damaged or differs in size from the first, or there are no images.
    """
    folders = {path.name.lower(): path for path in _folders(folder)}
    notes: list[str] = []
    if "train" in folders:
        other = next((name for name in _TESTS if name in folders), None)
        parts = [folders["train"], *([folders[other]] if other else [])]
        odd = sorted(path.name for name, path in folders.items() if name not in ("train", other))
        notes += [f"{', '.join(odd)} next to train ignored"] if odd else []
    else:
        parts = [folder]
    classes = [path.name for path in _folders(parts[0])]
    if len(classes) < 2:
        listing = f"only {classes[0]}" if classes else "none"
        raise DataError(f"{parts[0]}: needs one folder of images per class; found {listing}")
    files = [[(path, i) for i, name in enumerate(classes) for path in _images(part / name)] for part in parts]
    for part in parts[1:]:
        strange = [path.name for path in _folders(part) if path.name not in classes]
        if strange:
            raise DataError(f"{part}: class {strange[0]!r} does not occur in {parts[0]}")
    left = sum(
        1 for part in parts for name in classes for path in _files(part / name) if path.suffix.lower() not in SUFFIXES
    )
    what = "file that is not an image" if left == 1 else "files that are not images"
    notes += [f"{left} {what} ignored"] if left else []
    seen = [[_pixels(path) for path, _ in part] for part in files]
    notes += sorted({remark for part in seen for _, remarks in part for remark in remarks}, reverse=True)
    pictures = [[pixels for pixels, _ in part] for part in seen]
    first = pictures[0][0]
    for loaded, listed in zip(pictures, files, strict=True):
        for pixels, (path, _) in zip(loaded, listed, strict=True):
            if pixels.shape[:2] != first.shape[:2]:
                sizes = [f"{width}x{height}" for height, width in (first.shape[:2], pixels.shape[:2])]
                raise DataError(f"{path}: {sizes[1]} pixels, but {files[0][0][0]} has {sizes[0]}; all must have one size")
    colour = any(pixels.ndim == 3 for loaded in pictures for pixels in loaded)
    inputs = [np.stack([_planes(pixels, colour) for pixels in loaded]) for loaded in pictures]
    targets = [np.array([i for _, i in listed], dtype=np.int64) for listed in files]
    notes.append(f"{'RGB' if colour else 'grey'} images of {first.shape[1]}x{first.shape[0]} pixels")
    second = (inputs[1], targets[1]) if len(parts) > 1 else (None, None)
    return Raw(
        (inputs[0], second[0]),
        (targets[0], second[1]),
        folder.name,
        str(folder.resolve()),
        True,
        names=tuple(classes),
        notes=tuple(notes),
    )


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    images = [path for path in _files(folder) if path.suffix.lower() in SUFFIXES]
    if not images:
        deeper = ""
        if folder.is_dir() and (inside := _folders(folder)):
            deeper = f"; it has folders ({inside[0].name}, ...): if these are the classes, name their parents train and test"
        raise DataError(f"{folder}: no images for class {folder.name!r}{deeper}")
    return images


def _pixels(path: Path) -> tuple[NDArray[Any], list[str]]:
    """Return 8-bit pixels (H, W) or (H, W, 3), and notes on ignored parts of the image."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("folders of images need Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{path}: pixels of more than 8 bits (mode {image.mode}) are not supported; convert them")
            if image.width * image.height > _LARGEST:
                raise DataError(f"{path}: the image is too large")
            grey = image.mode in ("1", "L", "LA")
            whole = image.convert("RGBA") if "A" in image.mode or "transparency" in image.info else image
            remarks = ["all frames but the first ignored"] if getattr(image, "n_frames", 1) > 1 else []
            if whole.mode == "RGBA" and whole.getchannel("A").getextrema()[0] != 255:
                remarks.append("transparency ignored")
            return np.asarray(whole.convert("L" if grey else "RGB")), remarks
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged or not an image ({error})") from error


def _planes(pixels: NDArray[Any], colour: bool) -> NDArray[Any]:
    """Return the pixels as (C, H, W)."""
    if not colour:
        return pixels[None]
    return pixels.transpose(2, 0, 1) if pixels.ndim == 3 else np.repeat(pixels[None], 3, axis=0)
