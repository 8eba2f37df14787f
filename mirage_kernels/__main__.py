"""``python -m mirage_kernels``: what was built, with what, and which backends can run here."""

from __future__ import annotations

import ctypes
import importlib
import platform

import torch

from . import __version__, available_backends
from .backends import find_module


def build_facts() -> dict[str, str]:
    """Collect facts for error reports: versions, architectures, compiler, SIMD, threads."""
    facts = {
        "mirage-kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch CUDA": torch.version.cuda or "none",
        "torch threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        facts["GPU"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    try:
        built = importlib.import_module("mirage_kernels._build_info")
    except ImportError:
        facts["built"] = "unknown: _build_info.py, which setup.py writes, is absent"
        return facts | machine_facts()
    if built.torch_version:
        facts["built with torch"] = built.torch_version
    facts["built with CUDA"] = (
        f"{built.cuda_version} for {built.cuda_archs}" if built.cuda_version else "no CUDA operators"
    )
    if built.compiler:
        facts["compiler"] = built.compiler
        facts["flags"] = built.flags
    return facts | machine_facts()


def machine_facts() -> dict[str, str]:
    """Ask the compiled CPU operators, where they are loaded, for the SIMD and the threads of this machine."""
    path = find_module("_cpu")
    if path is None or not available_backends()["cpu"]:
        return {}
    module = ctypes.CDLL(str(path))
    module.mirage_simd.restype = ctypes.c_char_p
    return {"SIMD": module.mirage_simd().decode(), "hardware threads": str(module.mirage_hardware_threads())}


def main() -> None:
    """Print the facts, and which backends can run."""
    facts = build_facts()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    print("\nbackends")
    for name, backend in available_backends().items():
        print(f"  {name:<10} {'yes' if backend else 'no ':<4} {backend.reason}")


if __name__ == "__main__":
    main()
