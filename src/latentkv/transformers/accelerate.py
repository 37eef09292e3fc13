"""`accelerate`: an MLA model of transformers made to attend to its latents as they are cached."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from latentkv.errors import ConfigError
from latentkv.transformers.attention import NAME, SPARSE_NAME, latent_attention, latent_mask, whole_mask
from latentkv.transformers.cache_layer import LATENT_LAYERS

Model = TypeVar("Model", bound=PreTrainedModel)

_SELECT_BY_INDICES = ("deepseek_v32", "glm_moe_dsa", "axk2")
"""Models whose attention names the tokens that its indexer selects."""

_BEFORE = "_latentkv_before"  # on an accelerated model: the attention that it had, and the hook


def accelerate(model: Model) -> Model:
    """Have a model's MLA layers decode on the cached latents, through LatentKV's kernels and pages.

    `generate` gives what it gave before, within the rounding of sums; gradients are computed as before.

    Args:
        model: of transformers, with MLA layers (DeepSeek-V2 and V3, Kimi, GLM-4.7-Flash, MiniCPM3, ...), on the CPU.

    Returns:
        The same model.

    Raises:
        ConfigError: it has no MLA layer, or one that is more than that (sinks, a window, an indexer that does not name
            tokens, a projection that is not a plain one), or it is not on the CPU.
    """
    layers = _mla_layers(model)
    if hasattr(model, _BEFORE):
        return model
    for name, mask in ((NAME, latent_mask), (SPARSE_NAME, whole_mask)):
        AttentionInterface.register(name, latent_attention)
        AttentionMaskInterface.register(name, mask)
    before: str = getattr(model.config, "_attn_implementation")  # noqa: B009, for it is not theirs alone
    model.set_attn_implementation(SPARSE_NAME if any(hasattr(layer, "indexer") for layer in layers) else NAME)
    for layer in layers:
        layer.expand_kv = _leave_latents
    indices = [layer.layer_idx for layer in layers]
    hook = model.get_decoder().register_forward_pre_hook(partial(_give_cache, indices), with_kwargs=True)
    setattr(model, _BEFORE, (before, hook))
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`; caches that were filled meanwhile still work."""
    if hasattr(model, _BEFORE):
        before, hook = getattr(model, _BEFORE)
        hook.remove()
        for layer in _mla_layers(model):
            del layer.expand_kv
        model.set_attn_implementation(before)
        delattr(model, _BEFORE)
    return model


def _mla_layers(model: PreTrainedModel) -> list[Any]:
    """The attention of each MLA layer; raises as `accelerate`."""
    name = model.config.model_type
    layers: list[Any] = [each for each in model.modules() if hasattr(type(each), "expand_kv")]
    if not layers:
        raise ConfigError(f"{name} has no layer with latent attention as transformers 5.23 writes it: use it as it is.")
    for layer in layers:
        extras = ["sinks", "sliding_window", *(["indexer"] if name not in _SELECT_BY_INDICES else [])]
        more = next((each for each in extras if getattr(layer, each, None) is not None), None)
        if more is not None:
            raise ConfigError(
                f"{name} has attention with {more}, which accelerate does not compute: run it by latentkv.LLM."
            )
        if type(layer.kv_b_proj) is not nn.Linear:
            raise ConfigError(
                f"{name} has a kv_b_proj that is a {type(layer.kv_b_proj).__name__}: its weight must be plain to be "
                "absorbed. Merge adapters (merge_and_unload), or load it unquantised."
            )
        if layer.kv_b_proj.weight.device.type != "cpu":
            raise ConfigError(f"accelerate computes on CPUs, and {name} is on {layer.kv_b_proj.weight.device}.")
    return layers


def _leave_latents(latents: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `expand_kv`: what stands for keys and values is the cache itself; `latent_attention` knows."""
    return k_rope, latents


def _give_cache(
    indices: list[int], decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a forward: MLA layers of a cache that grows become layers of rows; other caches are copied from."""
    cache = kwargs.get("past_key_values")
    uses = kwargs.get("use_cache")
    if cache is None and not args[3:] and (decoder.config.use_cache if uses is None else uses):
        cache = kwargs["past_key_values"] = DynamicCache(config=decoder.config)
    if isinstance(cache, DynamicCache) and not cache.offloading:
        for index in indices:
            while len(cache.layers) <= index:
                cache.layers.append(DynamicLayer())
            layer = cache.layers[index]
            if (kind := LATENT_LAYERS.get(type(layer))) is not None:
                cache.layers[index] = taken = kind()
                vars(taken).update(vars(layer))  # tokens that it has already
    return args, kwargs
