"""A manifest for tests that need no tokenizer."""

from models.manifest import Category, ControlToken, Manifest

MANIFEST = Manifest(
    respond=ControlToken(token="[respond]", id=12),
    categories=(
        Category(name="safety", token="[refuse:safety]", id=10),
        Category(name="humanizing", token="[refuse:humanizing]", id=11),
    ),
)
