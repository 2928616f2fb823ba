"""The backbone of the perceptual distance: the lpips package's own trunk, trained to tell the world's pictures apart."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F

from svdiff.base import loop
from svdiff.base.clip import evaluation_pool
from svdiff.base.config import BaseTrainingConfig
from svdiff.base.things import COLOURS
from svdiff.base.world import World
from svdiff.files import atomic_dir

_GRID = 3


class Classifier(torch.nn.Module):
    """The trunk with linear heads at each of its five depths, so that every depth learns what pictures are of."""

    def __init__(self, net: str, things: int, artists: int, colours: int) -> None:
        super().__init__()
        import lpips

        whole = lpips.LPIPS(net=net, lpips=False, pnet_rand=True, pnet_tune=True, pretrained=False, verbose=False)
        self.scaling, self.trunk = whole.scaling_layer, whole.net
        self.sizes = (things, artists, colours, 4)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(c * _GRID**2, sum(self.sizes)) for c in whole.chns)

    def forward(self, x: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Pictures in [-1, 1] to (things, artist, colour, place) at each depth."""
        features = self.trunk(self.scaling(x))
        return [
            head(F.adaptive_avg_pool2d(f, _GRID).flatten(1)).split(self.sizes, dim=1)
            for head, f in zip(self.heads, features, strict=True)
        ]


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the backbone and write `backbone.safetensors` and `config.json` to `output`. Returns whether it ended."""
    from safetensors.torch import save_file

    part = config.lpips
    torch.set_num_threads(1)
    world = World(config.world, config.things)
    torch.manual_seed(config.seed + 3)
    colours = list(COLOURS)
    model = Classifier(part.net, len(world.words), len(world.artists), len(colours))
    scenes, restyled, pictures = evaluation_pool(world, config.seed + 3, part.pool)
    things = torch.zeros(len(scenes), len(world.words))
    place = torch.zeros(len(scenes), 4)
    for i, scene in enumerate(scenes):
        things[i, [world.words.index(thing.word) for thing in scene.things]] = 1
        first = scene.things[0]
        place[i] = torch.tensor([first.x, first.y, first.size, first.tilt / 20])
    artist = torch.tensor([world.artists.index(scene.artist) for scene in scenes])
    plain = torch.tensor([not r for r in restyled])
    colour = torch.tensor([colours.index(scene.colour) for scene in scenes])
    optimiser = torch.optim.AdamW(model.parameters(), lr=part.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)

    def step_fn(step: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 100, 0.9)
        draw = random.Random(f"lpips/{config.seed}/{step}")
        chosen = torch.tensor(draw.sample(range(part.pool), part.batch_size))
        x = pictures[chosen].float() / 127.5 - 1
        x = x * draw.uniform(0.9, 1.05) + draw.uniform(-0.08, 0.08)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [[part.float() for part in depth] for depth in model(x)]
        loss = torch.zeros(())
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
        return {"loss": loss.item(), "top1": top.item()}

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
            about = {"net": part.net, "trained_on": "picture world", "heads": "none (lpips=False)"}
            (target / "config.json").write_text(json.dumps(about, indent=1))
            loop.make_readable(target)
    return ended
