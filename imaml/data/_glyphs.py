"""Glyphs: printed characters, which need no download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imaml.data._extras import optional
from imaml.data._few_shot import FewShot, ImageSet, random_splits
from imaml.data._files import Arrays, cached
from imaml.data._glyph_rendering import Typeface, letters, typefaces

EXAMPLES = 20
MAX_ANGLE = np.deg2rad(12)
SCALES = (0.8, 1.0)
MAX_SHIFT = 2.0
LOOK_ALIKE = 0.9
"""Letters whose pictures have a larger cosine count as one: the same but for the details of an accent."""


@dataclass(frozen=True, kw_only=True)
class Glyphs(FewShot):
    """Draws few-shot tasks of printed letters, Latin, Greek, Cyrillic, Armenian and Georgian, without any download.

    Images are 28x28, grey. The classes are the 1365 letters that all twelve DejaVu faces (shipped with matplotlib)
    have, less those that look like an earlier one in the upright sans serif: Greek Alpha and Cyrillic A are Latin A,
    and o is O, since all letters are drawn at one size.

    About 650 remain: 70 % train, 10 % val, 20 % test, dealt at random but always alike. A class has 20 images: each
    face once, eight of them twice, turned by up to 12 degrees, scaled by 0.8 to 1 and shifted by up to 2 pixels.

    Cost: the images are drawn at the first use, in about 5 seconds, and kept in the user's cache.

    Not for comparing with published numbers: accented letters are characters of their own, so a test letter may
    resemble a training one. Take `Omniglot` for that.

    Args:
        shots: Support images of each class.
        queries: Query images of each class.
        seed: Names the stream of tasks.
        ways: Classes of a task.

    Raises:
        ValueError: A field is out of range.
        ImportError: At the first use, where matplotlib, fonttools, pillow or pooch is missing.
    """

    def _load(self) -> ImageSet:
        versions = [optional(package, "Glyphs").__version__ for package in ("matplotlib", "PIL")]
        recipe = (EXAMPLES, MAX_ANGLE, SCALES, MAX_SHIFT, LOOK_ALIKE, versions)
        name = f"glyphs-{hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]}.npz"
        images = cached(name, _rendered)["images"]
        sizes = {"val": len(images) // 10, "test": len(images) // 5}
        return ImageSet(images, random_splits(np.arange(len(images)), sizes, "train"))


def _rendered() -> Arrays:
    faces = typefaces()
    kept = distinct(letters(faces), Typeface(faces[0]))
    return {"images": render(kept, faces), "letters": np.array(kept)}


def distinct(candidates: Sequence[str], face: Typeface) -> list[str]:
    """The candidates that do not look, in `face`, like one kept before."""
    pictures = np.stack([face.draw(letter).ravel() for letter in candidates]).astype(np.float32)
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    alike = pictures @ pictures.T > LOOK_ALIKE
    kept: list[int] = []
    for candidate in range(len(candidates)):
        if not alike[candidate, kept].any():
            kept.append(candidate)
    return [candidates[position] for position in kept]


def render(characters: Sequence[str], faces: Sequence[Path]) -> NDArray[np.uint8]:
    """Draw 20 examples of each character, which depend on nothing but the character and the faces.

    Returns:
        `(characters, 20, 28, 28)`, 255 = ink.
    """
    pens = [Typeface(face) for face in faces]
    images = np.empty((len(characters), EXAMPLES, 28, 28), dtype=np.uint8)
    for letter, examples in zip(characters, images, strict=True):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(0, spawn_key=(ord(letter),))))
        for example, picture in enumerate(examples):
            turn, size, right, down = generator.random(4)
            picture[:] = pens[example % len(pens)].draw(
                letter,
                angle=MAX_ANGLE * (2 * turn - 1),
                scale=SCALES[0] + (SCALES[1] - SCALES[0]) * size,
                shift=(MAX_SHIFT * (2 * right - 1), MAX_SHIFT * (2 * down - 1)),
            )
    return images
