"""Language models: each family is a module of `specs(c)`, `apply(params, c, ids_BT, ...)` and `init_cache(c, B, S)`."""
