"""The backbone of the perceptual distance: the lpips package's own trunk, trained on the picture world.

It learns what pictures are of, and, as the distance itself, that the same drawing moved, turned or in another light is
nearer than another drawing at the same place, or than the drawing out of focus. The published heads are of no use on it, so it goes without.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from svdiff.base import loop
from svdiff.base.clip import evaluation_pool
from svdiff.base.config import BaseTrainingConfig
from svdiff.base.things import COLOURS
from svdiff.base.world import Scene, World, is_held_out
from svdiff.files import atomic_dir

_GRID = 3
#: By how much another drawing should be farther than the same drawing moved.
_MARGIN = 0.05


class Classifier(torch.nn.Module):
    """The trunk with linear heads at each of its five depths, so that every depth learns what pictures are of."""

    def __init__(self, net: str, things: int, artists: int, colours: int) -> None:
        super().__init__()
        import lpips

        whole = lpips.LPIPS(net=net, lpips=False, pnet_rand=True, pnet_tune=True, pretrained=False, verbose=False)
        self.scaling, self.trunk = whole.scaling_layer, whole.net
        self.sizes = (things, artists, colours, 4)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(c * _GRID**2, sum(self.sizes)) for c in whole.chns)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Pictures in [-1, 1] to the trunk's activations at each depth."""
        return list(self.trunk(self.scaling(x)))

    def answers(self, features: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """Activations to (things, artist, colour, place) at each depth."""
        return [
            head(F.adaptive_avg_pool2d(f, _GRID).flatten(1)).float().split(self.sizes, dim=1)
            for head, f in zip(self.heads, features, strict=True)
        ]


def distances(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """Of two batches' activations: half the squared difference of unit vectors, mean over places and depths, in [0, 1].

    The lpips package's distance without heads, divided by twice the number of depths.
    """
    unlike = [
        (F.normalize(a.float(), eps=1e-6) - F.normalize(b.float(), eps=1e-6)).pow(2).sum(1).mean((1, 2)) / 2
        for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(unlike).mean(0)


def moved(x: torch.Tensor, draw: random.Random, much: float) -> torch.Tensor:
    """The N×3×H×W pictures each shifted, turned, scaled, and in another light: up to `much` times 4 pixels, 10°, 10 %."""

    def amount() -> float:
        return much * draw.uniform(0.3, 1) * draw.choice((-1, 1))

    maps, light = [], []
    for _ in x:
        angle, zoom = math.radians(10 * amount()), 1 + 0.1 * amount()
        c, s = zoom * math.cos(angle), zoom * math.sin(angle)
        maps.append([[c, -s, amount() / 8], [s, c, amount() / 8]])
        light.append([1 + 0.1 * amount(), 0.1 * amount()])
    grid = F.affine_grid(torch.tensor(maps), list(x.shape), align_corners=False)
    gain, lift = torch.tensor(light).view(-1, 2, 1, 1, 1).unbind(1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False) * gain + lift


def blurred(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The N×3×H×W pictures out of focus, by 1 to 2.5 pixels."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(x, 11, draw.uniform(1, 2.5))


def redrawn_scene(world: World, scene: Scene, draw: random.Random) -> Scene:
    """The scene with another thing or by another artist, at the same place; no held-out combination."""
    while True:
        other = world.altered(scene, draw, draw.choice(("thing", "artist")))
        if not any(is_held_out(thing.word, other.artist, other.colour) for thing in other.things):
            return other


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the backbone and write `backbone.safetensors` and `config.json` to `output`. Returns whether it ended."""
    from safetensors.torch import save_file

    part = config.lpips
    torch.set_num_threads(1)
    world = World(config.world, config.things)
    torch.manual_seed(config.seed + 3)
    colours = list(COLOURS)
    model = Classifier(part.net, len(world.words), len(world.artists), len(colours))
    scenes = [world.scene(config.seed + 3, index) for index in range(part.pool)]
    changes = random.Random(f"lpips/altered/{config.seed}")
    altered = [redrawn_scene(world, scene, changes) for scene in scenes]
    pool = evaluation_pool(world, config.seed + 3, scenes)
    redrawn = evaluation_pool(world, config.seed + 3, altered).pictures
    things = torch.zeros(len(scenes), len(world.words))
    place = torch.zeros(len(scenes), 4)
    for i, scene in enumerate(scenes):
        things[i, [world.words.index(thing.word) for thing in scene.things]] = 1
        first = scene.things[0]
        place[i] = torch.tensor([first.x, first.y, first.size, first.tilt / 20])
    artist = torch.tensor([world.artists.index(scene.artist) for scene in scenes])
    plain = torch.tensor([not r for r in pool.restyled])
    colour = torch.tensor([colours.index(scene.colour) for scene in scenes])
    optimiser = torch.optim.AdamW(model.parameters(), lr=part.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)

    def step_fn(step: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 100, 0.9)
        draw = random.Random(f"lpips/{config.seed}/{step}")
        chosen = torch.tensor(draw.sample(range(part.pool), part.batch_size))
        x = pool.pictures[chosen].float() / 127.5 - 1
        y = redrawn[chosen].float() / 127.5 - 1
        near, far = moved(x, draw, 1.0), moved(y, draw, 0.3)
        far[::4] = blurred(x[::4], draw)  # what is left of a drawing out of focus is another drawing, too
        with loop.autocast():
            depths = model.features(torch.cat([x, near, far]))
            outputs = model.answers([depth[: len(x)] for depth in depths])
        origin, same, other = (list(part) for part in zip(*(d.chunk(3) for d in depths), strict=True))
        gap = distances(origin, other) - distances(origin, same)
        loss = 20 * F.softplus((_MARGIN - gap) / _MARGIN).mean()
        for what, who, ground, where in outputs:
            loss = loss + 10 * F.binary_cross_entropy_with_logits(what, things[chosen])
            known = plain[chosen]
            loss = loss + 0.3 * F.cross_entropy(who[known], artist[chosen][known])
            loss = loss + F.cross_entropy(ground, colour[chosen]) + 5 * F.mse_loss(where, place[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        top = things[chosen].gather(1, outputs[-1][0].argmax(1, keepdim=True)).mean()
        return {"loss": loss.item(), "top1": top.item(), "ordered": (gap > 0).float().mean().item()}

    ended = loop.run(
        "lpips",
        steps=part.steps,
        state={"model": model, "optimiser": optimiser},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        identity=f"{part.model_dump_json()}/{config.things}/{config.seed}",
        stop_after=stop_after,
    )
    if ended:
        with atomic_dir(output) as target:
            weights = {k: v.half().contiguous().clone() for k, v in model.trunk.state_dict().items()}
            save_file(weights, target / "backbone.safetensors")
            about = {
                "net": part.net,
                "trained_on": "picture world",
                "heads": "none (lpips=False)",
                "objective": "things, artist, colour and place; the drawing moved nearer than another drawing or a blur",
            }
            (target / "config.json").write_text(json.dumps(about, indent=1))
            loop.make_readable(target)
    return ended
