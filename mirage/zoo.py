"""Pipelines small enough for a laptop CPU.

`tiny_random_pipeline`: every part of a :class:`~mirage.pipeline.pipeline.MiragePipeline`, real code and random
weights. Its
videos mean nothing; it shows that the whole path runs. `mirage-tiny` is trained on synthetic rooms: `make tiny` trains
it by the files in configs/tiny, and `python -m mirage.zoo RUNS` puts its parts together in this package.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .models.adapter import MirageMemoryAdapter
from .models.checkpoints import load_lora
from .models.latent_depth import LatentDepth
from .models.transformer import MirageTransformer3DModel
from .pipeline.memory import MIRAGE_TINY_FOLDER as FOLDER
from .pipeline.pipeline import MiragePipeline

CHANNELS = 48
LORA = "lora.safetensors"
TEXT_LENGTH = 96  # as of configs/tiny

LAST = "lora"  # the last of its stages, and with a memory's name behind it that memory's
SHIPPED = ("none",)
"""Of the memories to compare with, those whose weights are in the package: the demo's. There is room for no more."""

_MOST_BYTES = 40_000_000


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


def mirage_tiny_pipeline(dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> MiragePipeline:
    """The trained tiny model, its LoRA loaded.

    Raises:
        FileNotFoundError: it is not in this installation.
    """
    if not (folder / LORA).is_file():
        raise FileNotFoundError(f"{folder}: mirage-tiny is not in this installation: `make tiny` trains it")
    pipeline = MiragePipeline.from_pretrained(folder, dtype=dtype)
    load_lora(pipeline.transformer, folder / LORA)
    return pipeline


def assemble_mirage_tiny(runs: Path, folder: Path = FOLDER, memories: Sequence[str] = SHIPPED) -> int:
    """Put together what configs/tiny has trained into `runs`, in bfloat16, with its card.

    Args:
        runs: folders named as the files of configs/tiny.
        folder: to write to.
        memories: to compare with, whose adapters, LoRAs and depth heads go into `memories/`, as far as they are there.

    Returns:
        Its bytes.

    Raises:
        OSError, ValueError: a part is missing, the parts do not belong together, or they are too large to ship.
    """
    from .training import release as card

    base = tiny_random_pipeline(with_memory=False, with_depth=False)
    base.tokenizer.model_max_length = TEXT_LENGTH
    pipeline = MiragePipeline(
        tokenizer=base.tokenizer,
        text_encoder=base.text_encoder,
        vae=AutoencoderKLWan.from_pretrained(runs / "vae-steady" / "vae"),
        scheduler=base.scheduler,
        transformer=MirageTransformer3DModel.from_pretrained(runs / "backbone" / "transformer"),
        memory_adapter=MirageMemoryAdapter.from_pretrained(runs / LAST / "memory_adapter"),
        latent_depth=LatentDepth.from_pretrained(runs / LAST / "latent_depth"),
    )
    facts = card.gather_facts(runs)
    content = (runs / LAST / LORA).read_bytes()
    pipeline.to(torch.bfloat16).save_pretrained(folder)
    card.write_bytes(folder / LORA, content)
    shutil.rmtree(folder / "memories", ignore_errors=True)
    for name in memories:
        run, memory = runs / f"{LAST}-{name}", folder / "memories" / name
        if not run.is_dir():
            continue
        for part in ("memory_adapter", "latent_depth"):
            shutil.copytree(run / part, memory / part, dirs_exist_ok=True)
        shutil.copyfile(run / LORA, memory / LORA)
    card.write_bytes(folder / card.FACTS, (json.dumps(facts, indent=1) + "\n").encode())
    card.write_card(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > _MOST_BYTES:
        raise ValueError(f"{folder}: must be at most {_MOST_BYTES:,} bytes to ship, got {size:,}")
    return size


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


def main() -> None:
    """`python -m mirage.zoo`: put mirage-tiny together, or add evaluations to its card."""
    parser = argparse.ArgumentParser(prog="python -m mirage.zoo", description=main.__doc__)
    parser.add_argument("--runs", type=Path, help="what `make tiny` has trained, runs/tiny")
    parser.add_argument("--report", type=Path, action="append", default=[], help="a report.json of `mirage evaluate`")
    asked = parser.parse_args()
    from .training import release as card

    if asked.runs is not None:
        print(f"{assemble_mirage_tiny(asked.runs):,} bytes in {FOLDER}")
    for path in asked.report:
        card.add_evaluation(FOLDER, json.loads(path.read_text(encoding="utf-8")))
    card.write_card(FOLDER)


if __name__ == "__main__":
    main()
