"""Tiny layouts of every family with random weights, made of diffusers' and transformers' own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.conftest import WORDS, make_tiny_base, write_tiny_tokenizer

PIXELS = 16  # pictures are 16 × 16, latents 8 × 8
LENGTH = 16  # tokens
CHAT = "{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }} {% endfor %}"
FAMILIES = ("sd", "sd2", "sdxl", "sd3", "sd3.5", "flux", "flux-schnell", "flux2", "flux2-klein")


def make_tiny(family: str, folder: Path) -> Path:
    """Write a random base of `family` to `folder`."""
    if family == "sd":
        return make_tiny_base(folder)
    if family == "sd2":
        return make_tiny_base(folder, prediction_type="v_prediction", use_linear_projection=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = {
            "sdxl": _sdxl,
            "sd3": _sd3,
            "sd3.5": lambda words: _sd3(words, qk_norm="rms_norm", dual_attention_layers=(0,)),
            "flux": _flux,
            "flux-schnell": lambda words: _flux(words, guidance_embeds=False),
            "flux2": _flux2,
            "flux2-klein": _flux2_klein,
        }[family](folder / "words")
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                _spread(part)
    pipe.save_pretrained(folder)
    return folder


@torch.no_grad()
def _spread(part: torch.nn.Module) -> None:
    """Fresh norms are all ones and zeros, some biases and gates too: a little spread tells their entries apart."""
    for parameter in part.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.add_(0.05 * torch.randn_like(parameter))


def base_settings(family: str, folder: Path) -> dict[str, Any]:
    """Section `base` of params.yaml for a tiny base; Flux's pictures have no size of their own."""
    return {"model": str(folder)} | ({"resolution": PIXELS} if family.startswith("flux") else {})


def _clip_tokenizer(words: Path) -> Any:
    from transformers import CLIPTokenizer

    write_tiny_tokenizer(words)
    return CLIPTokenizer.from_pretrained(words, model_max_length=LENGTH)


def _clip(tokenizer: Any, *, projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [("▁", -4.0)] + [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = special + [(f"▁{word}", -2.0) for word in WORDS] + letters
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer) + 8, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tokenizer, T5EncoderModel(config)


def _vae(channels: int, **settings: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=PIXELS,
        **settings,
    )


def _sdxl(words: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    tokenizer = _clip_tokenizer(words)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4, scaling_factor=0.13025),
        text_encoder=_clip(tokenizer, projected=False),
        text_encoder_2=_clip(tokenizer, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def _sd3(words: Path, **settings: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, (tokenizer_3, text_encoder_3) = _clip_tokenizer(words), _t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        **settings,
    )
    return StableDiffusion3Pipeline(
        vae=_vae(4, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(tokenizer, projected=True),
        text_encoder_2=_clip(tokenizer, projected=True),
        text_encoder_3=text_encoder_3,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=tokenizer_3,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(words: Path, guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, (tokenizer_2, text_encoder_2) = _clip_tokenizer(words), _t5()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance_embeds,
    )
    return FluxPipeline(
        vae=_vae(4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer, projected=False),
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
    )


def _flux2_parts(words: Path, guidance_embeds: bool, width: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
    )
    vae.bn.running_mean.normal_(std=0.1)
    vae.bn.running_var.uniform_(0.5, 1.5)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler, "tokenizer": _chat_tokenizer(words)}


def _chat_tokenizer(words: Path) -> Any:
    """A byte-level tokenizer that knows the letters and a few words, with a chat template."""
    from transformers import Qwen2Tokenizer

    symbols = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)} | {"<|endoftext|>": len(symbols)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=3 * LENGTH)
    tokenizer.chat_template = CHAT
    return tokenizer


def _flux2_klein(words: Path) -> Any:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    parts = _flux2_parts(words, guidance_embeds=False, width=16)
    config = Qwen3Config(
        vocab_size=len(parts["tokenizer"]),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return Flux2KleinPipeline(text_encoder=Qwen3ForCausalLM(config), **parts)


def _flux2(words: Path) -> Any:
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    parts = _flux2_parts(words, guidance_embeds=True, width=16)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = Mistral3Config(
        text_config=size
        | {"model_type": "mistral", "vocab_size": len(parts["tokenizer"]), "num_key_value_heads": 2,
           "max_position_embeddings": 64},
        vision_config=size | {"model_type": "pixtral", "image_size": 16, "patch_size": 4},
        image_token_index=1,
    )  # fmt: skip
    return Flux2Pipeline(text_encoder=Mistral3ForConditionalGeneration(config), **parts)
