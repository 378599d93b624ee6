"""The operations of native.cpp, compiled for its own processor when a worker starts, which takes some seconds.

For one thread on a CPU with AVX-512. Elsewhere, and without a compiler, PyTorch's operations do the same in more passes
over memory. Knows no decoder.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pipe")
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only")
COMPILERS = ("g++", "c++")
LONGEST_S = 60.0
"""A compiler that takes longer counts as none."""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class NotCompiled(Exception):
    """The operations are not to be had here: what they need, and what there is, in words."""

    def __init__(self, needs: str, found: str) -> None:
        super().__init__(f"needs {needs}, found {found}")
        self.needs, self.found = needs, found


class Native:
    """The compiled operations, on contiguous tensors of the CPU; those of other dtypes must not come.

    Args:
        library: as `compiled` makes it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def activate(self, x: Tensor, gamma: Tensor, out: Tensor) -> None:
        """Norm and SiLU of x [T, H, W, C] into out; gamma [C] float32."""
        run = self._function("activate", DTYPES[x.dtype], DTYPES[out.dtype])
        run(_at(x), _at(gamma), _at(out), *_longs(x.numel() // len(gamma), len(gamma)))

    def spread(self, x: Tensor, gamma: Tensor, past: Tensor, sums: Tensor) -> None:
        """Norm and SiLU of x [T, H, W, C] float32; into sums [T + 2, H, W, C] what products are made of.

        past [2, H, W, C] float32 is seen, then overwritten with the last two frames.
        """
        run = self._function("spread", str(len(x)), DTYPES[sums.dtype])
        run(_at(x), _at(gamma), _at(past), _at(sums), *_longs(x[0].numel() // len(gamma), len(gamma)))

    def gather(self, products: Sequence[Tensor], y: Tensor, *, add: bool) -> None:
        """T frames of y [T, H, W, C] float32, written or added to, from T + 2 products [1, C, H, W], channels last."""
        assert all(product.is_contiguous(memory_format=torch.channels_last) for product in products)
        run = self._function("gather", str(len(y)), DTYPES[products[0].dtype])
        places = (ctypes.c_void_p * len(products))(*(product.data_ptr() for product in products))
        run(places, _at(y), *_longs(y[0].numel()), ctypes.c_bool(add))

    def _function(self, *words: str) -> Callable[..., None]:
        return getattr(self._library, "_".join(words))


def compiled() -> Native:
    """The operations. Raises NotCompiled where they cannot be had or would not be faster."""
    vectors = torch.backends.cpu.get_cpu_capability()
    if "AVX512" not in vectors:
        raise NotCompiled("a CPU with AVX-512", vectors)
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NotCompiled(f"a compiler ({' or '.join(COMPILERS)})", "none")
    if sys.platform != "linux":
        raise NotCompiled("Linux", sys.platform)
    file = os.memfd_create("native")  # in no folder: whoever is killed meanwhile leaves nothing there
    library = f"/proc/self/fd/{file}"
    try:
        command = [compiler, *FLAGS, str(SOURCE), "-o", library]
        subprocess.run(command, capture_output=True, check=True, timeout=LONGEST_S, pass_fds=(file,))
        return Native(ctypes.CDLL(library))
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled(f"what {compiler} makes of {SOURCE.name}", _line(error)) from error
    finally:
        os.close(file)


def _line(error: OSError | subprocess.SubprocessError) -> str:
    """The first thing that the compiler says, or else the error."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"nothing after {error.timeout:.0f} s"
    said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip() or str(error)
    return said.splitlines()[0][:200]


def _longs(*numbers: int) -> tuple[ctypes.c_long, ...]:
    return tuple(ctypes.c_long(number) for number in numbers)


def _at(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
