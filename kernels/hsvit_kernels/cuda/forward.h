// Grouped attention, forward: every layer of one group of eight images a block, an image a warp. layer.h has the letters.

#pragma once

#include "layer.h"

namespace forward {

// Where things lie in shared memory, in bytes. Two layers' weights: one is fetched while the other is used.
constexpr int QKV_ROW = 3 * D * 4 + 16, WEIGHTS = 0, VECTORS = 2 * LAYER, VECTOR = NUMBERS * 4;
constexpr int CLS = VECTORS + 2 * VECTOR, CLS_Y = CLS + WARPS * CLS_ROW, CLS_QKV = CLS_Y + WARPS * ROW;
constexpr int CLS_O = CLS_QKV + WARPS * QKV_ROW, SHARED = CLS_O + WARPS * ROW;

struct Arguments {
    const void *tokens, *folded;  // bf16 [B, G (T - 1), D], by strides; the weights as weights.h leaves them
    const int *key, *images;      // [2], [B]
    void *out, *saved;            // bf16 [B, G, D], [G, A, B, T, D]
    long long stride_image;
    int batch, groups, depth, first_group;
    float eps;
};

// 16 outputs from row `row` on for the CLS vectors at `from` of the block's images (columns), and what is there: c.
DEVICE void multiply_cls(Real (&c)[4], Word weights, int row, int from) {
    Word at = lane() / 4 * ROW + lane() % 4 * 4 + from;
    UNROLL for (int k = 0; k < 4; ++k) {
        Word w[4];
        load_tiles(w, weights + (row * ROW + k * 32));
        multiply(c, w[0], w[1], w[2], w[3], load_word(at + k * 32), load_word(at + (k * 32 + 16)), c[0], c[1], c[2], c[3]);
    }
}

// Queries, keys and values of the CLS vectors; the warps share the rows out.
DEVICE void project_cls(Word weights, int vectors, int warp) {
#pragma unroll 1
    for (int row = warp * 16; row < 3 * D; row += WARPS * 16) {
        Word output = lane() / 4 * 4 + row * 4, to = lane() % 4 * (2 * QKV_ROW) + CLS_QKV + output;
        Real low = load_real(output + vectors), high = load_real(output + (vectors + 32)), c[4] = {low, low, high, high};
        multiply_cls(c, weights, row, CLS_Y);
        UNROLL for (int i = 0; i < 4; ++i) store_real(to + (i % 2 * QKV_ROW + i / 2 * 32), c[i]);
    }
}

// x_cls += o W_o^T + bias for the block's images; the first four warps share the rows out.
DEVICE void join_cls(Word weights, int vectors, int warp) {
    if (warp * 16 >= D) return;
    Word output = lane() / 4 * 4 + warp * 64, to = lane() % 4 * (2 * CLS_ROW) + CLS + output;
    Real c[4];
    UNROLL for (int i = 0; i < 4; ++i) {
        Word bias = load_word(output + (vectors + OUT_BIAS * 4 + i / 2 * 32));
        c[i] = load_real(to + (i % 2 * CLS_ROW + i / 2 * 32)) + low_of(bias) + high_of(bias);
    }
    multiply_cls(c, weights, OUT + warp * 16, CLS_O);
    UNROLL for (int i = 0; i < 4; ++i) store_real(to + (i % 2 * CLS_ROW + i / 2 * 32), c[i]);
}

// [32 tokens, 16 outputs whose weights are at `weights`], rounded: of[m][n][row g or g + 8].
DEVICE void project(Word (&of)[2][2][2], const Word (&y)[2][4][4], Word weights, const Real (&bias)[2][2]) {
    Real c[2][2][4];
    UNROLL for (int k = 0; k < 4; ++k) {
        Word w[4];
        load_tiles(w, weights + k * 32);
        UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 2; ++n) {
            const Real* with = k ? c[m][n] : bias[n];
            multiply(c[m][n], y[m][k][0], y[m][k][1], y[m][k][2], y[m][k][3], w[2 * n], w[2 * n + 1], with[0], with[1], with[k ? 2 : 0], with[k ? 3 : 1]);
        }
    }
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 2; ++n) UNROLL for (int r = 0; r < 2; ++r)
        of[m][n][r] = pack(c[m][n][2 * r], c[m][n][2 * r + 1]);
}

// What a slab of two heads needs of CLS: queries, keys and values of both heads at 2 t, 2 t + 1, keys rounded.
struct ClsSlab { Word q[2], k[2]; Real v[2][2]; };

DEVICE ClsSlab cls_slab(int slab, int warp) {
    ClsSlab found;
    Word at = lane() % 4 * 8 + (CLS_QKV + warp * QKV_ROW + slab * 64);
    UNROLL for (int h = 0; h < 2; ++h) {
        Real two[2];
        load_two(two, at + (Q * 4 + h * 32));
        found.q[h] = pack(two[0], two[1]);
        load_two(two, at + (K * 4 + h * 32));
        found.k[h] = pack(two[0], two[1]);
        load_two(found.v[h], at + (V * 4 + h * 32));
    }
    return found;
}

// One head's output o for the queries of tile m: rows g and g + 8, columns 2 t and 2 t + 1.
template <bool DROPOUT>
DEVICE void attend(Real (&o)[4], const Word (&q)[2], const Word (&keys)[2][2][2], const Word (&values)[4],
                   const ClsSlab& cls, int head, int m, Word keep, Word keep_cls) {
    Real s[4][4], s_cls[4], sums[4], p_cls[2], none = 0.0f;
    Word tops[2];
    multiply(s_cls, q[0], q[1], cls.k[head], none, none, none, none);
    UNROLL for (int n = 0; n < 4; ++n) multiply(s[n], q[0], q[1], keys[n / 2][head][n % 2], none, none, none, none);
    UNROLL for (int r = 0; r < 2; ++r) {
        Real top = s_cls[2 * r];
        UNROLL for (int n = 0; n < 4; ++n) top = larger(top, larger(s[n][2 * r], s[n][2 * r + 1]));
        top = larger(top, crossed(top, 1)), top = larger(top, crossed(top, 2));
        tops[r] = pack(Real(0.0f) - top, Real(0.0f) - top);
    }
    // Less the rounded top, in one product for two rows of eight keys: all that a softmax needs is one number for all.
    multiply(s_cls, tops[0], tops[1], EIGHTHS, s_cls[0], s_cls[1], s_cls[2], s_cls[3]);
    UNROLL for (int n = 0; n < 4; ++n) {
        multiply(s[n], tops[0], tops[1], EIGHTHS, s[n][0], s[n][1], s[n][2], s[n][3]);
        UNROLL for (int i = 0; i < 4; ++i) s[n][i] = exp2_of(s[n][i]);
    }
    UNROLL for (int r = 0; r < 2; ++r) {
        p_cls[r] = exp2_of(s_cls[2 * r]);
        Real p = DROPOUT ? where((keep_cls >> (16 + (2 * m + r) * 4 + 3)) & 1, p_cls[r], none) : p_cls[r];
        o[2 * r] = p * cls.v[head][0], o[2 * r + 1] = p * cls.v[head][1];
    }
    UNROLL for (int j = 0; j < 2; ++j) {
        Word p[4];
        UNROLL for (int i = 0; i < 4; ++i) p[i] = pack(s[2 * j + i / 2][i % 2 * 2], s[2 * j + i / 2][i % 2 * 2 + 1]);
        multiply(sums, p[0], p[1], p[2], p[3], ONES, ONES, j ? sums[0] : none, j ? sums[1] : none, j ? sums[2] : none, j ? sums[3] : none);
        if (DROPOUT) UNROLL for (int i = 0; i < 4; ++i) p[i] = masked(p[i], keep, (2 * m + i % 2) * 4 + 2 * j + i / 2);
        multiply(o, p[0], p[1], p[2], p[3], values[2 * j], values[2 * j + 1], o[0], o[1], o[2], o[3]);
    }
    UNROLL for (int r = 0; r < 2; ++r) {
        Real scale = inverse(sums[2 * r] + p_cls[r]);
        o[2 * r] *= scale, o[2 * r + 1] *= scale;
    }
}

// CLS's own query over all keys of a slab, head g % 2 in row g, to its place for `join_cls`.
template <bool DROPOUT>
DEVICE void attend_cls(const Word (&keys)[2][2][2], const Word (&values)[2][4], const ClsSlab& cls, int slab, int warp, Word keep_cls) {
    Word t = lane() % 4, odd = lane() / 4 % 2;
    Word q0 = where(odd, Word(0), cls.q[0]), q1 = where(odd, cls.q[1], Word(0));
    Real s[4][4], own[4], o[2][4], sums[4], none = 0.0f;
    multiply(own, q0, any(), q1, any(), cls.k[0], cls.k[1], none, none, none, none);
    Real top = own[0];
    UNROLL for (int n = 0; n < 4; ++n) {
        multiply(s[n], q0, any(), q1, any(), keys[n / 2][0][n % 2], keys[n / 2][1][n % 2], none, none, none, none);
        top = larger(top, larger(s[n][0], s[n][1]));
    }
    top = larger(top, crossed(top, 1)), top = larger(top, crossed(top, 2));
    Real p = exp2_of(own[0] - top), whole = p;
    Word of_query = DROPOUT ? taken(keep_cls, (odd * 4 + t) * 4 + 2) : Word(0);
    if (DROPOUT) p = where(taken(keep_cls, odd * 4 + 3) >> 31, p, none);
    UNROLL for (int j = 0; j < 2; ++j) {
        Word a[2];
        UNROLL for (int i = 0; i < 2; ++i) a[i] = pack(exp2_of(s[2 * j + i][0] - top), exp2_of(s[2 * j + i][1] - top));
        multiply(sums, a[0], any(), a[1], any(), ONES, ONES, j ? sums[0] : none, none, none, none);
        if (DROPOUT) UNROLL for (int i = 0; i < 2; ++i) a[i] = masked(a[i], of_query, 12 + 2 * j + i);
        UNROLL for (int h = 0; h < 2; ++h)
            multiply(o[h], a[0], any(), a[1], any(), values[h][2 * j], values[h][2 * j + 1], j ? o[h][0] : none, j ? o[h][1] : none, none, none);
    }
    Real scale = inverse(sums[0] + whole), found[2];
    UNROLL for (int c = 0; c < 2; ++c) found[c] = fused(p, where(odd, cls.v[1][c], cls.v[0][c]), where(odd, o[1][c], o[0][c])) * scale;
    store_word_if(lane() < 8, odd * 16 + t * 4 + (CLS_O + warp * ROW + slab * 32), pack(found[0], found[1]));
}

// One slab of two heads: CLS's query, and where `inner` those of the features, whose outputs are added to x.
template <int THRESHOLD>
DEVICE void slab_of(Real (&x)[2][8][4], const Word (&y)[2][4][4], const Key& key, unsigned call, int slab, int warp,
                    bool inner, const Tiles& tiles, int vectors) {
    constexpr bool DROPOUT = THRESHOLD > 0;
    const Real none[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    Word keys[2][2][2], queries[2][2][2], values[2][4], keep_cls = 0;
    Word weights = tiles.right + slab * 16 * ROW, biases = lane() % 4 * 8 + (vectors + slab * 64);
    Real q_bias[2][2], v_bias[2][2];
    UNROLL for (int n = 0; n < 2; ++n) load_two(v_bias[n], biases + (V * 4 + n * 32));
    project(queries, y, weights + V * ROW, v_bias);
    UNROLL for (int h = 0; h < 2; ++h) UNROLL for (int n = 0; n < 4; ++n) values[h][n] = transposed(queries[n / 2][h][n % 2]);
    project(keys, y, weights + K * ROW, none);
    const ClsSlab cls = cls_slab(slab, warp);
    if (DROPOUT) keep_cls = kept_of_cls<THRESHOLD>(key, call);
    attend_cls<DROPOUT>(keys, values, cls, slab, warp, keep_cls);
    if (!inner) return;
    UNROLL for (int n = 0; n < 2; ++n) load_two(q_bias[n], biases + n * 32);
    project(queries, y, weights, q_bias);
    Word keep[2], cls_key[2], out = tiles.right + (slab * 32 + OUT * ROW);
    UNROLL for (int h = 0; h < 2; ++h) {
        keep[h] = DROPOUT ? kept<THRESHOLD>(key, lane() + (call + h) * 2048) : Word(0);
        cls_key[h] = DROPOUT ? taken(keep_cls, lane() / 4 * 4 + h) : Word(0);
    }
    UNROLL for (int m = 0; m < 2; ++m) {
        Word a[2][2];
        UNROLL for (int h = 0; h < 2; ++h) {
            Real o[4];
            attend<DROPOUT>(o, queries[m][h], keys, values[h], cls, h, m, keep[h], cls_key[h]);
            a[h][0] = pack(o[0], o[1]), a[h][1] = pack(o[2], o[3]);
        }
        UNROLL for (int n = 0; n < 8; n += 2) {
            Word w[4];
            load_tiles(w, out + n * 8 * ROW);
            UNROLL for (int i = 0; i < 2; ++i) {
                Real(&c)[4] = x[m][n + i];
                multiply(c, a[0][0], a[0][1], a[1][0], a[1][1], w[2 * i], w[2 * i + 1], c[0], c[1], c[2], c[3]);
            }
        }
    }
}

// x [32, D] of an image, and its CLS vector to shared memory. Strides in numbers.
template <int TOKEN_STRIDE, int COLUMN_STRIDE>
DEVICE void load_image(Real (&x)[2][8][4], const Arguments& a, int group, int image, int warp) {
    Word g = lane() / 4, column = lane() % 4 * 2;
    Place tokens = place(a.tokens, 2 * (image * a.stride_image + static_cast<long long>(group) * TOKENS * TOKEN_STRIDE),
                         g * (2 * TOKEN_STRIDE) + column * (2 * COLUMN_STRIDE));
    const long long start = static_cast<long long>(a.groups) * a.depth * FOLDED + static_cast<long long>(group) * T * D * 4;
    Place positions = place(a.folded, start, (g + 1) * (D * 4) + column * 4);
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 8; ++n) UNROLL for (int r = 0; r < 2; ++r) {
        Real at[2];
        load_two(at, positions, ((m * 16 + r * 8) * D + n * 8) * 4);
        int from = 2 * ((m * 16 + r * 8) * TOKEN_STRIDE + n * 8 * COLUMN_STRIDE);
        if (COLUMN_STRIDE == 1) {
            Word two = load_word(tokens, from);
            x[m][n][2 * r] = low_of(two) + at[0], x[m][n][2 * r + 1] = high_of(two) + at[1];
        } else
            UNROLL for (int c = 0; c < 2; ++c) x[m][n][2 * r + c] = load_bf16(tokens, from + 2 * c * COLUMN_STRIDE) + at[c];
    }
    Real cls[2];
    load_two(cls, place(a.folded, start, lane() * 8), 0);
    UNROLL for (int c = 0; c < 2; ++c) store_real(lane() * 8 + (CLS + warp * CLS_ROW + c * 4), cls[c]);
}

// A layer's input, [T, D], as the backward reads it.
DEVICE void save(const Real (&x)[2][8][4], const Real (&cls)[2], const Arguments& a, int group, int layer, int image, bool mine) {
    long long to = ((static_cast<long long>(group) * a.depth + layer) * a.batch + image) * T * D * 2;
    store_word_if(mine, place(a.saved, to, lane() * 4), 0, pack(cls[0], cls[1]));
    Place at = place(a.saved, to, (lane() / 4 + 1) * (D * 2) + lane() % 4 * 4);
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 8; ++n) UNROLL for (int r = 0; r < 2; ++r)
        store_word_if(mine, at, (m * 16 + r * 8) * (D * 2) + n * 16, pack(x[m][n][2 * r], x[m][n][2 * r + 1]));
}

// x += the output's bias: 1 and 1 by the two numbers that it is the sum of.
DEVICE void add_bias(Real (&x)[2][8][4], int vectors) {
    Word ones = where(lane() % 4 == 0, Word(ONES), Word(0)), at = lane() / 4 * 4 + (vectors + OUT_BIAS * 4);
    UNROLL for (int n = 0; n < 8; ++n) {
        Word bias = load_word(at + n * 32);
        UNROLL for (int m = 0; m < 2; ++m) {
            Real(&c)[4] = x[m][n];
            multiply(c, ones, ones, bias, c[0], c[1], c[2], c[3]);
        }
    }
}

// THRESHOLD: of dropout, in 1/256.
template <int THRESHOLD, bool SAVE, int TOKEN_STRIDE, int COLUMN_STRIDE>
DEVICE void run(const Arguments& a) {
    const int warp = warp_of_block(), group = block(1), wanted = block(0) * WARPS + warp;
    const bool mine = wanted < a.batch;  // a warp without an image computes the last one once more
    const int image = mine ? wanted : a.batch - 1;
    const Key key = THRESHOLD ? key_of(a, image) : Key();
    Real x[2][8][4], cls[2];
    const long long first = static_cast<long long>(group) * a.depth;
    fetch_layer(a.folded, first, WEIGHTS, VECTORS);
    load_image<TOKEN_STRIDE, COLUMN_STRIDE>(x, a, group, image, warp);
#pragma unroll 1
    for (int layer = 0; layer < a.depth; ++layer) {
        const Tiles tiles = tiles_of(layer % 2 * LAYER + WEIGHTS);
        const int vectors = layer % 2 * VECTOR + VECTORS;
        const bool inner = layer + 1 < a.depth;
        fetched();
        barrier();  // this layer's weights are there, and CLS vectors of the last one
        if (inner) fetch_layer(a.folded, first + layer + 1, (layer + 1) % 2 * LAYER + WEIGHTS, (layer + 1) % 2 * VECTOR + VECTORS);
        load_two(cls, lane() * 8 + (CLS + warp * CLS_ROW));
        normalise_cls(cls, CLS_Y + warp * ROW, a.eps);
        if (SAVE) save(x, cls, a, group, layer, image, mine);
        Word y[2][4][4];
        Real factor[2][2];
        normalise(y, factor, x, a.eps);
        barrier();
        project_cls(tiles.left, vectors, warp);
        barrier();
#pragma unroll 1
        for (int slab = 0; slab < SLABS; ++slab)
            slab_of<THRESHOLD>(x, y, key, (a.first_group + group) * 2048u + layer * HEADS + slab * 2, slab, warp, inner, tiles, vectors);
        if (inner) add_bias(x, vectors);
        barrier();
        join_cls(tiles.left, vectors, warp);
    }
    barrier();
    load_two(cls, lane() * 8 + (CLS + warp * CLS_ROW));
    store_word_if(mine, place(a.out, (static_cast<long long>(image) * a.groups + group) * D * 2, lane() * 4), 0, pack(cls[0], cls[1]));
}

}  // namespace forward
