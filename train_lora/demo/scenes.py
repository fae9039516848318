"""Captioned scenes drawn by code: the embedded teacher's world.

A scene is one shape on a patterned background. The caption names its attributes; what it leaves
out (the exact place, size, tilt, light, and the pattern's angle, phase or scatter) varies freely,
so that prompt alignment, quality and diversity can each be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .shapes import SHAPE_DISTANCES

IMAGE_PX = 128

SHAPES = tuple(SHAPE_DISTANCES)
COLOURS = {
    "red": (0.90, 0.13, 0.13),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.92, 0.20),
    "green": (0.20, 0.80, 0.25),
    "cyan": (0.25, 0.88, 0.92),
    "purple": (0.66, 0.28, 0.92),
    "pink": (0.99, 0.55, 0.76),
    "white": (0.97, 0.97, 0.97),
}
# Backgrounds are darker than every object, so that each pair of colours can be told apart.
BACKGROUNDS = {
    "gray": (0.36, 0.36, 0.36),
    "blue": (0.10, 0.18, 0.50),
    "green": (0.06, 0.32, 0.14),
    "red": (0.44, 0.07, 0.09),
    "purple": (0.30, 0.08, 0.40),
    "brown": (0.38, 0.22, 0.08),
}
PATTERNS = ("plain", "striped", "dotted", "tiled")
SIZES = {"small": (0.32, 0.42), "large": (0.52, 0.64)}  # radius; the picture spans [-1, 1]
PLACES = {
    "left": (-0.5, 0.0),
    "right": (0.5, 0.0),
    "top": (0.0, -0.5),
    "bottom": (0.0, 0.5),
    "centre": (0.0, 0.0),
}
PLACE_JITTER = 0.12
# Patterns are made of independent random parts, as real textures are: a stripe says nothing about
# the next one, so that only the last steps of sampling can decide them.
NUM_DOTS = 6  # along each side
NUM_CELLS = 12  # tiles or stripes across the diagonal

# Attribute name -> its values in label order: what captions name and the classifier recognises.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    "size": tuple(SIZES),
    "place": tuple(PLACES),
}
OPTIONAL_ATTRIBUTES = ("size", "place")  # a caption may leave these open


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Attribute values of one scene; ``None`` means the caption leaves it open."""

    shape: str
    colour: str
    background: str
    pattern: str
    size: str | None = None
    place: str | None = None

    @property
    def caption(self) -> str:
        thing = f"{self.size} " if self.size else ""
        thing += f"{self.colour} {self.shape}"
        article = "an" if thing.startswith("orange") else "a"
        place = f", {self.place}" if self.place else ""
        return f"{article} {thing} on a {self.pattern} {self.background} background{place}"


def random_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    """Draw `count` scenes; every attribute uniform, size and place each left open half the time."""

    def pick(values: tuple[str, ...]) -> str:
        return values[int(torch.randint(len(values), (), generator=generator))]

    scenes = []
    for _ in range(count):
        drawn = {name: pick(values) for name, values in ATTRIBUTES.items()}
        for name in OPTIONAL_ATTRIBUTES:
            if torch.rand((), generator=generator) < 0.5:
                drawn.pop(name)
        scenes.append(Scene(**drawn))
    return scenes


def labels(scenes: list[Scene]) -> torch.Tensor:
    """Attribute indices of the scenes: (B, 6) int64 in ATTRIBUTES order, -1 where left open."""
    return torch.tensor(
        [
            [
                values.index(value) if (value := getattr(scene, name)) is not None else -1
                for name, values in ATTRIBUTES.items()
            ]
            for scene in scenes
        ]
    )


def from_labels(rows: torch.Tensor) -> list[Scene]:
    """The inverse of `labels`: (B, 6) int64 -> scenes."""
    return [
        Scene(
            **{
                name: values[value] if value >= 0 else None
                for (name, values), value in zip(ATTRIBUTES.items(), row, strict=True)
            }
        )
        for row in rows.tolist()
    ]


def fill_open_attributes(scenes: list[Scene], generator: torch.Generator) -> list[Scene]:
    """Choose a value for every attribute that a caption left open."""
    filled = []
    for scene in scenes:
        drawn = {name: getattr(scene, name) for name in ATTRIBUTES}
        for name in OPTIONAL_ATTRIBUTES:
            if drawn[name] is None:
                values = ATTRIBUTES[name]
                drawn[name] = values[int(torch.randint(len(values), (), generator=generator))]
        filled.append(Scene(**drawn))
    return filled


def draw(scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """Paint the scenes, with everything that the captions leave open drawn at random.

    Returns: (B, 3, 128, 128) float32 in [-1, 1].
    """
    scenes = fill_open_attributes(scenes, generator)
    axis = (torch.arange(IMAGE_PX) + 0.5) * (2 / IMAGE_PX) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    x, y = x.expand(len(scenes), -1, -1), y.expand(len(scenes), -1, -1)
    background = _paint_backgrounds(scenes, x, y, generator)
    distance, light = _object_distance_and_light(scenes, x, y, generator)
    colour = _jittered_colours([COLOURS[scene.colour] for scene in scenes], 0.03, generator)
    painted = (colour[:, :, None, None] * light[:, None]).clamp(0, 1)
    edge_px = 1.0 * (2 / IMAGE_PX)
    mask = (0.5 - distance / edge_px).clamp(0, 1)[:, None]
    return torch.lerp(background, painted, mask) * 2 - 1


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, generator=generator)


def _jittered_colours(
    colours: list[tuple[float, ...]], spread: float, generator: torch.Generator
) -> torch.Tensor:
    exact = torch.tensor(colours)
    return (exact + spread * torch.randn(exact.shape, generator=generator)).clamp(0, 1)


def _rotate(
    x: torch.Tensor, y: torch.Tensor, angle: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x


def _object_distance_and_light(
    scenes: list[Scene], x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed distance to each object's outline, and its shading around 1; both (B, H, W)."""
    count = len(scenes)
    low, high = torch.tensor([SIZES[scene.size] for scene in scenes]).T  # type: ignore[index]
    radius = low[:, None, None] + (high - low)[:, None, None] * _uniform(count, 0, 1, generator)
    place = torch.tensor([PLACES[scene.place] for scene in scenes])  # type: ignore[index]
    centre = place + PLACE_JITTER * (2 * torch.rand(count, 2, generator=generator) - 1)
    tilt = _uniform(count, -0.35, 0.35, generator)
    u, v = _rotate(
        (x - centre[:, 0, None, None]) / radius, (y - centre[:, 1, None, None]) / radius, tilt
    )
    distance = torch.stack(
        [SHAPE_DISTANCES[scene.shape](u[i], v[i]) for i, scene in enumerate(scenes)]
    )
    light_x, _ = _rotate(u, v, _uniform(count, 0, 2 * math.pi, generator))
    return distance * radius, 1 + 0.16 * light_x.clamp(-1, 1)


def _paint_backgrounds(
    scenes: list[Scene], x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Two tones of each background colour mixed by its pattern: (B, 3, H, W) in [0, 1]."""
    count = len(scenes)
    dark = _jittered_colours([BACKGROUNDS[scene.background] for scene in scenes], 0.02, generator)
    bright = (dark * 1.3 + 0.12).clamp(0, 1)
    u, v = _rotate(x, y, _uniform(count, 0, math.pi, generator))
    shift = _uniform(count, 0, 1, generator), _uniform(count, 0, 1, generator)
    scatter = torch.rand(count, 2, NUM_DOTS, NUM_DOTS, generator=generator)
    tones = torch.rand(count, NUM_CELLS + 2, NUM_CELLS + 2, generator=generator).round()
    mix = torch.zeros_like(x)
    for i, scene in enumerate(scenes):
        column, row = (_cell_coordinate(w[i], s[i]) for w, s in zip((u, v), shift, strict=True))
        if scene.pattern == "striped":
            mix[i] = _tiles(column, torch.zeros_like(row), tones[i, :1].expand(2, -1))
        elif scene.pattern == "tiled":
            mix[i] = _tiles(column, row, tones[i])
        elif scene.pattern == "dotted":
            mix[i] = _scattered_dots(x[i], y[i], scatter[i])
    return torch.lerp(dark[:, :, None, None], bright[:, :, None, None], mix[:, None])


def _cell_coordinate(distance: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """From [-sqrt 2, sqrt 2] to [0, NUM_CELLS + 1): the part before the point counts cells."""
    return (distance / (2 * math.sqrt(2)) + 0.5) * NUM_CELLS + shift


def _tiles(column: torch.Tensor, row: torch.Tensor, tones: torch.Tensor) -> torch.Tensor:
    """Tones (R, C) of a grid of tiles at cell coordinates (H, W), with antialiased borders."""
    left, top = column.floor().long(), row.floor().long()
    softness = NUM_CELLS / (2 * math.sqrt(2)) * (2 / IMAGE_PX)  # of one pixel, in cells
    # Only a tile's far border is blended, over one pixel: the next tile starts there.
    right = ((column - left - 1) / softness + 1).clamp(0, 1)
    down = ((row - top - 1) / softness + 1).clamp(0, 1)
    here = torch.lerp(tones[top, left], tones[top, left + 1], right)
    below = torch.lerp(tones[top + 1, left], tones[top + 1, left + 1], right)
    return torch.lerp(here, below, down)


def _scattered_dots(x: torch.Tensor, y: torch.Tensor, scatter: torch.Tensor) -> torch.Tensor:
    """One dot at a random place of each cell of a square grid: (H, W) in [0, 1].

    x, y: (H, W) coordinates; scatter: (2, cells, cells) in [0, 1], the place within each cell.
    """
    cells = scatter.shape[-1]
    cell = 2 / cells
    corner = torch.arange(cells) * cell - 1
    offset = cell * (0.25 + 0.5 * scatter)
    centre_x = (corner[None, :] + offset[0]).flatten()[:, None]
    centre_y = (corner[:, None] + offset[1]).flatten()[:, None]
    squared_x = (x[0][None] - centre_x) ** 2
    squared_y = (y[:, 0][None] - centre_y) ** 2
    nearest = (squared_x[:, None, :] + squared_y[:, :, None]).amin(0)
    return (0.5 - (nearest.sqrt() - 0.085) * (IMAGE_PX / 2)).clamp(0, 1)
