"""The list of faults. Each is a small mistake that someone could make; none leaves all results as they are.

A fault names its files by backend and, where that is needed for its text to be there only once, by a pattern of their
paths. So files may move and be renamed, and most of the texts hold no identifier that is likely to be.
"""

from __future__ import annotations

from dataclasses import dataclass

# Where the code of a backend may lie.
GLOBS = {
    "cpp": ("csrc/core/**/*.h", "csrc/cpu/**/*.h", "csrc/cpu/**/*.cpp"),
    "cuda": ("csrc/cuda/**/*.cuh", "csrc/cuda/**/*.cu"),
    "triton": ("mirage_kernels/**/triton/**/*.py", "mirage_kernels/**/triton.py", "mirage_kernels/ops/common/**/*.py"),
    "python": ("mirage_kernels/**/*.py",),
}


@dataclass(frozen=True)
class Selection:
    """Tests that a fault is tried on: ``pytest -k expression`` of the files of these names, anywhere below tests/."""

    backend: str
    files: tuple[str, ...]
    expression: str

    def __str__(self) -> str:
        return f"{self.backend}, {' '.join(self.files)} -k {self.expression!r}"


@dataclass(frozen=True)
class Fault:
    """One fault: texts, each of which must be there once, and what takes their place.

    ``where`` is a regular expression of a part of the path; with ``regex`` the old texts are such, too.
    """

    name: str
    tests: Selection
    edits: tuple[tuple[str, str], ...]
    where: str = ""
    regex: bool = False

    @property
    def backend(self) -> str:
        return self.tests.backend

    @property
    def globs(self) -> tuple[str, ...]:
        return GLOBS[self.backend]


def on_cpu(*files: str, expression: str = "cpu") -> Selection:
    return Selection("cpp", files, expression)


def emulated(*files: str, expression: str = "emulated") -> Selection:
    return Selection("cuda", files, expression)


def interpreted(expression: str) -> Selection:
    return Selection("triton", ("test_triton.py",), expression)


BACK_PROJECT = on_cpu("test_back_project.py")
SPLAT = on_cpu("test_splat.py")
SPLAT_THREADS = on_cpu(
    "test_determinism.py", expression="cpu and any_number_of_threads and splat and not aligned and not backward"
)
ALIGNED = on_cpu("test_splat_aligned.py")
CACHE_WRITE = on_cpu("test_cache_write.py")
BOUNDED_WRITE = on_cpu("test_bounded_write.py")
BOUNDS = on_cpu("test_block_bounds.py")
OVERLAP = on_cpu("test_view_overlap.py")
FLOAT8 = on_cpu("test_float8.py")

CPP = (
    # back_project
    Fault("cpp-upper-median", BACK_PROJECT, (("(cell.valid - 1) / 2", "cell.valid / 2"),)),
    Fault("cpp-upper-median-of-full-cells", BACK_PROJECT, (("(16 * rows - 1) / 2", "16 * rows / 2"),)),
    Fault(
        "cpp-half-valid-is-not-enough",
        BACK_PROJECT,
        (("loaded.valid} >= rows * width", "loaded.valid} > rows * width"),),
    ),
    Fault(
        "cpp-any-static-pixel-makes-a-token-static",
        BACK_PROJECT,
        ((r"uint8_t all = 1;([\s\S]{1,400}?)all &= ", r"uint8_t all = 0;\1all |= "),),
        regex=True,
    ),
    Fault("cpp-footprint-by-fy", BACK_PROJECT, (("footprint = depth / lift.fx", "footprint = depth / lift.fy"),)),
    # splat
    Fault("cpp-left-border-is-outside", SPLAT, (("(p.u >= 0.0f)", "(p.u > 0.0f)"),)),
    Fault(
        "cpp-ties-go-to-the-last-token",
        SPLAT,
        ((r"(\w+)\[at\] = std::min\(key, \1\[at\]\)", r"\1[at] = (key >> 32) <= (\1[at] >> 32) ? key : \1[at]"),),
        regex=True,
    ),
    Fault(
        "cpp-holes-read-zeros-and-so-do-tokens",
        SPLAT,
        ((r"\? zeros\.data\(\) : features\.row\(winners\[k\]\)", "? zeros.data() : zeros.data()"),),
        regex=True,
    ),
    Fault("cpp-index-is-cut-to-16-bits", SPLAT, (("& 0xffffffffu) : -1", "& 0xffffu) : -1"),), where="splat"),
    Fault(
        "cpp-only-the-first-slice-counts",
        SPLAT_THREADS,
        ((r"nearest\[k\] = keys\[k\] < nearest\[k\] \? keys\[k\] : nearest\[k\]", "nearest[k] = nearest[k]"),),
        regex=True,
    ),
    # culling and bounds
    Fault(
        "cpp-frustum-is-a-cell-too-narrow",
        BOUNDS,
        (("static_cast<double>(width) + margin", "static_cast<double>(width) - 1.0 + margin"),),
    ),
    # splat_aligned
    Fault(
        "cpp-tokens-just-behind-are-hidden",
        ALIGNED,
        ((r"= \w+ \* \(narrow\[cell\]", "= 1.0f * (narrow[cell]"),),
        regex=True,
    ),
    Fault(
        "cpp-quarter-of-the-ray-weight",
        ALIGNED,
        ((r"scale \+ (\w+ \* \w+\(\w+, \w+\))", r"scale + 0.25f * \1"),),
        regex=True,
    ),
    Fault("cpp-twice-the-sharpness", ALIGNED, (("- best)) * 0.125f", "- best)) * 0.25f"),)),
    Fault(
        "cpp-gradient-lacks-a-weight",
        ALIGNED,
        ((r"\(\(dots\[k\] - mean\) \* \w+\.\w+\[0\]\)", "(dots[k] - mean)"),),
        regex=True,
    ),
    # cache_write
    Fault(
        "cpp-frames-count-from-one",
        CACHE_WRITE,
        ((r"static_cast<int32_t>\(first_frame \+ t\)", "static_cast<int32_t>(first_frame + t + 1)"),),
        where="cache_write",
        regex=True,
    ),
    Fault(
        "cpp-written-blocks-keep-their-bounds",
        BOUNDS,
        (("if (bounds.has_value() && report[0] > 0)", "if (bounds.has_value() && report[0] < 0)"),),
    ),
    # bounded_write and eviction
    Fault(
        "cpp-carves-what-lies-on-the-surface",
        BOUNDED_WRITE,
        ((r"return depth \* \w+ < shown;", "return depth < shown;"),),
        regex=True,
    ),
    Fault(
        "cpp-surface-without-tolerance",
        BOUNDED_WRITE,
        ((r"\(depth <= \w+ \* surface\)", "(depth <= surface)"),),
        regex=True,
    ),
    Fault("cpp-voxel-level-is-not-rounded", BOUNDED_WRITE, (("> 0x3504f3u", "> 0x7fffffu"),)),
    Fault(
        "cpp-evicts-the-newest",
        BOUNDED_WRITE,
        (
            (r"(nth_element\(frames\.begin\(\), .*), frames\.end\(\)\)", r"\1, frames.end(), std::greater<int32_t>())"),
            (r"frame < last", "frame > last"),
            (r"frame_ids\[row\] > last", "frame_ids[row] < last"),
        ),
        regex=True,
    ),
    Fault("cpp-scales-stay-behind", BOUNDED_WRITE, ((r"\{&(\w+), &(\w+), &scales\}", r"{&\1, &\2}"),), regex=True),
    # view_overlap
    Fault(
        "cpp-intersection-and-union-change-places", OVERLAP, (("(target_seen[m] ? 0 : 1)", "(target_seen[m] ? 1 : 0)"),)
    ),
    Fault(
        "cpp-voxels-round-towards-zero",
        OVERLAP,
        (("truncated - (static_cast<float>(truncated) > clamped ? 1 : 0)", "truncated"),),
    ),
    # float8
    Fault("cpp-float8-ties-go-up", FLOAT8, (("0x7ffffu + ((magnitude >> 20) & 1u)", "0x7ffffu + 1u"),)),
)

CUDA_SPLAT = emulated("test_splat.py")
CUDA_BOUNDS = emulated(
    "test_cuda_emulated.py", expression="test_reads_by_bounds_along or (test_reads_by_bounds and 9-5)"
)
CUDA_ALIGNED = emulated("test_splat_aligned.py", expression="emulated and not gradient and not errors")
CUDA_ALIGNED_BACKWARD = emulated("test_splat_aligned.py", expression="emulated and gradient")
CUDA_CACHE_WRITE = emulated("test_cache_write.py")
CUDA_WRITTEN_BOUNDS = emulated("test_block_bounds.py", expression="emulated and test_a_write_updates")
CUDA_BACK_PROJECT = emulated("test_back_project.py")
CUDA_OVERLAP = emulated("test_view_overlap.py")
CUDA_FLOAT8 = emulated("test_float8.py", expression="emulated and (scale or values)")
CUDA_BOUNDED = emulated(
    "test_bounded_write.py", expression="emulated and (every_backend or brute_force or carved or far_blocks)"
)
CUDA_VIOLATIONS = emulated(
    "test_bounded_write.py", "test_cuda_emulated_writes.py", expression="emulated and (any_scene or large_grids)"
)
CUDA_CHANGED_BOUNDS = emulated("test_block_bounds.py", expression="emulated and keeps_them_exact")
CUDA_TRIM = emulated("test_cuda_emulated_writes.py", expression="test_trim")

CUDA = (
    # splat
    Fault(
        "cuda-ties-go-to-the-last-token",
        CUDA_SPLAT,
        (
            (r"make_key\(q\.z, static_cast<uint32_t>\(i\)\)", "make_key(q.z, ~static_cast<uint32_t>(i))"),
            (r"static_cast<int64_t>\(key_index\(key\)\)", "static_cast<int64_t>(~key_index(key))"),
            (r"row_factor<In>\(scales, key_index\(key\)\)", "row_factor<In>(scales, ~key_index(key))"),
        ),
        where="splat[^_]",
        regex=True,
    ),
    Fault("cuda-plain-store-for-an-atomic", CUDA_SPLAT, (("atomicMin(at, key)", "*at = key"),)),
    Fault("cuda-cells-are-rounded", CUDA_SPLAT, (("static_cast<int>(q.u)", "static_cast<int>(q.u + 0.5f)"),)),
    Fault(
        "cuda-float8-without-scales",
        CUDA_FLOAT8,
        ((r"seen \? row_factor<In>\(scales, \w+\(key\)\) : 1\.0f", "1.0f"),),
        regex=True,
    ),
    # culling and bounds
    Fault(
        "cuda-frustum-is-a-cell-too-narrow",
        CUDA_BOUNDS,
        (("near, width, height, margin)", "near, width - 1, height, margin)"),),
    ),
    # splat_aligned
    Fault("cuda-lists-hand-on-the-lesser-key", CUDA_ALIGNED, (("held < key ? key : held", "held < key ? held : key"),)),
    Fault(
        "cuda-footprints-count-everywhere",
        CUDA_ALIGNED,
        (
            (r"if \(narrow\[t \* cells \+ cell\] == \w+\) lower_depth\(", "lower_depth("),
            (r"if \(narrow\[at\] == \w+\) insert\(at, ", "insert(at, "),
        ),
        regex=True,
    ),
    Fault(
        "cuda-gradient-lacks-a-weight",
        CUDA_ALIGNED_BACKWARD,
        ((r"sum\[n\] \+= \w+ \* rows", "sum[n] += rows"),),
        regex=True,
    ),
    # cache_write
    Fault("cuda-count-stays", CUDA_CACHE_WRITE, (("*count = end;", "*count = start;"),), where="cache_write"),
    Fault(
        "cuda-count-passes-the-capacity", CUDA_CACHE_WRITE, (("carried < capacity ? carried : capacity", "carried"),)
    ),
    Fault(
        "cuda-written-blocks-keep-their-bounds",
        CUDA_WRITTEN_BOUNDS,
        (("block = (end - written) / kBlockTokens + blockIdx.x", "block = end / kBlockTokens + blockIdx.x"),),
    ),
    Fault("cuda-only-the-last-channel-is-checked", CUDA_CACHE_WRITE, (("bad |= !is_storable", "bad = !is_storable"),)),
    # back_project
    Fault("cuda-upper-median", CUDA_BACK_PROJECT, (("((valid - 1) / 2", "(valid / 2"),)),
    # bounded_write and eviction
    Fault(
        "cuda-carves-a-view-late",
        CUDA_BOUNDED,
        ((r"(\w+) >= grid\.carve_views", r"\1 > grid.carve_views"),),
        regex=True,
    ),
    Fault("cuda-seen-tokens-keep-their-violations", CUDA_VIOLATIONS, ((r"\(\w+ \? 0 : (\w+)\)", r"\1"),), regex=True),
    Fault(
        "cuda-changed-blocks-keep-their-bounds",
        CUDA_CHANGED_BOUNDS,
        ((r"atomicOr\(bounds\.touched \+ row / (\w+), 1u\)", r"atomicOr(bounds.touched + row / \1, 0u)"),),
        regex=True,
    ),
    Fault(
        "cuda-frames-below-zero-are-the-youngest",
        CUDA_TRIM,
        (("static_cast<unsigned>(frame) ^ 0x80000000u", "static_cast<unsigned>(frame)"),),
    ),
    # view_overlap
    Fault("cuda-union-is-the-intersection", CUDA_OVERLAP, (("__popc(view | targets)", "__popc(view & targets)"),)),
    Fault("cuda-dead-points-are-seen", CUDA_OVERLAP, (("if (token >= live) continue;", ""),)),
)

TRITON_SPLAT = interpreted("test_splat and not aligned")
TRITON_ALIGNED = interpreted("test_splat_aligned and not backward")
TRITON_ALIGNED_BACKWARD = interpreted("test_splat_aligned_backward")
TRITON_BACK_PROJECT = interpreted("test_back_project")
TRITON_CACHE_WRITE = interpreted("test_cache_write_report or test_cache_write_refuses")
TRITON_BOUNDED = interpreted("test_bounded_write_again_and_again")
TRITON_VOXELS = interpreted("test_bounded_write and voxel")
TRITON_TRIM = interpreted("test_cache_compact")
TRITON_OVERLAP = interpreted("test_view_overlap")
TRITON_BOUNDS = interpreted("test_block_bounds or bounds_of_more_views or culled")
TRITON_FLOAT8 = interpreted("float8")

TRITON = (
    # splat
    Fault(
        "triton-ties-go-to-the-last-token",
        TRITON_SPLAT,
        (
            (r"(tl\.int64\) << 32\)) \| index", r"\1 | (0xFFFFFFFF - index)"),
            (r"winner = key & 0xFFFFFFFF", "winner = 0xFFFFFFFF - (key & 0xFFFFFFFF)"),
        ),
        where=r"splat\b[^_]",
        regex=True,
    ),
    Fault("triton-near-is-inside", TRITON_SPLAT, (("return (z > near)", "return (z >= near)"),), where="camera|common"),
    Fault("triton-left-border-is-outside", TRITON_SPLAT, (("(u >= 0)", "(u > 0)"),)),
    Fault("triton-splat-returns-zeros", TRITON_SPLAT, (("convert(row, latents", "convert(row * 0, latents"),)),
    Fault(
        "triton-splat-gradient-of-the-last-view-only",
        TRITON_SPLAT,
        ((r"tl\.load\(target, valid, other=0\.0\) \+ (\w+), valid", r"\1, valid"),),
        regex=True,
    ),
    # culling and bounds
    Fault(
        "triton-frustum-is-a-cell-too-narrow",
        TRITON_BOUNDS,
        ((r"right, bottom = tl\.cast\(width, tl\.float32\)", "right, bottom = tl.cast(width, tl.float32) - 1"),),
        regex=True,
    ),
    Fault(
        "triton-points-that-are-not-finite-have-boxes",
        TRITON_BOUNDS,
        (("(index < live) & is_finite(x) & ", "(index < live) & "),),
    ),
    # back_project
    Fault("triton-upper-median", TRITON_BACK_PROJECT, (("rank = (count + 1) // 2", "rank = count // 2 + 1"),)),
    # cache_write
    Fault(
        "triton-count-stays",
        TRITON_CACHE_WRITE,
        (("tl.store(count, live + written)", "tl.store(count, live)"),),
        where="cache_write",
    ),
    Fault(
        "triton-last-row-stays-empty", TRITON_CACHE_WRITE, (("kept & (row < capacity)", "kept & (row + 1 < capacity)"),)
    ),
    Fault(
        "triton-range-is-exclusive",
        TRITON_CACHE_WRITE,
        (("(z >= min_depth) & (z <= max_depth)", "(z > min_depth) & (z < max_depth)"),),
        where="triton",
    ),
    # splat_aligned
    Fault(
        "triton-rays-do-not-count",
        TRITON_ALIGNED,
        ((r"(return u, v, depth, radius, scale) \+ \w+ \* \w+", r"\1"),),
        regex=True,
    ),
    Fault(
        "triton-lists-hand-on-the-lesser-key",
        TRITON_ALIGNED,
        (("(held > key), held, key)", "(held > key), key, held)"),),
    ),
    Fault(
        "triton-gradient-lacks-a-weight",
        TRITON_ALIGNED_BACKWARD,
        ((r"\(\(dot - mean\) \* \w+\)", "(dot - mean)"),),
        regex=True,
    ),
    # bounded_write and eviction
    Fault("triton-carves-a-view-late", TRITON_BOUNDED, ((r"(\w+) >= carve_views", r"\1 > carve_views"),), regex=True),
    Fault("triton-voxel-level-is-not-rounded", TRITON_VOXELS, (("> 0x3504F3", "> 0x7FFFFF"),)),
    Fault("triton-voxels-hold-one-more", TRITON_VOXELS, (("held < views_per_voxel", "held <= views_per_voxel"),)),
    Fault(
        "triton-frames-below-zero-are-the-youngest",
        TRITON_TRIM,
        ((".to(tl.int64) + _SIGN", ".to(tl.int64) & 0xFFFFFFFF"),),
    ),
    # view_overlap and float8
    Fault(
        "triton-union-is-the-view-alone", TRITON_OVERLAP, (("tl.sum(seen | target, axis=0)", "tl.sum(seen, axis=0)"),)
    ),
    Fault("triton-float8-scale-is-one-too-great", TRITON_FLOAT8, ((">> 23) - 8", ">> 23) - 7"),)),
)


def of_reference(*files: str, expression: str = "reference") -> Selection:
    return Selection("python", files, expression)


PYTHON = (
    # The definition itself, which the tests hold to another one, written independently.
    Fault(
        "python-upper-median",
        of_reference("test_back_project.py"),
        (("(count - 1) // 2", "count // 2"),),
        where="geometry",
    ),
    Fault(
        "python-quarter-of-the-ray-weight",
        of_reference("test_splat_aligned.py"),
        ((r"(?m)\bscale \+ (\w+ \* \w+),$", r"scale + 0.25 * \1,"),),
        where="common/alignment_score",
        regex=True,
    ),
    Fault(
        "python-evicts-the-newest",
        of_reference("test_bounded_write.py", expression="reference and trim"),
        (("frame_ids[held].argsort(stable=True)", "frame_ids[held].argsort(stable=True, descending=True)"),),
        where="reference",
    ),
    Fault(
        "python-voxel-level-is-not-rounded",
        of_reference("test_bounded_write.py", expression="reference and brute_force"),
        (("> 0x3504F3)", "> 0x7FFFFF)"),),
        where="geometry",
    ),
    Fault(
        "python-float8-largest-saturates",
        of_reference("test_float8.py", expression="reference or definition"),
        (("rounded.abs() <= FLOAT8_MAX", "rounded.abs() < FLOAT8_MAX"),),
        where="reference|quantization",
    ),
    # The cache.
    Fault(
        "python-cache-frames-count-from-one",
        of_reference("test_cache.py"),
        (("first_frame=buffers.num_frames", "first_frame=buffers.num_frames + 1"),),
        where="cache/",
    ),
)

FAULTS: tuple[Fault, ...] = (*CPP, *CUDA, *TRITON, *PYTHON)
