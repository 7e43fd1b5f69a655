"""What the help of several commands says about their arguments."""

CONFIG = """CONFIG is a YAML file; each key.path=value changes one key of it (the value is YAML), for example
train.steps=20 or 'optimizer={kind: sgd, learning_rate: 0.1}'. `dtrain show config CONFIG` prints all keys."""
