"""A recurrence on a GPU as one Triton kernel: all steps, a few rows of the batch in each program."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from .. import _compat
from ..errors import CannotRewrite
from ..launching import on_device_of
from ..rates import now
from .step_program import LARGEST_MATRIX, ROWS, StepProgram
from .step_triton_source import is_matrix, recurrence_source
from .step_triton_writer import Shape

_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
_REGISTERS = 20_000
"""32-bit numbers that the weights may take in the registers of a program that works on one row."""
_HELD = 110_000
"""Bytes of weights that programs hold which use the matrix units."""
_TRIED_ROWS, _TRIED_STEPS = 16, 128
"""The size of the batch and the number of steps with which a kernel is tried."""


class TritonRecurrence:
    """The kernel of a program without sums.

    Args:
        program: one step.
        dtype: of all tensors. Narrow ones are widened to float32 in a step, but for products.
        reverse: whether time runs backwards.
        exact_products: whether products of float32 are not to be rounded to TF32.
        rows: of the batch, that a program takes; chosen by default.
        device: where to try the kernel; None for nowhere.

    Raises:
        CannotRewrite: there is no kernel for this step, or no Triton.
    """

    def __init__(
        self,
        program: StepProgram,
        dtype: torch.dtype,
        *,
        reverse: bool,
        exact_products: bool = True,
        rows: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        if dtype not in _TYPES:
            raise CannotRewrite(f"there is no kernel for {dtype}")
        self.program, self._reverse = program, reverse
        self._batch_dims = [
            [_batch_dim(program.shape(n)) for n in nodes] for nodes in (program.inputs, program.shared)
        ]
        shapes = [program.shape(n) for n in program.shared]
        self._are_matrices = [is_matrix(s) for s in shapes]
        size = sum(math.prod(s) for s in shapes if is_matrix(s))
        words = size * (2 if dtype == torch.float64 else 1)
        if rows is None:
            rows = 1 if words <= _REGISTERS else 16
        if rows > 1 and dtype == torch.float64:
            raise CannotRewrite("matrices of this size in float64 have no kernel")
        if size > LARGEST_MATRIX:
            raise CannotRewrite("the matrices of a step are too large for a kernel")
        narrow = dtype.itemsize if rows > 1 else 4
        shape = Shape(
            rows=rows,
            widest=128,
            hold=rows == 1 or size * narrow <= _HELD,
            wide="tl.float64" if dtype == torch.float64 else "tl.float32",
            narrow=_TYPES[dtype],
            precision="tf32x3" if exact_products else "tf32",
            types=frozenset({dtype, torch.float32} if dtype.itemsize < 4 else {dtype}),
        )
        self._rows = rows
        self._warps = 8
        try:
            self.source = recurrence_source(program, shape, reverse=reverse)
            self.kernel = _compat.load_generated(self.source).kernel
            if device is not None:
                self._try(device, _warps(words) if rows == 1 else (8,))
        except CannotRewrite:
            raise
        except Exception as error:  # no Triton, or one that finds the kernel too large
            first = (str(error).strip().splitlines() or [""])[0]
            raise CannotRewrite(f"the kernel cannot be compiled: {type(error).__name__}: {first}") from error

    def _try(self, device: torch.device, candidates: Sequence[int]) -> None:
        """Compile the kernel, and see how many warps are the fastest; raises what Triton says if none do."""

        def like(nodes: Sequence[Node], *more: int) -> list[Tensor]:
            return [
                torch.zeros(
                    [*more, *(_TRIED_ROWS if n == ROWS else n for n in x.meta["val"].shape)],
                    dtype=x.meta["val"].dtype,
                    device=device,
                )
                for x in nodes
            ]

        program = self.program
        seconds: dict[int, float] = {}
        given = like(program.carry), like(program.inputs, _TRIED_STEPS), like(program.shared)
        for self._warps in candidates:
            try:
                self(*given)  # compiles
            except Exception:  # too large for so few, or so many
                if self._warps == candidates[-1] and not seconds:
                    raise
                continue
            times = []
            for _ in range(3):
                start = now(device)
                self(*given)
                times.append(now(device) - start)
            seconds[self._warps] = min(times)
        self._warps = min(seconds, key=seconds.__getitem__)

    def results(self, initial: Sequence[Tensor], steps: int) -> list[Tensor]:
        """Tensors for what is returned: states, ``[T + 1, B, ...]`` or the last ones, and what is emitted."""
        _, emitted, _ = self.program.results
        batch = initial[0].shape[0]
        states = [x.new_empty((steps + 1, *x.shape) if self.program.keep else x.shape) for x in initial]
        values = [n.meta["val"] for n in emitted]
        return [
            *states,
            *(initial[0].new_empty((steps, batch, *v.shape[1:]), dtype=v.dtype) for v in values),
        ]

    def __call__(
        self, initial: Sequence[Tensor], inputs: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> list[Tensor]:
        """Run all steps; returns what :meth:`results` says."""
        steps, first = inputs[0].shape[0], initial[0]
        batch = first.shape[0]
        results = self.results(initial, steps)
        if not batch:
            return results
        read = []
        for x, dim in zip(inputs, self._batch_dims[0], strict=True):
            read.append((x.movedim(1 + dim, 1) if dim else x).contiguous())
        read = [x[-1] if self._reverse else x for x in read]
        for x, matrix, dim in zip(shared, self._are_matrices, self._batch_dims[1], strict=True):
            x = x.to(first.device)  # a number may be on the CPU
            read.append(x.mT.contiguous() if matrix else (x.movedim(dim, 0) if dim else x).contiguous())
        read += [x.contiguous() for x in initial]
        n, last = len(initial), self._reverse
        written = [x[-1] if last and self.program.keep else x for x in results[:n]]
        written += [x[-1] if last else x for x in results[n:]]
        grid = (math.ceil(batch / self._rows),)
        with on_device_of(first):
            self.kernel[grid](*read, *written, steps, batch, 0, num_warps=self._warps, num_stages=1)
        return results


def _warps(words: int) -> tuple[int, ...]:
    """Promising numbers of warps for so many weights in registers."""
    # A thread has 255 registers.
    fewest = 1 << max(words // 4096, 1).bit_length() - 1
    return fewest, 2 * fewest


def _batch_dim(shape: tuple[int, ...]) -> int:
    return shape.index(ROWS) if ROWS in shape else 0
