"""How many scenes a second Shapes draws on one core, and what each part of a scene costs.

    python benchmarks/shapes.py [--scenes 5000] [--preset default] [--image_size 64]

The bar is 5,000 scenes (picture and captions) a second at 64 px on one core. Times are of the process, not of the
clock on the wall; the best of the rounds counts, since other processes can only slow a round down. Beside it stands
what the parts cost, and the same scenes drawn by Pillow's `ImageDraw` with the antialiasing that the masks have
(drawn four times as large, then reduced), which is what one would write first.
"""

import argparse
import time
from collections.abc import Callable

from PIL import Image, ImageDraw

from hf_vlp.data import ShapesConfig, ShapesWorld, load_shapes
from hf_vlp.data.shapes.drawing import draw
from hf_vlp.data.shapes.scenes import Scene
from hf_vlp.data.shapes.world import png

ROUNDS = 5
OVERSAMPLING = 4
BAR = 5_000


def best_seconds(work: Callable[[], object]) -> float:
    """Process seconds of the fastest round."""
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def drawn_directly(scene: Scene) -> Image.Image:
    """Every object as a disc of its colour, large, then reduced: the least that antialiased drawing takes."""
    image = Image.new("RGB", (scene.image_size * OVERSAMPLING,) * 2, scene.background_rgb)
    pen = ImageDraw.Draw(image)
    for thing in scene.objects:
        pen.ellipse([side * OVERSAMPLING for side in thing.box], fill=thing.rgb)
    return image.reduce(OVERSAMPLING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=5_000)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--image_size", type=int, default=64)
    arguments = parser.parse_args()
    count = arguments.scenes
    options = {"preset": arguments.preset, "image_size": arguments.image_size}
    world = ShapesWorld(ShapesConfig.preset(arguments.preset, image_size=arguments.image_size))
    scenes = [world.scene(index) for index in range(count)]
    pictures = [draw(scene) for scene in scenes]

    def whole() -> None:
        for index in range(count):
            scene = world.scene(index)
            world.image(scene)
            world.captions(index, scene)

    works: list[tuple[str, Callable[[], object]]] = [
        (f"scene, picture, {world.config.captions} captions", whole),
        ("  scene", lambda: [world.scene(index) for index in range(count)]),
        ("  picture", lambda: [draw(scene) for scene in scenes]),
        ("  captions", lambda: [world.captions(index, scene) for index, scene in enumerate(scenes)]),
        ("picture as PNG", lambda: [png(picture) for picture in pictures]),
        ("row of a dataset", lambda: [world.row(index) for index in range(count)]),
        ("datasets.Dataset", lambda: load_shapes(size=count, **options)),
        ("datasets.IterableDataset", lambda: sum(1 for _ in load_shapes(size=count, streaming=True, **options))),
        ("discs by ImageDraw, 4x", lambda: [drawn_directly(scene) for scene in scenes]),
    ]
    print(f"{count} scenes of preset {arguments.preset!r} at {arguments.image_size} px, best of {ROUNDS} rounds")
    print(f"{'':<34}{'us each':>10}{'a second':>12}")
    rates = {}
    for name, work in works:
        seconds = best_seconds(work)
        rates[name] = count / seconds
        print(f"{name:<34}{1e6 * seconds / count:>10.1f}{rates[name]:>12,.0f}")
    print(f"scenes a second / {BAR:,}: {rates[works[0][0]] / BAR:.2f}")


if __name__ == "__main__":
    main()
