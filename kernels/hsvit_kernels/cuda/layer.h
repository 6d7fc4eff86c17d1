// What both directions of grouped attention share, for T = 33 tokens of D = 64 features in 8 heads, in bf16: how a layer
// lies in shared memory, dropout's mask, LayerNorm. kernels/README.md says what lies where, and when.
//
// Letters: g = lane / 4 and t = lane % 4, by which a tensor core's operands are laid out; m: tiles of 16 feature tokens,
// of which a lane has rows g and g + 8; n: tiles of 8 columns, of which it has 2 t and 2 t + 1; k: tiles of 16 along a sum.

#pragma once

#include "lanes.h"

constexpr int WARPS = 8, TOKENS = 32, T = TOKENS + 1, D = 64, HEADS = 8, SLABS = HEADS / 2;
constexpr int Q = 0, K = D, V = 2 * D, OUT = 3 * D, ROWS = 4 * D;  // the rows of a layer's weights
constexpr int OUT_BIAS = 3 * D, NUMBERS = 4 * D;                   // its biases: q, k, v, output
constexpr int FOLDED = ROWS * D * 2 + NUMBERS * 4;  // bytes of a layer in memory: weights.h
// Rows in shared memory, in bytes, padded so that eight of them fall to different banks.
constexpr int ROW = D * 2 + 16, CLS_ROW = D * 4 + 16, LAYER = ROWS * ROW;
constexpr float SCALE = 1.4426950408889634f * 0.35355339059327373f;  // of scores, in units of log2(e)
constexpr unsigned MULTIPLIER = 1664525, INCREMENT = 1013904223, SITE = 1 << 24, CLS_BLOCK = 7;
constexpr unsigned ONES = 0x3f803f80, EIGHTHS = 0x3e003e00;

struct Key { unsigned x, y, z; };

// The bits of 32 weights that dropout keeps; `mask.Keep` has the definition.
template <int THRESHOLD>
DEVICE Word kept(const Key& key, Word counter) {
    Word keep = ~0u;
    UNROLL for (int call = 0; call < 2; ++call) {
        Word w = (counter * 2 + call) * MULTIPLIER + INCREMENT, x = key.x, y = key.y, z = key.z;
        x += y * w, y += z * x, z += x * y, w += y * z;
        x ^= x >> 16, y ^= y >> 16, z ^= z >> 16, w ^= w >> 16;
        x += y * w, y += z * x, z += x * y, w += y * z;
        const Word words[4] = {x, y, z, w};
        UNROLL for (int i = 0; i < 4; ++i) {
            Word word = words[i] ^ (words[i] >> 16);
            keep = (THRESHOLD >> (call * 4 + i)) & 1 ? word & keep : word | keep;
        }
    }
    return keep;
}

template <class A>
DEVICE Key key_of(const A& a, int image) {
    Key key;
    key.x = a.key[0] * MULTIPLIER + INCREMENT;
    key.y = (a.key[1] + SITE) * MULTIPLIER + INCREMENT;
    key.z = a.images[image] * MULTIPLIER + INCREMENT;
    return key;
}

// What concerns CLS among the weights of a slab's heads takes a lane one word: t = 0, 1 of CLS's key for queries g + 8 i
// and that head; t = 2 of CLS's query for head g / 4 and keys 2 (g % 4) + 8 i; t = 3 of both, for head g % 2.
template <int THRESHOLD>
DEVICE Word kept_of_cls(const Key& key, unsigned call) {
    Word g = lane() / 4, t = lane() % 4, is_query = (Word(1) < t) & 1;
    Word head = where(t < 2, t, where(t == 2, g / 4, g % 2));
    Word query = where(is_query, CLS_BLOCK, Word(0)), of_key = where(t == 2, Word(0), CLS_BLOCK);
    Word place = where(t < 2, g * 4 + 3, where(t == 2, g % 4 + 28, Word(31)));
    return kept<THRESHOLD>(key, (((head + call) * 8 + query) * 8 + of_key) * 32 + place);
}

DEVICE Word masked(Word pair, Word keep, int bit) { return pair & spread(keep << ((bit < 8 ? 7 : 15) - bit), bit >= 8); }

// Where a lane's part of tiles of weights begins, as right operands of a product (b0, b1 of 16 outputs) or left ones.
struct Tiles { Word right, left; };

DEVICE Tiles tiles_of(int weights) {
    Word i = lane(), start = weights;
    return {start + (i / 16 * 8 + i % 8) * ROW + i / 8 % 2 * 16, start + i % 16 * ROW + i / 16 * 16};
}

// Weights and biases of layer `number` of all groups' to shared memory, while the warps go on.
DEVICE void fetch_layer(const void* folded, long long number, int weights, int biases) {
    Word thread = lane() + warp_of_block() * 32, to = thread / 8 * ROW + thread % 8 * 16 + weights;
    Place from = place(folded, number * FOLDED, thread * 16);
    UNROLL for (int i = 0; i < ROWS / 32; ++i) fetch(to + i * 32 * ROW, from, i * 32 * D * 2);
    fetch_if(thread < NUMBERS / 4, thread * 16 + biases, place(folded, number * FOLDED + ROWS * D * 2, thread * 16));
}

// LayerNorm of the features, rounded: left operands y[m][k], and as they lie right operands of products the other way.
DEVICE void normalise(Word (&y)[2][4][4], Real (&factor)[2][2], const Real (&x)[2][8][4], float eps) {
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int r = 0; r < 2; ++r) {
        Real sum = x[m][0][2 * r] + x[m][0][2 * r + 1], square = x[m][0][2 * r] * x[m][0][2 * r];
        square = fused(x[m][0][2 * r + 1], x[m][0][2 * r + 1], square);
        UNROLL for (int n = 1; n < 8; ++n) UNROLL for (int c = 2 * r; c < 2 * r + 2; ++c)
            sum += x[m][n][c], square = fused(x[m][n][c], x[m][n][c], square);
        sum += crossed(sum, 1), square += crossed(square, 1);
        sum += crossed(sum, 2), square += crossed(square, 2);
        Real mean = sum * (1.0f / D), apart = fused(Real(0.0f) - mean, mean, square * (1.0f / D));
        factor[m][r] = rsqrt_of(larger(apart, 0.0f) + eps);
        Real shift = Real(0.0f) - mean * factor[m][r];
        UNROLL for (int n = 0; n < 8; ++n)
            y[m][n / 2][n % 2 * 2 + r] = pack(fused(x[m][n][2 * r], factor[m][r], shift), fused(x[m][n][2 * r + 1], factor[m][r], shift));
    }
}

// The image's CLS vector, two numbers a lane: normalised and rounded to where all warps find it. 1 / deviation.
DEVICE Real normalise_cls(const Real (&x)[2], int to, float eps) {
    Real sum = x[0] + x[1], square = fused(x[0], x[0], x[1] * x[1]);
    UNROLL for (int by = 1; by < 32; by *= 2) sum += crossed(sum, by), square += crossed(square, by);
    Real mean = sum * (1.0f / D), apart = fused(Real(0.0f) - mean, mean, square * (1.0f / D));
    Real factor = rsqrt_of(larger(apart, 0.0f) + eps), shift = Real(0.0f) - mean * factor;
    store_word(lane() * 4 + to, pack(fused(x[0], factor, shift), fused(x[1], factor, shift)));
    return factor;
}
