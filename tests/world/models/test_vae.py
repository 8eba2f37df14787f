"""`StreamingDecoder`: any split of a video decodes to the bits of one `vae.decode`, whatever happens in between."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="the extra generate is not installed")

import accelerate
from diffusers import AutoencoderKLWan
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mirage.models.vae import (
    StreamingDecoder,
    denormalise_latents,
    encode_frames,
    encode_static_frame,
    normalise_latents,
)

FORMS: dict[str, dict[str, Any]] = {
    "2.1": {},
    "2.2": {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
    },
}
CHANNELS = {"2.1": 16, "2.2": 48}
FRAMES = 5


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_vae(form: str = "2.2", dtype: torch.dtype = torch.float32, num_res_blocks: int = 1) -> AutoencoderKLWan:
    """A tiny one with random weights, whose latents are scaled by uneven numbers."""
    channels = CHANNELS[form]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=channels,
            num_res_blocks=num_res_blocks,
            latents_mean=(noise(channels, seed=1) / 3).tolist(),
            latents_std=(1 + noise(channels, seed=2).abs() / 3).tolist(),
            **FORMS[form],
        )
    return (vae if dtype == torch.float32 else vae.to(dtype)).eval()


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)  # operations this small only wait for a second one


@pytest.fixture(scope="module", params=FORMS)
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    return make_vae(request.param)


@pytest.fixture(scope="module")
def wan22() -> AutoencoderKLWan:
    return make_vae()


def make_latents(vae: AutoencoderKLWan, frames: int = FRAMES, size: tuple[int, int] = (4, 5), seed: int = 3) -> Tensor:
    return noise(1, vae.config.z_dim, frames, *size, seed=seed)


@torch.no_grad()
def stock_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """All at once, with the arithmetic of `WanImageToVideoPipeline` written out again."""
    latents = latents.to(vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    latents_mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    latents_std = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    return vae.decode(latents / latents_std + latents_mean, return_dict=False)[0]


def splits(frames: int) -> list[tuple[int, ...]]:
    """Every way to cut so many frames into pieces."""
    cuts = itertools.product((False, True), repeat=frames - 1)
    ends = ([i + 1 for i, cut in enumerate(cuts_) if cut] + [frames] for cuts_ in cuts)
    return [tuple(end - start for start, end in zip([0, *e], e, strict=False)) for e in ends]


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.slow
def test_every_split_is_the_whole(vae):
    latents = make_latents(vae)
    whole = stock_decode(vae, latents)
    assert whole.shape[2] == 4 * FRAMES - 3 and whole.std() > 0.05
    assert len(splits(FRAMES)) == 16
    decoder = StreamingDecoder(vae)
    for split in splits(FRAMES):
        decoder.reset()
        pieces = [decoder.decode(piece) for piece in latents.split(split, dim=2)]
        assert [piece.shape[2] for piece in pieces] == [4 * split[0] - 3, *(4 * n for n in split[1:])]
        assert torch.equal(torch.cat(pieces, 2), whole), split
        assert decoder.position == FRAMES


def test_pieces_decoded_by_themselves_differ(vae):
    """What the feature cache is for: without it the later pieces are other images, and too short."""
    latents = make_latents(vae)
    whole = stock_decode(vae, latents)
    alone = StreamingDecoder(vae).decode(latents[:, :, 2:])
    assert alone.shape[2] == 4 * 3 - 3
    assert (alone - whole[:, :, -alone.shape[2] :]).abs().max() > 1e-2


def test_iterate_gives_one_latent_frame_at_a_time(vae):
    latents = make_latents(vae)
    decoder = StreamingDecoder(vae)
    frames = list(decoder.iterate(latents[:, :, :3])) + list(decoder.iterate(latents[:, :, 3:]))
    assert [piece.shape[2] for piece in frames] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(frames, 2), stock_decode(vae, latents))


def test_iterate_can_be_left_and_taken_up(wan22):
    latents = make_latents(wan22)
    decoder = StreamingDecoder(wan22)
    steps = decoder.iterate(latents)
    first = torch.cat([next(steps), next(steps)], 2)
    assert decoder.position == 2
    rest = decoder.decode(latents[:, :, 2:])
    assert torch.equal(torch.cat([first, rest], 2), stock_decode(wan22, latents))
    untouched = decoder.iterate(latents)
    decoder.reset()
    for stale in (steps, untouched):
        with pytest.raises(RuntimeError, match="moved by another call while iterate"):
            next(stale)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    vae = make_vae(form, torch.bfloat16)
    latents = make_latents(vae)  # float32, cast as the pipelines cast
    decoder = StreamingDecoder(vae)
    frames = torch.cat([decoder.decode(piece) for piece in latents.split((2, 1, 2), dim=2)], 2)
    assert frames.dtype == torch.bfloat16
    assert torch.equal(frames, stock_decode(vae, latents))


def test_one_piece_is_exact_on_any_grid(wan22):
    """Where the 1x1x1 convolution rounds by the number of frames, too: it does on 2x3 tokens."""
    for size in [(1, 1), (2, 3), (3, 2), (5, 4)]:
        latents = make_latents(wan22, 3, size)
        assert torch.equal(StreamingDecoder(wan22).decode(latents), stock_decode(wan22, latents)), size


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_tiles(form):
    """Tiles of 4x4 tokens every 3, on a grid they do not divide, a cache for each; and one row of them."""
    vae = make_vae(form)
    side = vae.spatial_compression_ratio
    vae.enable_tiling(4 * side, 4 * side, 3 * side, 3 * side)
    for size, tiles in (((8, 5), 6), ((3, 7), 3)):
        latents = make_latents(vae, 3, size)
        whole = stock_decode(vae, latents)
        for split in splits(3):
            decoder = StreamingDecoder(vae)
            pieces = [decoder.decode(piece) for piece in latents.split(split, dim=2)]
            assert torch.equal(torch.cat(pieces, 2), whole), (size, split)
        assert len(decoder.snapshot().features) == tiles
        vae.disable_tiling()
        assert not torch.equal(stock_decode(vae, latents), whole)  # it did make a difference
        vae.enable_tiling()


def test_small_latents_are_not_tiled(wan22):
    vae = make_vae()
    vae.enable_tiling(64, 64, 48, 48)
    latents = make_latents(vae, 3, (4, 4))
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(piece) for piece in latents.split(1, dim=2)]
    assert torch.equal(torch.cat(pieces, 2), stock_decode(vae, latents))
    assert torch.equal(torch.cat(pieces, 2), stock_decode(wan22, latents))


# ------------------------------------------------------------------------------------------------------- isolation


@pytest.mark.slow
def test_two_decoders_and_the_stock_vae_take_turns(vae):
    one, two = make_latents(vae, seed=3), make_latents(vae, size=(3, 4), seed=4)
    wholes = stock_decode(vae, one), stock_decode(vae, two)
    decoders = StreamingDecoder(vae), StreamingDecoder(vae)
    frames: tuple[list[Tensor], list[Tensor]] = ([], [])
    for t in range(FRAMES):
        for decoder, latents, out in zip(decoders, (one, two), frames, strict=True):
            out.append(decoder.decode(latents[:, :, t : t + 1]))
            stock_decode(vae, make_latents(vae, 2, seed=5))
            encode_frames(vae, noise(1, 3, 5, 32, 32).clamp(-1, 1))
    for out, whole in zip(frames, wholes, strict=True):
        assert torch.equal(torch.cat(out, 2), whole)
    assert torch.equal(stock_decode(vae, one), wholes[0])


def test_reset_starts_another_video(wan22):
    decoder = StreamingDecoder(wan22)
    decoder.decode(make_latents(wan22, 2))
    decoder.reset()
    assert decoder.position == 0
    latents = make_latents(wan22, 2, (3, 6), seed=8)
    assert torch.equal(decoder.decode(latents), stock_decode(wan22, latents))


def test_nothing_is_recorded_for_autograd(wan22):
    decoder = StreamingDecoder(wan22)
    frames = decoder.decode(make_latents(wan22, 2).requires_grad_())
    assert not frames.requires_grad
    assert not any(t.requires_grad for t in decoder.state_dict().values())
    assert not encode_frames(wan22, torch.zeros(1, 3, 1, 16, 16)).requires_grad


def test_hooks_of_offloading_are_called(wan22):
    """The hook of an offloaded model runs before each step, as before `vae.decode`."""

    class Hook:
        calls = 0

        def pre_forward(self, module: torch.nn.Module) -> None:
            assert module is vae
            self.calls += 1

    vae, hook = make_vae(), Hook()
    vae._hf_hook = hook
    latents = make_latents(vae)
    frames = StreamingDecoder(vae).decode(latents)
    assert hook.calls >= FRAMES
    assert torch.equal(frames, stock_decode(wan22, latents))


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.cpu_offload_with_hook])
def test_offloading(wan22, offload):
    """What `enable_sequential_cpu_offload` and `enable_model_cpu_offload` of a pipeline do to its vae."""
    vae = make_vae()
    offload(vae, execution_device="cpu")
    assert hasattr(vae, "_hf_hook")
    latents = make_latents(vae)
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(piece) for piece in latents.split((2, 3), dim=2)]
    assert torch.equal(torch.cat(pieces, 2), stock_decode(wan22, latents))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(wan22, kind):
    vae = make_vae()
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(vae, onload_device=cpu, offload_device=cpu, offload_type=kind, **groups)
    assert any(isinstance(getattr(module, "_diffusers_hook", None), HookRegistry) for module in vae.modules())
    latents = make_latents(vae)
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(piece) for piece in latents.split((2, 3), dim=2)]
    assert torch.equal(torch.cat(pieces, 2), stock_decode(wan22, latents))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made within it held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.storages[reference.cdata] = reference, storage.nbytes()
        self.storages = {key: (ref, size) for key, (ref, size) in self.storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.slow
def test_memory_of_iterate_is_flat(wan22):
    def peak(frames: int, whole: bool) -> int:
        latents = make_latents(wan22, frames, (4, 4))
        decoder = StreamingDecoder(wan22)
        with LiveBytes() as live:
            if whole:
                decoder.decode(latents)
            else:
                for _ in decoder.iterate(latents):
                    pass
        return live.peak

    pixels = 4 * 3 * 64 * 64 * 4  # bytes of the frames of one latent frame
    latent = 48 * 4 * 4 * 4
    short, long = peak(3, whole=False), peak(12, whole=False)
    assert long - short <= 9 * 4 * latent  # the latents themselves, in their few forms
    assert long - short < pixels
    assert peak(12, whole=True) - peak(3, whole=True) >= 9 * pixels - short  # the measure does see what is held


# ----------------------------------------------------------------------------------------------------------- state


def test_snapshot_is_untouched_by_what_follows(wan22):
    latents = make_latents(wan22)
    decoder = StreamingDecoder(wan22)
    decoder.decode(latents[:, :, :1])  # the vae's mark "Rep" is in this state
    for start in (1, 2):
        snapshot = decoder.snapshot()
        copies = [f.clone() if isinstance(f, Tensor) else f for f in snapshot.features[0]]
        expected = decoder.decode(latents[:, :, start:])
        for feature, copy in zip(snapshot.features[0], copies, strict=True):
            assert torch.equal(feature, copy) if isinstance(copy, Tensor) else feature == copy
        decoder.restore(snapshot)
        assert decoder.position == start
        assert torch.equal(decoder.decode(latents[:, :, start:]), expected)
        decoder.restore(snapshot)
        decoder.decode(latents[:, :, start : start + 1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "tiled", "dtype"),
    [(0, False, torch.float32), (1, False, torch.bfloat16), (1, True, torch.float32), (2, False, torch.float32)],
)
def test_a_killed_run_goes_on(tmp_path, at, tiled, dtype):
    """Another vae object with the same weights, as in another process, after no, one and two latent frames."""
    before, after = make_vae(dtype=dtype), make_vae(dtype=dtype)
    for vae in (before, after):
        if tiled:
            vae.enable_tiling(48, 48, 32, 32)
    latents = make_latents(before, 3)
    decoder = StreamingDecoder(before)
    frames = [decoder.decode(latents[:, :, :at])] if at else []
    decoder.save(tmp_path / "decoder.safetensors")
    decoder.decode(latents[:, :, at:])
    resumed = StreamingDecoder(after)
    resumed.load(tmp_path / "decoder.safetensors")
    assert resumed.position == at
    frames.append(resumed.decode(latents[:, :, at:]))
    assert torch.equal(torch.cat(frames, 2), stock_decode(before, latents))
    assert [path.name for path in tmp_path.iterdir()] == ["decoder.safetensors"]


@pytest.mark.slow
def test_a_state_dict_round_trips(wan22):
    latents = make_latents(wan22)
    decoder, other = StreamingDecoder(wan22), StreamingDecoder(wan22)
    for t in range(3):
        decoder.decode(latents[:, :, t : t + 1])
        named, snapshot = decoder.state_dict(), decoder.snapshot()
        other.load_state_dict(named)
        assert other.state_dict().keys() == named.keys()
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in named.items())
        assert torch.equal(other.decode(latents[:, :, 3:]), decoder.decode(latents[:, :, 3:]))
        decoder.restore(snapshot)


def test_load_refuses_what_is_no_state(tmp_path, wan22):
    decoder = StreamingDecoder(wan22)
    decoder.decode(make_latents(wan22, 2))
    path, before = tmp_path / "decoder.safetensors", decoder.snapshot()
    decoder.save(path)
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no decoder state at .*other"):
        decoder.load(tmp_path / "other")
    for cut in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="decoder.safetensors: not a whole safetensors file"):
            decoder.load(path)
    save_file({"points": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError, match="decoder.safetensors: must be of format 'mirage-streaming-decoder', version '1'"
    ):
        decoder.load(path)
    save_file({"points": torch.zeros(3)}, path, {"format": "mirage-streaming-decoder", "version": "1"})
    with pytest.raises(ValueError, match=r"decoder.safetensors: layout must be \(7,\) int64, .* got nothing"):
        decoder.load(path)
    decoder.save(path)
    tiled = make_vae()
    tiled.enable_tiling(32, 32, 16, 16)
    for other, message in (
        (make_vae("2.1"), r"tile0.convolution0 must be \(1, 16, .* got \(1, 48, 2, 4, 5\) torch.float32"),
        (make_vae(num_res_blocks=2), "the state must hold 1 tiles of 32 convolutions as the vae, got 24 tensors"),
        (make_vae(dtype=torch.bfloat16), r"tile0.convolution0 must be .* torch.bfloat16, got .* torch.float32"),
        (tiled, r"vae must have the tiling of the state, \(\), got \(32, 32, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=f"decoder.safetensors: {message}"):
            StreamingDecoder(other).load(path)
    assert decoder.snapshot() is before


# ---------------------------------------------------------------------------------------------------------- refusals


def test_bad_pieces_are_refused_before_anything_is_touched(wan22):
    vae = make_vae()
    decoder = StreamingDecoder(vae)
    good = make_latents(vae, 2)
    decoder.decode(good)
    before = decoder.snapshot()
    for latents, error, message in (
        (good.numpy(), TypeError, "latents must be .B, 48, F, h, w. float, got ndarray"),
        (good.long(), TypeError, "latents must be .* got torch.int64"),
        (good[0], ValueError, r"latents must be .* got \(48, 2, 4, 5\)"),
        (good[:, :16], ValueError, r"latents must be .B, 48, F, h, w. float, .* got \(1, 16, 2, 4, 5\)"),
        (good[:, :, :0], ValueError, r"got \(1, 48, 0, 4, 5\)"),
        (
            good.repeat(2, 1, 1, 1, 1),
            ValueError,
            r"must be \(1, 48, F, h, w\), one video, got \(2, 48, 2, 4, 5\)",
        ),
        (
            good[..., :4],
            ValueError,
            r"must be \(1, 48, F, 4, 5\) as the video so far, got \(1, 48, 2, 4, 4\)",
        ),
    ):
        for call in (decoder.decode, decoder.iterate):
            with pytest.raises(error, match=message):
                call(latents)
    vae.enable_tiling(32, 32, 16, 16)
    with pytest.raises(ValueError, match=r"vae must keep its tiling within a video, \(\), got \(32, 32, 16, 16\)"):
        decoder.decode(good)
    assert decoder.snapshot() is before
    with pytest.raises(TypeError, match="vae must be AutoencoderKLWan, got Linear"):
        StreamingDecoder(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="snapshot must be DecoderState, got dict"):
        decoder.restore({})


def test_a_piece_that_fails_leaves_the_decoder_as_it_was(monkeypatch):
    vae = make_vae()
    latents = make_latents(vae)
    decoder = StreamingDecoder(vae)
    first = decoder.decode(latents[:, :, :2])
    before, forward, calls = decoder.snapshot(), vae.decoder.conv_out.forward, []

    def fails_at_the_second(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        return forward(*args)

    monkeypatch.setattr(vae.decoder.conv_out, "forward", fails_at_the_second)
    with pytest.raises(MemoryError, match="no memory left"):
        decoder.decode(latents[:, :, 2:])
    assert decoder.snapshot() is before
    rest = decoder.decode(latents[:, :, 2:])
    assert torch.equal(torch.cat([first, rest], 2), stock_decode(vae, latents))


# ------------------------------------------------------------------------------------------------- latents' scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_is_the_pipelines(dtype):
    vae = make_vae(dtype=dtype)
    frames = noise(1, 3, 5, 32, 48).clamp(-1, 1)
    latents = encode_frames(vae, frames)
    assert latents.shape == (1, 48, 2, 2, 3) and latents.dtype == torch.float32
    # WanImageToVideoPipeline.prepare_latents, in float32 whatever the vae's dtype.
    with torch.no_grad():
        encoded = vae.encode(frames.to(dtype)).latent_dist.mode().to(torch.float32)
    latents_mean = torch.tensor(vae.config.latents_mean).view(1, 48, 1, 1, 1)
    latents_std = 1.0 / torch.tensor(vae.config.latents_std).view(1, 48, 1, 1, 1)
    assert torch.equal(latents, (encoded - latents_mean) * latents_std)
    assert torch.equal(normalise_latents(vae, encoded), latents)
    raw = denormalise_latents(vae, latents)
    assert raw.dtype == dtype
    torch.testing.assert_close(raw.float(), encoded, rtol=0.03 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_a_still_is_of_a_video_that_stands_still(wan22):
    image = noise(1, 3, 32, 48).clamp(-1, 1)
    static_frame = encode_static_frame(wan22, image)
    assert static_frame.shape == (1, 48, 1, 2, 3) and static_frame.dtype == torch.float32
    assert torch.equal(static_frame, encode_frames(wan22, torch.stack([image] * 5, 2))[:, :, 1:])
    assert not torch.allclose(static_frame, encode_frames(wan22, image[:, :, None]), atol=0.1)


def test_bad_frames_are_refused(wan22):
    for frames, error, got in (
        (torch.zeros(1, 3, 5, 32, 32).byte(), TypeError, "torch.uint8"),
        (torch.zeros(3, 5, 32, 32), ValueError, r"\(3, 5, 32, 32\)"),
        (torch.zeros(1, 3, 4, 32, 32), ValueError, r"\(1, 3, 4, 32, 32\)"),
        (torch.zeros(1, 3, 5, 40, 32), ValueError, r"\(1, 3, 5, 40, 32\)"),
        (torch.zeros(2, 3, 5, 32, 32), ValueError, r"\(2, 3, 5, 32, 32\)"),
    ):
        with pytest.raises(error, match=rf"frames must be .* H and W multiples of 16, got {got}"):
            encode_frames(wan22, frames)
    with pytest.raises(ValueError, match=r"latents must be \(B, 48, F, h, w\)"):
        normalise_latents(wan22, torch.zeros(1, 1, 1, 2, 2))
