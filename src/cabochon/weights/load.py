"""Filling a network from a source of tensors, and writing it back.

The network is built on the `meta` device and gets its tensors one by one: the peak is the model plus one tensor, also
when weights are converted or quantised on the way. All that is missing, unexpected or of a wrong shape is reported at
once, before the first byte of weights is read.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..config import ModelConfig, to_json
from ..errors import CheckpointError, InputError
from ..ops.packing import Arena, pack, quantize
from ..quant import Layout, QuantTensor, dequantize
from . import safetensors
from .params import Param, Shape, parameters

Convert = Callable[[Param, Tensor | QuantTensor], Tensor | QuantTensor]
"""What becomes of a weight (a plain tensor is already of the wanted type) before it is put in place."""
Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


EXPECTED = 1 << 28
"""Bytes that are on their way from the disk while others are worked on. What is larger comes when it is read: that is
one long read, or a table that stays in its file."""


class Source(Protocol):
    """Tensors by the names of published files. What a format keeps in another form, its source hands out converted."""

    origin: str
    """Where they come from, for messages."""

    def shapes(self) -> dict[str, Shape]: ...

    def nbytes(self, name: str) -> int: ...

    def expect(self, name: str) -> None:
        """It is read soon: whatever has to come from a disk may start to."""

    def read(self, name: str) -> Tensor | QuantTensor: ...


def fill(
    module: nn.Module,
    source: Source,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    convert: Convert | None = None,
    progress: Progress | None = None,
    rows_on_host: bool = False,
) -> None:
    """Give `module` (built on meta) its weights, of type `dtype` on `device`, ready for inference (no gradients).

    Parts that the module was built without are passed over. With `rows_on_host` tables that are only looked up stay in
    host memory where a GPU can read it. Raises `CheckpointError` naming every tensor that
    doesn't fit.
    """
    wanted = set(module.state_dict())
    plan = _match(source, parameters(config, unused=True), wanted)
    total = sum(source.nbytes(name) for _, name in plan)
    done = 0
    for param, name in _expected(source, plan):
        tensor = source.read(name)
        if isinstance(tensor, QuantTensor):
            tensor = replace(tensor, dtype=dtype)
        elif not param.integer:
            tensor = tensor.to(dtype)
        if convert is not None:
            tensor = convert(param, tensor)
        place(module, param.name, host(tensor, device) if rows_on_host and param.looked_up else _to(tensor, device))
        done += source.nbytes(name)
        if progress is not None:
            progress(done, total)


def _expected(source: Source, plan: list[tuple[Param, str]]) -> Iterator[tuple[Param, str]]:
    """The plan, of which the following `EXPECTED` bytes are always on their way."""
    coming, told = 0, 0
    for item in plan:
        while told < len(plan) and coming < EXPECTED:
            size = source.nbytes(plan[told][1])
            if size < EXPECTED:
                source.expect(plan[told][1])
            coming, told = coming + size, told + 1
        yield item
        coming -= source.nbytes(item[1])


def quantizer(format: str | None, *, panels: bool) -> Convert:
    """Matrices become `format` as they come in (None: they keep theirs); with `panels` in the CPU kernels' layout.

    What is looked up by row and never multiplied stays in rows.
    """
    arena = Arena()

    def convert(param: Param, tensor: Tensor | QuantTensor) -> Tensor | QuantTensor:
        layout: Layout = "panels" if panels and not param.looked_up else "rows"
        wanted = param.format("bfloat16", format).name if format else None
        if isinstance(tensor, QuantTensor) and wanted not in (None, tensor.format):
            tensor = dequantize(tensor)
        if isinstance(tensor, Tensor):
            if wanted is None or not param.quantize:
                return tensor
            return quantize(tensor, wanted, layout, arena if layout == "panels" else None)
        return pack(tensor, arena) if layout == "panels" else tensor

    return convert


def place(module: nn.Module, name: str, value: Tensor | QuantTensor) -> None:
    """Put `value` where the parameter or buffer `name` is."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        setattr(owner, leaf, value)
    elif isinstance(value, Tensor):
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner._parameters.pop(leaf, None)
        setattr(owner, leaf, value)


def named_tensors(module: nn.Module, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of every weight. Raises `InputError` where weights are quantised."""
    stored = module.state_dict()
    for param in parameters(config):
        if param.name in stored:
            yield param.hf, stored[param.name]
        elif _is_quantized(module, param.name):
            raise InputError(f"{param.name} is quantised; load the checkpoint in bfloat16 to save it in this layout")


def save(folder: Path, module: nn.Module, config: ModelConfig, *, shard_bytes: int = safetensors.SHARD_BYTES) -> None:
    """Write config.json and the weights as `transformers` loads them back, in the type that they have."""
    tensors = dict(named_tensors(module, config))
    safetensors.save(folder, tensors.items(), shard_bytes=shard_bytes)
    raw = to_json(config)
    raw["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _match(source: Source, table: Iterable[Param], wanted: set[str]) -> list[tuple[Param, str]]:
    """(parameter, its name in the source) for everything that is wanted; raises when anything doesn't fit."""
    shapes = source.shapes()
    plan, missing, misshapen, known = [], [], [], set()
    for param in table:
        names = [name for name in (param.hf, *param.also) if name in shapes]
        known.update(names)
        if not param.used or param.name not in wanted:
            continue
        if not names:
            missing.append(param.hf)
        elif shapes[names[0]] != param.shape:
            misshapen.append(f"{names[0]} is {list(shapes[names[0]])} instead of {list(param.shape)}")
        else:
            plan.append((param, names[0]))
    unexpected = [name for name in shapes if name not in known]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {source.origin} don't fit their config.json ({'; '.join(problems)}); "
            "take both from the same checkpoint"
        )
    return plan


def _listed(names: Iterable[str]) -> str:
    folded = fold(names)
    return ", ".join(folded[:20]) + (f" and {len(folded) - 20} more" if len(folded) > 20 else "")


def fold(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only become one: `a.0.b, a.1.b, a.3.b` -> `a.{0-1,3}.b`."""
    groups: dict[str, list[int]] = defaultdict(list)
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        groups[key].append(-1 if number is None else int(number[0]))
    return [key if numbers[0] < 0 else key.replace("*", _ranges(numbers)) for key, numbers in groups.items()]


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(numbers) == 1:
        return str(numbers[0])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _to(value: Tensor | QuantTensor, device: torch.device | str) -> Tensor | QuantTensor:
    if isinstance(value, Tensor):
        return value.to(device)
    return replace(value, codes=value.codes.to(device), scales=value.scales.to(device))


def _is_quantized(module: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return isinstance(getattr(module.get_submodule(path), leaf, None), QuantTensor)
    except AttributeError:
        return False


def host(value: Tensor | QuantTensor, device: torch.device | str) -> Tensor | QuantTensor:
    """In host memory: pinned where kernels on `device` read rows from there."""
    if torch.device(device).type != "cuda":
        return _to(value, "cpu")
    if isinstance(value, Tensor):
        return value.pin_memory()
    return replace(value, codes=value.codes.pin_memory(), scales=value.scales.pin_memory())
