"""Variables shaped like well-known models, without the models."""

from __future__ import annotations

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 for ImageNet: its 214 trainable variables, 25.6 million parameters."""
    shapes: list[Shape] = []

    def convolution(kernel: int, channels: int, filters: int) -> None:
        shapes.extend([(kernel, kernel, channels, filters), (filters,), (filters,), (filters,)])

    convolution(7, 3, 64)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            convolution(1, channels, width)
            convolution(3, width, width)
            convolution(1, width, 4 * width)
            if block == 0:
                convolution(1, channels, 4 * width)
            channels = 4 * width
    return [*shapes, (2048, 1000), (1000,)]


def transformer() -> list[Shape]:
    """GPT-2 small's shape: 12 layers of width 768, a vocabulary of 20,000; 100 million parameters."""
    width, layer = 768, [(768, 2304), (2304,), (768, 768), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    norms = [(width,)] * 4
    return [(20_000, width), (1024, width), *[s for _ in range(12) for s in (*layer, *norms)], (width,), (width,)]


def tiny() -> list[Shape]:
    """The awkward one: 3,000 tiny variables and one of 60 MB."""
    return [*[(64,)] * 3000, (15_000_000,)]


MODELS = {"resnet50": resnet50, "transformer": transformer, "tiny": tiny}
