"""Triton's interpreter without work that it repeats for each operation: a third of the time of a test of kernels."""

from functools import cache
from typing import Any


def quicken() -> None:
    """Let functions of kernels patch Triton's language once in a process, and keep numpy's dtypes.

    Triton patches it for each call of a function. What a launch patches in the kernel's own module it takes back at
    its end; what a call patches, in Triton's own modules, stays.
    """
    from triton import language
    from triton.runtime import interpreter

    function = interpreter.InterpretedFunction
    if function.__call__.__module__ == __name__:
        return
    call, dtype_of = function.__call__, interpreter._get_np_dtype
    of_scalar = cache(dtype_of)
    patched: set[str] = set()

    def called(self: Any, *arguments: Any, **named: Any) -> Any:
        module = self.fn.__module__
        if module in patched:
            return self.rewrite()(*arguments, **named)
        patched.add(module)
        return call(self, *arguments, **named)

    def kept_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        return dtype_of(scalar) if isinstance(scalar, language.pointer_type) else of_scalar(scalar)

    function.__call__ = called
    interpreter._get_np_dtype = kept_dtype
