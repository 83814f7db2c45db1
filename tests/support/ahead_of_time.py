"""Compile Triton kernels for GPUs that are not here, and read what the machine code needs.

Run as a program (a fresh process, because the interpreter replaces the compiler for good): one JSON line per kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(kernel, arguments: dict[str, object], constants: dict[str, object], arch: int, **options: int):
    """(shared bytes, registers, spilled bytes) of `kernel` with `arguments` name -> Triton type, for sm_`arch`."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if str(arguments.get(name, "")).startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return binary.metadata.shared, *resources(binary.asm["cubin"])


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack per thread: 0 unless registers are spilled)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def attention(arch: int, head: int, decode: bool, pages: str = "bfloat16"):
    """A tile with what it is used for: sliding layers of two tensors, global ones whose value is the key."""
    from cabochon.ops.triton_attention import CHUNK, _attend
    from cabochon.ops.triton_tiles import attend_tile

    tile, group, wide = attend_tile(arch, head, decode), 4, head == 256
    pointers = {name: "*i32" for name in _attend.arg_names if name.endswith("_ptr")}
    pointers |= dict.fromkeys(("q_ptr", "step_ptr", "pages_ptr", "out_ptr"), "*bf16")
    pointers |= dict.fromkeys(("scales_ptr", "acc_ptr", "softmax_ptr"), "*fp32")
    pointers["pages_ptr"] = {"bfloat16": "*bf16", "int8": "*i8", "float8": "*u8"}[pages]
    sizes = {"tiles": "i32", "table_width": "i32", "queries": "i32"}
    constants = {
        "K": 2, "G": group, "H": head, "W": 2 * head if wide else head + head // 4, "KEY": 0 if wide else head // 4,
        "VALUE": head if wide else 0, "S": 32, "WINDOW": 1024 if wide else 0, "PAST": True,
        "SPLIT": 0 if pages == "bfloat16" else head, "FLOAT8": pages == "float8",
        "CHUNK": CHUNK if decode else 0, "BQ": tile.rows // group, "BG": group, "BN": tile.keys,
        "BV": min(tile.columns, head),
    }  # fmt: skip
    return compiled(_attend, pointers | sizes, constants, arch, num_warps=tile.warps, num_stages=tile.stages)


def join(arch: int, head: int):
    from cabochon.ops.triton_attention import _join

    arguments = {"acc_ptr": "*fp32", "softmax_ptr": "*fp32", "chunks_ptr": "*i32", "out_ptr": "*bf16", "lines": "i32"}
    return compiled(_join, arguments, {"N": 8, "H": head, "BN": 2048 // head}, arch, num_warps=4)


def matmul(arch: int, format: str):
    from cabochon.ops.triton_matmul import FORMATS, _gated
    from cabochon.ops.triton_tiles import matmul_tile

    codes, scales = {"plain": ("*bf16", "*bf16"), "int8": ("*i8", "*fp32"), "int4": ("*u8", "*fp16")}[format]
    arguments = {"x_ptr": "*bf16", "gate_ptr": codes, "gate_scale_ptr": scales, "up_ptr": codes}
    arguments |= {"up_scale_ptr": scales, "y_ptr": "*bf16", "rows": "i32"}
    constants = {"I": 2816, "O": 2112, "FORMAT": FORMATS.get(format, 0)}
    return tiled(_gated, arguments, constants, matmul_tile(arch), arch)


def experts(arch: int, pairs: int, format: str):
    from cabochon.ops.triton_experts import LONE, _inner
    from cabochon.ops.triton_matmul import FORMATS
    from cabochon.ops.triton_tiles import experts_tile

    codes, scales = {"plain": ("*bf16", "*bf16"), "int8": ("*i8", "*fp32"), "int4": ("*u8", "*fp16")}[format]
    arguments = {"x_ptr": "*bf16", "w_ptr": codes, "scale_ptr": scales, "y_ptr": "*bf16"}
    arguments |= {"pair_ptr": "*i64", "expert_ptr": "*i64"}
    constants = {
        "CHOICES": 8,
        "COUNT": 128,
        "I": 2816,
        "O": 704,
        "FORMAT": FORMATS.get(format, 0),
        "LONE": pairs <= LONE,
    }
    return tiled(_inner, arguments, constants, experts_tile(arch, pairs, 128), arch)


def tiled(kernel, arguments, constants, tile, arch: int):
    constants = constants | {"BR": tile.rows, "BO": tile.outputs, "BI": tile.inputs}
    return compiled(kernel, arguments, constants, arch, num_warps=tile.warps, num_stages=tile.stages)


def route(arch: int):
    from cabochon.ops.triton_experts import _route

    arguments = {"scores_ptr": "*bf16", "gain_ptr": "*bf16", "chosen_ptr": "*i64", "weight_ptr": "*bf16"}
    return compiled(_route, arguments, {"E": 128, "TOP": 8, "B": 128, "BT": 8}, arch, num_warps=1)


def rows(arch: int, name: str):
    from cabochon.ops import triton_rows

    bf16 = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr", "cos_ptr", "sin_ptr", "table_ptr", "a_ptr", "b_ptr"), "*bf16")
    arguments = bf16 | {"ids_ptr": "*i64", "scales_ptr": "*bf16"}
    arguments |= dict.fromkeys(("rows", "lines", "count"), "i32") | dict.fromkeys(("eps", "gain", "factor"), "fp32")
    constants = {
        "norm": {"WIDTH": 5376, "WEIGHT": True, "BR": 1, "B": 8192},
        "rope": {"N": 8, "HALF": 256, "TURNED": 64, "BR": 4, "B": 256},
        "embed": {"WIDTH": 10752, "FORMAT": 0, "B": 1024},
        "gate": {"B": 1024},
    }[name]
    return compiled(getattr(triton_rows, f"_{name}"), arguments, constants, arch, num_warps=8)


def store(arch: int, float8: bool):
    from cabochon.ops.triton_rows import _store

    arguments = {"rows_ptr": "*bf16", "slots_ptr": "*i64", "pages_ptr": "*u8", "scales_ptr": "*fp32"}
    return compiled(_store, arguments, {"K": 2, "W": 640, "SPLIT": 512, "FLOAT8": float8, "B": 1024}, arch, num_warps=4)


if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        name, *rest = request
        shared, registers, spilled = globals()[name](*rest)
        print(json.dumps({"kernel": request, "shared": shared, "registers": registers, "spilled": spilled}), flush=True)
