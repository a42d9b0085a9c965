"""Pictures of characters, drawn from the typefaces that matplotlib ships."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaml.data._extras import optional

SIDE = 28
OVERSAMPLING = 4
BODY = 20 * OVERSAMPLING
"""The longer side of a glyph before it is moved, as in MNIST: 20 of 28 pixels."""
LETTERS = ("Lu", "Ll", "Lt", "Lo")
"""Unicode categories: upper, lower and title case, and letters without case, but no (small) modifiers."""


def typefaces() -> list[Path]:
    """The twelve DejaVu faces, the upright sans serif first, without the two of a few display glyphs."""
    fonts = Path(optional("matplotlib", "Glyphs").get_data_path(), "fonts", "ttf")
    faces = [face for face in fonts.glob("DejaVu*.ttf") if "Display" not in face.name]
    return sorted(faces, key=lambda face: (face.stem != "DejaVuSans", face.name))


def letters(faces: Sequence[Path]) -> list[str]:
    """The letters that all faces have, in Unicode order."""
    ttlib = optional("fontTools.ttLib", "Glyphs")
    repertoires: list[set[int]] = []
    for face in faces:
        with ttlib.TTFont(face, lazy=True) as font:
            repertoires.append(set(font.getBestCmap()))
    common = map(chr, sorted(set.intersection(*repertoires)))
    return [letter for letter in common if unicodedata.category(letter) in LETTERS]


class Typeface:
    """One face, as a pen for single characters."""

    def __init__(self, path: Path) -> None:
        self._image = optional("PIL.Image", "Glyphs")
        fonts = optional("PIL.ImageFont", "Glyphs")
        # The basic layout, since the other one depends on a library that not every installation has.
        self._font = fonts.truetype(path, BODY, layout_engine=fonts.Layout.BASIC)

    def draw(
        self, letter: str, angle: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> NDArray[np.uint8]:
        """Draw a letter, centred, its longer side 20 pixels, then turned, scaled and shifted.

        Args:
            letter: The character.
            angle: Turn in radians.
            scale: Factor on the size.
            shift: Right and down, in pixels.

        Returns:
            `(28, 28)`, 255 = ink.
        """
        glyph: Any = self._font.getmask(letter)
        width, height = glyph.size
        source = self._image.frombytes("L", glyph.size, bytes(glyph))
        # PIL asks where in the source a pixel p of the picture comes from, c and c' being their centres:
        # s = c + R(-angle) (p - c' - shift) / zoom.
        zoom = scale * BODY / max(width, height)
        cosine, sine = np.cos(angle) / zoom, np.sin(angle) / zoom
        turn = np.array([[cosine, sine], [-sine, cosine]])
        centre = OVERSAMPLING * (SIDE / 2 + np.array(shift))
        offset = np.array([width, height]) / 2 - turn @ centre
        picture = source.transform(
            (OVERSAMPLING * SIDE,) * 2,
            self._image.Transform.AFFINE,
            np.column_stack((turn, offset)).ravel().tolist(),
            self._image.Resampling.BILINEAR,
        )
        return np.asarray(picture.reduce(OVERSAMPLING))
