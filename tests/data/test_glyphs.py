import unicodedata

import numpy as np
import pytest
import torch

from imaml.data import Glyphs
from imaml.data import _glyphs as glyphs
from imaml.data._files import read_arrays
from imaml.data._glyph_rendering import Typeface, letters, typefaces

FACES = typefaces()
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def pen():
    return Typeface(FACES[0])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """All glyphs, drawn into an empty cache; the cache folder; the letters."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pooch.os_cache", lambda name: folder)
        source = Glyphs(seed=1)
        source.batch("train", 0, 1)
    (file,) = folder.iterdir()
    return source, folder, read_arrays(file)["letters"].tolist()


def ink(picture):
    """Where a picture has ink: first and last row, first and last column."""
    rows, columns = np.nonzero(picture > 10)
    return rows.min(), rows.max(), columns.min(), columns.max()


def test_twelve_faces_with_1365_letters_of_five_scripts():
    found = letters(FACES)
    assert len(FACES) == 12 and FACES[0].name == "DejaVuSans.ttf"
    assert len(found) == 1365
    assert set("AzßΩжԱაᾈ") < set(found) and not set("1+ʰ") & set(found)


def test_a_letter_is_drawn_centred_at_20_pixels(pen):
    for letter in "OWliᾈ":
        top, bottom, left, right = ink(pen.draw(letter))
        assert 19 <= max(bottom - top, right - left) + 1 <= 21
        assert abs(top + bottom - 27) <= 2 and abs(left + right - 27) <= 2


def test_shift_scale_and_angle_do_what_they_say(pen):
    def centre(picture):
        y, x = np.mgrid[:28, :28]
        return np.array([(picture * x).sum(), (picture * y).sum()]) / picture.sum()

    plain = pen.draw("L").astype(float)
    np.testing.assert_allclose(centre(pen.draw("L", shift=(2, -1)).astype(float)) - centre(plain), [2, -1], atol=0.05)
    top, bottom, _, _ = ink(pen.draw("L", scale=0.5))
    assert 9 <= bottom - top + 1 <= 11
    turned = pen.draw("L", angle=np.pi / 2).astype(float)
    # rot90 turns counterclockwise; rows point down, so a positive angle turns clockwise.
    np.testing.assert_allclose(turned, np.rot90(plain, -1), atol=6)


def test_letters_that_look_alike_count_once(pen):
    alike = ["A", "Α", "А", "O", "o", "Ο", "о", "x", "х", "I", "l"]
    assert glyphs.distinct(alike, pen) == ["A", "O", "x", "I"]
    different = ["A", "B", "E", "F", "O", "Q", "b", "d", "p", "q", "и", "N", "Ω", "Ж", "ა", "Ա", "ä"]
    assert glyphs.distinct(different, pen) == different


def test_examples_stay_inside_and_differ(pen):
    images = glyphs.render(["A", "g", "W"], FACES)
    assert images.shape == (3, 20, 28, 28) and images.dtype == np.uint8
    assert (images.max((2, 3)) > 200).all()
    assert len(np.unique(images.reshape(60, -1), axis=0)) == 60
    assert images[:, :, [0, 27]].max() < 60 and images[..., [0, 27]].max() < 60, "cut off at the edge"


def test_an_example_depends_on_its_character_alone():
    np.testing.assert_array_equal(glyphs.render(["g"], FACES)[0], glyphs.render(["A", "g"], FACES)[1])
    latin, greek = glyphs.render(["O", "Ο"], FACES)
    assert not (latin == greek).all((1, 2)).any(), "two characters are turned and shifted alike"


def test_the_splits_hold_every_class_once(drawn):
    source, _, kept = drawn
    classes = [source.classes(split) for split in SPLITS]
    assert 600 < len(kept) == len(source.images) < 700
    assert sorted(np.concatenate(classes)) == list(range(len(kept)))
    assert [len(part) / len(kept) for part in classes] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    names = [unicodedata.name(letter).split()[0] for letter in kept]
    assert min(map(names.count, ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN"))) > 20


def test_the_images_in_the_tasks_of_two_splits_are_disjoint(drawn):
    source, _, _ = drawn
    images = [
        torch.cat([pair[0].flatten(0, 1) for pair in (batch.support, batch.query)]).flatten(1)
        for batch in (source.batch(split, 0, 20) for split in SPLITS)
    ]
    distinct = [len(part.unique(dim=0)) for part in images]
    assert len(torch.cat(images).unique(dim=0)) == sum(distinct)


def test_later_runs_read_the_cache(drawn, monkeypatch):
    source, folder, _ = drawn
    monkeypatch.setattr("pooch.os_cache", lambda name: folder)
    monkeypatch.setattr(glyphs, "_rendered", lambda: pytest.fail("drawn again"))
    np.testing.assert_array_equal(Glyphs().images, source.images)


def test_another_recipe_is_another_cache_file(cache, monkeypatch):
    monkeypatch.setattr(glyphs, "_rendered", lambda: {"images": np.zeros((40, 20, 28, 28), np.uint8)})
    for angle in (0.1, 0.2):
        monkeypatch.setattr(glyphs, "MAX_ANGLE", angle)
        assert len(Glyphs().images) == 40
    assert len(list(cache.iterdir())) == 2


def test_a_task_can_be_told_from_pixels_but_not_trivially(drawn):
    """Nearest neighbour on pixels, as a floor and a ceiling for what a learner has to add."""
    batch = drawn[0].batch("test", 0, 100)
    distances = torch.cdist(batch.query[0].flatten(2), batch.support[0].flatten(2))
    accuracy = (distances.argmin(-1) == batch.query[1]).double().mean()
    assert 0.35 < accuracy < 0.65
