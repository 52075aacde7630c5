"""The pocket networks of each family: new ones, and those grown from the first model, a Stable Diffusion.

    SDXL        its U-Net, with more states of the text, a pooled text and time ids, all through zero weights:
                before any training it predicts what the first model does
    flow        a new transformer of Stable Diffusion 3's kind, on the first model's latents and text encoders
    velocity    its U-Net, on a noise schedule that ends in pure noise

Text encoders of grown models are not trained, as those of SDXL and Stable Diffusion 3 were not.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.nn.utils import parametrize
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from szt_utils.captions import OBJECT_TEMPLATES
from szt_utils.models import Condition, tokenize
from szt_utils.models.sd3 import SD3
from szt_utils.models.sdxl import SDXL
from szt_utils.models.stable_diffusion import StableDiffusion
from szt_utils.pocket.scenes import COLORS, SHAPES
from szt_utils.pocket.vocabulary import pocket_tokenizer

SCHEDULE = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                steps_offset=1, clip_sample=False)
# The normalized states are as large as the stream beside them. A learned embedding is part of that stream,
# and so remains small beside what the text encoder makes of it.
STREAM_SCALE = 16
# Of Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed".
VELOCITY = dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")


# --- The first model

def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(80, 160),
        norm_num_groups=16, cross_attention_dim=128,
        attention_head_dim=5,  # Diffusers takes this for the number of heads
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])


def new_text_encoder(tokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


# --- Text encoders of a pipeline that takes the second-to-last hidden states, and a projection

def _inner(encoder: torch.nn.Module) -> torch.nn.Module:
    """The transformer in a text encoder; transformers 5 has flattened CLIPTextModel."""
    return getattr(encoder, "text_model", encoder)


def _like(encoder: CLIPTextModel, cls: type, **changes) -> torch.nn.Module:
    """A text encoder of other sizes; its projection and what it writes to the stream are zero."""
    config = {**encoder.config.to_dict(), "projection_dim": encoder.config.hidden_size, **changes}
    grown = cls(CLIPTextConfig(**config))
    for name, weight in grown.named_parameters():
        if "layer_norm" not in name or "bias" in name:
            torch.nn.init.zeros_(weight)
    return grown


@torch.no_grad()
def deepened(encoder: CLIPTextModel, layers: int) -> CLIPTextModelWithProjection:
    """The text encoder with further layers that add nothing; it projects the end of the text as it is."""
    grown = _like(encoder, CLIPTextModelWithProjection,
                  num_hidden_layers=encoder.config.num_hidden_layers + layers)
    _inner(grown).load_state_dict(_inner(encoder).state_dict(), strict=False)
    torch.nn.init.eye_(grown.text_projection.weight)
    return grown


@torch.no_grad()
def widened(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """The text encoder, twice as wide: the second half of its second-to-last hidden states is the last hidden
    state of the given one times STREAM_SCALE, after its last normalization, which SDXL skips.

    The first half is the stream of the given one, centered, so that zeros beside it change the normalizations
    by a factor sqrt(2) only. A layer of its own then writes the normalized stream into the second half: with
    gelu(a) - gelu(-a) = a its perceptron is linear. The last layer adds nothing.
    """
    width, layers = encoder.config.hidden_size, encoder.config.num_hidden_layers
    grown = _like(
        encoder, CLIPTextModelWithProjection, hidden_size=2 * width, num_hidden_layers=layers + 2,
        num_attention_heads=2 * encoder.config.num_attention_heads,
        layer_norm_eps=encoder.config.layer_norm_eps / 2,
        eos_token_id=2)  # as SDXL's: pooled is the token of the largest id
    state = _inner(grown).state_dict()
    for name, weight in _inner(encoder).state_dict().items():
        if "embedding.weight" in name:
            weight = weight - weight.mean(1, keepdim=True)
        elif "out_proj" in name or "fc2" in name:
            weight = weight - weight.mean(0)
        elif "norm" in name and "weight" in name:
            weight = weight / 2**0.5
        state[name][tuple(slice(size) for size in weight.shape)] = weight
    layer, norm = _inner(grown).encoder.layers[layers], _inner(encoder).final_layer_norm
    identity, gain = torch.eye(width), STREAM_SCALE * norm.weight[:, None]
    layer.layer_norm2.weight.fill_(0.5**0.5)
    layer.mlp.fc1.weight[:2 * width, :width] = torch.cat([identity, -identity])
    layer.mlp.fc2.weight[width:, :2 * width] = torch.cat([identity, -identity], 1) * gain
    layer.mlp.fc2.bias[width:] = STREAM_SCALE * norm.bias
    grown.text_projection.weight[:, :width] = identity
    return grown


class _PerColumn(torch.nn.Module):
    """A weight whose columns are divided by the root mean square of the inputs that they are for."""

    def __init__(self, size: torch.Tensor):
        super().__init__()
        self.register_buffer("size", size, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / self.size

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.size


@torch.no_grad()
def balance(model: SDXL | SD3) -> None:
    """Let the layers that read the text's states learn as if every one of them had a mean square of 1.

    A text encoder's stream is not normalized; it is up to 20 times as large as what a U-Net has learned to
    read. An optimizer whose steps do not follow the size of its inputs would change too much there at once.
    """
    texts = [template.format(f"{color} {shape}") for template, color, shape in
             zip(OBJECT_TEMPLATES * 3, [*COLORS] * 9, [*SHAPES] * 9, strict=False)]
    states = model.condition(tokenize(model, texts))["states"][:, :model.tokenizers[0].model_max_length]
    size = states.square().mean((0, 1)).sqrt().clamp(min=0.1)
    for name, module in model.network.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v", "context_embedder")):
            parametrize.register_parametrization(module, "weight", _PerColumn(size))


def merge(network: torch.nn.Module) -> None:
    """Make the weights of `balance` plain ones again."""
    for module in network.modules():
        if isinstance(module, torch.nn.Linear) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


# --- The families

def grow_velocity(first: StableDiffusion) -> StableDiffusion:
    """The first model with v-prediction and zero terminal SNR."""
    return StableDiffusion(first.path, first.tokenizers, first.text_encoders, first.vae, first.network,
                           DDPMScheduler(**SCHEDULE, **VELOCITY))


@torch.no_grad()
def grow_sdxl(first: StableDiffusion) -> SDXL:
    """Two text encoders: the first model's and `widened`, whose pooled text is of 128 numbers; time ids.

    A model of SDXL itself is taken as it is.
    """
    if isinstance(first, SDXL):
        return first
    (encoder,), ids = first.text_encoders, 32
    second, width = widened(encoder), encoder.config.hidden_size
    unet = UNet2DConditionModel.from_config({
        **first.network.config, "cross_attention_dim": 3 * width, "addition_embed_type": "text_time",
        "addition_time_embed_dim": ids, "projection_class_embeddings_input_dim": 6 * ids + width})
    state = unet.state_dict()
    for name, weight in first.network.state_dict().items():
        if weight.shape != state[name].shape:  # reads the text's states: of the first, raw, normalized
            state[name].zero_()[:, 2 * width:] = weight / STREAM_SCALE
        else:
            state[name].copy_(weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.weight)
    torch.nn.init.zeros_(unet.add_embedding.linear_2.bias)
    return SDXL(first.path, first.tokenizers * 2, [encoder, second], first.vae, unet,
                DDPMScheduler(**SCHEDULE))


class OneEmptyToken:
    """Joint attention where the last token of the context stands for `count` equal ones.

    Without T5, 256 zeros stand for its tokens. They stay equal from layer to layer, so one of them, with
    log 256 added to its scores, gives the same result in a third of the time.
    """

    def __init__(self, count: int):
        self.bias = math.log(count)

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return x if norm is None else norm(x)

        image, context = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q),
                           heads(attn.add_q_proj(context), attn.norm_added_q)], 2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k),
                         heads(attn.add_k_proj(context), attn.norm_added_k)], 2)
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(context))], 2)
        bias = F.pad(query.new_full((1,), self.bias), (key.shape[2] - 1, 0))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.expand(query.shape[2], -1))
        image, context = mixed.transpose(1, 2).flatten(2).split([image.shape[1], context.shape[1]], 1)
        return attn.to_out[0](image), context if attn.context_pre_only else attn.to_add_out(context)


class ShortSD3(SD3):
    """Stable Diffusion 3 without T5, whose zeros are one token; its network has `OneEmptyToken`."""

    def condition(self, ids: list[torch.Tensor], sizes: torch.Tensor | None = None) -> Condition:
        condition = super().condition(ids, sizes)
        return {**condition, "states": condition["states"][:, :ids[0].shape[1] + 1]}


def shortened(model: SD3) -> ShortSD3:
    """The model, without T5, with one token for its zeros."""
    model.network.set_attn_processor(OneEmptyToken(SD3.t5_parts[1]))
    return ShortSD3(model.path, model.tokenizers, model.text_encoders, model.vae, model.network,
                    model.scheduler)


def new_transformer(states: int, pooled: int, heads: int, layers: int, patch: int) -> SD3Transformer2DModel:
    """A transformer on patches of `patch` x `patch` latents, with heads of 32 channels; it predicts zeros at
    first."""
    width = 32 * heads
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=patch, in_channels=4, out_channels=4, num_layers=layers,
        attention_head_dim=32, num_attention_heads=heads, joint_attention_dim=states,
        caption_projection_dim=width, pooled_projection_dim=pooled, pos_embed_max_size=16 // patch,
        qk_norm="rms_norm")
    for name, module in transformer.named_modules():
        if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return transformer


def grow_flow(first: StableDiffusion, heads: int = 5, layers: int = 5, patch: int = 1) -> SD3:
    """A new transformer, which is given what goes into the text encoder's last layer and what comes out.

    A model of Stable Diffusion 3 itself is taken as it is.
    """
    if isinstance(first, SD3):
        return shortened(first)
    (encoder,) = first.text_encoders
    encoders = [deepened(encoder, 0), deepened(encoder, 1)]
    width = encoder.config.hidden_size
    transformer = new_transformer(2 * width, 2 * width, heads, layers, patch)
    first.vae.register_to_config(shift_factor=0.0)  # the pipeline needs a number
    return shortened(SD3(first.path, first.tokenizers * 2, encoders, first.vae, transformer,
                         FlowMatchEulerDiscreteScheduler()))


def write(model: StableDiffusion, folder: Path) -> None:
    """Save a model as a pipeline in Diffusers format."""
    text = {}
    for suffix, encoder in zip(("", "_2"), model.text_encoders, strict=False):
        # A new tokenizer: a used one would be saved with the padding of its last texts.
        text |= {f"tokenizer{suffix}": pocket_tokenizer(folder / f"tokenizer{suffix}"),
                 f"text_encoder{suffix}": encoder}
    parts = {"vae": model.vae, model.network_name: model.network, **text}
    if isinstance(model, SD3):
        pipeline = StableDiffusion3Pipeline(**parts, tokenizer_3=None, text_encoder_3=None,
                                            scheduler=model.scheduler)
    else:
        parts["scheduler"] = DDIMScheduler.from_config(model.scheduler.config, set_alpha_to_one=False)
        if isinstance(model, SDXL):
            # An empty prompt is encoded, as the first model's was.
            pipeline = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False,
                                                 add_watermarker=False)
        else:
            pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
    pipeline.save_pretrained(folder)
