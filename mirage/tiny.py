"""`tiny_random_pipeline`: every part of a :class:`~mirage.pipeline.MiragePipeline`, real code and random weights, small
enough for a laptop CPU. Its videos mean nothing; it shows that the whole path runs."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .adapter import MirageMemoryAdapter
from .latent_depth import LatentDepth
from .pipeline import MiragePipeline
from .transformer import MirageTransformer3DModel

CHANNELS = 48


def tiny_random_pipeline(
    seed: int = 0, control_channels: int = 2 * CHANNELS, with_memory: bool = True, with_depth: bool = True
) -> MiragePipeline:
    """A pipeline with the shapes of Wan2.2-TI2V-5B (48 channels, 16x in space, 4x in time) and random float32 weights.

    Args:
        seed: of the weights; the global random state is left alone.
        control_channels: of the adapter, 96 or 49.
        with_memory: False leaves the memory adapter out.
        with_depth: False leaves `latent_depth` out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * CHANNELS,
            latents_std=[1.0] * CHANNELS,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            scale_factor_temporal=4,
        )
        transformer = MirageTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=32,
            freq_dim=32,
            ffn_dim=96,
            num_layers=4,
        )
        adapter = None
        if with_memory:
            adapter = MirageMemoryAdapter.from_transformer(transformer, control_channels)
            for projection in adapter.proj_out:  # an adapter of zeros would show nothing of the memory
                torch.nn.init.normal_(projection.weight, std=0.02)
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, is_encoder_decoder=False)
        )
        latent_depth = LatentDepth(latent_channels=CHANNELS, width=16) if with_depth else None
    pipeline = MiragePipeline(
        tokenizer=_byte_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer.eval(),
        memory_adapter=None if adapter is None else adapter.eval(),
        latent_depth=None if latent_depth is None else latent_depth.eval(),
    )
    return pipeline


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, made here: nothing to download."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
