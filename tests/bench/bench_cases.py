"""What the tests of the benchmarks share."""

from latentkv.bench.ceilings import Ceilings

CEILINGS = Ceilings(
    threads=1,
    bf16_gflops=200.0,
    fp32_gflops=100.0,
    int8_gops=400.0,
    read_gbps=20.0,
    one_thread_bf16_gflops=100.0,
    one_thread_read_gbps=15.0,
    spread=dict.fromkeys(
        ("bf16_gflops", "fp32_gflops", "int8_gops", "read_gbps", "one_thread_bf16_gflops", "one_thread_read_gbps"), 0.1
    ),
)
