"""The command line, and the only place where YAML strings become objects."""

if __name__ == "launch":  # found through the working directory: a second copy of every module would exist
    raise ImportError("import dtrain.launch, not launch")
