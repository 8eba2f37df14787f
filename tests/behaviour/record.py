"""Write the record of behaviour, or compare with it.

``python -m tests.behaviour.record --check tests/behaviour/record.json`` prints a line for each entry that differs and
exits with 1 if there is any.

Sections: ``operators`` and ``caches`` hold for every machine and every backend (cpu, reference, Triton's interpreter,
and the CUDA sources on the emulator); an entry whose name ends in ``@BACKEND`` holds for that one alone,
on the machine of the record: the definition's gradient of points is equal up to rounding only.
``generation``, ``resumption`` and ``training`` hold for one processor and one torch, which stand beside them:
elsewhere they are not compared, and the check says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from . import caches, models, operators

RECORD = Path(__file__).with_name("record.json")
ROOT = Path(__file__).resolve().parents[2]
PORTABLE = {"operators": operators.measure, "caches": caches.measure}
BACKENDS = {"operators": ("cpu", "reference", "emulated", "triton"), "caches": ("cpu", "reference")}
LOCAL = ("generation", "resumption", "training")
MACHINE = "machine"  # an entry beside the hashes
SECTIONS = (*PORTABLE, *LOCAL)


def machine() -> dict[str, str]:
    """What the results of models depend on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": model, "capability": capability}


def measure_portable(section: str, backend: str) -> dict[str, str]:
    """On one backend; Triton's interpreter has to be chosen before Triton is imported: a process of its own."""
    if backend != "triton":
        return PORTABLE[section](backend)
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name if __spec__ else "tests.behaviour.record"]
    command += ["--measure", section, backend]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"measuring {section} on {backend} failed:\n{done.stderr}")
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_all(section: str, backends: list[str] | None) -> dict[str, dict[str, str]]:
    """On every backend, or on those of `backends`; on the slowest beside the others."""
    chosen = [backend for backend in BACKENDS[section] if backends is None or backend in backends]
    with ThreadPoolExecutor(1) as pool:
        apart = {name: pool.submit(measure_portable, section, name) for name in chosen if name == "triton"}
        found = {name: measure_portable(section, name) for name in chosen if name != "triton"}
        return found | {name: result.result() for name, result in apart.items()}


def merge(by_backend: dict[str, dict[str, str]]) -> dict[str, str]:
    """One entry a case where backends agree with the first, an entry of its own where one does not."""
    first, *others = by_backend
    merged = dict(by_backend[first])
    for backend in others:
        for name, value in by_backend[backend].items():
            if merged.get(name) != value:
                merged[f"{name} @{backend}"] = value
    return merged


def compare(section: str, recorded: dict[str, Any], found: dict[str, Any], backend: str = "") -> list[str]:
    """A line for each entry that differs, is missing or is new."""
    lines = []
    here = recorded.get(MACHINE) in (None, machine())
    where = f" on {backend}" if backend else ""
    for name, value in found.items():
        own = f"{name} @{backend}"
        expected = recorded.get(own, recorded.get(name))
        if own in recorded and not here:
            _say(f"{section}: {own}: NOT COMPARED, recorded on another machine")
        elif expected is None:
            lines.append(f"{section}: {name}{where}: not in the record")
        elif expected != value:
            lines.append(f"{section}: {name}{where}: was {_short(expected)}, is {_short(value)}")
    if backend in ("", "cpu"):
        gone = [name for name in recorded if name not in found and name != MACHINE and " @" not in name]
        lines += [f"{section}: {name}{where}: in the record, not measured" for name in gone]
    return lines


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:16] if isinstance(value, str) else text[:160]


def check_portable(recorded: dict[str, Any], section: str, backend: str) -> list[str]:
    return compare(section, recorded[section], measure_portable(section, backend), backend)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _write(path: Path, sections: list[str], backends: list[str] | None) -> int:
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for section in sections:
        if section in PORTABLE:
            record[section] = {MACHINE: machine()} | merge(measure_all(section, backends))
        else:
            record[section] = {MACHINE: machine(), "entries": models.measure(section)}
        _say(f"{section}: {len(record[section].get('entries', record[section]))} entries")
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _check(path: Path, sections: list[str], backends: list[str] | None) -> int:
    recorded, differences, now = json.loads(path.read_text()), [], machine()
    for section in sections:
        began = time.perf_counter()
        if section in PORTABLE:
            for backend, found in measure_all(section, backends).items():
                differences += compare(section, recorded[section], found, backend)
        elif recorded[section][MACHINE] != now:
            _say(f"{section}: NOT COMPARED, recorded on {recorded[section][MACHINE]}, this is {now}")
            continue
        else:
            differences += compare(section, recorded[section]["entries"], models.measure(section))
        _say(f"{section}: compared in {time.perf_counter() - began:.0f} s")
    print("\n".join(differences) if differences else "no difference")
    return 1 if differences else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--write", type=Path, metavar="FILE")
    asked.add_argument("--check", type=Path, metavar="FILE")
    asked.add_argument("--measure", nargs=2, metavar=("SECTION", "BACKEND"), help=argparse.SUPPRESS)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--backends", type=lambda text: text.split(","), help="of the portable sections; default all")
    options = parser.parse_args()
    unknown = set(options.only) - set(SECTIONS)
    if unknown:
        parser.error(f"--only must be among {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}")
    if options.measure:
        print(json.dumps(PORTABLE[options.measure[0]](options.measure[1])))
        return 0
    if options.write:
        return _write(options.write, options.only, options.backends)
    return _check(options.check, options.only, options.backends)


if __name__ == "__main__":
    sys.exit(main())
