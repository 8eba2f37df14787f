"""Generate a video along a camera path from one image, with the small model in the package, in half a minute.

python examples/generate_from_image.py --out out/example
"""

import argparse
from pathlib import Path

import torch

from mirage.scenes.synthetic import SyntheticRoom
from mirage.zoo import mirage_tiny_pipeline


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/example"))
    parser.add_argument("--frames", type=int, default=33)
    options = parser.parse_args()

    # Any image with its camera will do; a synthetic room gives both.
    room = SyntheticRoom(seed=20_000, moving=0, texture=0.25)
    cameras = room.path("walk-and-back", options.frames, (96, 160))
    image = room.render(cameras[:1]).images[0]

    pipe = mirage_tiny_pipeline()
    output = pipe(
        image,
        room.prompt,
        cameras=cameras,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        run_dir=options.out,
    )
    print(f"{output.video}: {options.frames} frames, {len(output.cache)} tokens remembered")


if __name__ == "__main__":
    main()
