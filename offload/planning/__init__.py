"""Predicting speed: facts of a model, speeds of a machine, a plan on a virtual clock, and the search for the best.

Pure functions of values; nothing here reads a weight, allocates an arena or measures. Where bytes fit is
`offload.planning.fit`'s business, how fast that is is decided here.
"""
