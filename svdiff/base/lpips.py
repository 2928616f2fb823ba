"""The backbone of the perceptual distance: the lpips package's own trunk, trained on the picture world.

It learns what pictures are of, and, as the distance itself, that the same scene moved, turned or in another light is
nearer than a scene changed in one respect, or than the scene out of focus. The published heads are of no use on it, so
it goes without.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from svdiff.base import loop
from svdiff.base.autoencoder import to_float
from svdiff.base.clip import WordHeads, caption_words
from svdiff.base.compose import compose
from svdiff.base.config import BaseTrainingConfig
from svdiff.base.world import Scene
from svdiff.files import atomic_dir

_NET = "alex"
_GRID = 3
#: By how much another scene should be farther than the same scene moved.
_MARGIN = 0.05


class Trunk(torch.nn.Module):
    """The trunk with linear heads at each of its five depths, so that every depth learns what pictures are of."""

    def __init__(self) -> None:
        super().__init__()
        import lpips

        whole = lpips.LPIPS(net=_NET, lpips=False, pnet_rand=True, pnet_tune=True, pretrained=False, verbose=False)
        self.scaling, self.trunk = whole.scaling_layer, whole.net
        self.heads = torch.nn.ModuleList(WordHeads(c * _GRID**2, caption_words()) for c in whole.chns)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Pictures in [-1, 1] to the trunk's activations at each depth."""
        return list(self.trunk(self.scaling(x)))

    def labels(self, scenes: list[Scene]) -> torch.Tensor:
        """Which words the scenes' full captions hold."""
        head = self.heads[0]
        assert isinstance(head, WordHeads)
        return head.labels(scenes)

    def word_loss(self, features: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        """Mean over depths of the heads' loss."""
        pooled = (F.adaptive_avg_pool2d(f, _GRID).flatten(1) for f in features)
        return torch.stack([head(p, labels) for head, p in zip(self.heads, pooled, strict=True)]).mean()


def distances(first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.Tensor:
    """Of two batches' activations: half the squared difference of unit vectors, mean over places and depths, in [0, 1].

    The lpips package's distance without heads, divided by twice the number of depths.
    """
    unlike = [
        (F.normalize(a, eps=1e-6) - F.normalize(b, eps=1e-6)).pow(2).sum(1).mean((1, 2)) / 2
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
    grid = F.affine_grid(torch.tensor(maps, device=x.device), list(x.shape), align_corners=False)
    gain, lift = torch.tensor(light, device=x.device).view(-1, 2, 1, 1, 1).unbind(1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False) * gain + lift


def blurred(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The N×3×H×W pictures out of focus, by 1 to 2.5 pixels."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(x, 11, draw.uniform(1, 2.5))


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the backbone and write `backbone.safetensors` and `config.json` to `output`. Returns whether it ended."""
    part, where = config.lpips, loop.device()
    world = loop.load_world(config)
    torch.manual_seed(config.seed + 3)
    model = Trunk().to(where)
    optimiser = torch.optim.AdamW(model.parameters(), lr=part.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    table = world.table(where)

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        chance = random.Random(f"lpips/{config.seed}/{step}")
        numbers = range(step * part.batch_size, (step + 1) * part.batch_size)
        scenes = [world.scene(config.seed + 3, n, named=0.0, strangers=0.15) for n in numbers]
        changed = [world.altered(scene, chance)[0] for scene in scenes]
        return *world.layout(scenes), *world.layout(changed), model.labels(scenes)

    def learn(step: int, *drawn: torch.Tensor) -> dict[str, torch.Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 50, 0.9)
        chance = random.Random(f"lpips/{config.seed}/{step}/moves")
        x, other_scenes = (to_float(compose(table, *drawn[i : i + 2])) for i in (0, 2))
        near, far = moved(x, chance, 1.0), moved(other_scenes, chance, 0.3)
        far[::4] = blurred(x[::4], chance)  # what is left of a drawing out of focus is another drawing, too
        depths = model.features(torch.cat([x, near, far]))
        origin, same, other = (list(chunk) for chunk in zip(*(d.chunk(3) for d in depths), strict=True))
        gap = distances(origin, other) - distances(origin, same)
        loss = 20 * F.softplus((_MARGIN - gap) / _MARGIN).mean()
        loss = loss + model.word_loss(origin, drawn[4])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {"loss": loss, "ordered": (gap > 0).float().mean()}

    ended = loop.run(
        "lpips",
        steps=part.steps,
        state={"model": model, "optimiser": optimiser},
        draw=draw,
        learn=learn,
        config=config,
        identity=f"{part.model_dump_json()}/{config.world}/{config.seed}",
        stop_after=stop_after,
    )
    if ended:
        with atomic_dir(output) as target:
            weights = {k: v.half().cpu().contiguous().clone() for k, v in model.trunk.state_dict().items()}
            save_file(weights, target / "backbone.safetensors")
            about = {
                "net": _NET,
                "trained_on": "picture world",
                "heads": "none (lpips=False)",
                "objective": "words of the caption; the scene moved nearer than a changed scene or a blur",
            }
            (target / "config.json").write_text(json.dumps(about, indent=1))
            loop.make_readable(target)
    return ended
