"""Step through a world chunk by chunk, deciding where to go as one goes: the loop of an interactive application.

python examples/interactive_session.py
"""

import torch

from mirage.scenes.synthetic import SyntheticRoom
from mirage.scenes.trajectories import pan
from mirage.zoo import mirage_tiny_pipeline


def main() -> None:
    room = SyntheticRoom(seed=20_001, moving=0, texture=0.25)
    start = room.start((96, 160))
    pipe = mirage_tiny_pipeline()
    with pipe.start_session(
        room.render(start).images[0],
        room.prompt,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    ) as session:
        camera, frames = start, 17  # the first chunk holds 4 n + 1 frames, later ones 4 n new ones
        for degrees in (20.0, 20.0, -40.0):
            path = pan(camera, frames, degrees=degrees)
            if session.num_frames > 0:
                path = path[1:]  # the last chunk ended at its first camera
            chunk = session.step(path)
            camera = path[-1]
            print(f"turned by {degrees:g} degrees: {chunk.metrics['coverage']:.0%} of the views were remembered")


if __name__ == "__main__":
    main()
