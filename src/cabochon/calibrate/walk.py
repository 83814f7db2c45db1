"""The texts go through the network layer by layer, twice: as it is, and rounded as far as it has come.

The inputs for which a matrix is rounded are those that the layers and matrices rounded before it make, in the kernels
that will serve it and with their rounding of activations. In memory are one layer's weights and the texts' states in
both forms, and the sums over the inputs of one matrix at a time.

Tables are rounded without texts: rows that are looked up have no inputs. A head that is the same table is rounded like
it, one of its own for the states that arrive there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import LayerSpec
from ..model.batch import Batch, whole_sequences
from ..model.decoder import Layer, angles_by_kind
from ..model.text import Text
from ..ops.packing import pack, quantize
from ..quant import QuantTensor
from ..rounding import Moments, quantize_for
from ..weights.checkpoint import Checkpoint
from ..weights.convert import fetch
from ..weights.load import place
from ..weights.params import Param, as_kept, parameters

_TEXT = "language_model."
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
AT_ONCE = 2048
"""Tokens that go through a layer together."""


class Inputs(NamedTuple):
    """What arrives at matrices that share their inputs."""

    x: Tensor
    """[T, I]"""
    chosen: Tensor | None = None
    """[T, top_k], which experts each token goes to; None where all tokens go."""


@dataclass(slots=True)
class _Stream:
    """Some of the texts on their way through one of the two networks."""

    batch: Batch
    x: Tensor
    """[T, D]"""
    ple: Tensor | None
    """[T, layers, ple_width]"""
    step: dict[int, Tensor] = field(default_factory=dict)
    """Rows of keys and values [T, K, W] by the layer that made them, while a later one reads them."""


def calibrated(
    found: Checkpoint,
    sequences: Sequence[Sequence[int]],
    format: str,
) -> Iterator[tuple[Param, Tensor | QuantTensor]]:
    """All parameters of `found` in the order of its table, the layers' matrices rounded to `format` for `sequences`.

    Raises:
        CheckpointError: a weight is missing, or the network computes no numbers.
    """
    found = replace(found, config=as_kept(found.config, format))
    walk = _Walk(found, sequences, format)
    for param in parameters(found.config):
        number = re.match(rf"{_TEXT}layers\.(\d+)\.", param.name)
        if number and int(number[1]) not in walk.done:
            walk.layer(int(number[1]))
        rounded = walk.head(param.name) if param.part == "head" else walk.rounded.pop(param.name, None)
        yield param, fetch(found.source, param) if rounded is None else rounded


class _Walk:
    def __init__(self, found: Checkpoint, sequences: Sequence[Sequence[int]], format: str) -> None:
        self.config, self.source, self.format = found.config.text, found.source, format
        self.table = {param.name: param for param in parameters(found.config)}
        self.dtype = torch.bfloat16
        self.rounded: dict[str, QuantTensor] = {}
        """Our names -> weights that nobody has asked for yet."""
        self.done: set[int] = set()
        self.k_norms: dict[int, Tensor] = {}
        """By the layer that stores keys, for those that share them (`Attention.queries`)."""
        self.last_reader = {spec.reads_kv_of: spec.index for spec in self.config.layers}
        with torch.inference_mode():
            self.streams = self._embed(list(_batches(sequences)))

    def _embed(self, batches: list[Batch]) -> list[tuple[_Stream, _Stream]]:
        """The beginning of every text in the exact network and in the rounded one."""
        with torch.device("meta"):
            networks = Text(self.config), Text(self.config)
        exact, rounded = networks
        tops = [name for name in self.table if re.match(rf"{_TEXT}(?!layers\.|lm_head\.)", name)]
        for name in tops:
            weight = self._weight(name)
            for network in networks:
                place(network, name.removeprefix(_TEXT), weight)
            if "embed_tokens" in name and self.table[name].quantize:
                wanted = self.table[name].format("bfloat16", self.format).name
                self._put(rounded, name.removeprefix(_TEXT), quantize(weight, wanted), _TEXT)
        embedded = [(exact.embed(batch), rounded.embed(batch)) for batch in batches]
        if exact.ple_width:
            moments = _moments((Inputs(y), Inputs(x)) for x, y in embedded)
            self._round(exact, rounded, ["per_layer_model_projection"], moments, _TEXT)
        return [
            (
                _Stream(batch, x, exact.per_layer_inputs(x, batch)),
                _Stream(batch, y, rounded.per_layer_inputs(y, batch)),
            )
            for batch, (x, y) in zip(batches, embedded, strict=True)
        ]

    @torch.inference_mode()
    def layer(self, index: int) -> None:
        """Round the matrices of the next layer, and take the texts through it."""
        spec = self.config.layers[index]
        exact, rounded = self._layers(spec)
        if spec.owns_kv:
            self.k_norms[index] = exact.self_attn.k_norm.weight
        k_weight = self.k_norms[spec.reads_kv_of] if spec.k_eq_v else None
        walks = [
            (_stages(exact, before, k_weight), _stages(rounded, after, k_weight)) for before, after in self.streams
        ]
        prefix = f"{_TEXT}layers.{index}."
        for names in _order(spec):
            arriving = ((next(after), next(before)) for before, after in walks)
            if names == _EXPERTS:
                self._round_experts(exact, rounded, list(arriving), prefix)
            else:
                self._round(exact, rounded, names, _moments(arriving), prefix)
        for walk in walks:
            for stages in walk:
                assert next(stages, None) is None
        if self.last_reader[spec.reads_kv_of] == index:
            for pair in self.streams:
                for stream in pair:
                    del stream.step[spec.reads_kv_of]
        self.done.add(index)

    @torch.inference_mode()
    def head(self, name: str) -> QuantTensor:
        """The head, when the texts have come through all layers."""
        gain, eps = self._weight(f"{_TEXT}norm.weight"), self.config.rms_norm_eps
        arriving = (
            (Inputs(ops.rms_norm(after.x, gain, eps)), Inputs(ops.rms_norm(before.x, gain, eps)))
            for before, after in self.streams
        )
        return quantize_for(_moments(arriving), [self._weight(name)], self.format)[0]

    def _round_experts(self, exact: Layer, rounded: Layer, arriving: list[tuple[Inputs, Inputs]], prefix: str) -> None:
        """Each expert for the tokens that the rounded network sends it. Both networks' inputs are those tokens'."""
        both, down = exact.experts.gate_up_proj, exact.experts.down_proj
        assert isinstance(both, Tensor) and isinstance(down, Tensor)
        made: list[tuple[QuantTensor, QuantTensor]] = []
        for expert in range(both.shape[0]):
            mine = []
            for (x, chosen), (target, _) in arriving:
                assert chosen is not None
                token = (chosen == expert).any(-1)
                mine.append((x[token], target[token]))
            moments = _moments((Inputs(x), Inputs(y)) for x, y in mine)
            (first,) = quantize_for(moments, [both[expert]], self.format)
            gates = pack(first), both[expert]
            inner = ((Inputs(_gated(x, gates[0])), Inputs(_gated(y, gates[1]))) for x, y in mine)
            (second,) = quantize_for(_moments(inner), [down[expert]], self.format)
            made.append((first, second))
        for name, parts in zip(_EXPERTS, zip(*made, strict=True), strict=True):
            self._put(rounded, name, _stacked(parts), prefix)

    def _round(self, exact: nn.Module, rounded: nn.Module, names: Iterable[str], moments: Moments, prefix: str) -> None:
        """Matrices with the same inputs, from their module in one network to that in the other."""
        paths = [f"{name}.weight" for name in names]
        weights = [exact.get_parameter(path) for path in paths]
        for path, weight in zip(paths, quantize_for(moments, weights, self.format), strict=True):
            self._put(rounded, path, weight, prefix)

    def _put(self, module: nn.Module, name: str, weight: QuantTensor, prefix: str) -> None:
        self.rounded[prefix + name] = weight
        place(module, name, weight if self.table[prefix + name].looked_up else pack(weight))

    def _layers(self, spec: LayerSpec) -> tuple[Layer, Layer]:
        """The layer twice, with the weights of the checkpoint."""
        with torch.device("meta"):
            exact, rounded = (Layer(spec, self.config.hidden_size, self.config.rms_norm_eps) for _ in range(2))
        prefix = f"{_TEXT}layers.{spec.index}."
        for name in self.table:
            if name.startswith(prefix):
                weight = self._weight(name)
                for layer in (exact, rounded):
                    place(layer, name.removeprefix(prefix), weight)
        return exact, rounded

    def _weight(self, name: str) -> Tensor:
        return fetch(self.source, self.table[name]).to(self.dtype)


def _order(spec: LayerSpec) -> list[tuple[str, ...]]:
    """Matrices of a layer in the order of `_stages`, those with the same inputs together."""
    first = ["self_attn.q_proj"]
    if spec.owns_kv:
        first += ["self_attn.k_proj"] if spec.k_eq_v else ["self_attn.k_proj", "self_attn.v_proj"]
    dense = [tuple(first), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    return [*dense, _EXPERTS] if spec.experts else dense


def _stages(layer: Layer, stream: _Stream, k_weight: Tensor | None) -> Iterator[Inputs]:
    """`Layer.forward` on a stream, which stops before every product whose matrix is to be rounded and hands out its
    inputs: the matrix may be another one when it goes on."""
    spec, attn, x, batch = layer.spec, layer.self_attn, stream.x, stream.batch
    angles = angles_by_kind([spec], batch.rows.position)[spec.kind]
    normed = layer.input_layernorm(x)
    yield Inputs(normed)
    if spec.owns_kv:
        stream.step[spec.index] = attn.kv_rows(normed, angles)
    read = attn.heads(normed, stream.step[spec.reads_kv_of], batch.view(spec, False), angles, k_weight)
    yield Inputs(read)
    x = layer.post_attention_layernorm.settle(attn.o_proj(read), onto=x)
    normed = layer.pre_feedforward_layernorm(x)
    yield Inputs(normed)
    mlp = layer.mlp
    yield Inputs(F.gelu(mlp.gate_proj(normed), approximate="tanh") * mlp.up_proj(normed))
    if spec.experts:
        yield Inputs(layer.pre_feedforward_layernorm_2(x), layer.router(x)[0])
    x = layer.feed_forward(x)
    if stream.ple is not None:
        x = layer.per_layer_input(x, stream.ple[:, spec.index])
    stream.x = x * layer.layer_scalar


def _gated(x: Tensor, both: ops.Weight) -> Tensor:
    """What an expert's second matrix gets."""
    gate, up = ops.linear(x, both).chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def _moments(arriving: Iterator[tuple[Inputs, Inputs]]) -> Moments:
    """Of inputs in (the rounded, the exact) network."""
    moments: Moments | None = None
    for (x, _), (exact, _) in arriving:
        moments = moments or Moments.none(x.shape[-1])
        moments.add(x, exact)
    assert moments is not None
    return moments


def _stacked(parts: Sequence[QuantTensor]) -> QuantTensor:
    """Matrices of one shape as one weight with an axis more."""
    codes, scales = (torch.stack([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return replace(parts[0], codes=codes, scales=scales, shape=(len(parts), *parts[0].shape))


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """The texts in batches of at most about `AT_ONCE` tokens."""
    some: list[Tensor] = []
    for ids in sequences:
        if some and sum(map(len, some)) + len(ids) > AT_ONCE:
            yield whole_sequences(some)
            some = []
        some.append(torch.tensor(ids))
    yield whole_sequences(some)
