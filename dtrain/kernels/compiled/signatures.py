"""The C signatures of the compiled kernels: one table for the compiler and for the caller.

P pointer to the array's real type, F pointer to float64, L pointer to int64, I int64, D double. All return nothing.
No two pointers of one call overlap: the compiler relies on it.
"""

SIGNATURES: dict[str, str] = {
    # rows.py
    "layer_norm": "PPP PPP II D",  # x weight bias | y mean rstd | rows columns | eps
    "layer_norm_vjp": "PPPPP PPP II",  # g x weight mean rstd | dx dweight dbias | rows columns
    "rms_norm": "PP PP II D",  # x weight | y rstd | rows columns | eps
    "rms_norm_vjp": "PPPP PP II",  # g x weight rstd | dx dweight | rows columns
    "softmax": "P P II",  # x | y | rows columns
    "softmax_vjp": "PP P II",  # g y | dx | rows columns
    "log_softmax": "P P II",
    "log_softmax_vjp": "PP P II",
    "cross_entropy": "PL PP III",  # logits targets | losses logsumexp | rows columns ignore
    "cross_entropy_vjp": "PPLP P III",  # g logits targets logsumexp | dlogits | rows columns ignore
    # attention.py
    "attention_weights": "P P IIIIII D",  # scores in place | logsumexp | heads rows columns first step stride | scale
    "attention_gradient": "PP PP IIIIII D",  # scores, dweights in place | logsumexp delta | as above | scale
    "attention_delta": "PP P IIII",  # g out | delta | batch length heads depth
    "rotary": "PPP P IIII III D",  # x cos sin | y | batch length heads half | strides of x | sign
    # elementwise.py
    "bias_residual": "PPP P II",
    "column_sum": "P P II",
    "gelu_tanh": "PP P II",  # x bias | y | rows columns
    "gelu_tanh_vjp": "PPP PP II",  # g x bias | dx dbias | rows columns
    "gelu_exact": "PP P II",
    "gelu_exact_vjp": "PPP PP II",
    "silu": "P P I",
    "silu_vjp": "PP P I",
    "swiglu": "PP P I",
    "swiglu_vjp": "PPP PP I",
    "dropout": "PL P II III D",  # x row_ids | y | rows columns | key low, key high, threshold | factor
    # embeddings and optimizers: updates.py
    "embedding": "PL P II",  # weight ids | y | rows columns
    "embedding_vjp": "PL P II",  # g ids | dweight, added to | rows columns
    "sum_squares": "P F I",
    "sgd": "PPP I DDIDD",  # p g m | count | lr momentum nesterov decay scale
    "sgd_plain": "PP I DDD",  # p g | count | lr decay scale
    "adam": "PPPP I DDDDDIDDD",  # p g m v | count | lr beta1 beta2 eps decay decoupled correction1 correction2 scale
    "adam_direction": "PPPP P I DDDDDDD",  # g m v p | out | count | beta1 beta2 eps decay correction1 correction2 scale
    "axpy": "PP I D",
}
