/* Fake-quantization and mixtures of widths, each in one walk through memory.

Every element is computed by the operations of reference.py in their order, in float32 and without
fused multiply-adds, so that values and their gradients are the same, but for the sign of zeros.
Sums over elements have an order of their own: float32 within BLOCK elements, float64 beyond. Threads
do not change it.

A tensor is seen as rows of `inner` elements in storage order. Row r has the grid of channel
r % channels; `grids` holds the scale, lowest and highest code and zero point of each channel, in
this order, as a float32 array (4, channels). Rows are cut into units of at most PIECE elements,
which are the work of threads; what is summed over a unit lies in float64 at its own place.
*/

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 1024
#define PIECE 16384
#define MOST_THREADS 256
#define EDGE 1e-6f

/* One machine-code version for each instruction set, chosen when the library is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    float scale, qmin, qmax, zero_point;
    float low, high; /* Between them gradients pass: the ends of the grid, EDGE wider. */
} Grid;

typedef struct {
    const void *x, *gradient;
    void *out;
    const float *grids, *shares;
    double *sums;
    int64_t channels, inner, units_of_row;
    int widths, bfloat16;
} Job;

INLINE Grid grid_of(const float *grids, int64_t channels, int64_t channel) {
    Grid grid;
    grid.scale = grids[channel];
    grid.qmin = grids[channels + channel];
    grid.qmax = grids[2 * channels + channel];
    grid.zero_point = grids[3 * channels + channel];
    grid.low = (grid.qmin - grid.zero_point) * grid.scale;
    grid.high = (grid.qmax - grid.zero_point) * grid.scale;
    grid.low -= EDGE * fabsf(grid.low);
    grid.high += EDGE * fabsf(grid.high);
    return grid;
}

INLINE float widened(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The nearest bfloat16, ties to even. */
INLINE uint16_t narrowed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* The level of x / scale, in scales. NaN stays NaN: both comparisons are false. */
INLINE float level(float ratio, Grid grid) {
    float code = ratio + grid.zero_point;
    code = code < grid.qmin ? grid.qmin : code;
    code = code > grid.qmax ? grid.qmax : code;
    return rintf(code) - grid.zero_point;
}

INLINE int passes(float x, Grid grid) { return (x >= grid.low) & (x <= grid.high); }

FOR_EACH_CPU static void quantize(const float *x, float *y, int n, Grid grid) {
#pragma omp simd
    for (int i = 0; i < n; i++) y[i] = level(x[i] / grid.scale, grid) * grid.scale;
}

FOR_EACH_CPU static void quantize_bfloat16(const uint16_t *x, uint16_t *y, int n, Grid grid) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float ratio = widened(x[i]) / grid.scale;
        y[i] = narrowed(level(ratio, grid) * grid.scale);
    }
}

/* Writes the gradient of x, adds up those of scale and zero point: `sums[0]` and `sums[1]`. */
FOR_EACH_CPU static void backward(
    const float *x, const float *g, float *out, int n, Grid grid, double *sums) {
    float by_scale = 0, clipped = 0;
#pragma omp simd reduction(+ : by_scale, clipped)
    for (int i = 0; i < n; i++) {
        float ratio = x[i] / grid.scale;
        int inside = passes(x[i], grid);
        float slope = level(ratio, grid) - (inside ? ratio : 0.0f);
        out[i] = inside ? g[i] : 0.0f;
        by_scale += g[i] * slope;
        clipped += inside ? 0.0f : g[i];
    }
    sums[0] += by_scale;
    sums[1] += clipped;
}

FOR_EACH_CPU static void backward_bfloat16(
    const uint16_t *x, const uint16_t *g, uint16_t *out, int n, Grid grid, double *sums) {
    float by_scale = 0, clipped = 0;
#pragma omp simd reduction(+ : by_scale, clipped)
    for (int i = 0; i < n; i++) {
        float wide = widened(x[i]), gradient = widened(g[i]), ratio = wide / grid.scale;
        int inside = passes(wide, grid);
        float slope = level(ratio, grid) - (inside ? ratio : 0.0f);
        out[i] = inside ? g[i] : 0;
        by_scale += gradient * slope;
        clipped += inside ? 0.0f : gradient;
    }
    sums[0] += by_scale;
    sums[1] += clipped;
}

/* total = share * level * scale of the first candidate, or adds that of a further one. */
FOR_EACH_CPU static void add_candidate(
    const float *x, float *total, int n, Grid grid, float share, int first) {
    float factor = grid.scale * share;
    if (first) {
#pragma omp simd
        for (int i = 0; i < n; i++) total[i] = level(x[i] / grid.scale, grid) * factor;
    } else {
#pragma omp simd
        for (int i = 0; i < n; i++) total[i] += level(x[i] / grid.scale, grid) * factor;
    }
}

/* The gradient of x by one candidate, set or added to `total`. `sums[0]` gains the gradient by
scale without the share, `sums[1]` the sum of gradient times level. */
FOR_EACH_CPU static void add_candidate_backward(
    const float *x, const float *g, float *total, int n, Grid grid, float share, int first,
    double *sums) {
    float by_scale = 0, by_level = 0;
#pragma omp simd reduction(+ : by_scale, by_level)
    for (int i = 0; i < n; i++) {
        float ratio = x[i] / grid.scale, value = level(ratio, grid);
        int inside = passes(x[i], grid);
        float part = (inside ? g[i] : 0.0f) * share;
        total[i] = first ? part : total[i] + part;
        by_scale += g[i] * (value - (inside ? ratio : 0.0f));
        by_level += g[i] * value;
    }
    sums[0] += by_scale;
    sums[1] += by_level;
}

FOR_EACH_CPU static void widen(const uint16_t *from, float *to, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) to[i] = widened(from[i]);
}

FOR_EACH_CPU static void narrow(const float *from, uint16_t *to, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) to[i] = narrowed(from[i]);
}

/* Where a unit's elements begin, how many there are, and its channel. */
typedef struct {
    int64_t start, channel;
    int count;
} Unit;

static Unit unit_at(const Job *job, int64_t at) {
    int64_t row = at / job->units_of_row, skipped = at % job->units_of_row * PIECE;
    int64_t left = job->inner - skipped;
    Unit unit = {row * job->inner + skipped, row % job->channels, left < PIECE ? (int)left : PIECE};
    return unit;
}

static void quantize_units(const Job *job, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at++) {
        Unit unit = unit_at(job, at);
        Grid grid = grid_of(job->grids, job->channels, unit.channel);
        if (job->bfloat16)
            quantize_bfloat16((const uint16_t *)job->x + unit.start,
                              (uint16_t *)job->out + unit.start, unit.count, grid);
        else
            quantize((const float *)job->x + unit.start, (float *)job->out + unit.start,
                     unit.count, grid);
    }
}

static void backward_units(const Job *job, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at++) {
        Unit unit = unit_at(job, at);
        Grid grid = grid_of(job->grids, job->channels, unit.channel);
        double *sums = job->sums + 2 * at;
        sums[0] = sums[1] = 0;
        for (int done = 0; done < unit.count; done += BLOCK) {
            int n = unit.count - done < BLOCK ? unit.count - done : BLOCK;
            int64_t from = unit.start + done;
            if (job->bfloat16)
                backward_bfloat16((const uint16_t *)job->x + from,
                                  (const uint16_t *)job->gradient + from,
                                  (uint16_t *)job->out + from, n, grid, sums);
            else
                backward((const float *)job->x + from, (const float *)job->gradient + from,
                         (float *)job->out + from, n, grid, sums);
        }
    }
}

/* `n` elements from `from` on in float32: where they lie, or widened into `buffer`. */
static const float *read_block(const Job *job, const void *values, int64_t from, int n,
                               float *buffer) {
    if (!job->bfloat16) return (const float *)values + from;
    widen((const uint16_t *)values + from, buffer, n);
    return buffer;
}

static void mix_block(const Job *job, int64_t from, int n, const Grid *grids) {
    float wide[BLOCK], total[BLOCK];
    const float *x = read_block(job, job->x, from, n, wide);
    float *out = job->bfloat16 ? total : (float *)job->out + from;
    for (int at = 0; at < job->widths; at++)
        add_candidate(x, out, n, grids[at], job->shares[at], at == 0);
    if (job->bfloat16) narrow(total, (uint16_t *)job->out + from, n);
}

static void mix_block_backward(const Job *job, int64_t from, int n, const Grid *grids,
                               double *sums) {
    float wide[BLOCK], wide_gradient[BLOCK], total[BLOCK];
    const float *x = read_block(job, job->x, from, n, wide);
    const float *g = read_block(job, job->gradient, from, n, wide_gradient);
    float *out = job->bfloat16 ? total : (float *)job->out + from;
    for (int at = 0; at < job->widths; at++)
        add_candidate_backward(x, g, out, n, grids[at], job->shares[at], at == 0, sums + 2 * at);
    if (job->bfloat16) narrow(total, (uint16_t *)job->out + from, n);
}

static void mix_units(const Job *job, int64_t first, int64_t last) {
    Grid grids[job->widths];
    for (int64_t at = first; at < last; at++) {
        Unit unit = unit_at(job, at);
        double *sums = job->sums ? job->sums + 2 * job->widths * at : NULL;
        for (int width = 0; width < job->widths; width++) {
            grids[width] =
                grid_of(job->grids + 4 * width * job->channels, job->channels, unit.channel);
            if (sums) sums[2 * width] = sums[2 * width + 1] = 0;
        }
        for (int done = 0; done < unit.count; done += BLOCK) {
            int n = unit.count - done < BLOCK ? unit.count - done : BLOCK;
            if (sums)
                mix_block_backward(job, unit.start + done, n, grids, sums);
            else
                mix_block(job, unit.start + done, n, grids);
        }
    }
}

typedef void (*Work)(const Job *, int64_t, int64_t);

typedef struct {
    Work work;
    const Job *job;
    int64_t first, last;
} Part;

static void *run_part(void *given) {
    Part *part = given;
    part->work(part->job, part->first, part->last);
    return NULL;
}

/* Threads live for one call: nothing is left over that a fork or an unload could break. */
static void in_threads(Work work, const Job *job, int64_t units, int threads) {
    pthread_t started[MOST_THREADS];
    Part parts[MOST_THREADS];
    int running[MOST_THREADS] = {0};
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 1) threads = 1;
    for (int at = 0; at < threads; at++) {
        Part part = {work, job, units * at / threads, units * (at + 1) / threads};
        parts[at] = part;
        if (at) running[at] = pthread_create(&started[at], NULL, run_part, &parts[at]) == 0;
    }
    for (int at = 0; at < threads; at++)
        if (!running[at]) run_part(&parts[at]);
    for (int at = 0; at < threads; at++)
        if (running[at]) pthread_join(started[at], NULL);
}

static int64_t units_of_row(int64_t inner) { return (inner + PIECE - 1) / PIECE; }

/* A hash of this file, so that a library of another version is told from one that fits. */
#ifndef BITSCAPE_SOURCE
#define BITSCAPE_SOURCE ""
#endif
const char *bitscape_source(void) { return BITSCAPE_SOURCE; }

int64_t bitscape_units(int64_t rows, int64_t inner) {
    return rows * units_of_row(inner);
}

void bitscape_quantize(const void *x, void *out, int bfloat16, int64_t rows, int64_t channels,
                       int64_t inner, const float *grids, int threads) {
    Job job = {.x = x, .out = out, .grids = grids, .channels = channels, .inner = inner,
               .units_of_row = units_of_row(inner), .bfloat16 = bfloat16};
    in_threads(quantize_units, &job, bitscape_units(rows, inner), threads);
}

/* `sums`: float64 (units, 2), see `backward`. */
void bitscape_quantize_backward(const void *x, const void *gradient, void *out, int bfloat16,
                                int64_t rows, int64_t channels, int64_t inner, const float *grids,
                                double *sums, int threads) {
    Job job = {.x = x, .gradient = gradient, .out = out, .grids = grids, .sums = sums,
               .channels = channels, .inner = inner,
               .units_of_row = units_of_row(inner), .bfloat16 = bfloat16};
    in_threads(backward_units, &job, bitscape_units(rows, inner), threads);
}

/* `grids`: float32 (widths, 4, channels); `shares`: float32 (widths). */
void bitscape_mix(const void *x, void *out, int bfloat16, int64_t rows, int64_t channels,
                  int64_t inner, const float *grids, const float *shares, int widths,
                  int threads) {
    Job job = {.x = x, .out = out, .grids = grids, .shares = shares, .channels = channels,
               .inner = inner, .units_of_row = units_of_row(inner), .widths = widths,
               .bfloat16 = bfloat16};
    in_threads(mix_units, &job, bitscape_units(rows, inner), threads);
}

/* `sums`: float64 (units, widths, 2), see `add_candidate_backward`. */
void bitscape_mix_backward(const void *x, const void *gradient, void *out, int bfloat16,
                           int64_t rows, int64_t channels, int64_t inner, const float *grids,
                           const float *shares, int widths, double *sums, int threads) {
    Job job = {.x = x, .gradient = gradient, .out = out, .grids = grids, .shares = shares,
               .sums = sums, .channels = channels, .inner = inner,
               .units_of_row = units_of_row(inner), .widths = widths,
               .bfloat16 = bfloat16};
    in_threads(mix_units, &job, bitscape_units(rows, inner), threads);
}
