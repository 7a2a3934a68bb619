"""Random layers for property tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def layer(seed: int, rows: int, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A delta [rows, size] and the Hessian of correlated inputs, float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + 0.3
    inputs = torch.randn(tokens, size, generator=generator) @ mixing
    return torch.randn(rows, size, generator=generator), 2 / 4 * inputs.T @ inputs


layers = st.builds(
    layer,
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 12),
    size=st.integers(2, 24),
    tokens=st.integers(1, 60),
)
