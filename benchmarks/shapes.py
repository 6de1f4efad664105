"""The parameter shapes of real models, from their architectures, and the uniform sets of the
tables.
"""

from math import prod

Shapes = list[tuple[int, ...]]


def gpt(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """nanoGPT's GPT with biases; the head is tied to the token embedding."""
    norm = [(width,), (width,)]
    block = [
        *norm,
        *[
            (3 * width, width),
            (3 * width,),
            (width, width),
            (width,),
        ],  # attention: q, k and v; projection
        *norm,
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],  # MLP
    ]
    return [(vocabulary, width), (context, width), *block * layers, *norm]


def resnet50(classes: int = 1000) -> Shapes:
    """torchvision's resnet50."""

    def conv(out: int, into: int, size: int) -> Shapes:
        return [(out, into, size, size), (out,), (out,)]  # and the batch norm behind it

    shapes, into = conv(64, 3, 7), 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            shapes += (
                conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            )
            if block == 0:
                shapes += conv(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (classes, into), (classes,)]


def vit(
    layers: int, width: int, patch: int, image: int = 224, classes: int = 1000
) -> Shapes:
    """torchvision's VisionTransformer."""
    norm = [(width,), (width,)]
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    block = [
        *norm,
        *attention,
        *norm,
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
    ]
    tokens = (image // patch) ** 2 + 1
    stem = [(1, 1, width), (width, 3, patch, patch), (width,), (1, tokens, width)]
    return [*stem, *block * layers, *norm, (classes, width), (classes,)]


NANOGPT = gpt(layers=6, width=384, vocabulary=4096, context=256)
GPT2 = gpt(layers=12, width=768, vocabulary=50257, context=1024)
RESNET50 = resnet50()
VIT_B16 = vit(layers=12, width=768, patch=16)

LARGE: Shapes = [(1024, 1024)] * 32
MATRICES: Shapes = [(512, 512)] * 32
"""Of a size whose eigenbases a GPU finds in seconds."""
HUGE: Shapes = [(2048, 2048)] * 32
SMALL: Shapes = [(64, 64), (64,)] * 75
MANY: Shapes = [(256,)] * 1000
FEW: Shapes = [(32, 32), (32,)] * 14
"""A newcomer's model."""
GPT_9M = gpt(layers=5, width=384, vocabulary=65, context=256)
SQUARES: Shapes = [(900, 1000)] * 20
HANDY: Shapes = [(48, 80), (48,)] * 80
VECTORS: Shapes = [(200,)] * 900
TINY: Shapes = [(4, 3), (5,)] * 3
"""For rehearsals and tests."""


def small(n: int) -> Shapes:
    """`n` tensors, 64x64 and 64 in turn."""
    return (SMALL * (n // len(SMALL) + 1))[:n]


def numel(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes)
