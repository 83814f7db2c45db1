"""The conformer's layers in one call each of the CPU kernels, where those take them: bfloat16, no gradients.

`Layer.forward` op by op is the definition; the kernels and the roundings between them are the same. One call saves the
interpreter's time between some twenty ops, in which all threads wait, and lets a kernel write what the next one reads
as that wants it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ..ops import cpu, towers
from .conformer import Layer
from .layers import ClippedLinear, Linear, RMSNorm
from .links import links


class FusedConformer:
    """The addresses of a layer's weights, looked up once."""

    def __init__(self, layer: Layer) -> None:
        self.links, self.attention, self.kernel = list(links(layer)), layer.self_attn, _kernel(layer)

    def run(self, x: Tensor, distance: Tensor, bound: float, after: FusedConformer | None) -> Tensor:
        """`Layer.forward`; meanwhile the first weights of `after` are fetched."""
        assert self.kernel is not None
        following = after.kernel if after is not None else None
        return towers.conformer(self.kernel, x, distance, self.attention.query_scale(x.dtype), bound, following)


_fused: WeakKeyDictionary[nn.Module, FusedConformer] = WeakKeyDictionary()


def run_layers(layers: Iterable[nn.Module], x: Tensor, distance: Tensor, bound: float) -> Tensor:
    """`x` [A, W] through all `layers`, each in one call where that can be."""
    steps = [(layer, fused(layer, x, distance)) for layer in layers]
    for (layer, whole), (_, after) in zip(steps, [*steps[1:], (None, None)], strict=True):
        x = layer(x, distance, bound) if whole is None else whole.run(x, distance, bound, after)
    return x


def fused(layer: nn.Module, x: Tensor, distance: Tensor) -> FusedConformer | None:
    """`layer` for activations like `x`; None where there are no kernels for them."""
    if not isinstance(layer, Layer) or not towers.takes_conformer(x, distance):
        return None
    known = _fused.get(layer)
    if known is None or not cpu.unchanged(known.links):
        known = _fused[layer] = FusedConformer(layer)
    return known if known.kernel is not None else None


def _kernel(layer: Layer) -> Any:
    """The prepared call, or None when something in the layer is not what the kernel knows."""
    first, attention, convolution, second = layer.feed_forward1, layer.self_attn, layer.lconv1d, layer.feed_forward2
    norms = (
        first.pre_layer_norm,
        first.post_layer_norm,
        layer.norm_pre_attn,
        layer.norm_post_attn,
        convolution.pre_layer_norm,
        convolution.conv_norm,
        second.pre_layer_norm,
        second.post_layer_norm,
        layer.norm_out,
    )
    products = (
        first.ffw_layer_1,
        first.ffw_layer_2,
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.post,
        attention.relative_k_proj,
        convolution.linear_start,
        convolution.linear_end,
        second.ffw_layer_1,
        second.ffw_layer_2,
    )
    if any(type(norm) is not RMSNorm for norm in norms) or any(
        type(p) not in (ClippedLinear, Linear) for p in products
    ):
        return None
    matrices = [(p.linear.weight, p.clip) if isinstance(p, ClippedLinear) else (p.weight, None) for p in products]
    return towers.prepare_conformer(
        (attention.heads, layer.norm_out.eps, first.share, attention.k_scale, attention.cap),
        [norm.weight for norm in norms],
        convolution.depthwise_conv1d.weight[:, 0],
        matrices,
    )
