"""Test what the benchmarks say about themselves: rows, text, goals, and tables that cannot go stale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import comparison, drop_in, goals, memories, plots, report, tables, timing
from benchmarks import scenes as rooms
from benchmarks.reference_memory import ReferenceMemory
from mirage_kernels import Cameras

ROW_KEYS = ["group", "name", "variant", "size", "median_s", "p20_s", "p80_s", "bytes", "floor_s"]


def row(group: str, name: str, variant: str, size: str, median: float | None = None, **more: Any) -> report.Row:
    times = None if median is None else (median, median, median)
    return report.make_row(group, name, variant, size, times=times, bandwidth=1e10, **more)


def results(rows: list[report.Row], gpu: dict[str, str] | None = None) -> dict[str, Any]:
    facts = {"machine": "here", "cpu": "a CPU, 2 threads", "gpu": gpu, "torch": "2.13", "cuda": None}
    return {**facts, "commit": "abc", "command": "pytest benchmarks", "rows": rows}


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: str(path.relative_to(tables.ROOT)))
def test_tables_say_what_the_results_say(path: Path) -> None:
    text = path.read_text()
    assert "<!-- bench:" in text
    assert tables.render(text, report.load_results()) == text, "run `python -m benchmarks.tables --write`"


def test_a_stale_table_is_found_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- bench:goals -->\nold\n<!-- /bench -->\nafter\n")
    monkeypatch.setattr(tables, "FILES", (path,))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert tables.main(["--write"]) == 0
    assert tables.main(["--check"]) == 0
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| goal | figure |" in text
    with pytest.raises(ValueError, match="bench marker must be one of"):
        tables.render("<!-- bench:nothing -->\n<!-- /bench -->", [])


def test_what_was_not_measured_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "load_fidelity", dict)
    monkeypatch.setattr(tables, "EVALUATIONS", tmp_path)
    for name, block in tables.BLOCKS.items():
        text = block([])
        assert report.NOT_MEASURED in text, name
    outcomes = [*goals.cpu_goals([]), *goals.gpu_goals([])]
    assert len(outcomes) == 17
    assert all(outcome.met is None and outcome.figure == report.NOT_MEASURED for outcome in outcomes)


def test_a_memory_that_was_called_ours_is_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report_of = tables.load_evaluations()[0]

    def old(memories: dict[str, Any]) -> dict[str, Any]:
        return {"ours" if name == "aligned" else name: figures for name, figures in memories.items()}

    before = {**report_of, "memory": old(report_of["memory"])}
    before["memory_by_depth"] = {depth: old(found) for depth, found in report_of["memory_by_depth"].items()}
    (tmp_path / "evaluation-97.json").write_text(json.dumps(before))
    wanted = tables.closed_loop_short([])
    monkeypatch.setattr(tables, "EVALUATIONS", tmp_path)
    assert tables.load_evaluations() == [report_of]
    assert tables.closed_loop_short([]) == wanted
    assert [line.split(" | ")[0] for line in wanted.split("\n")[2:]] == ["| none", "| nearest", "| aligned", "| pixel"]


def test_the_short_read_table_has_no_second_size_of_pixels() -> None:
    rows = [row("read", "9 latent views", "latent, bf16", size.label, 1e-3) for size in rooms.SIZES]
    rows += [row("read", "33 images", "pixel, kernels nearest", size.label, 0.2) for size in rooms.SHORT_SIZES]
    lines = tables.read_short([results(rows)]).split("\n")[2:]
    assert [line.split(" frames")[0] for line in lines] == ["| 20", "| 81", "| 401"]
    assert "200 ms, 200x" in lines[0] and report.NOT_MEASURED in lines[1]


@pytest.mark.parametrize("how", ["", ", eager, warm"], ids=["cpu", "gpu"])
def test_the_comparison_sets_the_sides_beside_each_other(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = rooms.GOAL.label
    rows = [
        row("read", "9 latent views", f"latent, bf16{how}", size, 1e-3),
        row("read", "9 latent views", "latent, bf16, cold caches", size, 2e-3),
        row("read", "9 latent views", f"reference{how}", size, 1e-2),
        row("read", "33 images", f"pixel, kernels nearest{how}", size, 0.2),
        row("memory", "held", "latent, bf16", size, nbytes=1000),
        row("memory", "held", "pixel, plain", size, nbytes=50_000),
        row("read", "cells wrong", "reference", size, value=0.027),
        row("growth", "new rooms: read", "latent, bf16", "chunk 1 of 704x1280", 1e-3),
    ]
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    head, sides, *lines = comparison.compare(rows)
    assert head.startswith(f"{size}, 17,600 tokens") and sides.split()[:2] == ["latent", "reference"]
    read, held, wrong, blank, note = lines
    assert read.split("  ")[0] == "read one chunk, nearest"
    assert [cell.strip() for cell in (read[28:38], read[38:56], read[56:76], read[76:])] == [
        "1.00 ms", "10.0 ms, 10.0x", "", "200 ms, 200x"
    ]  # fmt: skip
    assert held.split() == ["bytes", "held", "1.00", "kB", "50.0", "kB,", "50.0x"]
    assert wrong.split() == ["cells", "wrong", "0.0", "%", "2.7", "%"]
    assert blank == "" and note == comparison.ENCODER_NEEDS and "mirage-world[bench]" in note
    part = row("condition", "encoding 5 of 33 images", "pixel, encoder of width 160", size, 26.0)
    lines = comparison.compare([*rows, part])
    assert any(line.split("  ")[0] == "encode 5 of 33 images" and line.endswith("26.0 s") for line in lines)
    assert comparison.ENCODER_NEEDS not in lines


@pytest.mark.slow
def test_runs_measure_what_they_have_the_time_for() -> None:
    def collect(*options: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "--collect-only", "-q"]
        ran = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=tables.ROOT)
        return ran.returncode, ran.stdout + ran.stderr

    code, short = collect()
    assert code == 0 and "9-frames-of-704x1280" in short and "deselected" in short
    assert not any(name in short for name in ("401-frames", "test_growth.py::", "test_drop_in.py::", "test_chunk.py::"))
    code, full = collect("--full")
    assert code == 0 and all(name in full for name in ("401-frames", "test_growth.py::", "test_chunk.py::"))
    code, refused = collect("--save")
    assert code == pytest.ExitCode.USAGE_ERROR and "--save needs --full" in refused


def test_goals_take_the_faster_pixel_memory_and_the_right_rows() -> None:
    size = rooms.GOAL.label
    rows = [
        row("read", "9 latent views", "latent, bf16", size, 1e-4, nbytes=10**6),
        row("read", "33 images", "pixel, plain", size, 9.0),
        row("read", "33 images", "pixel, kernels nearest", size, 0.029),
        row("condition", "one chunk", "pixel, plain, encoder of width 160", size, 609.0),
        row("condition", "one chunk", "pixel, kernels nearest, encoder of width 160", size, 600.0),
        row("condition", "one chunk", "pixel, plain, encoder of width 16", size, 1.0),
        row("memory", "held", "latent, bf16", size, nbytes=1000),
        row("memory", "held", "pixel, plain", size, nbytes=51_000),
        row("memory", "held", "pixel, plain, 8-bit colours", size, nbytes=33_000),
    ]
    for chunk, seconds, view in ((1, 1e-3, 10), (50, 3e-3, 20)):
        label = f"chunk {chunk} of 704x1280"
        rows.append(row("growth", "new rooms: read", "latent, bf16", label, seconds))
        rows.append(row("growth", "new rooms: in view", "latent, bf16", label, nbytes=view))
    raster, cold, whole, held, growth, *_ = goals.cpu_goals(rows)
    assert raster.met is False and raster.figure.startswith("290x")
    assert cold.met is None
    assert whole.met is True and whole.figure.startswith("6,000,000x")
    assert held.met is True and "33.0x against 8-bit colours" in held.figure
    assert growth.met is False and growth.figure == "read 3.00x, bytes in view 2.00x"
    for name, seconds in (("read beside", 4e-3), ("first chunk beside", 2e-3)):  # read in turns: what counts
        rows.append(row("growth", f"new rooms: {name}", "latent, bf16", "chunk 50 of 704x1280", seconds))
    growth = goals.cpu_goals(rows)[4]
    assert growth.met is True and growth.figure == "read 2.00x, bytes in view 2.00x"


def test_rows_and_files_have_the_documented_form(tmp_path: Path) -> None:
    rows = [row("read", "9 latent views", "latent, bf16", "x", 2e-3, nbytes=10**7), row("memory", "held", "x", "y")]
    assert list(rows[0]) == ROW_KEYS and list(rows[1]) == ROW_KEYS
    assert rows[0]["floor_s"] == pytest.approx(1e-3) and rows[1]["median_s"] is None
    path = report.write_results(tmp_path / "here", results(rows), rows)
    loaded = json.loads(path.read_text())
    assert list(loaded) == ["machine", "cpu", "gpu", "torch", "cuda", "commit", "command", "rows"]
    assert loaded["rows"] == rows
    assert report.load_results(tmp_path) == [loaded]
    assert "| 9 latent views | x | latent, bf16 | 2.00 ms | 2.00 ms to 2.00 ms | 10.0 MB | 1.00 ms | 2.0 |" in (
        tmp_path / "here" / "results.md"
    ).read_text().replace("  ", " ")
    assert set(report.machine_facts(torch.device("cpu"))) == set(loaded) - {"rows"}


def test_text_of_figures() -> None:
    assert [report.seconds_text(s) for s in (26.1e-6, 1.444e-3, 9.03, 612, None)] == [
        "26.1 us", "1.44 ms", "9.03 s", "612 s", report.NOT_MEASURED
    ]  # fmt: skip
    assert [report.bytes_text(b) for b in (12, 2_041_840, 3e9)] == ["12.0 B", "2.04 MB", "3.00 GB"]
    assert report.ratio_text(5300.4) == "5,300x"


def test_sizes_name_themselves() -> None:
    for size in (*rooms.GPU_SIZES, rooms.QUICK):
        assert rooms.Size.parse(size.label) == size
    assert rooms.Size.parse("chunk 3 of 4x5") is None
    assert rooms.GOAL.tokens == 17_600 and rooms.GOAL.pixels == 4_505_600
    assert len(rooms.latent_views(rooms.chunk_cameras(rooms.GOAL))) == rooms.READ_VIEWS
    assert len(rooms.stored_cameras(rooms.Size(1001, 16, 32))) == 1001


def test_rooms_of_the_row_are_alike() -> None:
    cameras = rooms.camera_path(2).resized((24, 40))
    assert torch.equal(rooms.render_depth(cameras), rooms.render_depth(rooms.moved_room(cameras, 0)))
    torch.testing.assert_close(rooms.render_depth(cameras), rooms.render_depth(rooms.moved_room(cameras, 7)))


def test_timing_on_a_cpu() -> None:
    calls = []
    seconds = timing.time_cpu(lambda: calls.append("f"), 3, warmup=2, setup=lambda: calls.append("s"))
    assert len(seconds) == 3 and calls == ["s", "f"] * 5
    assert timing.summarise([3.0, 1.0, 2.0]).median == 2.0
    assert timing.copy_bandwidth(torch.device("cpu")) > 1e8
    assert timing.wait_for_quiet(limit_s=0.0) in (True, False)
    peak = timing.peak_bytes(lambda: torch.ones(8 << 20), torch.device("cpu"))
    assert peak is None or 30e6 < peak < 80e6


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("cold", [False, True])
def test_timing_on_a_gpu_calls_in_order(graph: bool, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device: what is called, and between which events."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return 2.0

    class Flush:
        def zero_(self) -> None:
            calls.append("flush")

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

    device: Any = mock.MagicMock()
    device.Event, device.CUDAGraph = Event, Graph
    device._sleep = lambda cycles: calls.append("sleep")
    monkeypatch.setattr(timing.torch, "cuda", device)
    monkeypatch.setattr(timing, "_twice_the_l2_cache", Flush)
    seconds = timing.time_cuda(
        lambda: calls.append("call"), 2, graph=graph, cold=cold, warmup=1, setup=lambda: calls.append("setup")
    )
    assert seconds == [2e-3, 2e-3]
    call = "replay" if graph else "call"
    before = ["setup", "flush"] if cold else ["setup", call, "setup"]
    one_round = [*before, *(["sleep"] if graph else []), "event", call, "event"]
    assert calls == ["setup", "call", *(["setup", "call"] if graph else []), *one_round, *one_round]


def test_the_reference_algorithm_is_exact_on_one_thread(threads: Any) -> None:
    threads(1)
    size = rooms.Size(12, 96, 160)
    memory = memories.reference_memory(size, torch.device("cpu"))
    views = rooms.latent_views(rooms.chunk_cameras(size)).resized(size.grid)
    assert memory.read_exactness(views.intrinsics, views.cam2world, size.grid) == (0.0, 0.0)
    cache = memories.latent_cache(size, torch.device("cpu"), torch.float32)
    readout = cache.read(views, size.grid, splat="nearest")
    latents, mask = memory.read(views.intrinsics, views.cam2world, size.grid)
    assert float((mask != readout.mask).float().mean()) < 0.01
    assert float((latents != readout.latents).any(1).float().mean()) < 0.02
    overlap = cache.view_overlap(rooms.stored_cameras(size), views, size.grid)
    stored = rooms.stored_cameras(size).resized(size.grid)
    expected = memory.overlap(stored.intrinsics, stored.cam2world, views.intrinsics, views.cam2world, size.grid)
    torch.testing.assert_close(overlap, expected, atol=0.02, rtol=0)


def test_wrong_cells_are_counted() -> None:
    """A farther token stored last is what two threads do at times."""
    memory = ReferenceMemory(1)
    memory.points = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    memory.features = torch.tensor([[2.0], [3.0]])
    camera = Cameras(torch.tensor([[[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]]), torch.eye(4)[None], (4, 4))
    assert memory.read_exactness(camera.intrinsics, camera.cam2world, (4, 4)) == (0.0, 0.0)
    memory._read_one = lambda k, pose, size: (torch.full((1, 4, 4), 3.0), torch.full((4, 4), 3.0))  # type: ignore[method-assign]
    assert memory.read_exactness(camera.intrinsics, camera.cam2world, (4, 4)) == (1.0, 0.0)


def test_the_drop_in_loop_gives_both_memories_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for memory in ("compat", "reference"):
        drop_in.main(["--memory", memory, "--frames", "2", "--height", "32", "--width", "64", "--chunks", "2"])
        printed.append(json.loads(capsys.readouterr().out))
    compat, reference = printed
    assert compat["tokens"] == reference["tokens"] == 5 * 2 * 4
    assert len(compat["project_s"]) == len(compat["update_s"]) == 2


def test_bytes_in_view_are_a_part_of_all() -> None:
    size, cpu = rooms.Size(6, 64, 96), torch.device("cpu")
    assert 0 < memories.tokens_in_view(size, cpu) < size.tokens
    assert memories.read_bytes(size, cpu, 10, torch.bfloat16) < memories.read_bytes(size, cpu, 10, torch.float32)


@pytest.mark.slow
def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    rows = [row("read", "9 latent views", "latent, bf16", s.label, 1e-3, nbytes=10**6) for s in rooms.SIZES]
    for chunk in (1, 50):
        rows.append(row("growth", "new rooms: read", "latent, bf16", f"chunk {chunk} of 704x1280", 1e-3))
        rows.append(row("growth", "new rooms: held", "latent, bf16", f"chunk {chunk} of 704x1280", nbytes=9))
    report.write_results(tmp_path, results(rows), rows)
    plots.main([str(tmp_path)])
    for name in ("time", "growth", "roofline"):
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
