"""The Triton kernels on whatever is here: without a GPU they run in Triton's interpreter, on the CPU (conftest.py)."""

import importlib
from types import ModuleType

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton", reason="Triton is not installed (pip install triton): its kernels are not checked here")

if DEVICE == "cpu":
    import triton.language as tl
    from triton.runtime import interpreter

    def _widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(wide, tl.float32)

    _dot = interpreter.InterpreterBuilder.create_dot

    def _dot_of_values(self, a, b, *rest):
        # The interpreter keeps bfloat16 as its 16 bits, and up to Triton 3.9 it multiplies those as integers.
        return _dot(self, _widened(a), _widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = _dot_of_values


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance of two tensors; nan is far from everything."""
    got, wanted = got.double(), wanted.double()
    far = float((got - wanted).norm() / wanted.norm())
    return far if far == far else float("inf")


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def twin(name: str) -> ModuleType:
    """A module of kernels; imported here, after the interpreter has been chosen."""
    return importlib.import_module(f"cabochon.ops.{name}")
