"""What each output of a convolution reads."""

from collections.abc import Sequence

from torch import Tensor, nn


def patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Unfold the inputs of a convolution, of any number of spatial dimensions.

    Args:
        inputs: [batch, channels, *sizes], or without the batch.
        kernel: Size of the kernel along each spatial dimension.
        stride: Likewise.
        padding: Zeros on both sides, likewise.
        dilation: Likewise.
        groups: Groups of channels.

    Returns:
        [groups, outputs, channels / groups * positions], in the order of the flattened kernel.
    """
    spatial = len(kernel)
    if inputs.ndim == spatial + 1:
        inputs = inputs[None]
    padded = nn.functional.pad(inputs, [side for size in reversed(padding) for side in (size, size)])
    for number, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True)):
        padded = padded.unfold(2 + number, spread * (size - 1) + 1, step)[..., ::spread]
    # [batch, channels, *outputs, *positions]
    batch, channels = padded.shape[:2]
    split = padded.reshape(batch, groups, channels // groups, *padded.shape[2:])
    places = range(3, 3 + spatial)
    ordered = split.permute(1, 0, *places, 2, *range(3 + spatial, 3 + 2 * spatial))
    return ordered.reshape(groups, -1, ordered.shape[2 + spatial :].numel())
