"""Weights of other systems, in and out.

Each format is a module with the same functions, which `capjax convert` calls:

    read(path, **fields) -> Weights    what the file tells; `fields` of the configuration beside it
    write(path, weights)               a new file or directory; whoever calls it makes it atomic
    compare(path, weights) -> [line]   what the file at `path` and `weights` compute, side by side
                                       (`native`, our own checkpoints, has none: equal is equal)

`mapping` holds what they share: tables of names that serve both directions.
"""
