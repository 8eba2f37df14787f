"""README, the docs and the examples say what runs: every Python block is run, every command line is parsed."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirage_kernels import Cameras

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATES = ("README.md", "generate.md", "quickstart.md")  # pages whose blocks need the extra `generate`

# What takes weights, a GPU or minutes is replaced by what is small.
SMALLER = {
    '"cuda"': '"cpu"',
    '"Wan-AI/Wan2.2-TI2V-5B-Diffusers"': "MODEL",
    '"path/to/adapter"': 'MODEL + "/memory_adapter"',
    '"lora.safetensors"': "LORA",
    '"depth-anything-v2"': "estimator",
    "num_frames=129": "num_frames=17",
    "[:33]": "[:9]",
    "[33:65]": "[9:17]",
}


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def command_lines(page: Path) -> list[str]:
    text = re.sub(r" *\\\n\s*", " ", page.read_text(encoding="utf-8"))
    found = re.findall(r"^ {4}(?:accelerate launch -m )?(mirage .*)$", text, re.MULTILINE)
    return [line for line in found if "..." not in line.split("#")[0] and "[--" not in line]


def make_cameras(views: int, size: tuple[int, int]) -> Cameras:
    intrinsics = torch.tensor([[0.8 * size[1], 0.0, size[1] / 2], [0.0, 0.8 * size[1], size[0] / 2], [0.0, 0.0, 1.0]])
    cam2world = torch.eye(4).repeat(views, 1, 1)
    cam2world[:, 0, 3] = torch.linspace(0.0, 0.1, views)
    return Cameras(intrinsics, cam2world, image_size=size)


class Estimator:
    """Depth of two metres everywhere."""

    needs_frames, alignment = False, "none"

    def __call__(self, frames: Any, cameras: Cameras, frame_numbers: Any) -> torch.Tensor:
        return torch.full((len(cameras), *cameras.image_size), 2.0)


def given() -> dict[str, Any]:
    """What the pages take for granted: a video model's latents, depth, masks and cameras."""
    cameras = make_cameras(2, (704, 1280))
    latents, depth = torch.randn(2, 48, 44, 80), torch.full((2, 704, 1280), 2.0)
    static = torch.ones(2, 704, 1280, dtype=torch.bool)
    chunk = SimpleNamespace(cameras=cameras, intrinsics=cameras.intrinsics, cam2world=cameras.cam2world)
    return {
        "torch": torch,
        "intrinsics": cameras.intrinsics,
        "cam2world": cameras.cam2world,
        "cameras": cameras,
        "next_cameras": cameras,
        "latents": latents,
        "depth": depth,
        "static": static,
        "points": torch.rand(500, 3) + torch.tensor([-0.5, -0.5, 1.5]),
        "chunks": [chunk, chunk],
        "my_world_model": lambda chunk, memory: (latents, depth, static),
        "image": torch.rand(3, 64, 96),
        "camera": make_cameras(1, (64, 96)),
        "estimator": Estimator(),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A pipeline of random weights on disk, in the place of Wan2.2's, and a LoRA for it."""
    pytest.importorskip("diffusers", reason="the extra generate is not installed")
    from peft import LoraConfig

    from mirage.models.lora import save_lora
    from mirage.zoo import tiny_random_pipeline

    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_random_pipeline()
    pipe.save_pretrained(folder / "pipeline")
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]))
    save_lora(pipe.transformer, folder / "lora.safetensors")
    return {"MODEL": str(folder / "pipeline"), "LORA": str(folder / "lora.safetensors")}


def test_the_pages_have_blocks() -> None:
    counts = {page.name: len(python_blocks(page)) for page in PAGES}
    assert counts["README.md"] == 2 and counts["memory.md"] >= 5 and counts["generate.md"] >= 3
    assert sum(len(command_lines(page)) for page in PAGES) >= 8
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(
    page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = given()
    if page.name in GENERATES:
        names |= request.getfixturevalue("model")
    for number, block in enumerate(python_blocks(page)):
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        if page.name == "README.md" and number:  # blocks of their own
            names = given() | request.getfixturevalue("model") | {"cameras": make_cameras(9, (64, 96))}
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if command_lines(page)], ids=lambda page: page.name)
def test_command_lines_are_understood(page: Path) -> None:
    pytest.importorskip("tyro", reason="mirage-world is not installed")
    from mirage.commands.cli import parse

    for line in command_lines(page):
        arguments = shlex.split(line, comments=True)[1:]
        assert parse(arguments)[0] == arguments[0], line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory_in_your_model", "generate_from_image", "interactive_session"])
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name != "memory_in_your_model":
        pytest.importorskip("diffusers", reason="the extra generate is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(["--frames", "9"] if name == "generate_from_image" else [])])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "remembered" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
