"""`latentkv doctor`: what this machine has, what runs on it, and whether that computes what it should."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentkv.cli.advice import platform_advice, torch_advice
from latentkv.cli.terminal import console, print_json
from latentkv.option_types import Flag

if TYPE_CHECKING:
    from rich.table import Table

    from latentkv.cli.self_test import OpReport
    from latentkv.plan import Memory

_CPUINFO = Path("/proc/cpuinfo")
_MAPS = Path("/proc/self/maps")
_NO_KERNELS = "none, torch computes everything, several times slower"
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*$")
_ISA_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)


@dataclass(frozen=True)
class Machine:
    """What is here; sizes in bytes.

    Attributes:
        teams: threads that held a team of OpenMP threads while the embedded model ran, this command's own included: 1
            where one thread computes at a time, 0 where there is nothing to share out or nothing that counts, None
            where operations are wrong and no model was run.
        openmp: files of the OpenMP runtimes in this process; each has threads of its own.
        advice: what is not tested, or could be better, a sentence each.
    """

    cpu: str
    cores: int
    isa: tuple[str, ...]
    python: str
    torch: str
    torch_backend: str
    threads: int
    teams: int | None
    openmp: tuple[str, ...]
    kernels: str
    gpu_kernels: tuple[str, ...]
    memory: tuple[Memory, ...]
    disk_free: int
    packed: PackedSummary | None
    advice: tuple[str, ...]


@dataclass(frozen=True)
class PackedSummary:
    """The folder of packed weights: how many files it holds, and their bytes."""

    folder: str
    files: int
    bytes: int


def doctor(*, as_json: Annotated[bool, Flag(("--json",))] = False) -> None:
    """Check this machine: CPU, memory, GPUs, what computes each operation and why, and whether it is right.

    Exits with 1 if an operation differs from its float64 reference by more than its tolerance.

    Args:
        as_json: print JSON, sizes in bytes.
    """
    import torch

    from latentkv.cli.self_test import self_test

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    reports = [report for device in devices for report in self_test(torch.device(device))]
    passed = all(report.passed for report in reports)
    # After this thread has computed: what it has left must not slow a model down.
    machine = _look_around(_teams_beside_a_model() if passed else None)
    if as_json:
        print_json({"machine": asdict(machine), "ops": [asdict(report) for report in reports], "passed": passed})
    else:
        _print_machine(machine)
        out = console()
        out.print(_op_table(reports))
        out.print(_verdict(reports))
    if not passed:
        raise typer.Exit(1)


def _verdict(reports: list[OpReport]) -> str:
    failed = sum(not report.passed for report in reports)
    if failed:
        return f"[bold red]{failed} of {len(reports)} checks fail: do not trust what this machine computes.[/bold red]"
    return f"[green]All {len(reports)} checks pass.[/green]"


def _look_around(teams: int | None) -> Machine:
    import torch

    from latentkv.bench.environment import describe_environment
    from latentkv.plan import machine_memory

    environment = describe_environment(torch.get_num_threads())
    return Machine(
        cpu=environment.cpu,
        cores=os.cpu_count() or 1,
        isa=_isa_flags(),
        python=environment.python,
        torch=environment.torch,
        torch_backend=torch.backends.cpu.get_cpu_capability(),
        threads=environment.threads,
        teams=teams,
        openmp=_openmp_runtimes(),
        kernels=_kernels(),
        gpu_kernels=tuple(_gpu_kernels(index) for index in range(torch.cuda.device_count())),
        memory=machine_memory(),
        disk_free=shutil.disk_usage(Path.cwd()).free,
        packed=_packed(),
        advice=_advice(),
    )


def _advice() -> tuple[str, ...]:
    import torch

    found = (platform_advice(platform.system()), torch_advice(torch.version.cuda, torch.cuda.device_count()))
    return tuple(sentence for sentence in found if sentence is not None)


def _teams_beside_a_model() -> int:
    """How many threads hold a team of OpenMP threads right after a step of the embedded model."""
    from latentkv import LLM, SamplingParams
    from latentkv.ops.native.team import live_teams

    llm = LLM(kv_cache_bytes=16 << 20)
    request = llm.request("It was a dark night", SamplingParams(max_tokens=8))

    def run_and_count() -> int:
        deque(llm.engine.run([request]), maxlen=0)
        return live_teams()

    return llm.thread.call(run_and_count)


def _openmp_runtimes() -> tuple[str, ...]:
    """The files of OpenMP runtimes that this process has loaded, as Linux tells; none elsewhere."""
    if not _MAPS.exists():
        return ()
    paths = {line.split(maxsplit=5)[-1] for line in _MAPS.read_text().splitlines() if _OPENMP.search(line)}
    return tuple(sorted(paths))


def _kernels() -> str:
    """Which of LatentKV's own kernels compute on this CPU, or why none do."""
    import torch

    from latentkv.kernels import available_backends, current_backend
    from latentkv.ops.backends import why_not_native

    reason = why_not_native(torch.device("cpu"))
    if reason is not None:
        return f"{_NO_KERNELS}: the native kernels {reason}"
    others = ", ".join(isa for isa in available_backends()[1:] if isa != current_backend())
    return f"native, {current_backend()} (also here: {others}; LATENTKV_ISA chooses)"


def _gpu_kernels(index: int) -> str:
    """Which of LatentKV's own kernels compute on this GPU, or why none do."""
    import torch

    from latentkv.ops.backends import why_not_triton

    reason = why_not_triton(torch.device("cuda", index))
    return "Triton" if reason is None else f"none, torch computes everything: Triton's kernels {reason}"


def _packed() -> PackedSummary | None:
    """What the default folder of packed weights holds; None where there is none, or it cannot be used."""
    from latentkv.llm_options import open_packed_folder

    folder = open_packed_folder("auto", None)
    if folder is None:
        return None
    files = folder.files()
    return PackedSummary(str(folder.path), len(files), sum(file.size for file in files))


def _isa_flags() -> tuple[str, ...]:
    """The vector extensions of the CPU that matter here, as Linux names them; none where it does not tell."""
    if not _CPUINFO.exists():
        return ()
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            present = set(value.split())
            return tuple(flag for flag in _ISA_FLAGS if flag in present)
    return ()


def _print_machine(machine: Machine) -> None:
    from latentkv.sizes import format_bytes

    out = console()
    out.print(f"CPU      {machine.cpu}, {machine.cores} cores; {' '.join(machine.isa) or 'no vector extensions known'}")
    for memory in machine.memory:
        out.print(f"Memory   {memory.name}: {format_bytes(memory.free)} free of {format_bytes(memory.total)}")
    if len(machine.memory) == 1:
        out.print("GPU      none found")
    out.print(f"Disk     {format_bytes(machine.disk_free)} free here")
    if machine.packed is not None:
        kept = machine.packed
        models = f"{kept.files} model{'s' if kept.files != 1 else ''}"
        out.print(f"Packed   weights of {models} in {kept.folder}, {format_bytes(kept.bytes)}")
    out.print(
        f"torch    {machine.torch} on Python {machine.python}, {machine.threads} threads, uses {machine.torch_backend}"
    )
    out.print(f"Threads  {_threads(machine)}")
    style = "bold yellow" if machine.kernels.startswith(_NO_KERNELS) else None
    out.print(f"Kernels  {machine.kernels}", style=style, markup=False)
    for index, kernels in enumerate(machine.gpu_kernels):
        out.print(f"GPU {index}    {kernels}")
    for sentence in machine.advice:
        out.print(f"Note     {sentence}", style="bold yellow", markup=False)
    out.print()


def _threads(machine: Machine) -> str:
    """Whether one team of threads computes, or why a step takes longer than it could."""
    if machine.teams is None:
        return "not tried, because operations are wrong"
    if machine.teams > 1:
        return (
            f"[bold red]{machine.teams} teams share the cores while a model runs: steps are slower by half or more. "
            "Let one thread compute at a time.[/bold red]"
        )
    found = "one team computes" if machine.teams else "no team was needed"
    if len(machine.openmp) < 2:
        return found
    return (
        f"{found}; {len(machine.openmp)} OpenMP runtimes are loaded ({', '.join(machine.openmp)}): where a second one "
        "computes at the same time, both are slower by half or more. LD_PRELOAD may bring one."
    )


def _op_table(reports: list[OpReport]) -> Table:
    """One row an operation and device, one column a dtype."""
    from rich.table import Table

    dtypes = list(dict.fromkeys(report.dtype for report in reports))
    rows: dict[tuple[str, str], dict[str, OpReport]] = {}
    for report in reports:
        rows.setdefault((report.op, report.device), {})[report.dtype] = report
    allowed = ", ".join(f"{report.tolerance:.1e} in {dtype}" for dtype, report in next(iter(rows.values())).items())
    title = f"Largest error of each operation against its float64 reference (allowed: {allowed})"
    table = Table(title=title, title_justify="left")
    for column in ("operation", "device", *dtypes):
        table.add_column(column, no_wrap=True)
    table.add_column("computed by")
    for (op, device), by_dtype in rows.items():
        backends = dict.fromkeys(report.backend for report in by_dtype.values())
        table.add_row(op, device, *(_error(by_dtype[dtype]) for dtype in dtypes), "; ".join(backends))
    return table


def _error(report: OpReport) -> str:
    return f"{report.error:.1e} " + ("[green]ok[/green]" if report.passed else "[bold red]wrong[/bold red]")
