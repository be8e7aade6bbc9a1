"""Rotary positions, split-half: channel i turns together with channel i + HS/2, as in Llama, Mistral and Qwen.

(The other convention, neighbouring channels 2i and 2i+1, is GPT-J's; mixing them up is silent and wrong.)

MATH    inv_freq_i = theta^(-2i/HS), i < HS/2        angle_ti = t * inv_freq_i
        out_i = x_i cos - x_(i+HS/2) sin             out_(i+HS/2) = x_(i+HS/2) cos + x_i sin
        The gradient is the rotation by the opposite angle.
SOURCE  Su et al. 2021, arXiv:2104.09864; scaling: Llama 3.1, as in transformers' `llama3` rope type
"""

import math

import numpy as np

from apr.config import RopeScaling


def inverse_frequencies(head_size: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each channel pair: (HS/2,) float64.

    With llama3 scaling, waves longer than original_max / low_freq_factor are slowed by `factor`, those shorter than
    original_max / high_freq_factor are left alone, and those between are blended linearly.
    """
    inv_freq = theta ** (-np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if scaling is None:
        return inv_freq
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return inv_freq * (keep + (1.0 - keep) / scaling.factor)


def rope_tables(positions: np.ndarray, head_size: int, theta: float, scaling: RopeScaling | None,
                dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every angle, each (T, 1, HS/2) of `dtype`; positions (T,) int. Angles are computed in float64."""
    angles = positions[:, None].astype(np.float64) * inverse_frequencies(head_size, theta, scaling)
    return np.cos(angles).astype(dtype)[:, None, :], np.sin(angles).astype(dtype)[:, None, :]


def rope_forward(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x (B, T, H, HS); cos, sin (T, 1, HS/2). Returns the rotated heads, same shape."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = np.empty_like(x)
    out[..., :half] = first * cos - second * sin
    out[..., half:] = second * cos + first * sin
    return out


def rope_backward(dout: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Gradient of rope_forward: dout (B, T, H, HS). Returns dx, same shape."""
    return rope_forward(dout, cos, -sin)
