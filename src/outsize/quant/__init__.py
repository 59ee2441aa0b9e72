"""Weights in few bits: matrices of layers as codes with scales, and products with them."""

from outsize.quant.formats import FORMATS, LINE_ROWS, Encoded, Format
from outsize.quant.linear import Matrix, QuantizedLinear, quantize
from outsize.quant.product import product

__all__ = [
    "FORMATS",
    "LINE_ROWS",
    "Encoded",
    "Format",
    "Matrix",
    "QuantizedLinear",
    "product",
    "quantize",
]
