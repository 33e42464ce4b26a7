"""Text on its way to and from token ids."""
