"""Where the time of a training step goes: operators and generated kernels by kind, of each setting.

Forward, backward and AdamW (fused) of a model of depth.py, under torch's profiler, which slows all down a
little: shares count. Beside them is the time without it. On CPUs each generated kernel reports itself.

    OMP_NUM_THREADS=2 python benchmarks/profile_step.py --threads 2 --row resnet 110 16 1 32
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import Counter

from depth_case import ALL, Case
from depth_models import add_row, row_of
from measuring import PRECISIONS, Step, parser, set_up
from torch._C._autograd import DeviceType
from torch._inductor import config
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "ours": r"hwbp_compile",
    "generated kernels": r"^graph_\d+_|^cpp_fused|^triton_",
    "convolutions": r"\bconv|_conv|convolution",
    "products": r"mm\b|mm_out|baddbmm|addmm|gemm|linear|attention|cutlass|xmma",
    "optimizer": r"_fused_adam|Optimizer",
    "autograd's bookkeeping": r"AccumulateGrad|autograd::engine|CompiledFunction",
}
"""By what a name has in it; the first that fits counts."""
OTHER = "all else"


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)


def profiled(step: Step, repeats: int) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds of a step by kind, and by name: an operator's own, without those that it calls.

    On a GPU those of its kernels. Python between operators is in neither.
    """
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as found:
        for _ in range(repeats):
            step()
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in found.key_averages():
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # an operator's time there is its kernels', which come by themselves
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        kinds[kind_of(event.key)] += own / repeats / 1e3
        names[event.key] += own / repeats / 1e3
    return kinds, names


def main() -> None:
    made = parser(__doc__, threads=2, repeats=30)
    made.add_argument("--precision", choices=PRECISIONS, default="float32")
    add_row(made, required=True)
    made.add_argument("--settings", nargs="*", choices=list(ALL), default=["inductor", "stacked, exact"])
    made.add_argument("--names", type=int, default=0, help="also the operators that take most, so many")
    arguments = made.parse_args()
    set_up(arguments)
    row = row_of(made, arguments.row)
    case = Case(row, arguments)
    with config.patch({"cpp.enable_kernel_profile": True}):
        for name in arguments.settings:
            show(f"{row}, {name}", case.step(name), arguments)


def show(title: str, step: Step, arguments: argparse.Namespace) -> None:
    for _ in range(5):
        step()
    plain = statistics.median(step.parts()[-1] for _ in range(arguments.repeats))
    kinds, names = profiled(step, arguments.repeats)
    total = kinds.total()
    print(f"{title}: {1e3 * plain:.2f} ms; in operators, profiled, {total:.2f} ms")
    for kind, ms in kinds.most_common():
        print(f"  {kind:24} {ms:8.3f} ms  {100 * ms / total:5.1f} %")
    for name, ms in names.most_common(arguments.names):
        print(f"    {ms:8.3f} ms  {name[:90]}")


if __name__ == "__main__":
    main()
