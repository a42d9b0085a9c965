import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder that this library caches in, for this test."""
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "imaml"
