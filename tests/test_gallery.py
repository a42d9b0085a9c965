"""The jobs of the gallery, at small size: each runs, finds what it promises, and is drawn."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
JOBS = sorted(file.stem for file in (FOLDER / "results").glob("*.json"))
LINES = range(60, 151)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a job at the sizes given, as `examples/gallery.py` does; returns its results and its picture's bytes."""
    monkeypatch.syspath_prepend(FOLDER)
    import gallery

    def once(job, **sizes):
        record = gallery.keep(job, tmp_path, **sizes)
        assert (tmp_path / f"{job}.png").read_bytes().startswith(b"\x89PNG")
        return record["numbers"]

    return once


@pytest.mark.parametrize("job", JOBS)
def test_a_job_is_a_page_of_code_with_a_picture_and_numbers(job):
    assert len((FOLDER / f"{job}.py").read_text(encoding="utf-8").splitlines()) in LINES
    record = json.loads((FOLDER / "results" / f"{job}.json").read_text(encoding="utf-8"))
    assert record["numbers"] and record["command"] == f"python examples/gallery.py {job}"
    assert (FOLDER / "results" / f"{job}.png").stat().st_size < 300_000
