"""A backbone for other libraries: under the names of timm or of transformers, and as an ONNX graph.

Neither of them is imported here; ONNX needs the packages that `write_onnx` names.

Letters: B images, N patch tokens, D width, S side of the images in pixels.
"""
import math
import re
from importlib.util import find_spec

import torch
from torch import nn

from engine import InputError
from models.swin_transformer import SwinTransformer
from models.vision_transformer import resample_positions

TRAINING_ONLY = "masked_embed"
HF_OUTSIDE = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm",
              "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
              "pos_embed": "embeddings.position_embeddings", "norm": "layernorm"}
HF_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
            "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
# LayerNorm of c x with an epsilon of c^2 e is that of x with e. In `SwinModel` two kinds of norms have 1e-5, whatever its
# configuration says: with tokens c times as large, all of them can have it, and every output is that of 1e-6.
SWIN_EPS = 1e-5
SWIN_SCALE = math.sqrt(SWIN_EPS / 1e-6)
SWIN_SCALED = r"patch_embed\.|.*(attn\.proj|mlp\.fc2|downsample\.reduction)\."  # what tokens are made of


def timm_state_dict(state):
    """Backbone names of this project to timm's: Swin's patch merging belongs to the stage that it begins, not ends.

    Beside registers timm has no position for the class token: it goes into that token, unless it is there already.
    """
    state = {name: value for name, value in state.items()
             if name != TRAINING_ONLY and not name.endswith(("relative_position_index", "attn_mask"))}
    positions = state.get("pos_embed") if {"reg_token", "cls_token"} <= state.keys() else None
    if positions is not None and positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 != positions.shape[1]:
        state |= {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:].clone()}  # of 1 + N
    return {re.sub(r"^layers\.(\d{1,4})\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", name): value
            for name, value in state.items()}


# ---------------------------------------------------------------- transformers

def hf_model(model, arch, image_size):
    """(content of config.json, state dictionary) with which `transformers.AutoModel` gives this network's tokens.

    A ViT becomes a `ViTModel` for images of `image_size` pixels whose pooler hands [CLS] on, one with registers a
    `Dinov2WithRegistersModel`, which gives these out too, behind [CLS]; a Swin a `SwinModel`, whose pooler is the mean. The
    names are those of transformers 4, which 5 reads too. Raises InputError for a Swin that `SwinModel` has no settings for.
    """
    if isinstance(model, SwinTransformer):
        return _hf_swin(model, arch, image_size)
    cells, block = image_size // model.patch_size, model.blocks[0]
    state = {name: value for name, value in model.state_dict().items() if name != TRAINING_ONLY}
    state["pos_embed"] = resample_positions(model.pos_embed, cells, cells, model.pos_grid)
    config = {"hidden_size": model.embed_dim, "num_hidden_layers": len(model.blocks),
              "num_attention_heads": block.attn.num_heads, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
              "image_size": image_size, "patch_size": model.patch_size}
    if model.reg_token is None:
        config = {"architectures": ["ViTModel"], "model_type": "vit", **config,
                  "intermediate_size": block.mlp.fc1.out_features, "pooler_act": "linear"}
        extra = {"pooler.dense.weight": torch.eye(model.embed_dim), "pooler.dense.bias": torch.zeros(model.embed_dim)}
    else:
        config = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers", **config,
                  "mlp_ratio": block.mlp.fc1.out_features // model.embed_dim,
                  "num_register_tokens": model.reg_token.shape[1]}
        extra = {f"encoder.layer.{i}.layer_scale{k}.lambda1": torch.ones(model.embed_dim)
                 for i in range(len(model.blocks)) for k in (1, 2)}
        extra["embeddings.mask_token"] = torch.zeros(1, model.embed_dim)
    blocks = HF_BLOCK if model.reg_token is None else {"attn.proj": HF_BLOCK["attn.proj"]}
    named = {_hf_name(name, "attention.attention.", blocks): value for name, value in state.items()}
    return config, _split_qkv(named) | extra


def _hf_swin(model, arch, image_size):
    window = model.layers[0].blocks[0].window_size[0]
    if (window, image_size) != (7, 224):
        raise InputError(f"--format hf: {arch} with window {window} for images of {image_size} pixels is not supported; "
                         "SwinModel computes the same with window 7 and 224 pixels only")
    config = {"architectures": ["SwinModel"], "model_type": "swin", "embed_dim": model.layers[0].blocks[0].dim,
              "depths": [len(stage.blocks) for stage in model.layers],
              "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers], "window_size": window,
              "mlp_ratio": 4.0, "hidden_act": "gelu", "layer_norm_eps": SWIN_EPS, "image_size": image_size,
              "patch_size": model.patch_size}
    named = {}
    for name, value in model.state_dict().items():
        if name != TRAINING_ONLY:
            value = value * SWIN_SCALE if re.match(SWIN_SCALED, name) else value
            named[_hf_name(name, "attention.self.", HF_BLOCK)] = value
    return config, _split_qkv(named)


def _hf_name(name, attention, blocks):
    """A name of ours as transformers has it, with "qkv" still in one.

    attention: where queries, keys and values are; blocks: names of parts of a block.
    """
    name = re.sub(r"^blocks\.", "encoder.layer.", re.sub(r"^layers\.", "encoder.layers.", name))
    for ours, theirs in HF_OUTSIDE.items():
        name = re.sub(rf"^{ours}\b", theirs, name)
    for ours, theirs in blocks.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return re.sub(r"\.attn\.(?=qkv|relative)", f".{attention}", name)


def _split_qkv(named):
    found = {}
    for name, value in named.items():
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True) if "qkv" in name else [("qkv", value)]
        found |= {name.replace("qkv", part): rows for part, rows in parts}
    return found


def hf_preprocessor(image_size, stats):
    """Content of preprocessor_config.json: what evaluations do, resize to 256/224, centre crop, normalise."""
    return {"image_processor_type": "BitImageProcessor", "do_resize": True,
            "size": {"shortest_edge": round(image_size * 256 / 224)}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": image_size, "width": image_size}, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(stats.mean), "image_std": list(stats.std), "do_convert_rgb": True}


# ---------------------------------------------------------------- ONNX

class TokenOutputs(nn.Module):
    """Images [B, 3, S, S] to [CLS], or the mean, [B, D] and the patch tokens [B, N, D]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        tokens = self.model(images, return_all_tokens=True)  # [B, 1 + N, D]
        return tokens[:, 0], tokens[:, 1:]


def write_onnx(model, image_size, stats, path):
    """Write a graph from `images` [B, 3, S, S], float32 and normalised, to `cls` [B, D] and `patches` [B, N, D].

    B is free. For a Swin `cls` is the mean. The pixel statistics and S are in the file's metadata. Raises InputError where
    the packages for it are not installed.
    """
    lacking = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if lacking:
        raise InputError(f"--format onnx needs what is not installed here: pip install {' '.join(lacking)}")
    images = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad():
        model(images)  # a Swin keeps its masks from here on: they become constants
        program = torch.onnx.export(
            TokenOutputs(model).eval(), (images,), input_names=["images"], output_names=["cls", "patches"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False)
    program.model.metadata_props.update(
        {name: " ".join(map(str, values)) for name, values in stats._asdict().items()} | {"image_size": str(image_size)})
    program.save(path, external_data=False)
