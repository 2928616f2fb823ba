"""Several trainings on one network: each picture of a batch takes the shifts of its own training, at the cost of one pass.

A training is the same `Trainer` as alone, with optimiser state, rates, draws and clipping of its own. It asks for the loss of
its next batch; what all ask for is one pass of the network, forward and backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from svdiff.config import SampleConfig, TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import Conditions, family_of
from svdiff.sampling import Job, sample_images
from svdiff.spectral.tokens import TokenEmbedding
from svdiff.training.loop import Pass, Trainer, Validation, conditions_of
from svdiff.training.losses import Loss
from svdiff.training.methods import Method
from svdiff.training.methods.spectral import SpectralMethod
from svdiff.training.methods.tokens import WithTokens, special_tokens, wants_tokens

if TYPE_CHECKING:
    from PIL.Image import Image

# What trainings must agree on, because it belongs to the network that they share.
SHARED = ("method", "subset", "rank", "text_encoder", "train_token", "precision", "gradient_checkpointing")


def check_together(settings: Mapping[str, TrainConfig]) -> None:
    """Raise SvdiffError for trainings, by name, that cannot share the passes of one network."""
    (first, common), *others = settings.items()
    for name, own in settings.items():
        alone = f"train {name} alone, or"
        if own.method != "svdiff":
            raise SvdiffError(
                f"{name} is trained by method {own.method}; only spectral shifts are trained together: {alone} choose svdiff"
            )
        weighed = [key for key in ("unmix_weight", "single_subject_weight") if getattr(own, key) > 0]
        if weighed:
            raise SvdiffError(
                f"train.{weighed[0]} of {name} is {getattr(own, weighed[0])}, and attention maps are not recorded of trainings "
                f"together: {alone} set it to 0"
            )
        if own.fit == "bucket":
            raise SvdiffError(
                f"train.fit of {name} is bucket, whose pictures have shapes of their own: {alone} set crop"
            )
        if own.compile:
            raise SvdiffError(
                f"train.compile of {name} is true, and batches of several change their size: {alone} set false"
            )
        if own.precision == "fp16":
            raise SvdiffError(
                f"train.precision of {name} is fp16, which scales the losses of each: {alone} set bf16 or no"
            )
    for name, own in others:
        for key in SHARED:
            if getattr(own, key) != getattr(common, key):
                raise SvdiffError(
                    f"train.{key} is {getattr(common, key)} for {first} and {getattr(own, key)} for {name}: only trainings "
                    "that agree in it share a network; train them in two calls"
                )


def _validated(trainer: Trainer, jobs: list[Job], settings: SampleConfig) -> Validation | SvdiffError:
    """A validation of one training whose turn it is, or why there is none."""
    try:
        return trainer.fixed_noise_loss(), sample_images(trainer.pipe, jobs, **settings.sampler)
    except SvdiffError as error:
        return error


class OwnNetwork:
    """The networks of one training alone; see `Network`."""

    def __init__(self, method: Method) -> None:
        self.methods = [method]

    def turn(self, method: Method) -> None:
        """See `Network`."""

    def answer(self, asked: Mapping[Trainer, int]) -> list[Loss]:
        """See `Network`."""
        return [trainer.answer(number) for trainer, number in asked.items()]

    def validate(self, asked: Mapping[Trainer, list[Job]], settings: SampleConfig) -> list[Validation | SvdiffError]:
        """See `Network`."""
        return [_validated(trainer, jobs, settings) for trainer, jobs in asked.items()]

    def detach(self) -> None:
        """See `Network`."""
        self.methods[0].detach()


class OneOfMany:
    """The spectral shifts, and special tokens, of one training among several on a network; see `Method`.

    Its parameters are its own tensors. Those of the network that all share hold them while it is this training's turn.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.own: dict[Parameter, Parameter] = {}  # by the network's parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def parameters(self) -> dict[str, list[Parameter]]:
        """See `Method`."""
        return {rate: [self.own[shared] for shared in of] for rate, of in self.method.parameters().items()}


class SharedNetwork:
    """Spectral shifts of several trainings on the networks of one pipeline.

    Args:
        pipe: the pipeline, without shifts yet.
        settings: of each training; as `check_together` wants them.
        tokens: the special tokens of each.
    """

    def __init__(self, pipe: Any, settings: Sequence[TrainConfig], tokens: Sequence[Sequence[str]]) -> None:
        self.family = family_of(pipe)
        self.embeddings: dict[str, TokenEmbedding] = {}
        starts: list[dict[str, Tensor]] = []  # of the special tokens of each training
        try:
            for own, words in zip(settings, tokens, strict=True):
                made = special_tokens(self.family, words, own) if wants_tokens(own) else {}
                starts.append({name: embedding.value.detach().clone() for name, embedding in made.items()})
                for name, embedding in made.items():
                    if name in self.embeddings:
                        embedding.remove()
                    else:
                        self.embeddings[name] = embedding
            self.spectral = SpectralMethod(pipe, settings[0])
        except BaseException:
            for embedding in self.embeddings.values():
                embedding.remove()
            raise
        self._shared = [p for shifts in self.spectral.shifts.values() for p in shifts.parameters()]
        self._shared += [embedding.value for embedding in self.embeddings.values()]
        self.methods: list[Any] = [self._method(start) for start in starts]
        self._held: list[Any] = []

    def _method(self, starts: Mapping[str, Tensor]) -> OneOfMany:
        """One training's method, with its special tokens where they start."""
        tokens = {name: embedding for name, embedding in self.embeddings.items() if name in starts}
        method = OneOfMany(WithTokens(self.spectral, tokens) if tokens else self.spectral)
        method.own = {shared: Parameter(shared.detach().clone()) for shared in self._shared}
        for name, embedding in self.embeddings.items():
            value = starts.get(name, embedding.base)
            method.own[embedding.value].data = value.to(embedding.value.device, copy=True)
        return method

    def turn(self, method: Any) -> None:
        """The networks are those of one training: for validations, saving, and all else that it does as if it were alone."""
        self._hold([method])
        self._assign(None, None)

    def _hold(self, methods: list[Any]) -> None:
        """Lay the parameters of some trainings into the networks, a row each; of one they are its own tensors."""
        if methods == self._held:
            return
        for shared in self._shared:
            own, shared.grad = [method.own[shared] for method in methods], None
            if len(own) == 1:
                shared.data = own[0].data
                continue
            shared.data = torch.stack([one.data for one in own])
            for one, row in zip(own, shared.data, strict=True):
                one.data = row
        self._held = methods

    def _assign(self, of_pictures: Sequence[int] | None, of_texts: Sequence[int] | None) -> None:
        """Say which of the trainings in turn each picture, and each text, belongs to."""
        for part, shifts in self.spectral.shifts.items():
            shifts.assign(of_pictures if part == self.family.network_name else of_texts)
        for embedding in self.embeddings.values():
            embedding.batch.assign(of_texts, len(self._held))

    def answer(self, asked: Mapping[Trainer, int]) -> list[Loss]:
        """The loss of the batch that each trainer asks for, by its number, with its share of the step's gradients made."""
        if len(asked) == 1:
            [(trainer, number)] = asked.items()
            self.turn(trainer.method)
            loss = trainer.answer(number)
            self._share_out([trainer.method])
            return [loss]
        trainers = list(asked)
        passes = [one for trainer, number in asked.items() for one in trainer.draw(number)]
        objective, accelerator = self.family.objective, trainers[0].accelerator
        losses = []
        for trainer, one, part in zip(trainers, passes, self._predict(trainers, passes), strict=True):
            losses.append(
                trainer.loss_of([one], [(part, objective.target(one.batch.latents, one.noise, one.timesteps))])
            )
        # One that is no longer finite is left out, so that it spoils no other; its training finds it.
        shares = [loss.total / trainer.config.accumulation for trainer, loss in zip(trainers, losses, strict=True)]
        finite = [share for share in shares if share.isfinite()]
        if finite:
            accelerator.backward(torch.stack(finite).sum())
        self._share_out([trainer.method for trainer in trainers])
        # The graph must be gone before the parameters of the networks take another shape.
        return [loss.detach() for loss in losses]

    def _predict(self, trainers: Sequence[Trainer], passes: Sequence[Pass]) -> Sequence[Tensor]:
        """What the network makes of a pass of each, in one pass for all."""
        with trainers[0].accelerator.autocast():  # as each alone encodes
            for trainer, one in zip(trainers, passes, strict=True):
                if not trainer.knows(one.batch.prompts):
                    self.turn(trainer.method)
                    trainer.encoded(one.batch.prompts)
        prompts = [(row, prompt) for row, one in enumerate(passes) for prompt in one.batch.prompts]

        def fixed(text: tuple[int, str]) -> Conditions | None:
            return trainers[text[0]].fixed(text[1])

        trained = [text for text in dict.fromkeys(prompts) if fixed(text) is None]
        self._hold([trainer.method for trainer in trainers])
        self._assign([row for row, _ in prompts], [row for row, _ in trained] or None)
        objective = self.family.objective
        noisy = torch.cat([objective.noised(one.batch.latents, one.noise, one.timesteps) for one in passes])
        with trainers[0].accelerator.autocast():
            found = self.family.encode([prompt for _, prompt in trained]) if trained else None
            conditions = conditions_of(prompts, fixed, trained, found)
            predicted = self.family.predict(noisy, torch.cat([one.timesteps for one in passes]), conditions)
        return predicted.split([len(one.noise) for one in passes])

    def validate(self, asked: Mapping[Trainer, list[Job]], settings: SampleConfig) -> list[Validation | SvdiffError]:
        """See `Network`: in batches of several trainings, or of each alone where one of them fails."""
        if len(asked) > 1:
            with suppress(SvdiffError):
                losses, images = self._fixed_noise_losses(list(asked)), iter(self._draw(asked, settings))
                return [
                    (loss, list(islice(images, len(jobs)))) for loss, jobs in zip(losses, asked.values(), strict=True)
                ]
        validations = []
        for trainer, jobs in asked.items():
            self.turn(trainer.method)
            validations.append(_validated(trainer, jobs, settings))
        return validations

    @torch.no_grad()
    def _fixed_noise_losses(self, trainers: Sequence[Trainer]) -> list[float]:
        passes = {trainer: trainer.fixed_noise_passes() for trainer in trainers}
        predicted: dict[Trainer, list[Tensor]] = {trainer: [] for trainer in trainers}
        for place in range(max(map(len, passes.values()))):  # those with more pictures ask for more passes
            asking = [trainer for trainer in trainers if place < len(passes[trainer])]
            for trainer, part in zip(asking, self._predict(asking, [passes[t][place] for t in asking]), strict=True):
                predicted[trainer].append(part)
        return [trainer.fixed_noise_loss_of(passes[trainer], predicted[trainer]) for trainer in trainers]

    def _draw(self, asked: Mapping[Trainer, list[Job]], settings: SampleConfig) -> list[Image]:
        self._hold([trainer.method for trainer in asked])
        rows = [row for row, jobs in enumerate(asked.values()) for _ in jobs]
        queue, images = [job for jobs in asked.values() for job in jobs], []
        for start in range(0, len(queue), settings.batch_size):
            part = slice(start, start + settings.batch_size)
            self._assign(rows[part], rows[part])
            images += sample_images(self.family.pipe, queue[part], **settings.sampler)
        return images

    def _share_out(self, methods: Sequence[Any]) -> None:
        """Give each training its gradients, and what the networks hold of them up."""
        for shared in self._shared:
            if shared.grad is None:
                continue
            rows = shared.grad.unbind() if len(methods) > 1 else [shared.grad]
            for method, row in zip(methods, rows, strict=True):
                own = method.own[shared]
                own.grad = row if own.grad is None else own.grad.add_(row)
            shared.grad = None

    def detach(self) -> None:
        """Give the pipeline its base weights back."""
        for embedding in self.embeddings.values():
            embedding.remove()
        self.spectral.detach()
