"""The command line, `mirage`: one function per subcommand, each registered by its parser in `make_parser`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirage_kernels import LatentCache
from mirage_kernels.cache.storage import format_version, read_metadata

from .. import __version__
from ..optional import MissingExtraError, import_extra
from ..pipeline.memory import MEMORIES, MIRAGE_TINY_STEPS, STEPS, WRITE_POLICIES, default_steps


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

    _add_generate(commands)
    _add_train(commands)
    _add_evaluate(commands)
    _add_worldscore(commands)

    info = commands.add_parser("info", help="describe a saved cache")
    info.add_argument("cache", type=Path, metavar="cache.safetensors")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=info_command)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate a video along a camera path, with the memory in the loop",
        description="Without an image, the left view of scikit-image's stereo pair with its true depth is taken.",
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or hub id of a Wan2.2 or Mirage pipeline, mirage-tiny, or tiny-random")
    add("--adapter", metavar="DIR_OR_ID_OR_FILE", help="memory adapter; a file is one of the published release")
    add("--lora", metavar="FILE", help="LoRA of the transformer")
    add("--image", type=Path, metavar="FILE", help="the first frame")
    add("--prompt", help="what the video shows")
    add("--trajectory", default="orbit-and-back", help="a path's name (orbit, dolly, pan, spiral, ..) or a file")
    add("--frames", type=int, default=129, help="4 n + 1 (129)")
    add("--out", type=Path, metavar="DIR", default=Path("mirage-out"), help="where to write (mirage-out)")
    add("--size", type=_parse_size, metavar="HxW", help="of the frames, multiples of 32; default the image's")
    add(
        "--fov",
        type=float,
        default=60.0,
        help="horizontal field of view of the image in degrees, for paths by name (60)",
    )
    add("--distance", type=float, help="to what paths by name go about, world units; default the image's median depth")
    add("--depth", type=Path, metavar="FILE.npy", help="depth of the image (H, W), or of every frame (N, H, W)")
    add("--depth-estimator", metavar="NAME", help="depth-anything-v2, depth-pro, map-anything or depth-anything-3")
    add(
        "--static-filter",
        default="geometric",
        help="none, or names joined by +: geometric, sky, sam2, sam3, confidence",
    )
    add("--memory", choices=MEMORIES, default="ours", help="what remembers; the model must be trained on it (ours)")
    add("--write-policy", choices=WRITE_POLICIES, default="bounded", help="of that memory (bounded)")
    add("--steps", type=int, help=f"denoising steps ({STEPS}; with mirage-tiny {MIRAGE_TINY_STEPS})")
    add("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (1)")
    add("--chunk-frames", type=int, default=33, help="frames at a time, 4 n + 1 (33)")
    add("--decode", choices=("chunk", "end"), default="chunk", help="decode every chunk, or nothing until the end")
    add("--seed", type=int, default=0)
    add("--fps", type=float, default=24.0)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on cuda, float32 on cpu")
    add("--offload", action="store_true", help="models move to the GPU only while they are used")
    add("--resume", action="store_true", help="go on with the run in DIR")
    parser.set_defaults(run=generate_command)


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train the memory adapter, LoRA, or a small model, as a YAML file says",
        description="Goes on with the run in the file's `out`, if there is one. On several GPUs under"
        " `accelerate launch -m mirage train FILE`.",
    )
    train.set_defaults(run=train_command)
    prepare = commands.add_parser(
        "prepare",
        help="encode the clips of a training file once",
        description="Clips that are in DIR already are left alone. A source of kind `packed` reads them.",
    )
    prepare.add_argument("--out", type=Path, metavar="DIR", required=True, help="where to write")
    prepare.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    prepare.set_defaults(run=prepare_command)
    for parser in (train, prepare):
        parser.add_argument("config", type=Path, metavar="FILE.yaml")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="in place of the file's, data.frames=33")


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="closed loops in synthetic rooms: what a memory is worth",
        description="Films loops with each memory and compares them with themselves and with the truth. Goes on with"
        " what is in DIR. Weights of a memory are those of --weights, or of MODEL/memories/NAME, else the model's own.",
    )
    add = parser.add_argument
    add("--model", required=True, help="as of `mirage generate`")
    add("--adapter", metavar="DIR_OR_ID_OR_FILE", help="memory adapter of the model's own memory")
    add("--lora", metavar="FILE", help="LoRA of the model's own memory")
    add(
        "--weights",
        type=_parse_weights,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="what a memory's model was trained to: a folder as `mirage train` leaves it; may come several times",
    )
    add("--seeds", type=_parse_seeds, default="10000:10032", help="FIRST:STOP, rooms never trained on (10000:10032)")
    add("--frames", type=int, default=97, help="of a loop, 4 n + 1 (97)")
    add("--memory", type=_parse_names, default=MEMORIES, help=f"of {','.join(MEMORIES)} (all of them)")
    add(
        "--write-policy",
        choices=WRITE_POLICIES,
        default="append",
        help="of our memory: keep everything, as the others do, or bounded (append)",
    )
    add("--texture", type=float, default=0.25, help="contrast of the rooms' patterns, 0 to 1 (0.25, as mirage-tiny's)")
    add("--depth", type=_parse_names, default=("true", "head"), help="true, head: whose depth is written (true,head)")
    add("--out", type=Path, metavar="DIR", default=Path("mirage-evaluation"), help="where to write")
    add("--size", type=_parse_size, metavar="HxW", default=(96, 160), help="of the frames, multiples of 32 (96x160)")
    add("--steps", type=int, help=f"denoising steps ({STEPS}; with mirage-tiny {MIRAGE_TINY_STEPS})")
    add("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (1)")
    add("--chunk-frames", type=int, default=33, help="frames at a time, 4 n + 1 (33)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on cuda, float32 on cpu")
    parser.set_defaults(run=evaluate_command)


def _add_worldscore(commands: Any) -> None:
    parser = commands.add_parser(
        "worldscore",
        help="generate WorldScore's videos, in the folders that its scripts read",
        description="Writes DIR/worldscore_output. Goes on with what is there.",
    )
    add = parser.add_argument
    add("--model", required=True, help="as of `mirage generate`")
    add("--adapter", metavar="DIR_OR_ID_OR_FILE", help="memory adapter")
    add("--lora", metavar="FILE", help="LoRA of the transformer")
    add("--dataset", type=Path, metavar="DIR", required=True, help="WorldScore-Dataset")
    add("--movement", choices=("static", "dynamic"), default="static", help="which half of the data set (static)")
    add("--limit", type=int, metavar="N", help="the first N instances alone")
    add("--out", type=Path, metavar="DIR", default=Path("mirage-worldscore"), help="where to write")
    add("--frames", type=int, default=49, help="of a camera move, 4 n + 1 (49)")
    add("--size", type=_parse_size, metavar="HxW", default=(704, 1280), help="multiples of 32 (704x1280)")
    add("--memory", choices=MEMORIES, default="ours", help="what remembers; the model must be trained on it (ours)")
    add("--depth-estimator", metavar="NAME", help="as of `mirage generate`; default the model's depth head")
    add("--static-filter", default="geometric", help="as of `mirage generate` (geometric)")
    add("--steps", type=int, help=f"denoising steps ({STEPS}; with mirage-tiny {MIRAGE_TINY_STEPS})")
    add("--guidance", type=float, default=1.0, help="guidance scale; 1 is none (1)")
    add("--seed", type=int, default=0)
    add("--fps", type=float, default=24.0)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default bfloat16 on cuda, float32 on cpu")
    parser.set_defaults(run=worldscore_command)


def _parse_seeds(text: str) -> range:
    try:
        first, stop = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be FIRST:STOP such as 10000:10032, got {text!r}") from None
    return range(first, stop)


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _parse_weights(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    if not equals or not folder:
        raise argparse.ArgumentTypeError(f"must be NAME=DIR, got {text!r}")
    return name, Path(folder)


def _parse_size(text: str) -> tuple[int, int]:
    try:
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH such as 704x1280, got {text!r}") from None
    return height, width


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of a model, denoising steps that were left open filled in."""
    given = {name: value for name, value in vars(options).items() if name not in ("run", "command")}
    return given | {"steps": default_steps(options.model) if options.steps is None else options.steps}


def generate_command(options: argparse.Namespace) -> int:
    """Generate a video, print what became of it and where it is."""
    from .generate import GenerateOptions, format_report, run_generate

    asked = GenerateOptions(**_given(options))
    print(format_report(asked, run_generate(asked)))
    return 0


def evaluate_command(options: argparse.Namespace) -> int:
    """Evaluate a model, print the tables and where the report is."""
    from ..evaluation.closed_loop import run_evaluate
    from ..evaluation.loops import CONTACT, PLOTS, REPORT, TABLE, VIDEO, EvaluateOptions
    from ..evaluation.report import format_report

    asked = EvaluateOptions(**_given(options) | {"weights": dict(options.weights)})
    print(format_report(run_evaluate(asked)))
    print(f"written to {asked.out}: {REPORT} {TABLE} {PLOTS}/ {CONTACT} {VIDEO}")
    return 0


def worldscore_command(options: argparse.Namespace) -> int:
    """Generate WorldScore's videos, print how many."""
    from ..evaluation.worldscore import OUTPUT, WorldScoreOptions, run_worldscore

    report = run_worldscore(WorldScoreOptions(**_given(options)))
    where = options.out / OUTPUT
    print(f"{report['written']} videos written to {where}, {report['present']} were there already")
    return 0


def train_command(options: argparse.Namespace) -> int:
    """Train a stage, print what became of it."""
    _import_for_training()
    from ..training.config import load_config
    from ..training.loop import train

    config = load_config(options.config, options.overrides)
    report = train(config)
    loss = "" if report["loss"] is None else f", loss {report['loss']:.4g}"
    if saved := ", ".join(report["saved"]):  # of several processes, one
        print(f"{report['steps']} steps{loss}, {report['seconds']:.0f} s; {saved} in {config.out}")
    return 0


def prepare_command(options: argparse.Namespace) -> int:
    """Encode clips, print how many, and which were broken."""
    _import_for_training()
    from ..training.config import load_config
    from ..training.data import list_broken
    from ..training.prepare import prepare

    report = prepare(load_config(options.config, options.overrides), options.out, options.device)
    for name, reason in report["broken"].items():
        print(f"skipped {list_broken({name: reason})}", file=sys.stderr)
    print(f"{report['written']} clips written to {options.out}, {report['present']} were there already")
    return 0


def _import_for_training() -> None:
    for module in ("diffusers", "transformers", "accelerate", "peft", "yaml", "tqdm", "ftfy"):
        import_extra(module, "train")


def demo_command(options: argparse.Namespace) -> int:
    """Run the demo, print its table and where its files are."""
    from .demo import CACHE, CONTACT, LOOP, REPORT, format_report, run_demo

    report = run_demo(options.out, options.rgbd, options.device)
    print(format_report(report))
    print(f"\n{report['seconds']:.1f} s, written to {options.out}: {CONTACT} {LOOP} {CACHE} {REPORT}\n")
    return 0 if options.rgbd else _generate_for_demo(options)


def _generate_for_demo(options: argparse.Namespace) -> int:
    """The part of the demo that needs a trained model: a walk with a memory and without."""
    from ..pipeline.memory import MIRAGE_TINY_FOLDER

    if not (MIRAGE_TINY_FOLDER / "memories" / "none").is_dir():
        print("mirage-tiny is not in this installation: `make tiny` and `make tiny-memories` train it")
        return 0
    try:
        from .world_demo import WORLD_REPORT, WORLD_SHEET, WORLD_VIDEO, format_world, run_world_demo

        report = run_world_demo(options.out, device=options.device)
    except MissingExtraError as error:
        print(f"to see mirage-tiny generate a walk: {error}")
        return 0
    print(format_world(report))
    print(f"\n{report['seconds']:.1f} s, written to {options.out}: {WORLD_SHEET} {WORLD_VIDEO} {WORLD_REPORT}")
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
        "version": int(format_version(settings)),
        "tokens": len(cache),
        "channels": cache.channels,
        "dtype": settings.pop("dtype"),
        "frames": cache.num_frames,
        "bytes": cache.nbytes,
        "bounds": bounds,
        "settings": {name: value for name, value in settings.items() if name != "channels"},
    }
