"""The packages that training reads: fetched by npm, pip or apt, checked against the manifest, under build/pebble."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "pebble"
FETCH = {
    "npm": lambda name, version: ["npm", "pack", f"{name}@{version}"],
    "pypi": lambda name, version: [sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{name}=={version}"],
    "debian": lambda name, version: ["apt-get", "download", f"{name}={version}"],
}


@functools.cache
def package(name: str) -> Path:
    """The unpacked folder of a package of manifest.json; its archive must have the recorded sha256."""
    entry = json.loads((HERE / "manifest.json").read_text())["packages"][name]
    archive = CACHE / entry["archive"]
    folder = archive.with_suffix("")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            command = FETCH[entry["registry"]](name, entry["version"])
            subprocess.run(command, cwd=CACHE, check=True, capture_output=True)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise SystemExit(f"{archive} has sha256 {found}, but the manifest says {entry['sha256']}.")
        _unpack(archive, folder)
    return folder / "package" if archive.suffix == ".tgz" else folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".tgz":
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
