"""Strategies: one way to use one axis of the mesh per file; a strategy transforms a model."""

if __name__ == "strategies":  # found through the working directory: a second copy of every module would exist
    raise ImportError("import dtrain.strategies, not strategies")
