"""A C++ compiler that remembers: a file that it has compiled before, with the same text, is copied and not compiled.

``python compiler.py CXX ARGUMENTS``. Undoing a fault costs nothing then, and of the emulator, which is built whole,
only what a fault touches is compiled. The memory is the folder ``$MUTATION_OBJECTS``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

# Half the time of compilers, and the same bits: fused operations are off either way. As in `make asan`.
QUICK = {"-O3": ("-O1", "-DMIRAGE_NO_CLONES")}


def read_with_includes(path: Path, folders: list[Path], seen: dict[Path, str]) -> None:
    """Add a file and what it includes by quotes to ``seen``; headers of libraries are left out."""
    path = Path(os.path.normpath(path))
    if path in seen:
        return
    seen[path] = path.read_text(errors="replace")
    for name in INCLUDE.findall(seen[path]):
        found = next((folder / name for folder in (path.parent, *folders) if (folder / name).is_file()), None)
        if found is not None:
            read_with_includes(found, folders, seen)


def main(arguments: list[str]) -> int:
    compiler, *options = arguments
    objects = os.environ.get("MUTATION_OBJECTS")
    if objects is None or "-c" not in options:
        return subprocess.run(arguments).returncode
    source, output = Path(options[options.index("-c") + 1]), Path(options[options.index("-o") + 1])
    dependencies = Path(options[options.index("-MF") + 1]) if "-MF" in options else None
    folders = [Path(option[2:]) for option in options if option.startswith("-I") and len(option) > 2]
    seen: dict[Path, str] = {}
    read_with_includes(source, folders, seen)
    forced = [options[k + 1] for k, option in enumerate(options) if option == "-include"]
    for name in forced:
        for folder in (Path(), *folders):
            if (folder / name).is_file():
                read_with_includes(folder / name, folders, seen)
                break
    # The emulator is built in a folder of a new name each time.
    words = [option.replace(os.getcwd(), ".") for option in options if option not in (str(output), str(dependencies))]
    texts = [text for pair in sorted((os.path.relpath(path), text) for path, text in seen.items()) for text in pair]
    kept = Path(objects) / hashlib.sha256("\0".join([compiler, *words, *texts]).encode()).hexdigest()
    if not (kept / "object").exists():
        result = subprocess.run([compiler, *(word for option in options for word in QUICK.get(option, (option,)))])
        if result.returncode != 0:
            return result.returncode
        kept.mkdir(parents=True, exist_ok=True)
        if dependencies is not None:
            shutil.copyfile(dependencies, kept / "dependencies")
        shutil.copyfile(output, kept / f"object.{os.getpid()}")
        os.replace(kept / f"object.{os.getpid()}", kept / "object")
        return 0
    shutil.copyfile(kept / "object", output)
    if dependencies is not None:
        shutil.copyfile(kept / "dependencies", dependencies)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
