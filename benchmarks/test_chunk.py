"""Measure a whole chunk with the memory in its loop: read, denoise, decode, depth, write. Weights are random.

On a GPU at Wan2.2-TI2V-5B's widths and 704x1280; on a CPU with ``tiny_random_pipeline``'s, which the rows name. Depth
is a ``LatentDepth``'s, the static filter is "geometric", the default, and nothing is saved.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import scenes
from .scenes import QUICK, Size
from .timing import summarise

pytestmark = pytest.mark.full

STEPS = 20
CHUNKS = 4  # the first is warm-up, and sees nothing
PARTS = ("read", "denoise", "decode", "depth", "filter", "write")


def _full_size_pipeline(device: torch.device) -> Any:
    """Make the 5 B transformer, its adapter and the VAE in bfloat16 on the device; the text encoder is small."""
    from diffusers import UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    from mirage.models.adapter import MirageMemoryAdapter
    from mirage.models.latent_depth import LatentDepth
    from mirage.models.transformer import MirageTransformer3DModel
    from mirage.pipeline.pipeline import MiragePipeline
    from mirage.zoo import tiny_random_pipeline

    from .pixel_memory import make_encoder

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = MirageTransformer3DModel(
                num_attention_heads=24,
                attention_head_dim=128,
                in_channels=scenes.CHANNELS,
                out_channels=scenes.CHANNELS,
                text_dim=4096,
                freq_dim=256,
                ffn_dim=14336,
                num_layers=30,
            )
            adapter = MirageMemoryAdapter.from_transformer(transformer)
    finally:
        torch.set_default_dtype(torch.float32)
    config = UMT5Config(vocab_size=259, d_model=4096, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    return MiragePipeline(
        tokenizer=tiny_random_pipeline(with_memory=False, with_depth=False).tokenizer,
        text_encoder=UMT5EncoderModel(config).to(device, torch.bfloat16).eval(),
        vae=make_encoder(device=device, dtype=torch.bfloat16, decoder_base_dim=256),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer.eval(),
        memory_adapter=adapter.eval(),
        latent_depth=LatentDepth(latent_channels=scenes.CHANNELS).to(device).eval(),
    )


def test_chunk(bench: Any) -> None:
    pytest.importorskip("diffusers", reason="the pipeline needs diffusers: pip install 'mirage-world[generate]'")
    pytest.importorskip("transformers", reason="it needs transformers too: pip install 'mirage-world[generate]'")
    if bench.device.type == "cuda":
        pipeline, size, what = _full_size_pipeline(bench.device), Size(1, 704, 1280), "Wan2.2-TI2V-5B's widths"
    else:
        from mirage.zoo import tiny_random_pipeline

        pipeline, what = tiny_random_pipeline(), "tiny widths"
        size = Size(1, QUICK.height, QUICK.width) if bench.quick else Size(1, 352, 640)
    pipeline.set_progress_bar_config(disable=True)
    steps, chunks = (2, 2) if bench.quick else (STEPS, CHUNKS)
    new = scenes.CHUNK_FRAMES - 1  # each chunk's first frame is the last of the chunk before
    cameras = scenes.camera_path(1 + chunks * new, laps=0.15 * chunks).resized(size.image)
    image = scenes.images(cameras[0], scenes.render_depth(cameras[0]))
    session = pipeline.start_session(
        image, "a room", num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
    )
    made: list[dict[str, float]] = []
    peak: list[int] = []

    def step(chunk: int) -> None:
        first = 0 if chunk == 0 else 1 + chunk * new
        metrics = session.step(cameras[first : 1 + (chunk + 1) * new]).metrics
        made.append(metrics["seconds"])
        peak.append(metrics.get("peak_device_bytes", 0))

    step(0)
    whole = [bench.once(lambda chunk=chunk: step(chunk)) for chunk in range(1, chunks)]
    label = f"33 frames of {size.height}x{size.width}, {steps} steps"
    bench.file("chunk", "whole", what, label, None, whole)
    for part in PARTS:
        bench.file("chunk", part, what, label, None, [seconds[part] for seconds in made[1:]])
    if bench.device.type == "cuda":
        bench.record("chunk", "peak memory", what, label, nbytes=max(peak))
    assert summarise(whole).median >= summarise([seconds["read"] for seconds in made[1:]]).median
    assert len(session.cache) > 0
