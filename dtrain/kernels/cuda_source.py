"""The CUDA C of the CuPy backend, for `real` = float or double.

Rows kernels: one block per row (in strides of the grid), its threads share the columns. Elementwise kernels: strides of
the grid over all elements. Every sum has a fixed order, so results are the same from run to run. A grid of one block of
one thread computes the same function: that is how the tests run this source without a GPU, as C++.
"""

THREADS = 256  # of a block; a power of two, for the tree in block_sum

SOURCE = r"""
typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;

#define EACH(i, count) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
#define EACH_ROW(i, rows) for (i64 i = blockIdx.x; i < rows; i += gridDim.x)
#define EACH_COLUMN(j, columns) for (i64 j = threadIdx.x; j < columns; j += blockDim.x)

__device__ real block_sum(real value) {
    __shared__ real partial[256];
    partial[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
        __syncthreads();
    }
    real result = partial[0];
    __syncthreads();
    return result;
}

__device__ real block_max(real value) {
    __shared__ real partial[256];
    partial[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) partial[threadIdx.x] = fmax(partial[threadIdx.x], partial[threadIdx.x + half]);
        __syncthreads();
    }
    real result = partial[0];
    __syncthreads();
    return result;
}

__device__ real row_max(const real* x, i64 columns) {
    real top = columns > 0 ? x[0] : 0;  // not -INFINITY: the run-time compiler has no such name
    EACH_COLUMN(j, columns) top = fmax(top, x[j]);
    return block_max(top);
}

__device__ real row_sum_exp(const real* x, real top, i64 columns) {
    real total = 0;
    EACH_COLUMN(j, columns) total += exp(x[j] - top);
    return block_sum(total);
}

extern "C" {

__global__ void layer_norm(const real* x, const real* w, const real* b, real* y, real* mean, real* rstd,
                           i64 rows, i64 columns, double eps) {
    EACH_ROW(i, rows) {
        const real* row = x + i * columns;
        real total = 0, squares = 0;
        EACH_COLUMN(j, columns) total += row[j];
        real centre = block_sum(total) / columns;
        EACH_COLUMN(j, columns) squares += (row[j] - centre) * (row[j] - centre);
        real scale = 1 / sqrt(block_sum(squares) / columns + (real)eps);
        EACH_COLUMN(j, columns) y[i * columns + j] = (row[j] - centre) * scale * w[j] + b[j];
        if (threadIdx.x == 0) {
            mean[i] = centre;
            rstd[i] = scale;
        }
    }
}

__global__ void layer_norm_vjp(const real* g, const real* x, const real* w, const real* mean, const real* rstd,
                               real* dx, i64 rows, i64 columns) {
    EACH_ROW(i, rows) {
        const real *grow = g + i * columns, *row = x + i * columns;
        real along = 0, across = 0;
        EACH_COLUMN(j, columns) {
            along += grow[j] * w[j];
            across += grow[j] * w[j] * ((row[j] - mean[i]) * rstd[i]);
        }
        along = block_sum(along) / columns;
        across = block_sum(across) / columns;
        EACH_COLUMN(j, columns)
            dx[i * columns + j] = (grow[j] * w[j] - along - (row[j] - mean[i]) * rstd[i] * across) * rstd[i];
    }
}

__global__ void softmax(const real* x, real* y, i64 rows, i64 columns) {
    EACH_ROW(i, rows) {
        const real* row = x + i * columns;
        real top = row_max(row, columns), total = row_sum_exp(row, top, columns);
        EACH_COLUMN(j, columns) y[i * columns + j] = exp(row[j] - top) / total;
    }
}

__global__ void cross_entropy(const real* x, const i64* targets, real* losses, real* logsumexp,
                              i64 rows, i64 columns, i64 ignore) {
    EACH_ROW(i, rows) {
        const real* row = x + i * columns;
        real top = row_max(row, columns), logarithm = log(row_sum_exp(row, top, columns));
        if (threadIdx.x == 0) {
            logsumexp[i] = logarithm + top;
            losses[i] = targets[i] == ignore ? 0 : logarithm + (top - row[targets[i]]);
        }
    }
}

__global__ void cross_entropy_vjp(const real* g, const real* x, const i64* targets, const real* logsumexp, real* dx,
                                  i64 rows, i64 columns, i64 ignore) {
    EACH_ROW(i, rows) EACH_COLUMN(j, columns) {
        i64 at = i * columns + j;
        dx[at] = targets[i] == ignore ? 0 : (exp(x[at] - logsumexp[i]) - (j == targets[i] ? 1 : 0)) * g[i];
    }
}

__device__ real gelu_gate(real z, int approximate) {
    return approximate ? (real)0.5 + (real)0.5 * tanh((real)GELU_SLOPE * (z + (real)GELU_CUBIC * z * z * z))
                       : (real)0.5 * erfc(-z * (real)0.7071067811865476);
}

__global__ void gelu(const real* x, const real* b, real* y, i64 count, i64 columns, i64 approximate) {
    EACH(i, count) {
        real z = x[i] + b[i % columns];
        y[i] = z * gelu_gate(z, approximate);
    }
}

__global__ void gelu_vjp(const real* g, const real* x, const real* b, real* dx,
                         i64 count, i64 columns, i64 approximate) {
    EACH(i, count) {
        real z = x[i] + b[i % columns], gate = gelu_gate(z, approximate);
        real slope = approximate ? gate * (1 - gate) * (real)(2 * GELU_SLOPE) * (1 + (real)(3 * GELU_CUBIC) * z * z)
                                 : exp(-(real)0.5 * z * z) * (real)0.3989422804014327;
        dx[i] = g[i] * (gate + z * slope);
    }
}

__device__ u32 philox_word(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1, int which) {
    for (int i = 0; i < 10; i++) {
        u64 product0 = (u64)0xD2511F53u * c0, product1 = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(product1 >> 32) ^ c1 ^ k0;
        c1 = (u32)product1;
        c2 = (u32)(product0 >> 32) ^ c3 ^ k1;
        c3 = (u32)product0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return which == 0 ? c0 : which == 1 ? c1 : which == 2 ? c2 : c3;
}

__global__ void dropout(const real* x, const i64* ids, real* y, i64 count, i64 columns, i64 key0, i64 key1,
                        i64 threshold, double factor) {
    EACH(i, count) {
        u64 row = ids[i / columns];
        i64 j = i % columns;
        u32 word = philox_word((u32)row, (u32)(row >> 32), (u32)(j / 4), 0, (u32)key0, (u32)key1, j % 4);
        y[i] = (i64)word >= threshold ? x[i] * (real)factor : 0;
    }
}

__global__ void embedding_vjp(const real* g, const i64* ids, real* dw, i64 rows, i64 columns) {
    EACH(j, columns) for (i64 i = 0; i < rows; i++) dw[ids[i] * columns + j] += g[i * columns + j];
}

__global__ void adam(real* p, const real* g, real* m, real* v, i64 count, double lr, double beta1, double beta2,
                     double eps, double decay, i64 decoupled, double correction1, double correction2, double scale) {
    real keep1 = beta1, keep2 = beta2, new1 = 1 - beta1, new2 = 1 - beta2, shrink = decay;
    EACH(i, count) {
        real gradient = g[i] * (real)scale + (decoupled ? 0 : p[i] * shrink);
        m[i] = m[i] * keep1 + gradient * new1;
        v[i] = v[i] * keep2 + gradient * gradient * new2;
        real step = m[i] / (real)correction1 / (sqrt(v[i] / (real)correction2) + (real)eps);
        p[i] -= (real)lr * (step + (decoupled ? p[i] * shrink : 0));
    }
}

}
"""
