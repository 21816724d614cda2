"""Compile the Triton kernels without running them, to see how many registers they use."""

import inspect
import re
import subprocess
import tempfile
from pathlib import Path

from models.fast import norm_elu_gpu

KERNELS = ("_tile_moments", "_merge_moments", "_normalize", "_tile_gradients", "_compute_input_gradient")
TENSORS = ("x", "y", "grad", "result")  # arguments that point to activations; all other pointers point to float32
COUNTS = ("rows", "parts")
NUMBERS = ("momentum", "eps", "share")


def _find_triton_argument_type(argument_name: str, constants: dict[str, int], dtype: str) -> str:
    """Return the type of a kernel's argument as Triton names it."""
    if argument_name in constants:
        return "constexpr"
    if argument_name in COUNTS:
        return "i32"
    if argument_name in NUMBERS:
        return "fp32"
    return f"*{dtype if argument_name in TENSORS else 'fp32'}"


def compile_kernels(channels: int, capability: int = 90, dtype: str = "bf16") -> dict[str, dict[str, int]]:
    """Return registers per thread and spilled bytes of each kernel. No GPU is needed.

    Args:
        channels: number of channels of the layer.
        capability: compute capability of the GPU; 90 is an H100 or H200.
        dtype: type of the activations, as Triton names it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    found = {}
    for name in KERNELS:
        kernel = getattr(norm_elu_gpu, name)
        constants = {
            "CHANNELS": channels,
            "COLUMNS": triton.next_power_of_2(channels),
            "TILE_ROWS": norm_elu_gpu.TILE // triton.next_power_of_2(channels),
            "TRACK": True,
        }
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        types = {name: _find_triton_argument_type(name, constants, dtype) for name in kernel.arg_names}
        named = "constexprs" if "constexprs" in inspect.signature(ASTSource.__init__).parameters else "constants"
        source = ASTSource(kernel, types, **{named: constants})
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            text = Path(folder) / "kernel.ptx"
            text.write_text(code, encoding="utf-8")
            architecture = re.search(r"\.target (\w+)", code)[1]
            command = [assembler, "-v", f"--gpu-name={architecture}", text, "-o", text.with_suffix(".o")]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        found[name] = {
            "registers": int(re.search(r"Used (\d+) registers", report)[1]),
            "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
        }
    return found
