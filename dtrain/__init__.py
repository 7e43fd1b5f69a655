"""dtrain: distributed training on real processes, MPI between the ranks and NumPy arrays inside them.

The package is cut into four layers, imports go only from left to right:

    dtrain.launch  ->  dtrain.strategies  ->  dtrain.* (the core)  ->  dtrain.collectives

Importing this module is cheap: it starts neither MPI nor NumPy. Import what is needed from the submodules.
"""

__version__ = "0.1.0"
