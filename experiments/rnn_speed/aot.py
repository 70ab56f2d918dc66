"""Compile the CUDA kernels ahead of time, without a GPU: registers, shared memory, spills, bytes per step.

Run as ``python -m experiments.rnn_speed.aot [--output aot.csv]``. Every variant that the layers use is
compiled for sm_80 and sm_90, and assembled by the ``ptxas`` that comes with Triton.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import pandas as pd
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqbatch.rnn import cuda, norm_cuda, norm_triton, triton_kernels

TARGETS = (80, 90)
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def variants() -> Iterator[dict[str, Any]]:
    """The settings of the layers: version, dtype, highway, direction, and how time is walked."""
    yes = (False, True)
    for dtype, peephole, planes, two, flags in product(("fp32", "bf16"), yes, (3, 4), yes, yes):
        yield {"dtype": dtype, "peephole": peephole, "planes": planes, "two": two, "flags": flags, "walk": "lanes"}
    for dtype, peephole, walk in product(("fp32", "bf16"), yes, ("chunks", "flat", "flat chunks")):
        yield {"dtype": dtype, "peephole": peephole, "planes": 3, "two": False, "flags": False, "walk": walk}


def compile_variant(name: str, variant: dict[str, Any], target: int, summary: bool = False) -> dict[str, Any]:
    """One kernel for one target: a row with what ptxas says of it."""
    kernel = getattr(triton_kernels, name)
    chunked = "chunks" in variant["walk"]
    constants: dict[str, Any] = {
        "SCALE": 1.0,
        "PLANES": variant["planes"],
        "HAS_SKIP": variant["planes"] == 3,
        "PEEPHOLE": variant["peephole"],
        "HAS_BIAS": True,
        "HAS_DROPOUT": True,
        "HAS_RESET": variant["flags"],
        "HAS_MASK": variant["flags"],
        "FLAT": "flat" in variant["walk"],
        "CHUNKED": chunked,
        "SUMMARY": summary,
        "KIND": 0 if variant["peephole"] else 1,
        "INSIDE": not variant["peephole"],
        "TWO": variant["two"],
        "KEEP": True,
        "BACKWARD": variant.get("backward", False),
        "BLOCK": cuda.BLOCK,
        "UNROLL": cuda.ahead(name, chunked, variant["flags"]),
    }
    data, carried, flag, offset = f"*{variant['dtype']}", "*fp32", "*u8", "*i32"
    types = dict.fromkeys(("u", "skip", "h", "grad_h", "grad_u", "grad_skip"), data)
    types |= dict.fromkeys(("reset", "mask", "cleared"), flag) | dict.fromkeys(("offsets", "segment"), offset)
    types |= dict.fromkeys(("steps", "lanes", "chunk", "chunks", "width"), "i32")
    signature = {n: "constexpr" if n in constants else types.get(n, carried) for n in kernel.arg_names}
    used = {(kernel.arg_names.index(n),): value for n, value in constants.items() if n in kernel.arg_names}
    # pointers come from torch's allocator and widths are usually multiples of 16
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n == "width"]
    source = ASTSource(kernel, signature, used, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 1})
    return {"kernel": name + (" (summary)" if summary else ""), "target": f"sm_{target}", **variant} | assembled(
        compiled.asm["ptx"], target
    )


def compile_step(name: str, of_h: bool, of_c: bool, target: int) -> dict[str, Any]:
    """The BN-LSTM step, forward or backward, for one target: a row with what ptxas says of it."""
    kernel = getattr(norm_triton, f"step_{name}")
    constants = {"OF_H": of_h, "OF_C": of_c, "ROWS": norm_cuda.ROWS, "BLOCK": norm_cuda.BLOCK}
    types = dict.fromkeys(("lo", "hi", "g", "entering", "width"), "i32") | dict.fromkeys(
        ("previous", "sources"), "*i64"
    )
    types["eps"] = "fp32"
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in kernel.arg_names}
    used = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n == "width"]
    source = ASTSource(kernel, signature, used, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": 4})
    about = {"kernel": f"bn_lstm {name}", "target": f"sm_{target}", "dtype": "fp32", "of_h": of_h, "of_c": of_c}
    return about | assembled(compiled.asm["ptx"], target)


def assembled(ptx: str, target: int) -> dict[str, int]:
    """Registers, shared memory and spills of a kernel, from ``ptxas -v``."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        arch = re.search(r"\.target (sm_\w+)", ptx)
        name = arch[1] if arch else f"sm_{target}"  # sm_90a for sm_90
        command = [ptxas, "-v", f"--gpu-name={name}", path, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {key: re.search(pattern, said) for key, pattern in PATTERNS.items()}
    return {key: int(match[1]) if match else 0 for key, match in found.items()}


PATTERNS = {
    "registers": r"Used (\d+) registers",
    "shared_bytes": r"(\d+) bytes smem",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}


def bytes_per_element(name: str, variant: dict[str, Any]) -> int:
    """What a walk must read and write for each step and column, counted from its loads and stores."""
    size, planes, carried = BYTES[variant["dtype"]], variant["planes"], 4
    values = planes + (planes == 3) + 1  # planes, skip, and h or its gradient
    if name == "forward":
        return values * size + carried
    return (values + planes + (planes == 3)) * size + carried


@click.command()
@click.option("--output", type=click.Path(dir_okay=False), help="Write the rows to this CSV file.")
@click.option("--quick", is_flag=True, help="Only sm_90 and every fourth variant.")
def main(output: str | None, quick: bool) -> None:
    """Print a row for each kernel, variant and target; exit with 1 where anything spills."""
    rows = []
    for target in TARGETS[1:] if quick else TARGETS:
        for variant in list(variants())[:: 4 if quick else 1]:
            linear = not variant["peephole"]
            for name in ("forward", "backward"):
                chunked = "chunks" in variant["walk"]
                if chunked and name == "forward" and not linear:
                    continue  # the gates see the state: there is no map to compose
                if name == "backward" and variant["walk"] == "flat":
                    continue  # always in chunks
                for summary in (False, True) if chunked else (False,):
                    row = compile_variant(name, variant, target, summary)
                    rows.append(row | {"bytes_per_element": 0 if summary else bytes_per_element(name, variant)})
                    print(rows[-1], flush=True)
        for name, of_h, of_c in product(("forward", "backward"), (False, True), (False, True)):
            rows.append(compile_step(name, of_h, of_c, target))
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    print(frame.groupby(["target", "kernel", "dtype", "walk"])["registers"].max().to_string())
    if output:
        frame.to_csv(output, index=False)
    spilled = frame[(frame.spill_store_bytes > 0) | (frame.spill_load_bytes > 0)]
    if len(spilled):
        raise SystemExit(f"{len(spilled)} of {len(frame)} kernels spill registers:\n{spilled.to_string()}")


if __name__ == "__main__":
    main()
