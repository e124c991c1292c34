"""Typed wrappers of the compiled ops, one file per kernel family: defaults, fakes, autograd."""
