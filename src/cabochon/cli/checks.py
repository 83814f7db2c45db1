"""What `cabochon doctor` looks at. Each check returns findings; none of them raises or downloads."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import hub
from ..config import ModelConfig, read_config
from ..errors import CabochonError
from ..sizing import Workload, hardware, plan, units
from ..weights.params import own_format

Status = Literal["ok", "warning", "error"]

TOKENIZERS = {
    "cc8d3a0ce36466ccc1278bf987df5f71db1719b9ca6b4118264f45cb627bfe0f": "the published tokenizer",
    "75a6583c1a418e2bbd79c60d95d28e0f5bf549ad3f2990b5bdb5238c6c2bf70c": "the published drafters' tokenizer",
}
"""sha256 of tokenizer.json."""

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")

TROUBLES = (
    (
        "out of memory",
        "see `cabochon plan MODEL`; take --quantization int4, an 8-bit cache or a shorter --max-model-len",
    ),
    ("slow first token", "a long prompt is read first: keep its beginning the same, so that the prefix cache knows it"),
    ("repetition", "use the model's own sampling (1.0 / 0.95 / 64); greedy decoding loops; fewer bits loop sooner"),
    ("unreliable JSON", "ask with a schema (response_format or a strict tool): replies then can't leave it"),
    ("unknown format", "take the original repository, or one in compressed-tensors, GPTQ, AWQ, FP8 or GGUF"),
    ("a download that stops", "run `cabochon pull MODEL` again: it goes on where it stopped"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    status: Status
    topic: str
    text: str


def machine(offline: bool = False) -> Iterator[Finding]:
    """Everything that doesn't depend on a model."""
    yield from python()
    yield from torch_build()
    yield from kernels()
    yield from instructions()
    yield from gpu()
    yield from space()
    yield from measured()
    yield from the_hub(offline)
    yield Finding("ok", "licence", "weights and code are Apache 2.0; 'Gemma' is a trademark of Google LLC")


def python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok" if sys.version_info >= (3, 11) else "error", "python", text)


def torch_build() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("error", "torch", f"can't be imported ({error}); pip install torch")
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU"
    yield Finding("ok", "torch", f"{torch.__version__} {built}, {torch.get_num_threads()} threads")


def kernels() -> Iterator[Finding]:
    """The CPU kernels in use; without them, why not."""
    from ..ops import cpu

    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if cpu.active() != "reference":
        others = [name for name in cpu.supported() if name != cpu.active()]
        extra = f"; also usable: {', '.join(others)}" if others else ""
        tiles = f"; AMX tiles are left alone: {cpu.tiles_refused}" if cpu.tiles_refused else ""
        yield Finding("warning" if tiles else "ok", "kernels", f"compiled, {cpu.active()} in use{extra}{tiles}")
    elif cpu.supported():
        yield Finding("warning", "kernels", "compiled, but CABOCHON_ISA=reference switches them off")
    else:
        found = f"a compiler is here ({compiler}): install again with `pip install --no-binary cabochon cabochon`"
        missing = "there is no C++ compiler: install one, then cabochon again"
        text = f"not compiled, so int8 and int4 are slow; {found if compiler else missing}"
        yield Finding("warning", "kernels", text)


def instructions() -> Iterator[Finding]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        yield Finding("ok", "cpu", f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores")
        return
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    has = [name for name in INSTRUCTIONS if name in flags]
    name = fields.get("model name", platform.machine())
    text = f"{name}, {os.cpu_count()} cores, {' '.join(has) or 'no wide vectors that the kernels know'}"
    yield Finding("ok" if has or "asimd" in flags else "warning", "cpu", text)


def gpu() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(index)
            yield Finding("ok", "gpu", f"{seen.name}, {units.gib(seen.total_memory)}, driver {_driver() or 'unknown'}")
    elif driver := _driver():
        yield Finding(
            "warning", "gpu", f"the driver ({driver}) is here, but torch is built without CUDA: install torch for it"
        )
    elif torch.backends.mps.is_available():
        yield Finding("ok", "gpu", "Apple's, through torch's mps")
    else:
        yield Finding("ok", "gpu", "none; the CPU is used")


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        asked = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else None


def space() -> Iterator[Finding]:
    free = hardware.free_memory()
    yield Finding("ok" if free > 2 << 30 else "warning", "memory", f"{units.gib(free)} free")
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    room = shutil.disk_usage(there).free
    text = f"{units.gib(room)} free for downloads in {folder}"
    yield Finding("ok" if room > 10 << 30 else "warning", "disk", text)


def measured() -> Iterator[Finding]:
    found = hardware.recall()
    if found is None:
        yield Finding("warning", "speed", "not measured, so plans guess it; run `cabochon doctor --measure`")
        return
    formats = ", ".join(f"{name} {getattr(found, name) / 1e12:.2f}" for name in ("bf16", "int8", "int4"))
    rates = f"{formats} T operations/s on {found.cores} threads"
    yield Finding("ok", "speed", f"memory {found.bandwidth / 1e9:.1f} GB/s, {rates}")


def the_hub(offline: bool) -> Iterator[Finding]:
    """Reachable within three seconds, and with a token? Nothing is fetched."""
    from huggingface_hub import constants, get_token

    token = "with a token" if get_token() else "without a token (public models need none)"
    if offline or constants.is_offline_mode():
        yield Finding("ok", "hub", f"not asked (offline); {token}")
        return
    import httpx

    try:
        httpx.head(constants.ENDPOINT, timeout=3, follow_redirects=True)
    except httpx.HTTPError as error:
        text = f"{constants.ENDPOINT} can't be reached ({type(error).__name__}); models that are here already still run"
        yield Finding("warning", "hub", text)
    else:
        yield Finding("ok", "hub", f"{constants.ENDPOINT} answers; {token}")


# A model --------------------------------------------------------------------------------------------------------------


def model(name: str) -> Iterator[Finding]:
    """A checkpoint on this machine: complete, known, and does it fit."""
    try:
        folder = hub.locate(name)
    except CabochonError as error:
        yield Finding("error", "model", str(error))
        return
    if folder.is_file() or any(folder.glob("*.gguf")):
        yield from _guarded("weights", lambda: _gguf(folder))
        return
    yield from _guarded("config", lambda: _config(folder))
    yield from _guarded("weights", lambda: _weights(folder))
    yield from _tokenizer(folder)
    yield from _guarded("fit", lambda: _fit(folder))


def _guarded(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Our own refusals are findings too."""
    try:
        yield from check()
    except CabochonError as error:
        yield Finding("error", topic, str(error))


def _config(folder: Path) -> Iterator[Finding]:
    config = read_config(folder)
    kind = "drafter" if config.drafter else config.model_type
    yield Finding("ok", "config", f"{folder}: {kind}, {len(config.text.layers)} layers, {config.dtype}")
    if (stored := own_format(config)) is not None:
        yield Finding("ok", "format", f"{stored}, written by cabochon quantize; matrices stay in it")
    elif config.quantization is not None:
        from ..weights.schemes import scheme_of

        yield Finding("ok", "format", f"{scheme_of(config.quantization).name}; read back to plain matrices")


def _weights(folder: Path) -> Iterator[Finding]:
    from ..weights.header import read_folder

    entries = read_folder(folder)
    size = sum(entry.nbytes for entry in entries.values())
    yield Finding("ok", "weights", f"{len(entries):,} tensors, {units.gib(size)}, complete")


def _gguf(path: Path) -> Iterator[Finding]:
    from ..weights.checkpoint import open_checkpoint

    found = open_checkpoint(path)
    yield Finding("ok", "weights", f"GGUF with {len(found.source.shapes()):,} tensors, complete")
    yield from _fit_of(found.config, path.name, found.kept)


def _tokenizer(folder: Path) -> Iterator[Finding]:
    from ..chat.jinja import describe_template

    file = folder / "tokenizer.json"
    if not file.is_file():
        yield Finding("warning", "tokenizer", "none; token ids only")
        return
    known = TOKENIZERS.get(hashlib.sha256(file.read_bytes()).hexdigest())
    bundled = folder == hub.BUNDLED
    named = known or ("the bundled model's own" if bundled else "none of the published ones; ids may differ")
    yield Finding("ok" if known or bundled else "warning", "tokenizer", named)
    text = describe_template(folder)
    yield Finding("warning" if text.startswith(("its own", "outdated")) else "ok", "template", text)


def _fit(folder: Path) -> Iterator[Finding]:
    config = read_config(folder)
    if config.drafter is None:
        yield from _fit_of(config, folder.name)


def _fit_of(config: ModelConfig, name: str, kept: frozenset[str] = frozenset()) -> Iterator[Finding]:
    context = min(8192, config.text.max_position_embeddings)
    work = Workload(context=context, dtype=config.dtype, quantization=own_format(config), kept=kept)
    made = plan(config, hardware.this_machine(), work, name=name)
    yield Finding(
        "ok" if made.fits else "error", "fit", made.verdict if made.fits else f"{made.verdict}; {made.advice}"
    )
