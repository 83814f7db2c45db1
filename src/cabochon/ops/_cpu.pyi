"""The compiled kernels: addresses and sizes in. `ops.cpu` is the face; `csrc/ops.h` documents the arguments."""

Matrix = tuple[int, int, int, int, int, int]
"""format, dtype, codes, scales, rows, cols."""

def supported() -> list[str]: ...
def active() -> str: ...
def use(name: str, /) -> None: ...
def threads() -> int: ...
def set_threads(count: int, /) -> None: ...
def linear(
    x: int, dtype: int, count: int, stride: int, weight: Matrix, y: int, y_dtype: int, softcap: float, /
) -> None: ...
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
def norm(x: int, dtype: int, count: int, width: int, stride: int, weight: int, eps: float, y: int, /) -> None: ...
def rope(
    x: int, cos: int, sin: int, y: int, dtype: int, tokens: int, heads: int, head: int, half_rotated: int, /
) -> None: ...
def store(pages: int, rows: int, slots: int, tokens: int, bytes: int, /) -> None: ...
def attend(
    q: int,
    step: int,
    pages: int,
    scales: int,
    out: int,
    dtype: int,
    row_start: int,
    position: int,
    see_until: int,
    start: int,
    context: int,
    table: int,
    first: int,
    requests: int,
    heads: int,
    kv_heads: int,
    head: int,
    width: int,
    key_offset: int,
    value_offset: int,
    window: int,
    table_width: int,
    slots: int,
    split: int,
    /,
) -> None: ...
def attend_all(
    q: int, k: int, v: int, out: int, dtype: int, batch: int, count: int, heads: int, head: int, /
) -> None: ...
def largest(x: int, count: int, width: int, stride: int, k: int, values: int, places: int, /) -> None: ...
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
def huge_pages(data: int, bytes: int, /) -> None: ...
