"""Compiling kernels for GPUs that are not here: no driver is needed, and no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_kernel
from triton.runtime.jit import create_function_from_signature

from latentkv.ops.triton.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""GPUs by the name of their instruction set."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a kernel.

    Attributes:
        name: the kernel's.
        shared_bytes: shared memory of a program.
        tensor_columns: columns of tensor memory, of which data-centre Blackwell has 512; others need none.
        async_copies: instructions that copy to shared memory while others compute (NVIDIA, before TMA).
    """

    name: str
    shared_bytes: int
    tensor_columns: int
    async_copies: int


def compile_for(launch: Launch, target: str) -> Compiled:
    """Compile a launch's kernel for one of `TARGETS`, specialised as the launch itself would be."""
    kernel: Any = launch.kernel
    backend = make_backend(TARGETS[target])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.constants, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled: Any = compile_kernel(source, target=TARGETS[target], options=options.__dict__)
    async_copies = compiled.asm.get("ptx", "").count("cp.async.ca") + compiled.asm.get("ptx", "").count("cp.async.cg")
    tensor_columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return Compiled(kernel.__name__, compiled.metadata.shared, tensor_columns, async_copies)
