// The weights of every layer as forward.h and backward.h read them: what a layer multiplies and adds on its way is taken
// in, LayerNorm's factors and offsets, the scores' scale in units of log2(e), and that of kept weights.
//
// A layer: 256 rows of 64 numbers in bf16 (q, k, v, output), then 256 biases: of q, k (zeros: it cancels) and v in fp32,
// of the output two numbers in bf16 whose sum it is. Behind all layers what every group's tokens start from, [G, T, D] in
// fp32: positions, and CLS where it stands.

#pragma once

#include "layer.h"

namespace weights {

constexpr int SHARED = 0;

struct Arguments {
    const void *cls, *positions, *norm_weight, *norm_bias, *qkv_weight, *qkv_bias, *out_weight, *out_bias;
    void* folded;
    int groups, depth;
    float keep_scale;
};

// Numbers `number` and the next of an array in fp32, or in bf16 if HALVES.
template <bool HALVES>
DEVICE void load_pair(Real (&x)[2], const void* from, long long number, const Word& further) {
    if (HALVES) {
        Word two = load_word(place(from, number * 2, further * 2), 0);
        x[0] = low_of(two), x[1] = high_of(two);
    } else
        load_two(x, place(from, number * 4, further * 4), 0);
}

template <bool HALVES>
DEVICE Real load_one(const void* from, long long number, const Word& further) {
    if (HALVES) return load_bf16(place(from, number * 2, further * 2), 0);
    return load_real(place(from, number * 4, further * 4), 0);
}

// Layer `number` of all groups': 32 rows a warp.
template <bool HALVES>
DEVICE void fold_layer(const Arguments& a, long long number, int warp) {
    const bool out = warp >= OUT / 32, keys = warp / 2 == K / D;
    const float scale = warp < K / 32 ? SCALE : out ? a.keep_scale : 1.0f;
    const int first = warp * 32;
    Real gamma[2] = {1.0f, 1.0f}, beta[2] = {0.0f, 0.0f}, mine = 0.0f;
    if (!out) load_pair<HALVES>(gamma, a.norm_weight, number * D, lane() * 2), load_pair<HALVES>(beta, a.norm_bias, number * D, lane() * 2);
    Place to = place(a.folded, number * FOLDED + first * D * 2, lane() * 4);
    for (int row = 0; row < 32; ++row) {
        Real w[2];
        if (out) load_pair<HALVES>(w, a.out_weight, (number * D + first - OUT + row) * D, lane() * 2);
        else load_pair<HALVES>(w, a.qkv_weight, (number * 3 * D + first + row) * D, lane() * 2);
        Real sum = fused(w[0], beta[0], w[1] * beta[1]);
        UNROLL for (int by = 1; by < 32; by *= 2) sum += crossed(sum, by);
        mine = where(lane() == row, sum, mine);
        store_word(to, row * D * 2, pack(w[0] * gamma[0] * scale, w[1] * gamma[1] * scale));
    }
    Place bias_to = place(a.folded, number * FOLDED + ROWS * D * 2 + first * 4, lane() * 4);
    if (out) {
        Real bias = load_one<HALVES>(a.out_bias, number * D + first - OUT, lane());
        store_word(bias_to, 0, pack(bias, bias - low_of(pack(bias, bias))));
    } else {
        Real bias = (mine + load_one<HALVES>(a.qkv_bias, number * 3 * D + first, lane())) * scale;
        store_real_if(Word(1), bias_to, 0, keys ? Real(0.0f) : bias);
    }
}

template <bool HALVES>
DEVICE void start_group(const Arguments& a, int group, int warp) {
    const long long from = static_cast<long long>(group) * T * D;
    for (int token = warp; token < T; token += WARPS) {
        Real at[2], cls[2] = {0.0f, 0.0f};
        load_pair<HALVES>(at, a.positions, from + token * D, lane() * 2);
        if (token == 0) load_pair<HALVES>(cls, a.cls, static_cast<long long>(group) * D, lane() * 2);
        Place to = place(a.folded, static_cast<long long>(a.groups) * a.depth * FOLDED + (from + token * D) * 4, lane() * 8);
        store_two(to, 0, at[0] + cls[0], at[1] + cls[1]);
    }
}

// A block a layer of a group, then one a group.
template <bool HALVES>
DEVICE void run(const Arguments& a) {
    const int layers = a.groups * a.depth;
    if (block(0) < layers) fold_layer<HALVES>(a, block(0), warp_of_block());
    else start_group<HALVES>(a, block(0) - layers, warp_of_block());
}

}  // namespace weights
