"""The packages that training reads: fetched by npm, checked against the manifest, unpacked under build/pebble."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "pebble"


@functools.cache
def package(name: str) -> Path:
    """The unpacked folder of a package of manifest.json; its archive must have the recorded sha256."""
    entry = json.loads((HERE / "manifest.json").read_text())["packages"][name]
    folder = CACHE / entry["archive"].removesuffix(".tgz")
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        archive = CACHE / entry["archive"]
        if not archive.exists():
            subprocess.run(["npm", "pack", f"{name}@{entry['version']}"], cwd=CACHE, check=True, capture_output=True)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise SystemExit(f"{archive} has sha256 {found}, but the manifest says {entry['sha256']}.")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    return folder / "package"
