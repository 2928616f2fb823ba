"""What differs between families of base models, behind one interface; a family is one file of facts beside this one.

Training, deltas, scores and stages ask a `Family` and know no pipeline by name.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from svdiff.models.objective import Objective

Conditions: TypeAlias = "dict[str, Tensor]"
"""What a prompt means to the network, by name; each tensor has one row a prompt, so that they can be joined."""

LARGE_VOCABULARY = (
    30_000  # words: from here on a vocabulary is one of a language, in the order of how frequent words are
)
RARE = 0.95  # from here on a small vocabulary, such as the embedded base's, has words that are left for tokens

log = logging.getLogger(__name__)

FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "sd3:StableDiffusion3",
    "FluxPipeline": "flux:Flux",
    "Flux2Pipeline": "flux2:Flux2",
    "Flux2KleinPipeline": "flux2:Flux2Klein",
}
"""Module and class of the family that a `_class_name` of model_index.json belongs to."""


class Family(ABC):
    """A loaded base model as everything outside of this package sees it; cheap to make from a pipeline.

    Latents are (B, C, h, w) everywhere, in the numbers that the network reads: scaled, and with Flux.2's patches as channels.
    """

    title: ClassVar[str]
    pipeline: ClassVar[str]
    """Class of diffusers that loads and samples it; `_class_name` of its model_index.json."""
    load_options: ClassVar[Mapping[str, Any]] = {}
    """What else its `from_pretrained` is told."""
    network_name: ClassVar[Literal["unet", "transformer"]]
    """The denoising network's name in the pipeline, and the prefix of its weights in deltas."""
    encoder_names: ClassVar[tuple[str, ...]]
    """Text encoders that can be trained, by name; the others stay as they are."""
    tokenizer_name: ClassVar[str] = "tokenizer"
    """The tokenizer in whose vocabulary a special token is one word."""
    attention: ClassVar[Literal["cross", "joint"]]
    """Whether pictures look at the text in layers of their own, as the attention losses need, or both at both."""
    flow: ClassVar[bool] = False
    """Whether it learns a flow, along which sampling has no place for noise."""
    patch: ClassVar[int] = 1
    """Side in latents of what is one position to the network."""
    lora_names: ClassVar[Mapping[str, str]] = {}
    """What LoRA files in kohya's layout call each network; none where all tools read diffusers' names."""
    sizes: ClassVar[Mapping[str, Mapping[str, tuple[str, Mapping[str, Any]]]]]
    """Well-known bases by a short name: of each network its class and configuration, for tables without a download."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod  # noqa: B027 (most families need nothing)
    def prepare(cls, pipe: Any) -> None:
        """Make a pipeline just loaded ready, such as giving it the scheduler that is sampled with."""

    # -- the parts -----------------------------------------------------------------------------------------

    @property
    def network(self) -> nn.Module:
        """The denoising network."""
        network: nn.Module = getattr(self.pipe, self.network_name)
        return network

    @property
    def tokenizer(self) -> Any:
        """See `tokenizer_name`."""
        return getattr(self.pipe, self.tokenizer_name)

    @property
    def dtype(self) -> torch.dtype:
        """The denoising network's type of numbers."""
        dtype: torch.dtype = getattr(self.pipe, self.network_name).dtype
        return dtype

    def tokenizer_of(self, encoder: str) -> Any:
        """The tokenizer that a text encoder reads."""
        return getattr(self.pipe, encoder.replace("text_encoder", "tokenizer"))

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every network of the pipeline by name, the denoising one first."""
        from torch import nn

        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return {self.network_name: self.network} | modules

    def trained(self, subset: str, *, text_encoder: bool) -> dict[str, str]:
        """The networks that a training changes, each with its subset: text encoders whole, when asked."""
        return {self.network_name: subset} | dict.fromkeys(self.encoder_names if text_encoder else (), "UNet")

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels: the base's native one, or `base.resolution`."""
        side = getattr(self.pipe, "default_sample_size", None) or self.pipe.unet.config.sample_size
        return int(side * self.pipe.vae_scale_factor)

    @classmethod
    def native_size(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """The native `image_size` by the configurations of the denoising network and of `vae` alone."""
        return int(configs[cls.network_name]["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1))

    @classmethod
    def patch_side(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Pixels along the side of what the network reads as one, by the configurations that `native_size` reads."""
        return int(2 ** (len(configs["vae"]["block_out_channels"]) - 1) * cls.patch)

    @classmethod
    def grid(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """Pixels that the sides of oblong pictures are multiples of, by the same."""
        return cls.patch_side(configs)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The configurations that `native_size` and `grid` read."""
        return {self.network_name: self.network.config, "vae": self.pipe.vae.config}  # type: ignore[dict-item]

    @property
    def guidance_is_learned(self) -> bool:
        """Whether the network was distilled to read the guidance scale, and knows no negative prompt."""
        return False

    @property
    def is_distilled(self) -> bool:
        """Whether the network was taught the guided prediction, so that Eq. 9 and negative prompts have no place."""
        return self.guidance_is_learned

    # -- text ----------------------------------------------------------------------------------------------

    @property
    def reader(self) -> tuple[Any, int]:
        """The tokenizer of the text encoder that reads furthest, and how many tokens that is."""
        return self.tokenizer, self.tokenizer.model_max_length

    def check_prompt(self, prompt: str) -> None:
        """Raise SvdiffError for a prompt that the text encoder would read the beginning of."""
        tokenizer, limit = self.reader
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            raise SvdiffError(f"prompt '{prompt}' is {length} tokens long; the text encoder reads {limit}: shorten it")

    def check_token(self, token: str) -> None:
        """Raise SvdiffError for a special token that is no single token: pieces of words carry meanings of their own."""
        pieces = self.tokenizer.tokenize(token)
        if len(pieces) != 1 or self.tokenizer.convert_tokens_to_ids(pieces[0]) == self.tokenizer.unk_token_id:
            raise SvdiffError(
                f"token '{token}' is {len(pieces)} tokens to the base's tokenizer ({', '.join(pieces) or 'none'}); "
                "expected one rare word of its vocabulary, e.g. sks"
            )
        number, size = self.tokenizer.convert_tokens_to_ids(pieces[0]), len(self.tokenizer)
        if size <= LARGE_VOCABULARY and number < RARE * size:
            log.warning(
                "token '%s' is number %d of the %d that the base knows; if it is an ordinary word there, training takes its "
                "meaning away: rarely used ones are the last, such as sks",
                token,
                number,
                size,
            )
        if size > LARGE_VOCABULARY and number < size / 2:
            raise SvdiffError(
                f"token '{token}' is an ordinary word to the base, number {number} of the {size} in its vocabulary, which "
                "has frequent ones first: training would take its meaning away; expected a rare one, e.g. sks"
            )

    def check_tokens(self, tokens: Sequence[str]) -> None:
        """Raise SvdiffError for special tokens that are one and the same to the tokenizer."""
        seen: dict[tuple[str, ...], str] = {}
        for token in tokens:
            self.check_token(token)
            pieces = tuple(self.tokenizer.tokenize(token))
            if pieces in seen:
                raise SvdiffError(
                    f"tokens '{seen[pieces]}' and '{token}' are one to the base's tokenizer: change `token` of one concept"
                )
            seen[pieces] = token

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditions:
        """What prompts mean to the network, with gradients where a text encoder is trained."""

    def check_eta(self, eta: float) -> None:
        """Raise SvdiffError for an η of DDIM that the base is not sampled with."""
        if self.flow:
            from svdiff.models.objective import no_eta

            no_eta(eta)

    # -- pictures ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the networks run, also those that wait elsewhere."""
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latents."""
        side = self.image_size // self.pipe.vae_scale_factor
        return self.pipe.vae.config.latent_channels, side, side

    def to_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's posterior, (B, C, h, w), of pixels (B, 3, H, W) in −1 to 1; float32."""
        with self._autoencoder() as vae:
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        return self.scaled(posterior.mean.float()), self.scaled(posterior.std.float(), deviation=True)

    def to_pictures(self, latents: Tensor) -> list[Image]:
        """Pictures of latents (B, C, h, w)."""
        with self._autoencoder() as vae:
            pixels = vae.decode(self.unscaled(latents.to(vae.dtype))).sample
        return to_8_bits(self.pipe.image_processor.postprocess(pixels, output_type="np"))

    def scaled(self, latents: Tensor, *, deviation: bool = False) -> Tensor:
        """The autoencoder's latents, or their deviation, in the numbers that the network reads."""
        config = self.pipe.vae.config
        shift = 0.0 if deviation else getattr(config, "shift_factor", None) or 0.0
        return (latents - shift) * config.scaling_factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The network's latents in the numbers of the autoencoder."""
        config = self.pipe.vae.config
        return latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

    @contextmanager
    def _autoencoder(self) -> Iterator[Any]:
        """The autoencoder, in float32 for now if it is one that overflows in float16 (SDXL's)."""
        import torch

        vae = self.pipe.vae
        overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
        if overflows:
            vae.to(torch.float32)
        try:
            yield vae
        finally:
            if overflows:
                vae.to(torch.float16)

    # -- denoising -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """How latents are noised, and what the network predicts of that."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, *, guidance: float = 1.0) -> Tensor:
        """One pass of the network on noisy latents: (B, C, h, w), what `objective.target` is the truth of.

        `guidance` is what a network is told that reads the scale; in training it is 1.
        """

    def draw(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float,
        eta: float = 0.0,
        negative: str | None = None,
        callback: Any = None,
    ) -> list[Image]:
        """Pictures by the pipeline itself, each from its own generator; `callback` is called by it after every step."""
        pixels = self.pipe(
            prompt=list(prompts),
            height=self.image_size,
            width=self.image_size,
            num_inference_steps=steps,
            generator=list(generators),
            callback_on_step_end=callback,
            output_type="np",
            **self.guided(len(prompts), guidance, eta, negative),
        ).images
        return to_8_bits(pixels)

    @abstractmethod
    def guided(self, count: int, guidance: float, eta: float, negative: str | None) -> dict[str, Any]:
        """What the pipeline is told about guidance, for `count` pictures. Raises SvdiffError for what it cannot do."""


def to_8_bits(pixels: Any) -> list[Image]:
    """Pictures of an array (B, H, W, 3) in 0 to 1. Raises SvdiffError for not-a-numbers, which would come out black."""
    import numpy as np
    from diffusers.image_processor import VaeImageProcessor

    if not np.isfinite(pixels).all():
        raise SvdiffError(
            "the network drew pixels that are not finite numbers: the weights or shifts in force are too large for the "
            "precision; use a smaller scale, train with lower rates, or sample in float32"
        )
    pictures: list[Image] = VaeImageProcessor.numpy_to_pil(pixels)
    return pictures


def family_class(name: str, model: str) -> type[Family]:
    """The family of a pipeline's class name. Raises SvdiffError, naming `model`, for one that is not supported."""
    if name not in FAMILIES:
        raise SvdiffError(f"base.model '{model}' is a {name}; supported are {', '.join(FAMILIES)}")
    module, _, attribute = FAMILIES[name].partition(":")
    family: type[Family] = getattr(import_module(f"svdiff.models.{module}"), attribute)
    return family


def family_of(pipe: Any) -> Family:
    """The family's view of a loaded pipeline."""
    name = type(pipe).__name__
    return family_class(name, getattr(pipe, "name_or_path", name))(pipe)
