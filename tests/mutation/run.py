"""Plants deliberate faults, one at a time, in a copy of the tree, and checks that the tests fail.

    python -m tests.mutation.run                          all faults
    python -m tests.mutation.run --only NAME..            some, by their names or a prefix of them
    python -m tests.mutation.run --sample 6 --seed 3      so many of each seed's order
    python -m tests.mutation.run --report FILE.json --missing    what FILE does not have yet, to go on in pieces
    python -m tests.mutation.run --list

A fault is *caught* where a test fails. It is *invalid* where its text is not found exactly once, where the changed code
does not compile, where tests cannot be collected or set up, or where they hang; and it *survives* where all tests pass.
In the end the tests that caught faults have to pass without any. Exit status 1 if a fault survives or is invalid.

The copy, ``build/mutation``, is kept: the next run compiles only what has changed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .faults import FAULTS, Fault, Selection

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build" / "mutation"
TIMEOUT = 600  # seconds, of one selection, on a busy machine
CAUGHT, SURVIVED, INVALID = "caught", "SURVIVED", "invalid"


class Invalid(RuntimeError):
    """A fault that says nothing of the tests."""


@dataclass
class Outcome:
    """How the tests of one fault, or of no fault, ended: the test that failed, or the reason why none could."""

    status: str
    detail: str
    seconds: float = 0.0
    signal: int = 0


def tracked_files() -> list[str]:
    """Tracked and new files of the working tree, without those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


class Tree:
    """A copy of the tree in which faults are planted, with modules of its own."""

    def __init__(self, number: int) -> None:
        self.root = WORK / f"tree{number}"
        self.lock = WORK / f"tree{number}.lock"
        self.warm: subprocess.Popen[str] | None = None

    def update(self) -> None:
        """Make the copy equal to the working tree; files that are equal already keep their time."""
        names = set(tracked_files())
        for name in names:
            source, target = ROOT / name, self.root / name
            if not target.is_file() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        listed = self.root / ".copied"
        for name in set(listed.read_text().split("\0")) - names if listed.exists() else ():
            (self.root / name).unlink(missing_ok=True)
        listed.write_text("\0".join(sorted(names)))

    def environment(self, backend: str = "") -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "CXX": f"{sys.executable} {HERE / 'compiler.py'} {os.environ.get('CXX') or 'c++'}",
            "MUTATION_OBJECTS": str(WORK / "objects"),
            "PYTHONPATH": os.pathsep.join([str(self.root), str(HERE)]),
            "MIRAGE_BUILD_CUDA": "0",
            "MIRAGE_REQUIRE_CPU": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if backend in ("triton", "python"):
            environment["PYTHONDONTWRITEBYTECODE"] = "1"  # what is compiled of a fault must not outlive it
        return environment | ({"TRITON_INTERPRET": "1"} if backend == "triton" else {})

    def build(self) -> None:
        """Build the C++ operators with setup.py, which knows all files."""
        self._run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"])

    def build_again(self) -> None:
        """Build what a fault has changed."""
        builds = sorted(self.root.glob("build/**/build.ninja"), key=lambda path: path.stat().st_mtime)
        if not builds:
            return self.build()
        self._run([find_ninja(), "-C", str(builds[-1].parent)])
        for module in builds[-1].parent.glob("_cpu*.so"):
            target = self.root / "mirage_kernels" / module.name
            target.unlink(missing_ok=True)
            shutil.copyfile(module, target)

    def build_emulator(self) -> None:
        """Build the CUDA operators' emulator; later tests compile what a fault has changed."""
        for file in self.root.glob("tests/**/cuda_emulator/build.py"):
            self._run([sys.executable, "-c", "from cuda_emulator.build import build; build()"], file.parents[1])

    def _run(self, command: list[str], folder: Path | None = None) -> None:
        result = subprocess.run(
            command, cwd=folder or self.root, env=self.environment(), capture_output=True, text=True
        )
        if result.returncode != 0:
            raise Invalid("does not compile: " + "\n".join((result.stdout + result.stderr).splitlines()[-12:]))

    def _pytest(self, request: dict[str, Any]) -> int | None:
        """See warm.py."""
        if self.warm is None:
            command = [sys.executable, str(HERE / "warm.py")]
            self.warm = subprocess.Popen(
                command, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self.warm.stdin is not None and self.warm.stdout is not None
        print(json.dumps(request), file=self.warm.stdin, flush=True)
        return json.loads(self.warm.stdout.readline())

    def run_tests(self, backend: str, arguments: list[str]) -> tuple[int, dict[str, list[dict[str, str]]], str]:
        """Exit status of pytest, what happened to tests by kind of event, and the end of its output."""
        with tempfile.TemporaryDirectory() as folder:
            record, output = Path(folder) / "record", Path(folder) / "output"
            status = self._pytest(
                {
                    "arguments": ["-q", "-p", "no:cacheprovider", "-p", "recorder", *arguments],
                    "environment": self.environment(backend) | {"MUTATION_RECORD": str(record)},
                    "folder": str(self.root),
                    "output": str(output),
                    "seconds": TIMEOUT,
                }
            )
            if status is None:
                raise Invalid(f"the tests took longer than {TIMEOUT} s")
            events = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-12:])
        kinds = ("start", "passed", "failed", "error")
        return status, {kind: [event for event in events if event["event"] == kind] for kind in kinds}, tail

    def catch(self, selection: Selection) -> Outcome:
        """Run a selection of tests up to the first failure."""
        files = sorted({path for name in selection.files for path in self.root.glob(f"tests/**/{name}")})
        if not files:
            raise Invalid(f"no tests: {', '.join(selection.files)} match no file below tests/")
        status, by, tail = self.run_tests(selection.backend, ["-x", "-k", selection.expression, *map(str, files)])
        if by["failed"]:
            return Outcome(CAUGHT, by["failed"][0]["test"])
        if by["error"]:
            raise Invalid(f"{by['error'][0]['test']} could not be set up: {by['error'][0]['message']}")
        if status < 0 and by["start"]:
            return Outcome(CAUGHT, by["start"][-1]["test"], signal=-status)  # the process died in this test
        if status != 0 or not by["passed"]:
            raise Invalid(f"pytest exited with {status}: {tail}")
        return Outcome(SURVIVED, f"{len(by['passed'])} tests passed")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def candidates(root: Path, fault: Fault) -> list[Path]:
    """The files that a fault may lie in."""
    files = {path for pattern in fault.globs for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in files if re.search(fault.where, str(path.relative_to(root))))


def planted(root: Path, fault: Fault) -> dict[Path, str]:
    """The new text of every file that a fault changes.

    Raises:
        Invalid: one of its texts is not found exactly once.
    """
    texts: dict[Path, str] = {}
    paths = candidates(root, fault)
    for old, new in fault.edits:
        pattern = re.compile(old if fault.regex else re.escape(old))
        found = [(path, m) for path in paths for m in pattern.finditer(texts.get(path) or path.read_text())]
        if len(found) != 1:
            places = ", ".join(f"{path.relative_to(root)}" for path, _ in found) or f"none of {len(paths)} files"
            raise Invalid(f"must match once, matches {len(found)} times, in {places}: {old!r}")
        path, match = found[0]
        text = texts.get(path) or path.read_text()
        texts[path] = text[: match.start()] + (match.expand(new) if fault.regex else new) + text[match.end() :]
    return texts


def try_fault(tree: Tree, fault: Fault) -> Outcome:
    """Plant a fault, run its tests, and undo it."""
    start = time.monotonic()
    before: dict[Path, bytes] = {}
    try:
        texts = planted(tree.root, fault)
        before = {path: path.read_bytes() for path in texts}
        for path, text in texts.items():
            path.write_text(text)
        if fault.backend == "cpp":
            tree.build_again()
        outcome = tree.catch(fault.tests)
    except Invalid as reason:
        outcome = Outcome(INVALID, str(reason))
    finally:
        for path, content in before.items():
            path.write_bytes(content)
    outcome.seconds = time.monotonic() - start
    return outcome


def in_parallel(trees: list[Tree], items: list, work, report) -> list:  # type: ignore[no-untyped-def]
    """work(tree, item) for all items, in order, each tree with one at a time; report(item, result) as they come."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for number, item in enumerate(items):
        waiting.put((number, item))
    results: dict = {}
    printing = threading.Lock()

    def loop(tree: Tree) -> None:
        while True:
            try:
                number, item = waiting.get_nowait()
            except queue.Empty:
                return
            results[number] = work(tree, item)
            with printing:
                report(item, results[number])

    threads = [threading.Thread(target=loop, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(items))]


def check_catches(tree: Tree, faults: list[Fault], outcomes: list[Outcome]) -> None:
    """Run the tests that caught faults once more without any; a catch by one that fails then, too, is invalid."""
    try:
        tree.build_again()
    except Invalid as reason:
        raise SystemExit(f"the tree itself {reason}") from None
    for backend in dict.fromkeys(fault.backend for fault in faults):
        caught = [o for f, o in zip(faults, outcomes, strict=True) if f.backend == backend and o.status == CAUGHT]
        if not caught:
            continue
        try:
            _, by, tail = tree.run_tests(backend, sorted({outcome.detail for outcome in caught}))
        except Invalid as reason:
            by, tail = {"passed": []}, str(reason)
        passed = {event["test"] for event in by["passed"]}
        for outcome in caught:
            if outcome.detail not in passed:
                outcome.status, outcome.detail = INVALID, f"{outcome.detail} does not pass without it either: {tail}"


def read_report(path: Path | None) -> dict[str, dict[str, str]]:
    """The results in a report, by fault; none where there is no such file."""
    return json.loads(path.read_text())["faults"] if path is not None and path.exists() else {}


def choose(arguments: argparse.Namespace) -> list[Fault]:
    """The faults that the command line asks for, in the order of the list."""
    chosen = [f for f in FAULTS if not arguments.only or any(f.name.startswith(name) for name in arguments.only)]
    if arguments.missing:
        caught = {name for name, result in read_report(arguments.report).items() if result["status"] == CAUGHT}
        chosen = [fault for fault in chosen if fault.name not in caught]
    if arguments.sample:
        some = random.Random(arguments.seed).sample(chosen, min(arguments.sample, len(chosen)))
        chosen = [fault for fault in chosen if fault in some]
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults by name, or by a prefix of it")
    parser.add_argument("--sample", type=int, metavar="K", help="K of the faults, by chance")
    parser.add_argument("--seed", type=int, default=0, help="of --sample; the default is always the same sample")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time, each in its own copy")
    parser.add_argument("--report", type=Path, metavar="FILE.json", help="add the results to those there")
    parser.add_argument("--missing", action="store_true", help="only faults that the report does not have as caught")
    parser.add_argument("--list", action="store_true", help="only say where each fault would go")
    arguments = parser.parse_args()
    faults = choose(arguments)
    if not faults:
        print("nothing to do")
        return 0 if arguments.missing else 2
    if arguments.list:
        return list_faults(faults)

    start = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    trees = [Tree(number) for number in range(arguments.jobs)]
    locks = [open(tree.lock, "w") for tree in trees]  # noqa: SIM115  # held until the end
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    for tree in trees:
        tree.update()
    try:
        for tree in trees:
            tree.build()
            if any(fault.backend == "cuda" for fault in faults):
                tree.build_emulator()
    except Invalid as reason:
        print(f"the tree itself {reason}")
        return 1

    def tell(fault: Fault, outcome: Outcome) -> None:
        died = f" (signal {outcome.signal})" if outcome.signal else ""
        print(f"  {outcome.status:8} {outcome.seconds:6.1f} s  {fault.name}: {outcome.detail}{died}", flush=True)

    print(f"{len(faults)} faults", flush=True)
    outcomes = in_parallel(trees, faults, try_fault, tell)
    check_catches(trees[0], faults, outcomes)
    for fault, outcome in zip(faults, outcomes, strict=True):
        if outcome.status != CAUGHT:
            tell(fault, outcome)
    numbers = {status: sum(o.status == status for o in outcomes) for status in (CAUGHT, SURVIVED, INVALID)}
    seconds = time.monotonic() - start
    print(f"{', '.join(f'{number} {status}' for status, number in numbers.items())} in {seconds:.0f} s")
    if arguments.report:
        found = read_report(arguments.report) | {
            fault.name: {"status": outcome.status, "by": outcome.detail}
            for fault, outcome in zip(faults, outcomes, strict=True)
        }
        ordered = {fault.name: found[fault.name] for fault in FAULTS if fault.name in found}
        arguments.report.write_text(json.dumps({"faults": ordered}, indent=2) + "\n")
    return 0 if numbers[CAUGHT] == len(faults) else 1


def list_faults(faults: list[Fault]) -> int:
    """Print the place of every fault; 1 if one has none."""
    status = 0
    for fault in faults:
        try:
            places = ", ".join(str(path.relative_to(ROOT)) for path in planted(ROOT, fault))
            print(f"{fault.name}: {places}")
        except Invalid as reason:
            print(f"{fault.name}: {INVALID}, {reason}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
