"""The size of the portable graph that the tests of export share."""

CANVAS = (128, 160)
"""Height and width. The stride of P6's cells is canvas // map: 64 along this height, 53 along this width."""
