"""The decoder layer of text network and drafter: attention, dense MLP with experts beside it, per-layer embedding.

Unusual here: only what a matrix takes and what is stored of a token has the weights' type; all else, what matrices
give and the residual stream, is float32 at least (docs/numerics.md has what rounding it, too, would cost). Attention is
handed the step's rows of keys and values, its own or those of the layer it shares with, and the pages of what came
before; it writes neither.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import ops
from ..config import Kind, LayerSpec
from ..kv.layout import row_geometry
from ..ops.views import View
from .layers import Linear, RMSNorm, rope_angles
from .watched import Watched

Angles = tuple[Tensor, Tensor]


def angles_by_kind(layers: Iterable[LayerSpec], position: Tensor) -> dict[Kind, Angles]:
    """cos and sin at `position` [Q] for the layers of each kind, which all turn alike."""
    first = {spec.kind: spec for spec in layers}
    return {kind: rope_angles(position, spec.rope, spec.head_dim) for kind, spec in first.items()}


class Attention(Watched):
    """Grouped-query attention of one layer; produces the stored row of its tokens unless it reads another layer's."""

    def __init__(self, spec: LayerSpec, width: int, eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.eps = eps
        self.row_width, self.key_offset, self.value_offset = row_geometry(spec)
        self.q_proj = Linear(width, spec.q_heads * spec.head_dim, wide=True)
        self.q_norm = RMSNorm(spec.head_dim, eps)
        if spec.owns_kv:
            self.k_proj = Linear(width, spec.kv_heads * spec.head_dim, wide=True)
            self.k_norm = RMSNorm(spec.head_dim, eps)
            if not spec.k_eq_v:
                self.v_proj = Linear(width, spec.kv_heads * spec.head_dim, wide=True)
        self.o_proj = Linear(spec.q_heads * spec.head_dim, width, wide=True)

    def kv_rows(self, x: Tensor, angles: Angles) -> Tensor:
        """What is stored of the tokens `x` [T, D]: [T, K, W], see `kv.layout`."""
        spec = self.spec
        raw = self.k_proj(x).unflatten(-1, (spec.kv_heads, spec.head_dim))  # [T, K, H]
        if not spec.k_eq_v:
            key = ops.rope(self.k_norm.settle(raw), *angles)
            value = ops.rms_norm(self.v_proj(x).unflatten(-1, (spec.kv_heads, spec.head_dim)), None, self.eps)
            return torch.cat([key, value], -1).to(x.dtype)
        n_rot, n_rest = split_rotated(ops.rms_norm(raw, None, self.eps), spec.rope.rotated)
        w_rot, _ = split_rotated(self.k_norm.weight, spec.rope.rotated)
        # A head of width `rotated` that turns whole: the pairs (i, i + rotated / 2) are the former (i, i + H / 2).
        k_rot = ops.rope(n_rot * w_rot, *angles)
        return torch.cat([n_rot, n_rest, k_rot], -1).to(x.dtype)

    def queries(self, x: Tensor, angles: Angles, k_weight: Tensor | None) -> Tensor:
        """[Q, D] -> [Q, N, H] in the order of the stored key.

        `k_weight` is the key norm's weight of the layer that stored the rows, for K=V layers: the dimensions that don't
        turn are stored without it.
        """
        spec = self.spec
        raw = self.q_proj(x).unflatten(-1, (spec.q_heads, spec.head_dim))
        q = ops.rope(self.q_norm.settle(raw), *angles, None if spec.k_eq_v else x.dtype)
        if not spec.k_eq_v:
            return q
        assert k_weight is not None
        q_rot, q_rest = split_rotated(q, spec.rope.rotated)
        _, w_rest = split_rotated(k_weight, spec.rope.rotated)
        return torch.cat([q_rest * w_rest, q_rot], -1).to(x.dtype)

    def forward(self, x: Tensor, step: Tensor, view: View, angles: Angles, k_weight: Tensor | None) -> Tensor:
        """`x` [Q, D] are the query rows, `step` [T, K, W] the rows of all tokens of the step -> [Q, D], wide."""
        out: Tensor = self.o_proj(self.heads(x, step, view, angles, k_weight))
        return out

    def heads(self, x: Tensor, step: Tensor, view: View, angles: Angles, k_weight: Tensor | None) -> Tensor:
        """What the heads have read, before the output projection: [Q, N * H]."""
        spec = self.spec
        out = ops.attend(
            self.queries(x, angles, k_weight),
            step,
            view,
            key_offset=self.key_offset,
            value_offset=self.value_offset,
            window=spec.window,
        )
        if spec.k_eq_v:
            out = join_rotated(out, spec.rope.rotated)
        return out.flatten(-2)


def split_rotated(x: Tensor, rotated: int) -> tuple[Tensor, Tensor]:
    """[..., H] -> the dimensions that turn [..., rotated] and the rest [..., H - rotated], see `config.Rope`."""
    part, half = rotated // 2, x.shape[-1] // 2
    turned = torch.cat([x[..., :part], x[..., half : half + part]], -1)
    return turned, torch.cat([x[..., part:half], x[..., half + part :]], -1)


def join_rotated(x: Tensor, rotated: int) -> Tensor:
    """The inverse of `split_rotated` on its concatenated parts: [..., H] -> [..., H]."""
    part, rest = rotated // 2, (x.shape[-1] - rotated) // 2
    first, second, third, fourth = x.split([part, part, rest, rest], -1)
    return torch.cat([first, third, second, fourth], -1)


class MLP(Watched):
    """Gated GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return ops.gated_mlp(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


class Router(Watched):
    """Chooses experts for each token from the raw residual stream."""

    def __init__(self, width: int, count: int, per_token: int, eps: float) -> None:
        super().__init__()
        self.proj = Linear(width, count)
        self.scale = nn.Parameter(torch.empty(width))
        self.per_expert_scale = nn.Parameter(torch.empty(count))
        self.per_token = per_token
        self.eps = eps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.route(x, self.proj.weight, self.scale, self.per_expert_scale, self.per_token, self.eps)


class Experts(Watched):
    """All experts' matrices, stacked; gate rows before up rows."""

    gate_up_proj: ops.Weight
    down_proj: ops.Weight

    def __init__(self, width: int, count: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return ops.experts(x, chosen, weights, self.gate_up_proj, self.down_proj)


class Layer(Watched):
    """A decoder layer: attention, dense MLP (with experts beside it), per-layer embedding, scalar."""

    layer_scalar: Tensor

    def __init__(self, spec: LayerSpec, width: int, eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(spec, width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.mlp = MLP(width, spec.ffn_width)
        self.post_feedforward_layernorm = RMSNorm(width, eps)
        if spec.experts:
            self.router = Router(width, spec.experts.count, spec.experts.per_token, eps)
            self.experts = Experts(width, spec.experts.count, spec.experts.width)
            self.post_feedforward_layernorm_1 = RMSNorm(width, eps)
            self.pre_feedforward_layernorm_2 = RMSNorm(width, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(width, eps)
        if spec.ple_width:
            self.per_layer_input_gate = Linear(width, spec.ple_width, wide=True)
            self.per_layer_projection = Linear(spec.ple_width, width, wide=True)
            self.post_per_layer_input_norm = RMSNorm(width, eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self,
        x: Tensor,
        ple: Tensor | None,
        step: dict[int, Tensor],
        view: View,
        angles: Angles,
        k_weight: Tensor | None,
    ) -> Tensor:
        """`x` [Q, D] -> [Q, D], the residual stream, float32 at least.

        Args:
            step: rows of the step's tokens [T, K, W] by the layer that stores them; this layer's are added.
            k_weight: see `Attention.queries`.
        """
        spec, attn = self.spec, self.self_attn
        normed = self.input_layernorm(x)
        if spec.owns_kv:
            step[spec.index] = attn.kv_rows(normed, angles)
        y = attn(normed, step[spec.reads_kv_of], view, angles, k_weight)
        x = self.feed_forward(self.post_attention_layernorm.settle(y, onto=x))
        if ple is not None:
            x = self.per_layer_input(x, ple)
        return x * self.layer_scalar

    def feed_forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.pre_feedforward_layernorm(x))
        if self.spec.experts:
            routed = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
            y = self.post_feedforward_layernorm_2.settle(routed, onto=self.post_feedforward_layernorm_1.settle(y))
        return self.post_feedforward_layernorm.settle(y, onto=x)

    def per_layer_input(self, x: Tensor, ple: Tensor) -> Tensor:
        gated = ops.gate(self.per_layer_input_gate(x.to(ple.dtype)), ple)
        return self.post_per_layer_input_norm.settle(self.per_layer_projection(gated), onto=x)
