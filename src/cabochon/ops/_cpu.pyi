"""The compiled kernels: addresses and sizes in. `ops.cpu` is the face; `csrc/ops.h` documents the arguments."""

Matrix = tuple[int, int, int, int, int, int]
"""format, dtype, codes, scales, rows, cols."""
Asking = tuple[int, int, int, int, int, int, int, int, int]
"""table, its width, first; first rows, positions, last seen; starts, contexts; count."""
Source = tuple[int, int, int, int, int]
"""rows of the step; pages, scales, slots, split."""
Stored = tuple[int, int, int, int, int]
"""KV heads, row width, key offset, value offset, window or 0."""

def supported() -> list[str]: ...
def active() -> str: ...
def use(name: str, /) -> None: ...
def threads() -> int: ...
def set_threads(count: int, /) -> None: ...
def linear(
    x: int, dtype: int, count: int, stride: int, weight: Matrix, y: int, y_dtype: int, softcap: float, /
) -> None: ...
def head_at(x: int, dtype: int, count: int, some: int, stride: int, table: Matrix, ids: int, y: int, /) -> None: ...
def gated(x: int, dtype: int, count: int, stride: int, gate: Matrix, up: Matrix, down: Matrix, y: int, /) -> None: ...
def experts(
    x: int,
    dtype: int,
    count: int,
    stride: int,
    chosen: int,
    weights: int,
    per_token: int,
    experts: int,
    gate_up: Matrix,
    down: Matrix,
    gate_up_codes: int,
    gate_up_scales: int,
    down_codes: int,
    down_scales: int,
    y: int,
    /,
) -> None: ...
def norm(
    x: int, dtype: int, count: int, width: int, stride: int, weight: int, eps: float, y: int, to: int, /
) -> None: ...
def per_layer(
    x: int, count: int, width: int, onto: int, weight: int, eps: float, scale: float, y: int, dtype: int, /
) -> None: ...
def set_team(count: int, /) -> int: ...
def cos_sin(positions: int, count: int, frequencies: int, width: int, cos: int, sin: int, /) -> None: ...
def rope(
    x: int, cos: int, sin: int, y: int, dtype: int, tokens: int, heads: int, head: int, half_rotated: int, /
) -> None: ...
def store(
    pages: int, scales: int, rows: int, slots: int, dtype: int, tokens: int, kv_heads: int, width: int, split: int, /
) -> None: ...
def attend(
    q: int, asking: Asking, source: Source, shape: Stored, out: int, dtype: int, heads: int, head: int, /
) -> None: ...

Part = tuple[tuple[int, float, int, int], tuple[int, ...], tuple[Matrix, ...], Stored, tuple[int, int, bool]]
"""A layer: dtype, eps, heads, head width; vectors; matrices; its rows; its kind, its source, whether it stores them."""
Turning = tuple[int, int, int, int, Asking]
"""cos, sin, how many numbers turn; slots of the step's rows, or 0; who asks."""

class Layers:
    """`sources` are `Source` and, where value = key, the key norm's weight of the layer whose rows these are."""

    def __init__(self, layers: list[Part], /) -> None: ...
    def run(
        self,
        x: int,
        count: int,
        y: int,
        ple: int,
        ple_stride: int,
        tokens: int,
        kinds: list[Turning],
        sources: list[tuple[int, int, int, int, int, int]],
        /,
    ) -> None: ...

Link = tuple[dict[str, object], str, object, int]
"""A dictionary, a key, the value that was found there; the address of its numbers where that may change, or 0."""

def unchanged(links: list[Link], /) -> bool: ...

class Conformer:
    def __init__(
        self,
        numbers: tuple[float, ...],
        vectors: tuple[int, ...],
        matrices: tuple[tuple[int, int, int, tuple[int, ...]], ...],
        /,
    ) -> None: ...
    def run(
        self,
        x: int,
        count: int,
        distance: int,
        reach: int,
        scale: int,
        bound: float,
        y: int,
        after: Conformer | None,
        /,
    ) -> None: ...

def attend_all(
    q: int, k: int, v: int, out: int, dtype: int, batch: int, count: int, heads: int, head: int, /
) -> None: ...
def matrix_tiles() -> bool: ...
def admit_tiles() -> str: ...
def same_products(first: str, second: str, /) -> bool: ...
def product(
    x: int,
    count: int,
    cols: int,
    stride: int,
    first: int,
    second: int,
    outputs: int,
    clip: tuple[int, ...],
    second_clip: tuple[int, ...],
    how: int,
    onto: int,
    onto_stride: int,
    y: int,
    /,
) -> bool: ...
def settle(
    x: int,
    dtype: int,
    count: int,
    width: int,
    stride: int,
    weight: int,
    weight_dtype: int,
    onto: int,
    eps: float,
    bound: float,
    share: float,
    y: int,
    /,
) -> None: ...
def turn(
    x: int,
    weight: int,
    cos: int,
    sin: int,
    y: int,
    dtype: int,
    eps: float,
    tokens: int,
    places: int,
    heads: int,
    head: int,
    /,
) -> None: ...
def recent(
    q: int,
    k: int,
    v: int,
    relative: int,
    scale: int,
    out: int,
    dtype: int,
    key_scale: float,
    cap: float,
    tokens: int,
    heads: int,
    head: int,
    reach: int,
    /,
) -> None: ...
def blend(
    x: int,
    dtype: int,
    count: int,
    width: int,
    stride: int,
    taps: int,
    weight: int,
    tap_count: int,
    eps: float,
    bound: float,
    y: int,
    /,
) -> None: ...
def subsample(
    mel: int,
    count: int,
    width: int,
    stride: int,
    taps: int,
    norm: int,
    second_taps: int,
    second_norm: int,
    channels: int,
    outputs: int,
    eps: float,
    y: int,
    /,
) -> None: ...
def largest(x: int, count: int, width: int, stride: int, k: int, values: int, places: int, /) -> None: ...
def draw(x: int, count: int, width: int, stride: int, settings: int, tokens: int, best: int, /) -> None: ...
def log_sum(x: int, count: int, width: int, stride: int, y: int, /) -> None: ...
def quantize(
    x: int,
    dtype: int,
    count: int,
    width: int,
    stride: int,
    format: int,
    panels: bool,
    codes: int,
    scales: int,
    /,
) -> None: ...
def pack(codes: int, scales: int, count: int, width: int, format: int, to_codes: int, to_scales: int, /) -> None: ...
def spin(rounds: int, /) -> float: ...
def lookup(ids: int, count: int, table: Matrix, panels: bool, scale: float, y: int, dtype: int, /) -> None: ...
def huge_pages(data: int, bytes: int, /) -> None: ...
def give_back() -> None: ...
def read(data: int, bytes: int, /) -> int: ...
