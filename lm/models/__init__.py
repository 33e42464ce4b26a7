"""Language models: a family is a module with `specs(c)`, `apply(params, c, ids_BT, ...)` and `init_cache(c, B, S)`."""
