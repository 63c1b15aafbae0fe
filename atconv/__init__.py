"""ATConv: Attentive Convolution (arXiv 2510.20092), a 3×3 convolution with kernels generated from the image."""

from atconv.module import ATConv

__all__ = ["ATConv"]
