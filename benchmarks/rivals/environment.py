"""The rivals' own folder: installed at run time, without their dependencies' pins, and never committed.

JAX has an environment of its own beside it, so that its dependencies meet none of torch's.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".rivals"
WHEELS = ("higher", "torchopt", "optree", "graphviz", "betty-ml", "torch-maml")
SOURCES = ("learn2learn",)
"""Packages that do not build, of which a pure-Python part can be imported from the unpacked source."""

JAX = FOLDER.with_name(".rivals-jax")


def install() -> dict[str, str]:
    """Fetch what is not there yet; returns what failed and the last line that pip said of it."""
    FOLDER.mkdir(exist_ok=True)
    failed = {}
    for package in WHEELS + SOURCES:
        if package in versions():
            continue
        how = ["install", "--target", str(FOLDER)]
        if package in SOURCES:
            how = ["download", "--no-build-isolation", "--no-binary", package, "--dest", str(FOLDER)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *how, "--no-deps", package]
        run = subprocess.run(pip, capture_output=True, text=True)
        if run.returncode:
            failed[package] = (run.stderr.strip().splitlines() or ["pip failed"])[-1]
    for archive in FOLDER.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            opened.extractall(FOLDER / "sources", filter="data")
        archive.unlink()
    return failed | _install_jax()


def _install_jax() -> dict[str, str]:
    if "jax" in versions():
        return {}
    pip = [str(jax_python()), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "jax"]
    for command in ([sys.executable, "-m", "venv", str(JAX)], pip):
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            return {"jax": (run.stderr.strip().splitlines() or [f"{command[2]} failed"])[-1]}
    return {}


def jax_python() -> Path:
    """The interpreter that has JAX; there only after `install`."""
    return JAX / "bin" / "python"


def search_path() -> list[str]:
    """Folders for the end of `PYTHONPATH`, behind the packages of the running environment."""
    return [str(FOLDER), *(str(source) for source in sorted(FOLDER.glob("sources/*")))]


def versions() -> dict[str, str]:
    """What is there, by name."""
    found = {d.name.lower().replace("_", "-"): d.version for d in distributions(path=[str(FOLDER)])}
    jax = distributions(path=[str(path) for path in JAX.glob("lib/python*/site-packages")])
    found |= {d.name: d.version for d in jax if d.name in ("jax", "jaxlib")}
    unpacked = (source.name.rpartition("-") for source in FOLDER.glob("sources/*-*"))
    return found | {name: version for name, _, version in unpacked}


if __name__ == "__main__":
    for package, reason in install().items():
        print(f"{package}: {reason}")
    print(versions())
