"""Language-model training as pure functions over trees of arrays."""
