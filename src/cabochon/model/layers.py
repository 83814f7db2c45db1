"""The small modules that every tower is made of. Parameters start empty: a checkpoint or an initialiser fills them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Rope
from .watched import Watched


class Linear(Watched):
    """A matrix without bias. `weight` [O, I] is a parameter, or a `QuantTensor` once a loader put one there.

    What a `wide` one gives is float32 at least.
    """

    weight: ops.Weight

    def __init__(self, inputs: int, outputs: int, *, wide: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.wide)


class Embedding(Watched):
    """A table of rows [count, width], looked up by `ops.embed`; `weight` may become a `QuantTensor` like a matrix's."""

    weight: ops.Weight

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(self, ids: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
        return ops.embed(ids, self.weight, scale, dtype)


class RMSNorm(Watched):
    """Root-mean-square norm over the last axis with a plain weight (w, not 1 + w), whose type the result has."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def settle(self, x: Tensor, *, bound: float = torch.inf, onto: Tensor | None = None, share: float = 1.0) -> Tensor:
        """`onto + share *` the norm of `x` cut to +-`bound`, in the type of `x`."""
        return ops.settle(x, self.weight, self.eps, bound=bound, onto=onto, share=share)


def rope_angles(position: Tensor, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, rotated / 2], float32, of the angles at `position` [T].

    Angles are taken in float32, as the reference does; at position 131,071 this differs from exact angles, so computing
    them "better" would be worse.
    """
    return ops.cos_sin(position, _frequencies(rope, head_dim, position.device))


@cache
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> Tensor:
    """Radians per position [rotated / 2] of every pair that turns."""
    with torch.inference_mode(False):  # they outlive the step that asked first
        exponent = torch.arange(0, rope.rotated, 2, dtype=torch.float32, device=device) / head_dim
        return 1.0 / rope.theta**exponent


class ClippedLinear(nn.Module):
    """A tower's matrix: inputs and outputs are clamped to ranges that the checkpoint holds; plain without `clipped`."""

    input_min: Tensor
    input_max: Tensor
    output_min: Tensor
    output_max: Tensor

    def __init__(self, inputs: int, outputs: int, clipped: bool) -> None:
        super().__init__()
        self.linear = Linear(inputs, outputs)
        self.clipped = clipped
        if clipped:
            for side in ("input", "output"):
                self.register_buffer(f"{side}_min", torch.tensor(-torch.inf))
                self.register_buffer(f"{side}_max", torch.tensor(torch.inf))

    @property
    def clip(self) -> ops.Clip | None:
        if not self.clipped:
            return None
        return ops.Clip(self.input_min, self.input_max, self.output_min, self.output_max)

    def forward(self, x: Tensor, *, silu: bool = False, onto: Tensor | None = None) -> Tensor:
        return ops.clipped_linear(x, self.linear.weight, self.clip, silu=silu, onto=onto)


class Projector(nn.Module):
    """A tower's features into the text network's width: norm without weight, then a matrix."""

    def __init__(self, inputs: int, outputs: int, eps: float) -> None:
        super().__init__()
        self.embedding_projection = Linear(inputs, outputs)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.embedding_projection(ops.rms_norm(x, None, self.eps))
        return out
