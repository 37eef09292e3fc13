"""What `latentkv doctor` says of a machine that could have something better, or that nobody has tested."""

from __future__ import annotations


def platform_advice(system: str) -> str | None:
    """One sentence about an operating system, as `platform.system` names it; None for the one that is tested."""
    if system == "Linux":
        return None
    if system == "Windows":
        return "Windows is not supported: nothing is built or tested there; use WSL 2, which is Linux."
    if system == "Darwin":
        return "macOS is not tested, and Apple's clang does not build the native kernels: torch computes there."
    return f"{system} is not supported: nothing is tested there; use 64-bit Linux."


def torch_advice(cuda: str | None, gpus: int) -> str | None:
    """One sentence about a torch that was built for GPUs where there are none; None where it fits.

    Args:
        cuda: the version that torch was built for (`torch.version.cuda`); None: it is a CPU build.
        gpus: devices that torch finds.
    """
    if cuda is None or gpus:
        return None
    return (
        f"torch is the build for CUDA {cuda} and finds no GPU: the CPU build computes the same, gigabytes smaller, "
        "pip install 'torch>=2.13,<2.14' --force-reinstall --index-url https://download.pytorch.org/whl/cpu"
    )
