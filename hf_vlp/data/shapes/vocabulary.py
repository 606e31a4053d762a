"""The words and colours of Shapes: what things are called, in which other words, and how they look."""

# Canonical colour -> RGB. Chosen far enough apart to stay distinct after +-12 of jitter a channel.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (42, 158, 62),
    "blue": (40, 72, 218),
    "yellow": (242, 214, 36),
    "orange": (243, 132, 24),
    "purple": (134, 52, 186),
    "pink": (250, 132, 190),
    "cyan": (56, 204, 214),
    "brown": (122, 76, 40),
    "black": (20, 20, 20),
    "white": (243, 243, 243),
    "gray": (128, 128, 128),
}

COLOR_SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "gray": ("grey",),
}

SHAPES: tuple[str, ...] = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "cross",
    "ring",
    "crescent",
    "hexagon",
    "pentagon",
    "arrow",
)

SHAPE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc",),
    "square": ("box",),
    "diamond": ("rhombus",),
    "cross": ("plus",),
    "ring": ("hoop",),
    "crescent": ("moon",),
}

SIZES: tuple[str, ...] = ("small", "medium", "large")

SIZE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("little", "tiny"),
    "medium": ("medium-sized",),
    "large": ("big",),
}

TEXTURES: tuple[str, ...] = ("solid", "striped", "dotted", "checkered")

TEXTURE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "solid": ("plain",),
    "dotted": ("spotted",),
    "checkered": ("chequered",),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (244, 244, 244),
    "black": (18, 18, 18),
    "gray": (126, 126, 126),
}

# Every word that names a colour or a shape, plural included -> its canonical name.
COLOR_WORDS: dict[str, str] = {color: color for color in COLORS} | {
    word: color for color, words in COLOR_SYNONYMS.items() for word in words
}
SHAPE_WORDS: dict[str, str] = {}
for _shape in SHAPES:
    for _word in (_shape, *SHAPE_SYNONYMS.get(_shape, ())):
        SHAPE_WORDS[_word] = _shape
        SHAPE_WORDS[_word + ("es" if _word[-1] in "sx" else "s")] = _shape
