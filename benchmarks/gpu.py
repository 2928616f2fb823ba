"""What only a graphics card shows: speed, memory and rounding at the real sizes, within a minute.

    python -m benchmarks.gpu --json out.json                       # SD 1.5, SDXL, SD 3.5 medium, Flux.1-dev on one GPU
    python -m benchmarks.gpu --json out.json --device cpu --tiny   # the same code on tiny networks

Networks have the real sizes and random weights, nothing is downloaded. Their weights are made of their singular
vectors, so that no decomposition has to be waited for: U and V are rows of cosine transforms with random signs, and at a
limited rank the leading directions are put into the weight. Flux is trained at rank 64 with W kept (its factors need
more than a card holds), the others at full rank.

Cases stand in the order of what is most worth knowing. Each is on its own: what fails is written down with its error
and the next one starts. The whole result is written after every case; cases that the deadline leaves no time for say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.catalogue import CONCEPTS, in_turn, random_delta, ratio
from benchmarks.methods import full, lora
from svdiff.files import write_atomic
from svdiff.models.memory import SHARE, training_memory
from svdiff.models.sizes import build
from svdiff.spectral import Basis, SpectralPipeline, SpectralShifts, attach
from svdiff.spectral.basis import TRANSPOSED, Factors, full_rank, matrix_weights
from svdiff.spectral.decompose import as_matrix, from_matrix, leading_svd, svd

GIB = 2**30
TIMED_SECONDS = 1.0  # of steps, after the first two
SHIFTED = 0.05  # shifts against the mean singular value, where they are not zero


class Base(NamedTuple):
    """A well-known base, with what makes a network of its kind tiny."""

    rank: int | None
    tiny: dict[str, Any]


TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
BASES = {
    "sd15": Base(
        None,
        TINY_UNET
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
        },
    ),
    "sdxl": Base(
        None,
        TINY_UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
    ),
    "sd3.5-medium": Base(
        None,
        {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
        },
    ),
    "flux": Base(
        64,
        {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
        },
    ),
}
FLUX_LATENTS = 128  # side; no configuration says so


class Machine:
    """The device, and whether networks are tiny."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.cuda = self.device.type == "cuda"

    def described(self) -> dict[str, Any]:
        """Where the numbers come from."""
        found: dict[str, Any] = {"torch": torch.__version__, "device": self.device.type, "tiny": self.tiny}
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            found |= {"name": properties.name, "memory_gib": properties.total_memory / GIB, "cuda": torch.version.cuda}
        return found

    def network(self, base: str, dtype: torch.dtype) -> Any:
        """A base's denoising network, with random weights that are the same at every call."""
        torch.manual_seed(0)
        network = build(base, device=str(self.device), **(BASES[base].tiny if self.tiny else {}))
        return network.to(dtype).requires_grad_(False).eval()

    def inputs(self, network: Any, batch: int = 1) -> dict[str, Any]:
        """What a network is called with, of the base's native size of pictures."""
        config = network.config
        side = config.get("sample_size") or (8 if self.tiny else FLUX_LATENTS)

        def normal(*shape: int) -> Tensor:
            generator = torch.Generator().manual_seed(sum(shape))
            return torch.randn(batch, *shape, generator=generator).to(self.device, network.dtype)

        steps = torch.full((batch,), 500.0, device=self.device)
        if "cross_attention_dim" in config:
            given = {
                "sample": normal(config.in_channels, side, side),
                "timestep": steps,
                "encoder_hidden_states": normal(77, config.cross_attention_dim),
            }
            if config.addition_embed_type == "text_time":
                sizes = torch.tensor([8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side], device=self.device)
                width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                given["added_cond_kwargs"] = {"text_embeds": normal(width), "time_ids": sizes.expand(batch, -1)}
            return given
        text = {"pooled_projections": normal(config.pooled_projection_dim)}
        if "guidance_embeds" not in config:
            tokens = 77 + 256
            picture = normal(config.in_channels, side, side)
            return text | {
                "hidden_states": picture,
                "timestep": steps,
                "encoder_hidden_states": normal(tokens, config.joint_attention_dim),
            }
        rows, columns = torch.meshgrid(*[torch.arange(side // 2, device=self.device)] * 2, indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        return text | {
            "hidden_states": normal((side // 2) ** 2, config.in_channels),
            "timestep": steps / 1000,
            "guidance": torch.ones(batch, device=self.device),
            "encoder_hidden_states": normal(512, config.joint_attention_dim),
            "txt_ids": torch.zeros(512, 3, device=self.device),
            "img_ids": places.to(network.dtype),
        }

    def autocast(self) -> torch.autocast:
        """What training computes in: bfloat16."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def now(self) -> float:
        """Seconds, after everything asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, run: Callable[[], object]) -> float:
        """Median seconds of a run, without the first two."""
        run()
        run()
        times: list[float] = []
        while sum(times) < TIMED_SECONDS and len(times) < 10:
            start = self.now()
            run()
            times.append(self.now() - start)
        return statistics.median(times)

    def allocated(self) -> float | None:
        """GiB held by tensors on the device; None on the CPU, where nobody counts them."""
        return torch.cuda.memory_allocated(self.device) / GIB if self.cuda else None

    def peak(self) -> float | None:
        """GiB held at most since `forget`."""
        return torch.cuda.max_memory_allocated(self.device) / GIB if self.cuda else None

    def forget(self) -> None:
        """Free what nothing refers to, and start to look for the peak anew."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


def set_tf32(allowed: bool) -> None:
    """Whether products of float32 numbers may be made of TensorFloat-32, as the library allows on GPUs."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


# -- weights with known singular vectors -------------------------------------------------------------------


def orthonormal(size: int, count: int, device: torch.device) -> Tensor:
    """`(size, count)` with orthonormal columns: of the cosine transform, in random order and with random signs."""
    generator = torch.Generator().manual_seed(size * 1_000_003 + count)
    columns = torch.randperm(size, generator=generator)[:count].to(device)
    signs = torch.randint(0, 2, (size, 1), generator=generator).to(device) * 2.0 - 1
    places = 2 * torch.arange(size, device=device)[:, None] + 1
    angles = (places * columns % (4 * size)).double() * (torch.pi / (2 * size))
    scale = torch.where(columns == 0, 1 / size, 2 / size).sqrt()
    return (angles.cos() * scale * signs).float()


@torch.no_grad()
def with_known_factors(owner: nn.Module, weight: Tensor, rank: int | None) -> Factors:
    """Exchange a weight, in place, for one of about its size whose leading directions are known."""
    transposed = isinstance(owner, TRANSPOSED)
    matrix = as_matrix(weight, transposed=transposed).float()
    m, n = matrix.shape
    whole = full_rank(owner, weight)
    count = whole if rank is None else min(rank, whole)
    u, v = orthonormal(m, count, weight.device), orthonormal(n, count, weight.device)
    if count == whole:
        sigma = torch.linspace(1.9, 0.1, count, device=weight.device)
        sigma *= matrix.norm() / sigma.norm()
        matrix = (u * sigma) @ v.T
    else:
        sigma = torch.linspace(1.5, 1.1, count, device=weight.device) * matrix.std() * (m**0.5 + n**0.5)
        matrix = matrix - u @ (u.T @ matrix)
        matrix = matrix - (matrix @ v) @ v.T + (u * sigma) @ v.T
    weight.copy_(from_matrix(matrix, weight.shape, transposed=transposed))
    return Factors(u, sigma, v.T.contiguous(), weight.shape, None, 0.0, f"{m} x {n}")


def known_basis(network: nn.Module, rank: int | None) -> Basis:
    """See `with_known_factors`, of every weight."""
    set_tf32(False)
    known = {name: with_known_factors(*owner, rank) for name, owner in matrix_weights(network).items()}
    set_tf32(True)
    return Basis(known, "random weights", rank)


def attach_all(network: nn.Module, basis: Basis, rank: int | None) -> SpectralShifts:
    """Attach shifts to every weight. The basis, which waits on disk in a training, takes no memory of the device after."""
    shifts = attach(network, basis, subset="all", rank=rank)
    for factors in basis.values():
        for name in ("u", "vh"):
            object.__setattr__(factors, name, getattr(factors, name).to("meta"))
    return shifts


# -- cases -------------------------------------------------------------------------------------------------


@torch.no_grad()
def rounding(machine: Machine, base: str) -> dict[str, Any]:
    """Relative error ‖y − y₀‖ / ‖y₀‖ of the network's output: of TF32 and bf16 against float32, and of δ = 0 against the
    plain network in each precision."""
    rank = BASES[base].rank
    network = machine.network(base, torch.float32)
    basis = known_basis(network, rank)
    plain = {name: output(machine, network) for name in precisions(network)}
    del network
    machine.forget()
    network = machine.network(base, torch.float32)
    known_basis(network, rank)
    shifts = attach(network, basis, subset="all", rank=rank)
    generator = torch.Generator().manual_seed(0)
    rows = {"zero": torch.zeros(sum(shifts.sizes.values()))}
    rows["shifted"] = torch.cat(
        [
            SHIFTED * float(getattr(layer, "sigma", torch.ones(1)).mean()) * torch.randn(size, generator=generator)
            for layer, size in zip(shifts.layers.values(), shifts.sizes.values(), strict=True)
        ]
    )
    found: dict[str, dict[str, Tensor]] = {"zero": {}, "shifted": {}}
    for name in precisions(network):
        for state, row in rows.items():
            shifts.write(row)
            found[state][name] = output(machine, network)
    lower = ("tf32", "bf16")
    return {
        "rank": rank,
        "delta_0_against_plain": {name: error(found["zero"][name], plain[name]) for name in plain},
        "plain_against_float32": {name: error(plain[name], plain["float32"]) for name in lower},
        "shifted_against_float32": {name: error(found["shifted"][name], found["shifted"]["float32"]) for name in lower},
        "shifted_against_plain": error(found["shifted"]["float32"], plain["float32"]),
    }


def precisions(network: Any) -> Iterator[str]:
    """Let a float32 network compute in one precision after the other, the last by casting it."""
    set_tf32(False)
    yield "float32"
    set_tf32(True)
    yield "tf32"
    network.to(torch.bfloat16)
    yield "bf16"


def output(machine: Machine, network: Any) -> Tensor:
    """What a network says to the inputs that are the same for every precision."""
    y: Tensor = network(**machine.inputs(network)).sample
    return y.double()


def error(y: Tensor, reference: Tensor) -> float:
    """Relative error."""
    return float((y - reference).norm() / reference.norm())


def spectral(network: nn.Module, rank: int | None) -> list[Tensor]:
    """Train the spectral shifts of every weight."""
    return list(attach_all(network, known_basis(network, rank), rank).parameters())


METHODS: dict[str, Callable[[Any, int | None], list[Tensor]]] = {
    "spectral": spectral,
    "lora": lambda network, rank: lora(network, Path()),
    "full": lambda network, rank: full(network.float(), Path()),
}
"""As the trainer does it: what is trained is float32, the rest bfloat16, LoRA of rank 1 by PEFT."""


def training(machine: Machine, base: str, method: str, compiled: bool = False) -> dict[str, Any]:
    """Seconds and GiB of a training step at batch 1 with AdamW, without and with gradient checkpointing.

    With `compiled`, without checkpointing alone, and what torch.compile gains there.
    """
    rank = BASES[base].rank
    network = machine.network(base, torch.bfloat16)
    predicted = training_memory(network, "all", rank, itemsize=2).total / GIB if method == "spectral" else None
    started = machine.now()
    trained = METHODS[method](network, rank)
    made = machine.now() - started
    machine.forget()
    given = machine.inputs(network)
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad()
        with machine.autocast():
            loss = network(**given).sample.float().square().mean()
        loss.backward()
        optimizer.step()

    network.train()
    if compiled:
        plain = machine.timed(step)
        network.compile()
        started = machine.now()
        step()
        took, compiled_step = machine.now() - started, machine.timed(step)
        return {"compiling_s": took, "plain_step_s": plain, "step_s": compiled_step, "gain": plain / compiled_step}
    network.enable_gradient_checkpointing()
    result: dict[str, Any] = {
        "rank": rank if method == "spectral" else None,
        "trained": sum(p.numel() for p in trained),
        "made_ready_s": made,
        "checkpointing": {"step_s": machine.timed(step), "peak_gib": machine.peak()},
        "held_gib": machine.allocated(),
    }
    if method == "spectral":
        result |= {"plan_says_held_gib": predicted, "plan_says_card_gib": predicted and predicted / SHARE}
    machine.forget()
    network.disable_gradient_checkpointing()
    try:
        result["plain"] = {"step_s": machine.timed(step), "peak_gib": machine.peak()}
    except torch.OutOfMemoryError as problem:
        result["plain"] = {"error": str(problem)}
    return result


@torch.no_grad()
def concepts(machine: Machine, base: str) -> dict[str, Any]:
    """Switching among a thousand concepts, and guided steps of 8 pictures of 8 concepts over 8 pictures of one."""
    network = machine.network(base, torch.bfloat16)
    parts, bases = {"unet": network}, {"unet": known_basis(network, None)}
    personal = SpectralPipeline(SimpleNamespace(**parts), bases=bases, progress=False)
    names = [f"concept {number}" for number in range(CONCEPTS)]
    for seed, name in enumerate(names):
        personal.load_delta(random_delta(parts, bases, seed), name)
    given = machine.inputs(network, 2 * CONCEPTS)
    for key, value in given.items():
        given[key] = torch.cat([value[:CONCEPTS]] * 2)  # with and without the prompt

    def draw() -> Tensor:
        y: Tensor = network(**given).sample[:CONCEPTS]
        machine.now()
        return y

    def plain() -> None:
        personal.set_deltas(names[0])
        draw()

    def mixed() -> Tensor:
        with personal.concepts(names):
            return draw()

    def one_by_one() -> Tensor:
        pictures = []
        for number, name in enumerate(names):
            personal.set_deltas(name)
            pictures.append(draw()[number])
        return torch.stack(pictures)

    difference = error(mixed().double(), one_by_one().double())
    times = in_turn({"plain": plain, "mixed": mixed}, 5)
    for number in range(1000 - len(names)):
        personal._rows[f"resident {number}"] = {"unet": torch.randn_like(personal._rows[names[0]]["unet"])}
    switches = []
    for place in range(300):
        start = machine.now()
        personal.set_deltas(personal.deltas[place * 7919 % len(personal.deltas)])
        switches.append(1e3 * (machine.now() - start))
    switches.sort()
    return {
        "mixed_over_plain": ratio(times, "mixed", "plain"),
        "plain_step_s": statistics.median(times["plain"]),
        "mixed_against_one_by_one": difference,
        "switch_p50_ms": switches[150],
        "switch_p99_ms": switches[297],
    }


def decomposition(machine: Machine, m: int, n: int) -> dict[str, Any]:
    """Seconds of the whole decomposition and of the leading 64 directions of one weight, with their errors."""
    m, n = (m // 32, n // 32) if machine.tiny else (m, n)
    count = min(m, n)
    u, v = (orthonormal(size, count, machine.device) for size in (m, n))
    sigma = torch.arange(1, count + 1, device=machine.device) ** -0.5
    matrix, rank = (u * sigma) @ v.T, min(64, count // 8)
    result: dict[str, Any] = {}
    for name, run in (("whole", lambda: svd(matrix)), ("leading", lambda: leading_svd(matrix, rank))):
        start = machine.now()
        run()
        first, start = machine.now() - start, machine.now()
        _, found, _ = run()
        result[name] = {
            "first_s": first,
            "s": machine.now() - start,
            "sigma_error": error(found, sigma[: len(found)].double()),
        }
    return result


def cases() -> Iterator[tuple[str, Callable[[Machine], dict[str, Any]]]]:
    """All cases by name, the most important ones first."""

    def of(case: Callable[..., dict[str, Any]], *arguments: Any) -> Callable[[Machine], dict[str, Any]]:
        return lambda machine: case(machine, *arguments)

    yield "rounding sd15", of(rounding, "sd15")
    yield "training sd15 spectral", of(training, "sd15", "spectral")
    yield "training sd15 lora", of(training, "sd15", "lora")
    yield "training sd15 full", of(training, "sd15", "full")
    yield "concepts sd15", of(concepts, "sd15")
    for method in ("spectral", "lora"):
        for base in ("sdxl", "flux", "sd3.5-medium"):
            yield f"training {base} {method}", of(training, base, method)
    for base in ("sdxl", "sd3.5-medium", "flux"):
        yield f"rounding {base}", of(rounding, base)
    for m, n in ((1280, 1280), (1280, 11520), (10240, 1280), (12288, 3072)):
        yield f"decomposition {m} x {n}", of(decomposition, m, n)
    for base in ("sdxl", "sd3.5-medium", "flux"):
        yield f"training {base} full", of(training, base, "full")
    yield "compiled sd15 spectral", of(training, "sd15", "spectral", True)
    yield "compiled sd15 lora", of(training, "sd15", "lora", True)


def attempted(machine: Machine, case: Callable[[Machine], dict[str, Any]]) -> dict[str, Any]:
    """The result of a case, or the error that it ended with; nothing of it is left on the device."""
    try:
        result = case(machine)
    except Exception as problem:
        result = {"error": f"{type(problem).__name__}: {problem}", "traceback": traceback.format_exc()[-2000:]}
    machine.forget()
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file that the result is written to after every case")
    parser.add_argument("--seconds", type=float, default=60, help="no case starts later than this")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, … or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to test this file itself")
    parser.add_argument("--only", default="", help="the cases with this in their name, e.g. 'flux'")
    options = parser.parse_args()
    begun = time.perf_counter()
    machine = Machine(options.device, options.tiny)
    set_tf32(True)
    result: dict[str, Any] = {"machine": machine.described(), "cases": {}}
    for name, case in cases():
        if options.only not in name:
            continue
        started = time.perf_counter()
        if started - begun > options.seconds:
            result["cases"][name] = {"error": f"not started: {options.seconds:g} seconds were over"}
        else:
            result["cases"][name] = attempted(machine, case) | {"case_s": time.perf_counter() - started}
            print(name, json.dumps({k: v for k, v in result["cases"][name].items() if k != "traceback"}), flush=True)
        write_atomic(options.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
