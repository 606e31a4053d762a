"""Prompt ensembles for zero-shot classification (2103.00020, section 3.1.4).

A class is named in many sentences and its weight is the mean of their embeddings, which is steadier than any one of
them. `hf_vlp.evaluation.zero_shot.class_embeddings` builds the weights from these or from one's own templates.
"""

# For photographs of objects: how the thing is shown, how well, how many, in what medium.
PHOTO_TEMPLATES: tuple[str, ...] = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a picture of one {}.",
    "a picture of several {}s.",
    "a close-up photo of a {}.",
    "a {} seen from far away.",
    "a bright photo of a {}.",
    "a photo of a {} in poor light.",
    "a blurred photo of a {}.",
    "a sharp photo of a {}.",
    "a black and white photo of a {}.",
    "a photo in which a {} is partly hidden.",
    "a photo of a {} in front of a plain background.",
    "a photo of a {} outdoors.",
    "a photo of a {} indoors.",
    "a big {}.",
    "a little {}.",
    "a {} that looks odd.",
    "a fine example of a {}.",
    "a drawing of a {}.",
    "a painting of a {}.",
    "a {} made of plastic.",
    "a {} in a video game.",
    "there is a {} in this picture.",
)

# For icons, emoji and other small drawings.
ICON_TEMPLATES: tuple[str, ...] = (
    "{}",
    "an icon of a {}",
    "an emoji of a {}",
    "the symbol for {}",
    "a small drawing of a {}",
    "a simple coloured picture of a {}",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("a photo of a {}.",),
    "photo": PHOTO_TEMPLATES,
    "icon": ICON_TEMPLATES,
}

__all__ = ["ICON_TEMPLATES", "PHOTO_TEMPLATES", "TEMPLATES"]
