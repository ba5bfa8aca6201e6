"""Parts that plugins for servers share: a server's layers keep the scalings of a patched model.

settings   the scaling of each of a server's layers, from a checkpoint's config and weights
layers     calls of tritonattn for the rows of a step, over pages of keys and values
versions   the versions of a server that the tests ran
"""
