"""What differs between families of base models, behind one interface; a family is one file of facts beside this one.

Training, deltas, scores and stages ask a `Family` and know no pipeline by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

FAMILIES: dict[str, str] = {"StableDiffusionPipeline": "stable_diffusion:StableDiffusion"}
"""Module and class of the family that a `_class_name` of model_index.json belongs to."""


class Family:
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
    lora_names: ClassVar[Mapping[str, str]]
    """What LoRA files in kohya's layout call each network."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @classmethod
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
        """The networks that a training changes, each with its subset: text encoders whole, when asked.

        Raises SvdiffError where they are asked for and the base has none that can be trained.
        """
        if text_encoder and not self.encoder_names:
            raise SvdiffError(
                f"train.text_encoder is true, and the text encoder of {self.title} is a language model, which is not "
                "trained; set it to false"
            )
        return {self.network_name: subset} | dict.fromkeys(self.encoder_names if text_encoder else (), "UNet")

    @property
    def image_size(self) -> int:
        """Side of the native pictures in pixels."""
        raise NotImplementedError

    @classmethod
    def native_size(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """`image_size` by the configurations of the denoising network and of `vae` alone."""
        raise NotImplementedError

    # -- text ----------------------------------------------------------------------------------------------

    def check_prompt(self, prompt: str) -> None:
        """Raise SvdiffError for a prompt that the text encoder would read the beginning of."""
        length, limit = len(self.tokenizer(prompt).input_ids), self.tokenizer.model_max_length
        if length > limit:
            raise SvdiffError(f"prompt '{prompt}' is {length} tokens long; the text encoder reads {limit}: shorten it")

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """What prompts mean to the network, with gradients where a text encoder is trained."""
        raise NotImplementedError

    # -- pictures ------------------------------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a native picture's latents."""
        raise NotImplementedError

    def to_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's posterior, (B, C, h, w), of pixels (B, 3, H, W) in −1 to 1; float32."""
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def to_pictures(self, latents: Tensor) -> list[Image]:
        """Pictures of latents (B, C, h, w)."""
        vae = self.pipe.vae
        scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
        pixels = vae.decode(latents.to(vae.dtype) / scale + shift).sample
        return to_8_bits(self.pipe.image_processor.postprocess(pixels, output_type="np"))

    # -- denoising -----------------------------------------------------------------------------------------

    @property
    def objective(self) -> Objective:
        """How latents are noised, and what the network predicts of that."""
        raise NotImplementedError

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """One pass of the network on noisy latents: (B, C, h, w), what `objective.target` is the truth of."""
        raise NotImplementedError

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
        raise NotImplementedError


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
