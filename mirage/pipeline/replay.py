"""What a run continues from, made again out of the latents of its chunks.

A run keeps memory, decoder and generator of its newest chunks alone. Where it continues from an earlier one, or where
they are damaged, every step of the chunks so far but the denoising is taken again, which leaves the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch

from mirage_kernels import Cameras

from ..files.checked import DamagedFileError
from .run_store import RunStore
from .state import ChunkState
from .steps import ChunkSteps


def replay(
    steps: ChunkSteps,
    store: RunStore,
    generator: torch.Generator,
    write_first_frame: Callable[[Cameras], object],
    begin: Callable[..., ChunkState],
) -> None:
    """Take the steps of all chunks in `store` again, with the latents that they have.

    Args:
        steps: whose memory, as it was before the run, and whose decoder become what they were after the last chunk.
        store: of the run.
        generator: as it was when the run began; it becomes what it was after the last chunk.
        write_first_frame: writes the image into the memory, as seen by a camera.
        begin: returns the state of a chunk, of the chunk, its new pixel frames' cameras and its latent frames'.

    Raises:
        ValueError: the memory is of pixels, whose cameras a run does not keep.
    """
    if steps.config.memory.kind == "pixel":
        raise ValueError(
            f"run_dir {store.folder} lacks the memory that it continues from, and one of pixels cannot be made again:"
            " begin again in another folder"
        )
    device, mark, decoder = steps.denoiser.device, steps.cache.checkpoint(), steps.decoder.snapshot()
    try:
        for index, chunk in enumerate(tuple(store.chunks)):
            latents, views = store.latents(chunk.latents).to(device), store.cameras[index].to(steps.cache.device)
            with store.rewound(index):
                if not index:
                    write_first_frame(views[0])
                state = begin(chunk, views, views)
                steps.read_memory(state)
                steps.skip_denoising(state)
                state.latents = latents
                steps.decode(state)
                steps.estimate_depth(state)
                steps.filter_dynamic(state)
                steps.write_memory(state)
    except BaseException:
        steps.cache.rollback(mark)
        steps.decoder.restore(decoder)
        raise
    finally:
        steps.first_frame = None
    with suppress(DamagedFileError):  # where it is lost too, the generator has drawn what it drew then
        store.load_random(generator)
