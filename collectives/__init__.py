"""Process groups and collective algorithms on plain arrays; imports nothing else of dtrain."""

if __name__ == "collectives":  # found through the working directory: a second copy of every module would exist
    raise ImportError("import dtrain.collectives, not collectives")
