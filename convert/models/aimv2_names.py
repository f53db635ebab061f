"""Naming schemes ("layouts") of AIMv2 vision encoders; the released names, SAILViT's and Apple's, are canonical."""

from dataclasses import dataclass, replace

from .name_tables import Dimensions, ModelFamily, NamingScheme, TensorSource, plan_tensors, tensor_specs


PATCHES, POSITIONS = "preprocessor.patchifier.proj", "preprocessor.pos_embed"

HEAD = r"head\..*"

TRANSFORMERS = {
    "preprocessor.patchifier.proj": "embeddings.patch_embed",
    "preprocessor.patchifier.norm": "embeddings.rms_norm",
    "preprocessor.pos_embed": "embeddings.position_embedding.weight",
    "trunk.blocks.{}.norm_1": "encoder.layers.{}.rms_norm1",
    "trunk.blocks.{}.attn.qkv": tuple(f"encoder.layers.{{}}.attention.{part}_proj" for part in "qkv"),
    "trunk.blocks.{}.attn.proj": "encoder.layers.{}.attention.out_proj",
    "trunk.blocks.{}.norm_2": "encoder.layers.{}.rms_norm2",
    "trunk.blocks.{}.mlp.fc1": "encoder.layers.{}.ffn.gate_proj",
    "trunk.blocks.{}.mlp.fc2": "encoder.layers.{}.ffn.down_proj",
    "trunk.blocks.{}.mlp.fc3": "encoder.layers.{}.ffn.up_proj",
    "trunk.post_trunk_norm": "rms_norm",
}

RELEASED = {name: name for name in TRANSFORMERS}

OVIS2_TRANSFORMERS = {**TRANSFORMERS, "preprocessor.patchifier.proj": "embeddings.patch_embedding"}

TIMM = {
    "preprocessor.patchifier.proj": "patch_embed.proj",
    "preprocessor.patchifier.norm": "patch_embed.norm",
    "preprocessor.pos_embed": "pos_embed",
    "trunk.blocks.{}.norm_1": "blocks.{}.norm1",
    "trunk.blocks.{}.attn.qkv": "blocks.{}.attn.qkv",
    "trunk.blocks.{}.attn.proj": "blocks.{}.attn.proj",
    "trunk.blocks.{}.norm_2": "blocks.{}.norm2",
    "trunk.blocks.{}.mlp.fc1": "blocks.{}.mlp.fc1_g",
    "trunk.blocks.{}.mlp.fc2": "blocks.{}.mlp.fc2",
    "trunk.blocks.{}.mlp.fc3": "blocks.{}.mlp.fc1_x",
    "trunk.post_trunk_norm": "norm",
}


OVIS2_PREFIX = "model.vision_tower.transformer."
FLAT = (POSITIONS,)
SCHEMES = (
    NamingScheme("sailvit", "released SAILViT, Apple's AIMv2", RELEASED, "", HEAD),
    NamingScheme("lit", "image encoder of Apple's AIMv2 lit", RELEASED, "image_encoder.", HEAD),
    NamingScheme("ovis2", "Ovis2, original", RELEASED, "visual_tokenizer.backbone.", HEAD),
    NamingScheme("transformers", "transformers' aimv2_vision_model", TRANSFORMERS, "", HEAD, FLAT),
    NamingScheme("ovis2-transformers", "Ovis2 in transformers", OVIS2_TRANSFORMERS, OVIS2_PREFIX, HEAD, FLAT, False),
    NamingScheme("timm", "timm's aimv2", TIMM, "", r"(head|fc_norm)\..*", has_sincos=False),
)
LAYOUTS = {scheme.name: scheme for scheme in SCHEMES}


@dataclass(frozen=True)
class AIMv2Dimensions(Dimensions):
    """The dimensions of an encoder, under the names of SAILViTConfig; grid_size is the side of the square of learned
    position embeddings, None if there are none (sine-cosine)."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_channels: int
    patch_size: int
    grid_size: int | None
    qkv_bias: bool = False
    use_bias: bool = False

    def parameters(self) -> dict[tuple[str, str], tuple[int, ...]]:
        width, mlp, patch = self.hidden_size, self.intermediate_size, self.patch_size
        shapes: dict[tuple[str, str], tuple[int, ...]] = {
            (PATCHES, ".weight"): (width, self.num_channels, patch, patch),
            (PATCHES, ".bias"): (width,),
            ("preprocessor.patchifier.norm", ".weight"): (width,),
        }
        if self.grid_size is not None:
            shapes[POSITIONS, ""] = (1, self.grid_size**2, width)
        for norm in ("trunk.blocks.{}.norm_1", "trunk.blocks.{}.norm_2", "trunk.post_trunk_norm"):
            shapes[norm, ".weight"] = (width,)
        for name, rows, columns, has_bias in (
            ("attn.qkv", 3 * width, width, self.qkv_bias),
            ("attn.proj", width, width, self.use_bias),
            ("mlp.fc1", mlp, width, self.use_bias),
            ("mlp.fc2", width, mlp, self.use_bias),
            ("mlp.fc3", mlp, width, self.use_bias),
        ):
            shapes[f"trunk.blocks.{{}}.{name}", ".weight"] = (rows, columns)
            if has_bias:
                shapes[f"trunk.blocks.{{}}.{name}", ".bias"] = (rows,)
        return shapes


LARGEST = AIMv2Dimensions(1, 1, 1, 1, 1, 1, qkv_bias=True, use_bias=True)
AIMV2 = ModelFamily("AIMv2 encoder", "vision", LAYOUTS, (PATCHES,), LARGEST)

is_aimv2 = AIMV2.fits


def plan_layout(
    source: NamingScheme, target: NamingScheme, dimensions: AIMv2Dimensions, grid_size: int | None
) -> list[TensorSource]:
    """
    Return where the elements of every tensor of the target layout come from. If its grid_size is not that of the
    source's dimensions, the position embeddings have no sources: they are computed.
    """
    stored = tensor_specs(source, dimensions)
    if grid_size != dimensions.grid_size:
        stored = [spec for spec in stored if spec.canonical != POSITIONS]
    return plan_tensors(stored, tensor_specs(target, replace(dimensions, grid_size=grid_size)))
