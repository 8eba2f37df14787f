"""Schemas of the private operators: one name per operator and per family of kernels.

Defined here, in Python, so that they exist without a compiler. ``compiled`` is implemented by the C++ and CUDA modules
(``STABLE_TORCH_LIBRARY_IMPL``), ``triton`` by ``mirage_kernels.triton``. The public functions of ``ops.py`` choose.
"""

from __future__ import annotations

import torch

NAMESPACE = "mirage"
FAMILIES = ("compiled", "triton")

SCHEMAS = {
    "back_project": (
        "(Tensor depth, Tensor intrinsics, Tensor cam2world, Tensor? mask, SymInt height, SymInt width, bool bilinear)"
        " -> (Tensor points, Tensor valid)"
    ),
    "splat": (
        "(Tensor points, Tensor features, Tensor? num_points, Tensor intrinsics, Tensor cam2world,"
        " SymInt height, SymInt width, float near, ScalarType dtype, Tensor? bounds=None, Tensor? scales=None)"
        " -> (Tensor latents, Tensor mask, Tensor depth, Tensor index)"
    ),
    "splat_backward": "(Tensor grad_latents, Tensor index, SymInt num_points, ScalarType dtype) -> Tensor",
    "splat_aligned": (
        "(Tensor points, Tensor features, Tensor? num_points, Tensor frame_ids, Tensor frame_centers,"
        " Tensor intrinsics, Tensor cam2world, SymInt height, SymInt width, float near, float sharpness,"
        " ScalarType dtype, Tensor? bounds=None, Tensor? scales=None)"
        " -> (Tensor latents, Tensor mask, Tensor depth, Tensor index, Tensor keys)"
    ),
    "splat_aligned_backward": (
        "(Tensor grad_latents, Tensor points, Tensor features, Tensor frame_ids, Tensor frame_centers,"
        " Tensor intrinsics, Tensor cam2world, Tensor keys, float sharpness, bool of_points,"
        " Tensor? scales=None) -> (Tensor grad_features, Tensor grad_points)"
    ),
    "cache_write": (
        "(Tensor(a!) points, Tensor(b!) features, Tensor(c!) frame_ids, Tensor(d!) count, Tensor latents, Tensor depth,"
        " Tensor intrinsics, Tensor cam2world, Tensor? mask, int first_frame, bool bilinear,"
        " float min_depth, float max_depth, Tensor(e!)? bounds=None, Tensor(f!)? scales=None) -> Tensor"
    ),
    "bounded_write": (
        "(Tensor(a!) points, Tensor(b!) features, Tensor(c!) frame_ids, Tensor(d!) votes, Tensor(e!)? looks,"
        " Tensor(f!) count, Tensor frame_centers, Tensor latents, Tensor depth, Tensor intrinsics, Tensor cam2world,"
        " Tensor? mask, Tensor order, int first_frame, bool bilinear, float min_depth, float max_depth, float near,"
        " int views_per_voxel, int carve_views, Tensor(g!)? bounds=None, Tensor(h!)? scales=None) -> Tensor"
    ),
    "cache_compact": (
        "(Tensor(a!) points, Tensor(b!) features, Tensor(c!) frame_ids, Tensor(d!)? votes, Tensor(e!)? looks,"
        " Tensor(f!) count, int max_tokens, Tensor(g!)? bounds=None, Tensor(h!)? scales=None) -> Tensor"
    ),
    "block_bounds": "(Tensor points, Tensor? num_points, Tensor(a!) bounds) -> ()",
    "view_overlap": (
        "(Tensor points, Tensor? num_points, Tensor intrinsics, Tensor cam2world, Tensor target_intrinsics,"
        " Tensor target_cam2world, SymInt height, SymInt width, float voxel_size, float near, Tensor? bounds=None)"
        " -> Tensor"
    ),
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _family in FAMILIES:
    for _name, _schema in SCHEMAS.items():
        _library.define(f"{_name}_{_family}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))


# Looked up once: torch.ops resolves names in Python, and torch.compile warns of cached functions.
_operators = {
    (name, family): getattr(getattr(torch.ops, NAMESPACE), f"{name}_{family}").default
    for name in SCHEMAS
    for family in FAMILIES
}


def private_operator(name: str, family: str) -> torch._ops.OpOverload:
    """The private operator ``mirage::{name}_{family}``."""
    return _operators[name, family]
