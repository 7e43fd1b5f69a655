"""`python -m dtrain`: the command `dtrain`, of this Python and no other."""

from dtrain.launch.__main__ import main

if __name__ == "__main__":
    main()
