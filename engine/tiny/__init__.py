"""The built-in default model: a tiny assistant, trained in under a minute, that answers in one of four styles.

It makes the server run with no download and gives alignment something real to do: every answer style is equally
likely at first, and preferences move the shares. `knowledge` and `corpus` are plain Python; torch is
imported only by `train` and `build`.
"""
