"""Low-rank adapters (LoRA, arXiv 2106.09685): a projection x W becomes x W + (x A) B · alpha / rank.

Adapters are leaves ``lora_a`` and ``lora_b`` beside the kernel that they change. A tree that has any is trained in them
alone: ``trainable`` takes them out, ``with_trainable`` puts them back. The matrices of such a model do not change, so
they are kept in the type that it computes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxnr.config import PROJECTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which projections of every layer have adapters, and how wide they are; rank 0 for none."""

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0


NO_LORA = LoraConfig()


def frozen_dtype(config: LoraConfig, compute: Any) -> Any:
    """Of the matrices of a model: float32 where they are trained, ``compute`` where adapters are, beside them."""
    return compute if config.rank else jnp.float32


class Projection(nn.Module):
    """A dense layer with float32 parameters (its kernel: ``kernel_dtype``), and with adapters where ``rank`` is not 0.

    B begins at zero, so that a model with new adapters is the model without.
    """

    features: int
    use_bias: bool
    dtype: jnp.dtype
    kernel_init: Callable[..., Any]
    rank: int = 0
    scale: float = 0.0
    kernel_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, self.features), self.kernel_dtype)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32).astype(self.dtype)
        if self.rank:
            a = self.param("lora_a", nn.initializers.lecun_normal(), (width, self.rank), jnp.float32)
            b = self.param("lora_b", nn.initializers.zeros_init(), (self.rank, self.features), jnp.float32)
            y += (x @ a.astype(self.dtype)) @ b.astype(self.dtype) * self.scale
        return y


def trainable(params: dict) -> dict:
    """The adapters of a tree, or the whole tree where it has none."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1].startswith("lora_")}
    return traverse_util.unflatten_dict(adapters or flat)


def with_trainable(params: dict, changed: dict) -> dict:
    """``params`` with the leaves of ``changed``, which is shaped as ``trainable(params)``."""
    return traverse_util.unflatten_dict({**traverse_util.flatten_dict(params), **traverse_util.flatten_dict(changed)})


def without_adapters(params: dict) -> dict:
    """The tree of the model without adapters: what it was before they were trained."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: leaf for path, leaf in flat.items() if not path[-1].startswith("lora_")})


def with_new_adapters(params: dict, abstract: dict, key: jax.Array) -> dict:
    """``params`` with the adapters that ``abstract`` has beside them, as they begin: A random, B zero."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(abstract)
    given: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    for number, path in enumerate(sorted(path for path in flat if path not in given)):
        leaf = flat[path]
        deviation = leaf.shape[-2] ** -0.5 if path[-1] == "lora_a" else 0.0
        given[path] = deviation * jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
    return traverse_util.unflatten_dict(given)


def merge(params: dict, config: LoraConfig) -> dict:
    """The parameters of the same model without adapters: each kernel W becomes W + A B · scale, in float32."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b = flat.pop(path), flat.pop((*path[:-1], "lora_b"))
        kernel = (*path[:-1], "kernel")
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # kernels of all layers: [L, in, out]
        flat[kernel] = flat[kernel] + product * config.scale
    return traverse_util.unflatten_dict(flat)
