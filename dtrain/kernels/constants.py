"""Constants that the backends share."""

import math

GELU_SLOPE = math.sqrt(2 / math.pi)  # gelu's tanh form: z/2 * (1 + tanh(GELU_SLOPE * (z + GELU_CUBIC * z^3)))
GELU_CUBIC = 0.044715
