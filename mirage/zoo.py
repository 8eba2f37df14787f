"""Load a pipeline by its name: a folder or hub id, `tiny-random`, or `mirage-tiny`, which is in the package.

`tiny-random` is every part of a :class:`~mirage.pipeline.pipeline.MiragePipeline`, real code and random weights: its
videos mean nothing, it shows that the whole path runs. `mirage-tiny` is trained on synthetic rooms by the files in
configs/tiny, see :mod:`mirage.training.release`.

diffusers and transformers are imported where a model is made, so that the names here cost nothing.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .pipeline.pipeline import MiragePipeline

TINY_RANDOM, MIRAGE_TINY = "tiny-random", "mirage-tiny"
MIRAGE_TINY_FOLDER = Path(__file__).parent / "mirage-tiny"
"""Where the model that comes with the package is. `memories/NAME` in it are what other memories have for weights."""

STEPS, MIRAGE_TINY_STEPS = 20, 2
"""Of denoising, where nothing else is asked for. Small models gather errors with every step."""

CHANNELS = 48
"""Channels of a latent, as of Wan2.2-TI2V-5B."""

LORA = "lora.safetensors"
"""The LoRA of a model's folder, or of one that `mirage train` leaves."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_steps(model: str) -> int:
    """Return the number of denoising steps for a model by its name, where nothing else is asked for."""
    return MIRAGE_TINY_STEPS if model == MIRAGE_TINY else STEPS


def load_pipeline(
    model: str,
    *,
    adapter: str | None = None,
    lora: str | None = None,
    memory: str = "aligned",
    device: str = "cpu",
    dtype: str | None = None,
    offload: bool = False,
) -> MiragePipeline:
    """Load a pipeline and put it on its device.

    Without `adapter` and `lora` it has the weights that come with the model for `memory`, where there are any.

    Args:
        model: folder or hub id of a Wan2.2 or Mirage pipeline, "mirage-tiny" or "tiny-random".
        adapter: memory adapter: folder or hub id, or a file of the published release.
        lora: LoRA of the transformer, in the place of the model's own: file, folder or hub id.
        memory: name of the memory that the pipeline will be run on.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16"; default bfloat16 on cuda, float32 on cpu.
        offload: whether models move to the device only while they are used.

    Raises:
        OSError, ValueError: no such model, or files that do not belong together.
    """
    from .models.adapter import MirageMemoryAdapter
    from .models.checkpoints import load_published
    from .models.components import check_models
    from .models.lora import load_lora

    torch_dtype = _DTYPES[dtype or ("bfloat16" if device == "cuda" else "float32")]
    if model == TINY_RANDOM:
        pipeline = tiny_random_pipeline()
        if torch_dtype != torch.float32:
            pipeline.to(torch_dtype)
    elif model == MIRAGE_TINY:
        pipeline = mirage_tiny_pipeline(torch_dtype)
    else:
        pipeline = _load_pretrained(model, torch_dtype)
        saved_with_lora = bool(getattr(pipeline.transformer, "peft_config", None))
        if lora is None and not saved_with_lora and (beside := Path(model) / LORA).is_file():
            load_lora(pipeline.transformer, beside)
    if adapter is not None:
        if Path(adapter).is_file():  # of the published release
            loaded = MirageMemoryAdapter.from_transformer(pipeline.transformer)
            load_published(adapter=loaded, vace=adapter)
        else:
            loaded = MirageMemoryAdapter.from_pretrained(adapter, dtype=torch_dtype)
        check_models(pipeline.vae, pipeline.transformer, loaded)
        pipeline.register_modules(memory_adapter=loaded)
    beside_memory = memory_weights(model, memory)
    if lora is not None:
        if getattr(pipeline.transformer, "peft_config", None):  # the model's own, which this one replaces
            pipeline.transformer.unload_lora()
        load_lora(pipeline.transformer, lora)
    elif adapter is None and beside_memory is not None:
        take_weights(pipeline, beside_memory)
    pipeline.set_progress_bar_config(disable=True)
    if offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline


def _load_pretrained(model: str, dtype: torch.dtype) -> MiragePipeline:
    """Load a pipeline of a folder or hub id, in which there may be anything."""
    from .pipeline.pipeline import MiragePipeline

    try:
        pipeline: MiragePipeline = MiragePipeline.from_pretrained(model, dtype=dtype)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # what a damaged or hostile folder makes the loaders raise is not said anywhere
        if isinstance(error, (OSError, ValueError)):
            if model in str(error):
                raise
            said = str(error)
        elif isinstance(error, UnpicklingError):
            said = "its weights are a pickle that holds other things than tensors, which is not read"
        else:
            said = f"{type(error).__name__}: {error}"
        raise ValueError(f"model {model} cannot be loaded: {said}") from error
    return pipeline


def memory_weights(model: str, memory: str) -> Path | None:
    """Return the folder of a model's weights for a memory, `memories/NAME` in the model's own, or None without one."""
    folder = (MIRAGE_TINY_FOLDER if model == MIRAGE_TINY else Path(model)) / "memories" / memory
    return folder if folder.is_dir() else None


def take_weights(pipeline: Any, folder: Path) -> None:
    """Give a pipeline what `mirage train` leaves: memory_adapter/, latent_depth/ and lora.safetensors, as far as given.

    A LoRA that the pipeline has is removed.

    Raises:
        OSError, ValueError: none of them is there, or they do not fit.
    """
    from .models.adapter import MirageMemoryAdapter
    from .models.components import check_models
    from .models.latent_depth import LatentDepth
    from .models.lora import load_lora

    parts = {"memory_adapter": MirageMemoryAdapter, "latent_depth": LatentDepth}
    if not any((folder / part).exists() for part in (*parts, LORA)):
        raise FileNotFoundError(f"{folder}: must hold {', '.join(parts)} or {LORA}, as `mirage train` leaves them")
    transformer = pipeline.transformer
    for part, cls in parts.items():
        if (folder / part).is_dir():
            model = cls.from_pretrained(folder / part, torch_dtype=transformer.dtype).to(transformer.device)
            pipeline.register_modules(**{part: model.eval()})
    check_models(pipeline.vae, transformer, pipeline.memory_adapter, pipeline.latent_depth)
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()
    if (folder / LORA).is_file():
        load_lora(transformer, folder / LORA)
        transformer.to(transformer.device)


def mirage_tiny_pipeline(dtype: torch.dtype = torch.float32, folder: Path = MIRAGE_TINY_FOLDER) -> MiragePipeline:
    """Load the trained tiny model with its LoRA.

    Raises:
        FileNotFoundError: it is not in this installation.
    """
    from .models.lora import load_lora
    from .pipeline.pipeline import MiragePipeline

    if not (folder / LORA).is_file():
        raise FileNotFoundError(f"{folder}: mirage-tiny is not in this installation: `make tiny` trains it")
    pipeline: MiragePipeline = MiragePipeline.from_pretrained(folder, dtype=dtype)
    load_lora(pipeline.transformer, folder / LORA)
    return pipeline


def tiny_random_pipeline(
    seed: int = 0, control_channels: int = 2 * CHANNELS, with_memory: bool = True, with_depth: bool = True
) -> MiragePipeline:
    """Make a pipeline of random float32 weights, shaped as Wan2.2-TI2V-5B: 48 channels, 16x in space, 4x in time.

    Args:
        seed: of the weights; the global random state is left alone.
        control_channels: of the adapter, 96 or 49.
        with_memory: False leaves the memory adapter out.
        with_depth: False leaves `latent_depth` out.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    from .models.adapter import MirageMemoryAdapter
    from .models.latent_depth import LatentDepth
    from .models.transformer import MirageTransformer3DModel
    from .pipeline.pipeline import MiragePipeline

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
        tokenizer=make_byte_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer.eval(),
        memory_adapter=None if adapter is None else adapter.eval(),
        latent_depth=None if latent_depth is None else latent_depth.eval(),
    )
    return pipeline


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token per byte: nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
