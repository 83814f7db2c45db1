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

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int64": "*i64"}


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


def attention(arch: int, head: int, decode: bool, layout: str = "two tensors", group: int = 4):
    from cabochon.ops.triton_attention import CHUNK, _attend
    from cabochon.ops.triton_tiles import attend_tile

    tile = attend_tile(arch, head, decode)
    pointers = {name: "*i32" for name in _attend.arg_names if name.endswith("_ptr")}
    pointers |= dict.fromkeys(("q_ptr", "step_ptr", "pages_ptr", "out_ptr"), "*bf16")
    pointers |= dict.fromkeys(("scales_ptr", "acc_ptr", "softmax_ptr"), "*fp32")
    sizes = {"tiles": "i32", "table_width": "i32", "queries": "i32"}
    wide = layout == "two tensors"
    constants = {
        "K": 2, "G": group, "H": head, "W": 2 * head if wide else head + head // 4, "KEY": 0 if wide else head // 4,
        "VALUE": head if wide else 0, "S": 16, "WINDOW": 0 if head == 512 else 1024, "PAST": True, "SPLIT": 0,
        "CHUNK": CHUNK if decode else 0, "BQ": tile.rows // group, "BG": group, "BN": tile.keys,
        "BV": min(tile.columns, head),
    }  # fmt: skip
    return compiled(_attend, pointers | sizes, constants, arch, num_warps=tile.warps, num_stages=tile.stages)


if __name__ == "__main__":
    for request in json.loads(sys.argv[1]):
        name, *rest = request
        shared, registers, spilled = globals()[name](*rest)
        print(json.dumps({"kernel": request, "shared": shared, "registers": registers, "spilled": spilled}), flush=True)
