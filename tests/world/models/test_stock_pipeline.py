"""`MirageTransformer3DModel` in diffusers' own `WanImageToVideoPipeline`, without and with a memory."""

from __future__ import annotations

from typing import Any

import generation
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
from generation import LATENT, SIZE
from torch import Tensor

from mirage.models.transformer import MirageTransformer3DModel
from mirage.pipeline.conditioning import make_memory_context, make_scores
from mirage.pipeline.pipeline import MiragePipeline


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    threads(1)


@pytest.fixture(scope="module")
def ours() -> MiragePipeline:
    return generation.make_pipeline()


def stock(ours: MiragePipeline, transformer: WanTransformer3DModel) -> WanImageToVideoPipeline:
    pipeline = WanImageToVideoPipeline(
        tokenizer=ours.tokenizer,
        text_encoder=ours.text_encoder,
        vae=ours.vae,
        scheduler=UniPCMultistepScheduler.from_config(ours.scheduler.config),
        transformer=transformer,
        expand_timesteps=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: WanImageToVideoPipeline) -> Tensor:
    return pipeline(
        image=generation.options(13)["image"],
        prompt="a room",
        height=SIZE[0],
        width=SIZE[1],
        num_frames=13,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).frames


def test_it_is_the_stock_transformer_without_a_memory_and_not_with_one(ours: MiragePipeline) -> None:
    theirs = WanTransformer3DModel.from_config(dict(ours.transformer.config)).eval()
    theirs.load_state_dict(ours.transformer.state_dict())
    pipeline, expected = stock(ours, ours.transformer), latents(stock(ours, theirs))
    assert torch.equal(latents(pipeline), expected)

    cameras = generation.cameras(13)[::4]
    cache = ours(**generation.options(5)).cache
    readout = cache.read(cameras, LATENT)
    scores = make_scores(pipeline.vae, len(cameras), *LATENT)
    context = make_memory_context(readout.latents.movedim(0, 1)[None], readout.mask[None], scores)
    names = set(pipeline.transformer.state_dict())
    pipeline.transformer.set_memory(ours.memory_adapter, context)
    with_memory = latents(pipeline)
    assert with_memory.isfinite().all() and (with_memory - expected).abs().max() > 1e-3
    assert set(pipeline.transformer.state_dict()) == names  # the adapter is no part of it
    pipeline.transformer.set_memory(ours.memory_adapter, context, memory_scale=0.0)
    assert torch.equal(latents(pipeline), expected)
    with pytest.raises(ValueError, match=r"transformer must have no memory of set_memory\(\)"):
        ours(**generation.options(5))
    pipeline.transformer.set_memory(None)
    assert torch.equal(latents(pipeline), expected)
    with pytest.raises(ValueError, match="memory_adapter must be given with memory_context, got None"):
        pipeline.transformer.set_memory(None, context)


def test_time_steps_of_frames_videos_and_tokens(ours: MiragePipeline) -> None:
    transformer: MirageTransformer3DModel = ours.transformer
    inputs = {"hidden_states": torch.randn(2, 48, 3, *LATENT), "encoder_hidden_states": torch.randn(2, 7, 32)}

    def run(timestep: Tensor, **changes: Any) -> Tensor:
        with torch.no_grad():
            return transformer(**inputs, timestep=timestep, return_dict=False, **changes)[0]

    of_frames = torch.tensor([[0.0, 700.0, 700.0], [0.0, 300.0, 300.0]])
    of_tokens = of_frames.repeat_interleave(6, dim=1)
    assert torch.equal(run(of_tokens), run(of_frames))
    assert torch.equal(run(torch.tensor([700.0, 300.0])), run(of_frames[:, 1:2].expand(2, 3)))
    of_tokens[1, 7] = 5.0
    with pytest.raises(ValueError, match="timestep must be the same for all tokens of a frame"):
        run(of_tokens)
    with pytest.raises(ValueError, match=r"timestep must be \(B, F\) = \(2, 3\), one per frame, got \(2, 17\)"):
        run(of_tokens[:, 1:])
    with pytest.raises(ValueError, match="encoder_hidden_states_image must be None"):
        run(of_frames, encoder_hidden_states_image=torch.zeros(2, 1, 32))
