"""The files Omniglot comes in: packed arrays, the official archives, or those extracted."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from imaml.data._extras import optional
from imaml.data._files import BROKEN, Arrays, cache_folder, cached, read_arrays

SOURCE = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
CHECKSUMS = {
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
DRAWERS = 20
SIDE = 28
DRAWING = re.compile(r"(\d{4})_(\d{2})\.png")


class Characters(NamedTuple):
    """Every character, in the order of their official numbers."""

    images: NDArray[np.uint8]
    """`(characters, 20, 28, 28)`, 255 = ink."""
    is_evaluation: NDArray[np.bool_]
    """`(characters,)`: whether it belongs to the official evaluation set."""


def read(path: Path | None) -> Characters:
    """Read the characters from `path`, or from the official archives, downloaded once.

    Returns:
        Every character there.

    Raises:
        FileNotFoundError: There is nothing at `path`, or no drawing in it.
        ValueError: A file is damaged, has another checksum than the official one, or holds other arrays.
    """
    if path is None:
        sources = [_downloaded(name) for name in CHECKSUMS]
    elif path.suffix == ".npz" and path.is_file():
        return _unpacked(path, read_arrays(path))
    elif path.is_file():
        sources = [path]
    else:
        archives = [path / name for name in CHECKSUMS if (path / name).is_file()]
        sources = archives or sorted(file for file in path.rglob("*.png") if DRAWING.fullmatch(file.name))
    if not sources:
        raise FileNotFoundError(
            f"No Omniglot drawings at {path}. Expected a packed .npz, an official archive "
            f"({' or '.join(CHECKSUMS)}), or a folder that holds the archives or their contents."
        )
    stamps = [(str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns) for file in sources]
    name = f"omniglot-{hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]}.npz"
    return _unpacked(cache_folder() / name, cached(name, lambda: _decoded(sources)))


def _unpacked(path: Path, arrays: Arrays) -> Characters:
    """Unpack 1 bit a pixel, or 4 (two pixels a byte, the left one in the high half)."""
    try:
        packed, is_evaluation = arrays["images"], arrays["is_evaluation"]
    except KeyError as error:
        raise ValueError(f"{path} has no array {error}. Expected `images` and `is_evaluation`.") from None
    binary, grey = SIDE**2 // 8, SIDE**2 // 2
    if packed.dtype != np.uint8 or packed.ndim != 3 or packed.shape[1:] not in {(DRAWERS, binary), (DRAWERS, grey)}:
        raise ValueError(
            f"`images` of {path} must be uint8 (characters, {DRAWERS}, {binary} or {grey}), 28x28 pixels of "
            f"1 or 4 bits. Got {packed.dtype} {packed.shape}."
        )
    if is_evaluation.dtype != np.bool_ or is_evaluation.shape != packed.shape[:1]:
        raise ValueError(
            f"`is_evaluation` of {path} must be bool {packed.shape[:1]}, one for each character. "
            f"Got {is_evaluation.dtype} {is_evaluation.shape}."
        )
    if packed.shape[2] == binary:
        images = np.unpackbits(packed, axis=-1) * np.uint8(255)
    else:
        images = np.stack((packed >> 4, packed & 15), axis=-1) * np.uint8(17)
    return Characters(images.reshape(-1, DRAWERS, SIDE, SIDE), is_evaluation)


def _downloaded(name: str) -> Path:
    pooch = optional("pooch", "Downloading Omniglot")
    remedy = f"Get {' and '.join(CHECKSUMS)} by hand and pass their folder as `path` (--data of the program)."
    try:
        return Path(pooch.retrieve(SOURCE + name, f"md5:{CHECKSUMS[name]}", fname=name, path=cache_folder()))
    except OSError as error:
        raise OSError(f"Could not download {SOURCE}{name}: {error}. {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{SOURCE}{name} is not the official file: {error} {remedy}") from error


def _decoded(sources: list[Path]) -> Arrays:
    """Decode drawings as `images`, 1 bit a pixel, and `is_evaluation`."""
    image = optional("PIL.Image", "Reading the Omniglot archives")
    characters: dict[str, dict[str, NDArray[np.uint8]]] = {}
    evaluation: set[str] = set()
    for path, number, drawer, content in _drawings(sources):
        try:
            drawing = image.open(io.BytesIO(content)).convert("1", dither=image.Dither.NONE)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path} is not a readable image ({error}). Get the archive again.") from error
        # Nearest: PIL resizes 1-bit drawings so whatever filter is asked for, as in the MAML authors' recipe.
        ink = ~np.asarray(drawing.resize((SIDE, SIDE), image.Resampling.NEAREST))
        characters.setdefault(number, {})[drawer] = np.packbits(ink)
        if "images_evaluation" in path.parts:
            evaluation.add(number)
    if not characters:
        raise FileNotFoundError(
            f"No Omniglot drawings in {sources[0]}. Expected members such as Greek/character01/0394_01.png."
        )
    for number, drawings in characters.items():
        if len(drawings) != DRAWERS:
            raise ValueError(
                f"Character {number} in {sources[0].parent} must have {DRAWERS} drawings. "
                f"Got {len(drawings)}: extract or get the archive again."
            )
    ordered = sorted(characters.items())
    return {
        "images": np.array([[ink for _, ink in sorted(drawings.items())] for _, drawings in ordered]),
        "is_evaluation": np.array([number in evaluation for number, _ in ordered]),
    }


def _drawings(sources: list[Path]) -> Iterator[tuple[PurePath, str, str, bytes]]:
    """Path, character, drawer and content of every drawing; archives are read in memory, never extracted."""
    for source in sources:
        if match := DRAWING.fullmatch(source.name):
            yield source, match[1], match[2], source.read_bytes()
            continue
        content = source.read_bytes()
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        expected = CHECKSUMS.get(source.name, digest)
        if digest != expected:
            raise ValueError(f"The md5 checksum of {source} must be {expected}. Got {digest}: get it again.")
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                for name in archive.namelist():
                    if match := DRAWING.fullmatch(PurePath(name).name):
                        yield source / name, match[1], match[2], archive.read(name)
        except BROKEN as error:
            raise ValueError(
                f"{source} is not a readable zip archive ({error}). It may be truncated: get it again."
            ) from error
