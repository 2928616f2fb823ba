"""Stage `sample`: the evaluation pictures of an entry, and pictures for anyone who wants one now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svdiff.catalogue import Entry
from svdiff.config import Config, SampleConfig
from svdiff.data.cutmix import prior_mix_prompts
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, atomic_file, check_writable
from svdiff.models import load_pipeline, scratch
from svdiff.peaks import Peaks
from svdiff.sampling.guidance import sample_guided
from svdiff.sampling.images import Job, sample_images
from svdiff.sampling.weights_delta import is_weights_delta, load_weights_deltas
from svdiff.spectral import SpectralDelta, SpectralPipeline
from svdiff.words import file_stem

if TYPE_CHECKING:
    from PIL.Image import Image

Part = tuple[Path | SpectralDelta, float]  # a delta and its weight


def delta_path(name: str) -> Path:
    """Where the delta of a trained entry lies."""
    return Path("out/train") / name / "delta.safetensors"


def find_delta(text: str) -> tuple[Path, float]:
    """A delta and its weight from words such as 'teapot', 'teapot:0.7' or 'some/file.safetensors:-1'.

    Raises SvdiffError if neither a file nor a trained entry is called so, or the weight is not a number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon:
        name, weight = text, "1"
    path = Path(name) if name.endswith(".safetensors") else delta_path(name)
    if not path.is_file():
        raise SvdiffError(f"{path} not found; expected a delta file, or the name of an entry that is trained")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SvdiffError(f"'{text}': after the colon a weight is expected, a finite number as in {name}:0.5")
    return path, number


class Personalised(Protocol):
    """What was put on a pipeline, and the way back."""

    def unload(self) -> None:
        """The base's own weights again, bit for bit."""
        ...


def personalise(pipe: Any, path: Path, scale: float = 1.0) -> Personalised:
    """Put a trained delta of any method on `pipe`, at strength s = `scale` (Fig. 26).

    Raises SvdiffError for a missing file, or one that was trained on another base.
    """
    return personalise_with(pipe, [(path, scale)])


def personalise_with(pipe: Any, parts: Sequence[Part]) -> Personalised:
    """Put a weighted sum of deltas on `pipe`: σ + Σ wᵢδᵢ (Eq. 4, 5), or W₀ + Σ wᵢΔWᵢ for the baselines' (Fig. 8).

    Raises SvdiffError for a missing file, one that was trained on another base, or shifts and weights together.
    """
    if weights := _weights_of(parts):
        return load_weights_deltas(pipe, weights)
    spectral = SpectralPipeline(pipe, cache=scratch() / "bases")
    _load(spectral, parts)
    return spectral


def _weights_of(parts: Sequence[Part]) -> list[tuple[Path, float]]:
    """The parts, where they are the baselines' and change weights; none where they are shifts."""
    for delta, _ in parts:
        if isinstance(delta, Path) and not delta.is_file():
            raise SvdiffError(f"{delta} not found; train it first, with `svdiff train {delta.parent.name}`")
    weights = [(delta, weight) for delta, weight in parts if isinstance(delta, Path) and is_weights_delta(delta)]
    if weights and len(weights) < len(parts):
        raise SvdiffError(
            f"{weights[0][0]} changes weights, others shift singular values: they do not add up; give deltas of one kind"
        )
    return weights


def _load(spectral: SpectralPipeline, parts: Sequence[Part]) -> None:
    for place, (delta, _) in enumerate(parts):
        spectral.load_delta(delta, str(place))
    spectral.set_deltas({str(place): weight for place, (_, weight) in enumerate(parts)})


class Switch:
    """Weighted sums of deltas on a pipeline, one after the other.

    The base is hashed, decomposed and attached once for deltas that shift the same weights: from one to the next the
    shifts are copied. For others it is attached anew, so that pictures never depend on what was drawn before them.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self._attached: tuple[object, SpectralPipeline] | None = None

    @contextmanager
    def on(self, parts: Sequence[Part]) -> Iterator[Any]:
        """The pipeline with these deltas in force. Raises as `personalise_with`, before the block runs."""
        if _weights_of(parts):
            self.off()
            personal = personalise_with(self.pipe, parts)
            try:
                yield self.pipe
            finally:
                personal.unload()
            return
        loaded = [(SpectralDelta.load(delta) if isinstance(delta, Path) else delta, weight) for delta, weight in parts]
        shifted = {
            prefix: (
                {name for delta, _ in loaded for name in delta.part(prefix)},
                {delta.directions(prefix) for delta, _ in loaded if prefix in delta.prefixes()},
            )
            for prefix in sorted({prefix for delta, _ in loaded for prefix in delta.prefixes()})
        }
        if self._attached is None or self._attached[0] != shifted:
            self.off()
            self._attached = (shifted, SpectralPipeline(self.pipe, cache=scratch() / "bases"))
        _, spectral = self._attached
        try:
            _load(spectral, loaded)
            yield self.pipe
        finally:
            for name in spectral.deltas:
                spectral.delete_delta(name)

    def off(self) -> None:
        """The base's own layers and weights again, bit for bit."""
        if self._attached is not None:
            self._attached[1].unload()
            self._attached = None


def default_negatives(config: Config, entry: Entry) -> list[str]:
    """The prior prompts, which serve as negatives of Eq. 10 (supplement D): of mixes for a pair, else of the class."""
    classes, template = [concept.class_word for concept in entry.concepts.values()], config.prior.prompt
    if entry.kind != "pair":
        return entry.class_prompts(template)
    of_pairs = [
        prior_mix_prompts(*pair, template=template, layouts=config.mix.layouts) for pair in combinations(classes, 2)
    ]
    return list(dict.fromkeys(prompt for prompts in of_pairs for prompt in prompts))


def class_jobs(config: Config, entry: Entry) -> list[Job]:
    """Pictures of the bare class prompts, which tell whether the class word has drifted towards the concept."""
    seeds = range(config.sample.drift_pictures)
    return [Job(prompt, seed) for prompt in entry.class_prompts(config.prior.prompt) for seed in seeds]


def draw_pictures(
    pipe: Any,
    jobs: Sequence[Job],
    settings: SampleConfig,
    negatives: Sequence[str] = (),
    progress: str | None = None,
) -> list[Image]:
    """Pictures as `settings` say; with β below 1 under the negative prompts of Eq. 10, those of `settings` first.

    Raises SvdiffError if β is below 1 and there are no negatives at all.
    """
    if settings.beta == 1:
        return sample_images(pipe, jobs, **settings.sampler, progress=progress)
    negatives = settings.negatives or list(negatives)
    return sample_guided(pipe, jobs, **settings.sampler, beta=settings.beta, negatives=negatives, progress=progress)


def sample_entry(config: Config, name: str, out_dir: Path | None = None, delta: Path | None = None) -> Path:
    """Every evaluation prompt at every seed, from the trained model and from the untouched base.

    Writes images.csv (file, model, prompt, prompt_index, seed) and trained/*.png, base/*.png to out/sample/<name>/, or
    for `delta` in the place of the trained one to `out_dir`; and in its folder drift/ the same for the bare class prompts.
    """
    import pandas as pd

    settings, entry = config.sample, config.entry(name)
    out_dir = out_dir or Path("out/sample") / name
    drift = class_jobs(config, entry)
    wanted = {"": [Job(prompt, seed) for prompt in config.sample_prompts(name) for seed in settings.seeds]}
    wanted |= {"drift": drift} if drift else {}
    peaks = Peaks()
    with peaks.phase("loading"):
        pipe = load_pipeline(config.base)
    with peaks.phase("decomposition"):
        personal = personalise(pipe, delta or delta_path(name))
    rows: dict[str, list[dict[str, object]]] = {part: [] for part in wanted}
    with atomic_dir(out_dir) as folder:
        for model in ("trained", "base"):
            if model == "base":
                personal.unload()
            for part, jobs in wanted.items():
                progress = f"sample {name} ({model}{part and ', ' + part})"
                with peaks.phase("sampling"):
                    images = draw_pictures(pipe, jobs, settings, default_negatives(config, entry), progress)
                rows[part] += _save_pictures(folder / part, model, jobs, images)
        for part, of_models in rows.items():
            pd.DataFrame(of_models).to_csv(folder / part / "images.csv", index=False)
    peaks.say()
    return out_dir


def _save_pictures(folder: Path, model: str, jobs: Sequence[Job], images: Sequence[Image]) -> list[dict[str, object]]:
    """Write <model>/*.png; a row a picture, as images.csv has it."""
    (folder / model).mkdir(parents=True)
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    rows: list[dict[str, object]] = [
        {
            "file": f"{model}/p{prompts.index(job.prompt):02d}-s{job.seed:04d}.png",
            "model": model,
            "prompt": job.prompt,
            "prompt_index": prompts.index(job.prompt),
            "seed": job.seed,
        }
        for job in jobs
    ]
    for row, image in zip(rows, images, strict=True):
        image.save(folder / str(row["file"]))
    return rows


def sample_prompts(
    config: Config,
    deltas: Sequence[Part],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    output: Path,
    settings: SampleConfig,
    negatives: Sequence[str] = (),
) -> list[Path]:
    """Pictures of any prompts under a weighted sum of deltas, a file each in `output`."""
    check_writable(output)
    jobs = [Job(prompt, seed) for prompt in prompts for seed in seeds]
    pipe = load_pipeline(config.base)
    personal = personalise_with(pipe, deltas)
    if isinstance(personal, SpectralPipeline):
        personal.fuse()  # the process draws nothing else: plain weights are the fastest
    images = draw_pictures(pipe, jobs, settings, negatives, "sample")
    paths = []
    for job, image in zip(jobs, images, strict=True):
        path = output / f"{file_stem(job.prompt)}-s{job.seed}.png"
        with atomic_file(path) as temporary:
            image.save(temporary)
        paths.append(path)
    return paths
