import hashlib
import http.server
import io
import os
import shutil
import stat
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from imaml.data import _omniglot_files as files
from imaml.data._files import write_arrays

OFFICIAL = ("images_background.zip", "images_evaluation.zip")


def drawings(first, count):
    """Members of an archive: `count` characters by 20 drawers; and the 28x28 ink each must be read as."""
    generator = np.random.default_rng(first)
    nearest = ((np.arange(28) + 0.5) * 105 / 28).astype(int)
    members, ink = {}, np.zeros((count, 20, 28, 28), dtype=bool)
    for character in range(count):
        for drawer in range(20):
            paper = generator.random((105, 105)) < 0.8
            buffer = io.BytesIO()
            Image.fromarray(paper).save(buffer, "PNG")
            name = f"Greek/character{character + 1:02}/{first + character:04}_{drawer + 1:02}.png"
            members[name] = buffer.getvalue()
            ink[character, drawer] = ~paper[np.ix_(nearest, nearest)]
    return members, ink


BACKGROUND, EVALUATION = drawings(first=3, count=2), drawings(first=965, count=1)


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{path.stem}/{name}", content)
    return path


@pytest.fixture
def both(tmp_path, monkeypatch, cache):
    """A folder with small archives in the place of the official ones."""
    folder = tmp_path / "omniglot"
    folder.mkdir()
    paths = [
        archive(folder / name, members) for name, (members, _) in zip(OFFICIAL, (BACKGROUND, EVALUATION), strict=True)
    ]
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in paths}
    monkeypatch.setattr(files, "CHECKSUMS", sums)
    return folder


def check(characters, *parts):
    np.testing.assert_array_equal(characters.images, np.concatenate([ink for _, ink in parts]) * np.uint8(255))
    assert characters.is_evaluation.tolist() == [part is EVALUATION for part in parts for _ in part[1]]


def test_the_archive_of_five_alphabets_reads_as_the_packed_file(data_folder, cache):
    path = data_folder / "images_background_small1.zip"
    characters = files.read(path)
    with zipfile.ZipFile(path) as file:
        numbers = sorted({int(m[1]) for n in file.namelist() if (m := files.DRAWING.search(n))})
    assert len(numbers) == 136
    np.testing.assert_array_equal(
        characters.images, files.read(data_folder / "omniglot28.npz").images[np.array(numbers) - 1]
    )
    assert not characters.is_evaluation.any()


def test_one_archive(both):
    check(files.read(both / OFFICIAL[0]), BACKGROUND)
    check(files.read(both / OFFICIAL[1]), EVALUATION)


def test_a_folder_of_archives(both):
    check(files.read(both), BACKGROUND, EVALUATION)


def test_a_folder_of_extracted_archives(both):
    for name in OFFICIAL:
        shutil.unpack_archive(both / name, both)
        os.unlink(both / name)
    (both / "._0003_01.png").write_bytes(b"what an operating system leaves behind")
    check(files.read(both), BACKGROUND, EVALUATION)
    check(files.read(both / "images_evaluation"), EVALUATION)


@pytest.mark.parametrize("where", ["up", "absolute", "link"])
def test_an_archive_is_never_extracted(tmp_path, cache, where):
    path, folder = tmp_path / "up.zip", tmp_path / "elsewhere"
    prefix = {"up": "../../", "absolute": f"{folder}/", "link": "link/"}[where]
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, str(tmp_path))
        for name, content in BACKGROUND[0].items():
            file.writestr(prefix + name, content)
    check(files.read(path), BACKGROUND)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "up.zip"]
    assert [file.suffix for file in cache.iterdir()] == [".npz"]


def test_decoded_once(both, monkeypatch):
    first = files.read(both)
    monkeypatch.setattr(files, "_decoded", lambda sources: pytest.fail("decoded twice"))
    np.testing.assert_array_equal(files.read(both).images, first.images)


def test_a_changed_archive_is_decoded_again(tmp_path, cache):
    path = archive(tmp_path / "some.zip", BACKGROUND[0])
    files.read(path)
    archive(path, EVALUATION[0])
    np.testing.assert_array_equal(files.read(path).images, EVALUATION[1] * np.uint8(255))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(both, monkeypatch):
    """The folder `both`, at the address where the archives are looked for."""
    handler = lambda *args: Quiet(*args, directory=both)  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(files, "SOURCE", f"http://127.0.0.1:{http_server.server_port}/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield both
        http_server.shutdown()
        thread.join()


def test_downloaded_once(server):
    check(files.read(None), BACKGROUND, EVALUATION)
    for name in OFFICIAL:
        os.unlink(server / name)
    check(files.read(None), BACKGROUND, EVALUATION)


def test_a_download_with_another_checksum_is_refused(server, cache):
    (server / OFFICIAL[1]).write_bytes(b"an error page")
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is not the official file.*by hand"):
        files.read(None)
    assert [file.name for file in cache.iterdir()] == [OFFICIAL[0]], "the wrong file, or half of one, was kept"


def test_a_failed_download_says_what_to_do(server, cache):
    os.unlink(server / OFFICIAL[0])
    with pytest.raises(OSError, match=r"Could not download .*images_background\.zip: .*by hand and pass their folder"):
        files.read(None)
    assert not list(cache.iterdir())


def test_a_local_official_archive_is_checked(both):
    archive(both / OFFICIAL[0], EVALUATION[0])
    with pytest.raises(
        ValueError, match=r"checksum of .*images_background\.zip must be [0-9a-f]{32}. Got [0-9a-f]{32}"
    ):
        files.read(both)


def test_a_truncated_archive_is_refused(tmp_path, cache):
    path = archive(tmp_path / "cut.zip", BACKGROUND[0])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.zip is not a readable zip archive .* truncated"):
        files.read(path)
    assert not cache.exists()


def test_a_member_with_flipped_bits_is_refused(tmp_path, cache):
    path = archive(tmp_path / "flipped.zip", BACKGROUND[0])
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.zip is not a readable zip archive"):
        files.read(path)


def test_a_broken_image_is_refused_by_name(tmp_path, cache):
    members = dict(BACKGROUND[0])
    victim = list(members)[25]
    for damaged in (members[victim][:60], b"text"):
        path = archive(tmp_path / "some.zip", {**members, victim: damaged})
        with pytest.raises(ValueError, match=r"some.*0004_06\.png is not a readable image"):
            files.read(path)


def test_a_missing_drawing_is_refused(tmp_path, cache):
    members = dict(BACKGROUND[0])
    del members["Greek/character02/0004_20.png"]
    with pytest.raises(ValueError, match=r"Character 0004 .* must have 20 drawings. Got 19"):
        files.read(archive(tmp_path / "some.zip", members))


@pytest.mark.parametrize("make", [
    lambda path: path, lambda path: path.with_suffix(".npz"), lambda path: path.mkdir() or path,
    lambda path: archive(path.with_suffix(".zip"), {"readme.txt": "text"}),
], ids=["absent", "absent-npz", "empty-folder", "empty-archive"])  # fmt: skip
def test_nothing_there(tmp_path, cache, make):
    with pytest.raises(FileNotFoundError, match=r"No Omniglot drawings (at|in) .*nothing.* Expected"):
        files.read(make(tmp_path / "nothing"))


GOOD = {"images": np.zeros((3, 20, 98), np.uint8), "is_evaluation": np.zeros(3, bool)}


@pytest.mark.parametrize("name, array, words", [
    ("is_evaluation", None, "has no array 'is_evaluation'"),
    ("images", None, "has no array 'images'"),
    ("images", np.zeros((3, 20, 99), np.uint8), r"must be uint8 .* Got uint8 \(3, 20, 99\)"),
    ("images", np.zeros((3, 19, 98), np.uint8), r"must be uint8 .* Got uint8 \(3, 19, 98\)"),
    ("images", np.zeros((3, 20, 28, 28), np.uint8), r"must be uint8 .* Got uint8 \(3, 20, 28, 28\)"),
    ("images", np.zeros((3, 20, 98)), r"must be uint8 .* Got float64 \(3, 20, 98\)"),
    ("is_evaluation", np.zeros(4, bool), r"must be bool \(3,\).* Got bool \(4,\)"),
    ("is_evaluation", np.zeros(3), r"must be bool \(3,\).* Got float64 \(3,\)"),
])  # fmt: skip
def test_wrong_arrays_are_refused(tmp_path, name, array, words):
    others = {other: value for other, value in GOOD.items() if other != name}
    write_arrays(tmp_path / "wrong.npz", others if array is None else {**others, name: array})
    with pytest.raises(ValueError, match=words) as caught:
        files.read(tmp_path / "wrong.npz")
    assert "wrong.npz" in str(caught.value) and name in str(caught.value)


def test_a_truncated_packed_file_is_refused(tmp_path):
    path = tmp_path / "cut.npz"
    write_arrays(path, GOOD)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.npz is not a readable \.npz file"):
        files.read(path)
