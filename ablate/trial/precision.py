"""What a low precision costs on a CPU, said before a step is taken."""

from __future__ import annotations


def slow_on_cpu(precision: str) -> list[str]:
    """Warnings about a precision on workers without GPUs."""
    if precision == "amp":
        return [
            "precision amp on a CPU is fp16 autocast with a CPU gradient scaler: real, but "
            "slower than fp32 where the CPU emulates fp16; fp32 is the usual choice on CPUs"
        ]
    if "fp16" in precision:
        return [f"precision {precision} on a CPU emulates fp16: right in its rounding, slow"]
    if "bf16" in precision:
        return [
            f"precision {precision} on a CPU is right in its rounding, and several times slower "
            "than fp32 where the processor has no bf16 instructions (AVX512_BF16, AMX)"
        ]
    return []
