"""Which Auto class of transformers gives which class of the catalogue."""

from hf_vlp.models.catalog import Architecture, is_training_role

# Role in the catalogue -> Auto classes that should find the class, beside `AutoModel`, which finds all of them.
AUTO_CLASSES: dict[str, tuple[str, ...]] = {
    "model": (),
    "captioning": ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "zero_shot": ("AutoModelForZeroShotImageClassification",),
    "retrieval": ("AutoModelForZeroShotImageClassification",),
    "vqa": ("AutoModelForVisualQuestionAnswering",),
}
# Roles that no Auto class gives.
_NOT_MODELS = ("config", "processor")


def classes_of(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Auto class -> `"module:Class"` of those that it may give for the architecture, the most likely first."""
    found: dict[str, list[str]] = {}
    for role in dict.fromkeys([*AUTO_CLASSES, *architecture.classes]):
        if role in architecture.classes and role not in _NOT_MODELS and not is_training_role(role):
            for name in ("AutoModel", *AUTO_CLASSES.get(role, ())):
                found.setdefault(name, []).append(architecture.classes[role])
    return {name: tuple(dict.fromkeys(references)) for name, references in found.items()}
