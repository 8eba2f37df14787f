"""The command line, `mirage`: one function per subcommand, each registered by its parser in `make_parser`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage_kernels import LatentCache
from mirage_kernels.storage import VERSION, read_metadata

from . import __version__
from .extras import MissingExtraError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit status: 0, or 2 for what the user can mend, in a line on stderr."""
    options = make_parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        return status
    except (OSError, ValueError, MissingExtraError) as error:
        print(f"mirage {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of its result is the function that does the work."""
    parser = argparse.ArgumentParser(prog="mirage", description="Latent spatial memory for video world models.")
    parser.add_argument("--version", action="version", version=f"mirage {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="remember a real scene and look at it from elsewhere")
    demo.add_argument("--rgbd", type=Path, metavar="FOLDER", help="RGB-D frames with poses, in the layout of 7-Scenes")
    demo.add_argument("--out", type=Path, metavar="DIR", default=Path("mirage-demo"), help="where to write")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    demo.set_defaults(run=demo_command)

    info = commands.add_parser("info", help="describe a saved cache")
    info.add_argument("cache", type=Path, metavar="cache.safetensors")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=info_command)
    return parser


def demo_command(options: argparse.Namespace) -> int:
    """Run the demo, print its table and where its files are."""
    from .demo import CACHE, CONTACT, LOOP, REPORT, format_report, run_demo

    report = run_demo(options.out, options.rgbd, options.device)
    print(format_report(report))
    print(f"\n{report['seconds']:.1f} s, written to {options.out}: {CONTACT} {LOOP} {CACHE} {REPORT}")
    return 0


def info_command(options: argparse.Namespace) -> int:
    """Describe a saved cache."""
    info = describe_cache(options.cache)
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    low, high = info["bounds"] or ([], [])
    extent = "  ".join(f"{axis} {a:.3g} to {b:.3g}" for axis, a, b in zip("xyz", low, high, strict=False))
    lines = {
        "file": f"{info['file']}, {info['file_bytes']:,} bytes, format version {info['version']}",
        "tokens": f"{info['tokens']:,} of {info['channels']} {info['dtype']} channels",
        "frames": f"{info['frames']:,}",
        "memory": f"{info['bytes'] / 2**20:.2f} MiB",
        "bounds": extent or "none, it is empty",
        "settings": ", ".join(f"{name}={value}" for name, value in info["settings"].items()),
    }
    for name, text in lines.items():
        print(f"{name:<10}{text}")
    return 0


def describe_cache(path: Path) -> dict[str, Any]:
    """What `mirage info --json` prints: file, file_bytes, version (of the file format), tokens, channels,
    dtype, frames, bytes (of the live tokens), bounds ([least x, y, z], [greatest x, y, z], world units; None
    when empty), settings.

    Raises:
        OSError, ValueError: no such file, or it is not a whole saved cache of a known version.
    """
    settings, _ = read_metadata(path)
    cache = LatentCache.load(path)
    bounds = [cache.points.amin(0).tolist(), cache.points.amax(0).tolist()] if len(cache) else None
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "version": VERSION,
        "tokens": len(cache),
        "channels": cache.channels,
        "dtype": settings.pop("dtype"),
        "frames": cache.num_frames,
        "bytes": cache.nbytes,
        "bounds": bounds,
        "settings": {name: value for name, value in settings.items() if name != "channels"},
    }
