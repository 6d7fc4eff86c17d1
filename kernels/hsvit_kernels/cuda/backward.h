// Grouped attention, backward, for what forward.h computes. A block has some images of a group and walks the layers in
// reverse: for each layer all its images, eight at a time, a warp each, while the weights' sums stay in shared memory.
// What a warp has found of a slab of two heads lies in shared memory too, for all warps to multiply.

#pragma once

#include "layer.h"

namespace backward {

constexpr int TILE = TOKENS * ROW;  // an image's tokens, 64 numbers each
constexpr int WEIGHTS = 0, BIASES = ROWS * ROW, SUMS = BIASES + NUMBERS * 4, BIAS_SUMS = SUMS + ROWS * D * 4;
constexpr int Y = BIAS_SUMS + ROWS * 4, DX = Y + WARPS * TILE, SLAB = DX + WARPS * TILE;  // SLAB: dq, dk, dv, o
constexpr int CLS_Y = SLAB + WARPS * TILE, CLS_DX = CLS_Y + 16 * ROW, CLS_SLAB = CLS_DX + 16 * ROW;
constexpr int CLS_QKV = CLS_SLAB + 16 * ROW, HALVES = 3 * D * 2 + 16, CLS_DQKV = CLS_QKV + WARPS * HALVES;
constexpr int CLS_D = CLS_DQKV + WARPS * HALVES, FACTORS = CLS_D + WARPS * CLS_ROW, SHARED = FACTORS + WARPS * T * 4;
constexpr float LN2 = 0.6931471805599453f;

struct Arguments {
    const void *saved, *dout, *folded;  // bf16 [G, A, B, T, D], [B, G, D]; the weights as the forward has them
    const int *key, *images;
    void *dtokens;                      // bf16 [B, G, T - 1, D]: between layers what flows back to them
    float *dcls, *products, *sums;      // [B, G, D], [splits, G A, 4, D, D], [splits, G A, 4, D]
    int batch, groups, depth, first_group, share;
    float eps, keep_scale;
};

// Where a lane's own numbers of a row of tokens lie, m = n = r = 0.
DEVICE Word own(int tile, int warp) { return lane() / 4 * ROW + lane() % 4 * 4 + (tile + warp * TILE); }
constexpr int OF(int m, int r) { return (m * 16 + r * 8) * ROW; }

// What flows back into an image's layer, to DX; zeros for no image, or above the last layer.
DEVICE void fetch_gradient(const Arguments& a, int group, int image, int warp, bool zero) {
    Word row = lane() / 8, chunk = lane() % 8, to = row * ROW + chunk * 16 + (DX + warp * TILE);
    Place from = place(a.dtokens, (static_cast<long long>(image) * a.groups + group) * TOKENS * D * 2, lane() * 16);
    Real none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    UNROLL for (int i = 0; i < 8; ++i) {
        if (zero) store_four(to + i * 4 * ROW, none);
        else fetch(to + i * 4 * ROW, from, i * 4 * D * 2);
    }
}

// Of an image's layer: the normalised input to Y, 1 / deviation of each row to FACTORS; the same of CLS.
DEVICE void begin(const Arguments& a, long long number, int image, int warp) {
    long long from = (number * a.batch + image) * T * D * 2;
    Place at = place(a.saved, from, (lane() / 4 + 1) * (D * 2) + lane() % 4 * 4);
    Real x[2][8][4], factor[2][2];
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 8; ++n) UNROLL for (int r = 0; r < 2; ++r) {
        Word two = load_word(at, (m * 16 + r * 8) * (D * 2) + n * 16);
        x[m][n][2 * r] = low_of(two), x[m][n][2 * r + 1] = high_of(two);
    }
    Word y[2][4][4], two = load_word(place(a.saved, from, lane() * 4), 0), to = own(Y, warp);
    normalise(y, factor, x, a.eps);
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 8; ++n) UNROLL for (int r = 0; r < 2; ++r)
        store_word(to + (OF(m, r) + n * 16), y[m][n / 2][n % 2 * 2 + r]);
    const Real cls[2] = {low_of(two), high_of(two)};
    Word factors = lane() / 4 * 4 + (FACTORS + warp * T * 4);
    store_real(FACTORS + (warp * T + TOKENS) * 4, normalise_cls(cls, CLS_Y + warp * ROW, a.eps));
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int r = 0; r < 2; ++r) store_real(factors + (m * 16 + r * 8) * 4, factor[m][r]);
}

// CLS's queries, keys and values of the block's images, and what flows back to its heads' outputs: 12 and 4 tiles of rows.
DEVICE void project_cls(const Tiles& tiles, int warp) {
#pragma unroll 1
    for (int tile = warp; tile < 16; tile += WARPS) {
        const bool back = tile >= 12;
        Word at = lane() / 4 * ROW + lane() % 4 * 4 + (back ? CLS_DX : CLS_Y);
        Real low = 0.0f, high = 0.0f;
        if (!back) low = load_real(lane() / 4 * 4 + (BIASES + tile * 64)), high = load_real(lane() / 4 * 4 + (BIASES + tile * 64 + 32));
        Real c[4] = {low, low, high, high};
        UNROLL for (int k = 0; k < 4; ++k) {
            Word w[4];
            if (back) load_turned(w, tiles.right + (OUT * ROW + k * 16 * ROW + (tile - 12) * 32));
            else load_tiles(w, tiles.left + (tile * 16 * ROW + k * 32));
            multiply(c, w[0], w[1], w[2], w[3], load_word(at + k * 32), load_word(at + (k * 32 + 16)), c[0], c[1], c[2], c[3]);
        }
        UNROLL for (int i = 0; i < 4; ++i) {
            Word image = lane() % 4 * 2 + i % 2, output = lane() / 4 + i / 2 * 8;
            if (back) store_real(image * CLS_ROW + output * 4 + (CLS_D + (tile - 12) * 64), c[i]);
            else store_half(image * HALVES + output * 2 + (CLS_QKV + tile * 32), c[i]);
        }
    }
}

// [32 tokens, 16]: an image's tokens at `from` by weights, as they lie or the other way round, rounded: of[m][head][r].
template <bool TURNED>
DEVICE void project(Word (&of)[2][2][2], Word from, Word weights, const Real (&bias)[2][2]) {
    Real c[2][2][4];
    UNROLL for (int k = 0; k < 4; ++k) {
        Word w[4];
        if (TURNED) load_turned(w, weights + k * 16 * ROW);
        else load_tiles(w, weights + k * 32);
        UNROLL for (int m = 0; m < 2; ++m) {
            Word x[4];
            load_tiles(x, from + (m * 16 * ROW + k * 32));
            UNROLL for (int n = 0; n < 2; ++n) {
                const Real* with = k ? c[m][n] : bias[n];
                multiply(c[m][n], x[0], x[1], x[2], x[3], w[2 * n], w[2 * n + 1], with[0], with[1], with[k ? 2 : 0], with[k ? 3 : 1]);
            }
        }
    }
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 2; ++n) UNROLL for (int r = 0; r < 2; ++r)
        of[m][n][r] = pack(c[m][n][2 * r], c[m][n][2 * r + 1]);
}

// What a warp holds of a slab: [m][head][r], as products want them.
struct Slab { Word q[2][2][2], k[2][2][2], v[2][2][2], d[2][2][2]; };
// Of CLS: q, k, v and what flows back to o, of both heads at 2 t, 2 t + 1.
struct OfCls { Word q[2], k[2], v[2], d[2]; };
// What flows back to keys and values of a head: [m] features, and CLS.
struct Back { Real dk[2][4], dv[2][4], dk_cls[4], dv_cls[4]; };

DEVICE OfCls of_cls(int slab, int warp) {
    OfCls found;
    Word at = lane() % 4 * 4 + (CLS_QKV + warp * HALVES + slab * 32), d = lane() % 4 * 8 + (CLS_D + warp * CLS_ROW + slab * 64);
    UNROLL for (int h = 0; h < 2; ++h) {
        Real two[2];
        load_two(two, d + h * 32);
        found.q[h] = load_word(at + (Q * 2 + h * 16)), found.k[h] = load_word(at + (K * 2 + h * 16));
        found.v[h] = load_word(at + (V * 2 + h * 16)), found.d[h] = pack(two[0], two[1]);
    }
    return found;
}

DEVICE void clear(Real (&c)[4]) { UNROLL for (int i = 0; i < 4; ++i) c[i] = 0.0f; }

// d += a b for a of 16 keys by 16 queries: packed tiles of queries by keys, [key tile][r], the other way round.
DEVICE void multiply_keys(Real (&d)[4], const Word (&tile)[4][2], int m, Word b0, Word b1) {
    multiply(d, transposed(tile[2 * m][0]), transposed(tile[2 * m + 1][0]), transposed(tile[2 * m][1]), transposed(tile[2 * m + 1][1]),
             b0, b1, d[0], d[1], d[2], d[3]);
}

// Queries of tile m and a head: dq and o, rounded, and their part of what flows back to keys and values.
template <bool DROPOUT>
DEVICE void attend(Word (&dq)[2], Word (&out)[2], Back& back, const Slab& s, const OfCls& cls, int head, int m, Word keep, Word keep_cls) {
    Real p[4][4], dp[4][4], p_cls[4], dp_cls[4], sums[4], none = 0.0f;
    Word tops[2], pairs[4][2], dpairs[4][2], of_cls[2], dof_cls[2];
    const Word(&q)[2] = s.q[m][head], (&d)[2] = s.d[m][head];
    multiply(p_cls, q[0], q[1], cls.k[head], none, none, none, none);
    multiply(dp_cls, d[0], d[1], cls.v[head], none, none, none, none);
    UNROLL for (int n = 0; n < 4; ++n) multiply(p[n], q[0], q[1], s.k[n / 2][head][n % 2], none, none, none, none);
    UNROLL for (int n = 0; n < 4; ++n) multiply(dp[n], d[0], d[1], s.v[n / 2][head][n % 2], none, none, none, none);
    UNROLL for (int r = 0; r < 2; ++r) {
        Real top = p_cls[2 * r];
        UNROLL for (int n = 0; n < 4; ++n) top = larger(top, larger(p[n][2 * r], p[n][2 * r + 1]));
        top = larger(top, crossed(top, 1)), top = larger(top, crossed(top, 2));
        tops[r] = pack(Real(0.0f) - top, Real(0.0f) - top);
    }
    multiply(p_cls, tops[0], tops[1], EIGHTHS, p_cls[0], p_cls[1], p_cls[2], p_cls[3]);
    UNROLL for (int n = 0; n < 4; ++n) {
        multiply(p[n], tops[0], tops[1], EIGHTHS, p[n][0], p[n][1], p[n][2], p[n][3]);
        UNROLL for (int i = 0; i < 4; ++i) p[n][i] = exp2_of(p[n][i]);
        UNROLL for (int r = 0; r < 2; ++r) pairs[n][r] = pack(p[n][2 * r], p[n][2 * r + 1]);
        multiply(sums, pairs[n][0], pairs[n][1], ONES, n ? sums[0] : none, n ? sums[1] : none, n ? sums[2] : none, n ? sums[3] : none);
    }
    UNROLL for (int r = 0; r < 2; ++r) {
        p_cls[2 * r] = exp2_of(p_cls[2 * r]);
        Word kept_cls = DROPOUT ? (keep_cls >> (16 + (2 * m + r) * 4 + 3)) & 1 : Word(1);
        Real scale = inverse(sums[2 * r] + p_cls[2 * r]), found = 0.0f;
        dp_cls[2 * r] = where(kept_cls, dp_cls[2 * r], none);
        UNROLL for (int n = 0; n < 4; ++n) {
            const int bit = (2 * m + r) * 4 + n;
            Word two = pack(dp[n][2 * r], dp[n][2 * r + 1]);
            if (DROPOUT) two = masked(two, keep, bit);
            dp[n][2 * r] = low_of(two), dp[n][2 * r + 1] = high_of(two);
            found = fused(p[n][2 * r], dp[n][2 * r], found), found = fused(p[n][2 * r + 1], dp[n][2 * r + 1], found);
            pairs[n][r] = pack(p[n][2 * r] * scale, p[n][2 * r + 1] * scale);
            if (DROPOUT) pairs[n][r] = masked(pairs[n][r], keep, bit);
        }
        found += crossed(found, 1), found += crossed(found, 2);
        // dp less what is the same for all keys, times the weight: as a derivative of scores in units of log2(e).
        Real slope = scale * LN2, same = fused(p_cls[2 * r], dp_cls[2 * r], found) * scale * slope;
        same = Real(0.0f) - same;
        UNROLL for (int n = 0; n < 4; ++n)
            dpairs[n][r] = pack(p[n][2 * r] * fused(dp[n][2 * r], slope, same), p[n][2 * r + 1] * fused(dp[n][2 * r + 1], slope, same));
        dp_cls[2 * r] = p_cls[2 * r] * fused(dp_cls[2 * r], slope, same);
        p_cls[2 * r] = where(kept_cls, p_cls[2 * r] * scale, none);
        of_cls[r] = transposed(pack(p_cls[2 * r], p_cls[2 * r])), dof_cls[r] = transposed(pack(dp_cls[2 * r], dp_cls[2 * r]));
    }
    Real o[4], dq_of[4];
    UNROLL for (int r = 0; r < 2; ++r) {
        o[2 * r] = p_cls[2 * r] * low_of(cls.v[head]), o[2 * r + 1] = p_cls[2 * r] * high_of(cls.v[head]);
        dq_of[2 * r] = dp_cls[2 * r] * low_of(cls.k[head]), dq_of[2 * r + 1] = dp_cls[2 * r] * high_of(cls.k[head]);
    }
    UNROLL for (int j = 0; j < 2; ++j) {
        multiply(o, pairs[2 * j][0], pairs[2 * j][1], pairs[2 * j + 1][0], pairs[2 * j + 1][1],
                 transposed(s.v[j][head][0]), transposed(s.v[j][head][1]), o[0], o[1], o[2], o[3]);
        multiply(dq_of, dpairs[2 * j][0], dpairs[2 * j][1], dpairs[2 * j + 1][0], dpairs[2 * j + 1][1],
                 transposed(s.k[j][head][0]), transposed(s.k[j][head][1]), dq_of[0], dq_of[1], dq_of[2], dq_of[3]);
    }
    Word d_low = transposed(d[0]), d_high = transposed(d[1]), q_low = transposed(q[0]), q_high = transposed(q[1]);
    UNROLL for (int j = 0; j < 2; ++j) {
        multiply_keys(back.dv[j], pairs, j, d_low, d_high);
        multiply_keys(back.dk[j], dpairs, j, q_low, q_high);
    }
    Real(&v)[4] = back.dv_cls, (&k)[4] = back.dk_cls;
    multiply(v, of_cls[0], any(), of_cls[1], any(), d_low, d_high, v[0], v[1], v[2], v[3]);
    multiply(k, dof_cls[0], any(), dof_cls[1], any(), q_low, q_high, k[0], k[1], k[2], k[3]);
    UNROLL for (int r = 0; r < 2; ++r) dq[r] = pack(dq_of[2 * r], dq_of[2 * r + 1]), out[r] = pack(o[2 * r], o[2 * r + 1]);
}

// CLS's own query, head g % 2 in row g: the weights of the feature keys and what flows back to their scores, and of CLS's.
struct OfQuery { Word p[4], dp[4]; Real one, d_one; };

// Its dq and o go to shared memory.
template <bool DROPOUT>
DEVICE OfQuery attend_cls(const Slab& s, const OfCls& cls, int slab, int warp, Word keep_cls) {
    Word g = lane() / 4, t = lane() % 4, odd = g % 2, zero = 0u;
    Word q0 = where(odd, zero, cls.q[0]), q1 = where(odd, cls.q[1], zero), d0 = where(odd, zero, cls.d[0]), d1 = where(odd, cls.d[1], zero);
    Real p[4][4], dp[4][4], own_p[4], own_dp[4], none = 0.0f, sum = 0.0f;
    multiply(own_p, q0, any(), q1, any(), cls.k[0], cls.k[1], none, none, none, none);
    multiply(own_dp, d0, any(), d1, any(), cls.v[0], cls.v[1], none, none, none, none);
    Real top = own_p[0];
    UNROLL for (int n = 0; n < 4; ++n) {
        multiply(p[n], q0, any(), q1, any(), s.k[n / 2][0][n % 2], s.k[n / 2][1][n % 2], none, none, none, none);
        multiply(dp[n], d0, any(), d1, any(), s.v[n / 2][0][n % 2], s.v[n / 2][1][n % 2], none, none, none, none);
        top = larger(top, larger(p[n][0], p[n][1]));
    }
    top = larger(top, crossed(top, 1)), top = larger(top, crossed(top, 2));
    UNROLL for (int n = 0; n < 4; ++n) UNROLL for (int c = 0; c < 2; ++c) p[n][c] = exp2_of(p[n][c] - top), sum += p[n][c];
    sum += crossed(sum, 1), sum += crossed(sum, 2);
    Real one = exp2_of(own_p[0] - top), scale = inverse(sum + one);
    one *= scale;
    Word of_query = DROPOUT ? taken(keep_cls, (odd * 4 + t) * 4 + 2) : zero, kept_one = DROPOUT ? taken(keep_cls, odd * 4 + 3) >> 31 : Word(1);
    Real d_one = where(kept_one, own_dp[0], none), of = 0.0f;
    Word pairs[4], dpairs[4];
    UNROLL for (int n = 0; n < 4; ++n) {
        Word two = pack(dp[n][0], dp[n][1]);
        if (DROPOUT) two = masked(two, of_query, 12 + n);
        dp[n][0] = low_of(two), dp[n][1] = high_of(two);
        UNROLL for (int c = 0; c < 2; ++c) p[n][c] *= scale, of = fused(p[n][c], dp[n][c], of);
        pairs[n] = pack(p[n][0], p[n][1]);
        if (DROPOUT) pairs[n] = masked(pairs[n], of_query, 12 + n);
    }
    of += crossed(of, 1), of += crossed(of, 2);
    of = fused(one, d_one, of);
    UNROLL for (int n = 0; n < 4; ++n) dpairs[n] = pack(p[n][0] * (dp[n][0] - of) * LN2, p[n][1] * (dp[n][1] - of) * LN2);
    d_one = one * (d_one - of) * LN2, one = where(kept_one, one, none);
    Real o[2][4], dq[2][4], found[2], dfound[2];
    UNROLL for (int h = 0; h < 2; ++h) {
        clear(o[h]), clear(dq[h]);
        UNROLL for (int j = 0; j < 2; ++j) {
            multiply(o[h], pairs[2 * j], any(), pairs[2 * j + 1], any(), transposed(s.v[j][h][0]), transposed(s.v[j][h][1]), o[h][0], o[h][1], none, none);
            multiply(dq[h], dpairs[2 * j], any(), dpairs[2 * j + 1], any(), transposed(s.k[j][h][0]), transposed(s.k[j][h][1]), dq[h][0], dq[h][1], none, none);
        }
    }
    Word v_own = where(odd, cls.v[1], cls.v[0]), k_own = where(odd, cls.k[1], cls.k[0]);
    UNROLL for (int c = 0; c < 2; ++c) {
        found[c] = fused(one, c ? high_of(v_own) : low_of(v_own), where(odd, o[1][c], o[0][c]));
        dfound[c] = fused(d_one, c ? high_of(k_own) : low_of(k_own), where(odd, dq[1][c], dq[0][c]));
    }
    Word to = odd * 16 + t * 4 + (CLS_SLAB + warp * ROW), two = pack(dfound[0], dfound[1]);
    store_word_if(g < 2, to, two), store_word_if(g < 2, to + 96, pack(found[0], found[1]));
    store_word_if(g < 2, odd * 16 + t * 4 + (CLS_DQKV + warp * HALVES + slab * 32), two);
    OfQuery query;
    UNROLL for (int n = 0; n < 4; ++n) query.p[n] = pairs[n], query.dp[n] = dpairs[n];
    query.one = one, query.d_one = d_one;
    return query;
}

// The part of CLS's query in what flows back to the keys and values of a head.
DEVICE void add_query(Back& back, const OfQuery& query, const OfCls& cls, int head, int slab, int warp) {
    // Row `head` of the tiles is this head's: as many keys by one.
    Word g = lane() / 4, t = lane() % 4;
    Word at = (CLS_QKV + warp * HALVES + slab * 32 + head * 16) + g * 2, d_at = (CLS_D + warp * CLS_ROW + slab * 64 + head * 32) + g * 4;
    Real none = 0.0f, q_g = where(t == 0, load_half(at), none), d_g = where(t == 0, load_real(d_at), none);
    Word of_q = head ? pack(none, q_g) : pack(q_g, none), of_d = head ? pack(none, d_g) : pack(d_g, none);
    UNROLL for (int j = 0; j < 2; ++j) {
        Real(&v)[4] = back.dv[j], (&k)[4] = back.dk[j];
        multiply(v, transposed(query.p[2 * j]), transposed(query.p[2 * j + 1]), of_d, v[0], v[1], v[2], v[3]);
        multiply(k, transposed(query.dp[2 * j]), transposed(query.dp[2 * j + 1]), of_q, k[0], k[1], k[2], k[3]);
    }
    Real p = taken(query.one, head * 4), dp = taken(query.d_one, head * 4);
    back.dv_cls[0] = fused(p, low_of(cls.d[head]), back.dv_cls[0]), back.dv_cls[1] = fused(p, high_of(cls.d[head]), back.dv_cls[1]);
    back.dk_cls[0] = fused(dp, low_of(cls.q[head]), back.dk_cls[0]), back.dk_cls[1] = fused(dp, high_of(cls.q[head]), back.dk_cls[1]);
}

// dy [32, D] += d [32, 16] of a slab by its rows of weights.
DEVICE void spread_back(Real (&dy)[2][8][4], const Word (&d)[2][2][2], Word weights) {
    UNROLL for (int n = 0; n < 8; n += 2) {
        Word w[4];
        load_turned(w, weights + n * 16);
        UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int i = 0; i < 2; ++i) {
            Real(&c)[4] = dy[m][n + i];
            multiply(c, d[m][0][0], d[m][0][1], d[m][1][0], d[m][1][1], w[2 * i], w[2 * i + 1], c[0], c[1], c[2], c[3]);
        }
    }
}

// A slab of two heads of the warp's image: what is multiplied for the weights' sums to SLAB, dy += its part.
template <int THRESHOLD>
DEVICE void slab_of(Real (&dy)[2][8][4], const Arguments& a, int image, unsigned call, int slab, int warp, bool inner) {
    constexpr bool DROPOUT = THRESHOLD > 0;
    const Key key = DROPOUT ? key_of(a, image) : Key();  // for each slab again: it need not stay in registers
    const Tiles tiles = tiles_of(WEIGHTS);
    const Real none[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    Word left = tiles.left + (Y + warp * TILE), biases = lane() % 4 * 8 + (BIASES + slab * 64), weights = tiles.right + slab * 16 * ROW;
    Real q_bias[2][2], v_bias[2][2];
    Slab s;
    UNROLL for (int n = 0; n < 2; ++n) load_two(q_bias[n], biases + n * 32), load_two(v_bias[n], biases + (V * 4 + n * 32));
    project<false>(s.k, left, weights + K * ROW, none);
    project<false>(s.v, left, weights + V * ROW, v_bias);
    const OfCls cls = of_cls(slab, warp);
    Word keep_cls = DROPOUT ? kept_of_cls<THRESHOLD>(key, call) : Word(0);
    const OfQuery query = attend_cls<DROPOUT>(s, cls, slab, warp, keep_cls);
    if (inner) {
        project<false>(s.q, left, weights, q_bias);
        project<true>(s.d, tiles.left + (DX + warp * TILE), tiles.left + (OUT * ROW + slab * 32), none);
    }
    Word dq[2][2][2], dk[2][2][2], dv[2][2][2], out[2][2][2], to = own(SLAB, warp);
    Word cls_to = lane() % 4 * 4 + (CLS_SLAB + warp * ROW), all_to = lane() % 4 * 4 + (CLS_DQKV + warp * HALVES + slab * 32);
    UNROLL for (int h = 0; h < 2; ++h) {
        Back back;
        UNROLL for (int m = 0; m < 2; ++m) clear(back.dk[m]), clear(back.dv[m]), dq[m][h][0] = dq[m][h][1] = out[m][h][0] = out[m][h][1] = 0u;
        clear(back.dk_cls), clear(back.dv_cls);
        if (inner) {
            Word keep = DROPOUT ? kept<THRESHOLD>(key, lane() + (call + h) * 2048) : Word(0);
            Word keep_key = DROPOUT ? taken(keep_cls, lane() / 4 * 4 + h) : Word(0);
            UNROLL for (int m = 0; m < 2; ++m) attend<DROPOUT>(dq[m][h], out[m][h], back, s, cls, h, m, keep, keep_key);
        }
        add_query(back, query, cls, h, slab, warp);
        UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int r = 0; r < 2; ++r) {
            dk[m][h][r] = pack(back.dk[m][2 * r], back.dk[m][2 * r + 1]), dv[m][h][r] = pack(back.dv[m][2 * r], back.dv[m][2 * r + 1]);
            store_word(to + (OF(m, r) + h * 16), dq[m][h][r]), store_word(to + (OF(m, r) + h * 16 + 32), dk[m][h][r]);
            store_word(to + (OF(m, r) + h * 16 + 64), dv[m][h][r]), store_word(to + (OF(m, r) + h * 16 + 96), out[m][h][r]);
        }
        Word k_cls = pack(back.dk_cls[0], back.dk_cls[1]), v_cls = pack(back.dv_cls[0], back.dv_cls[1]);
        store_word_if(lane() < 4, cls_to + (32 + h * 16), k_cls), store_word_if(lane() < 4, cls_to + (64 + h * 16), v_cls);
        store_word_if(lane() < 4, all_to + (K * 2 + h * 16), k_cls), store_word_if(lane() < 4, all_to + (V * 2 + h * 16), v_cls);
    }
    if (inner) spread_back(dy, dq, tiles.left + slab * 16 * ROW);
    spread_back(dy, dk, tiles.left + (K + slab * 16) * ROW);
    spread_back(dy, dv, tiles.left + (V + slab * 16) * ROW);
}

// One step of 16 rows of the weights' sums: c[0..2] of dq, dk, dv by column tile `warp` of y, c[3] of dx by o; the biases' too.
DEVICE void step_of_sums(Real (&c)[4][4], Real (&bias)[4], Word slab, Word dx, Word y0, Word y1, Word o0, Word o1, int warp) {
    Word a[4];
    UNROLL for (int part = 0; part < 3; ++part) {
        load_turned(a, slab + part * 32);
        multiply(c[part], a[0], a[1], a[2], a[3], y0, y1, c[part][0], c[part][1], c[part][2], c[part][3]);
    }
    load_turned(a, dx + warp / 2 * 32);
    multiply(c[3], a[0], a[1], a[2], a[3], o0, o1, c[3][0], c[3][1], c[3][2], c[3][3]);
    load_turned(a, warp % 2 ? slab + warp / 2 * 32 : dx + warp / 2 * 32);
    multiply(bias, a[0], a[1], a[2], a[3], ONES, ONES, bias[0], bias[1], bias[2], bias[3]);
}

// A slab's part of the weights' sums over the rows of eight images and their CLS vectors; the warps share it out.
DEVICE void add_sums(int slab, int warp) {
    Word at = lane() * 16 + (SUMS + (slab * WARPS + warp) * 4 * 512), right = tiles_of(WEIGHTS).right, row = lane() * ROW;
    Real c[4][4], bias[4];
    UNROLL for (int part = 0; part < 4; ++part) load_four(c[part], at + part * 512);
    clear(bias);
#pragma unroll 1
    for (int image = 0; image < WARPS; ++image) {
        Word y[4], o[4], from = right + image * TILE;
        load_turned(y, row + (Y + image * TILE + warp * 16)), load_turned(o, row + (SLAB + image * TILE + 96 + warp % 2 * 16));
        UNROLL for (int k = 0; k < 2; ++k)
            step_of_sums(c, bias, from + (SLAB + k * 16 * ROW), from + (DX + k * 16 * ROW), y[2 * k], y[2 * k + 1], o[2 * k], o[2 * k + 1], warp);
    }
    Word y[4], o[4], again = lane() % 16 * ROW;
    load_turned(y, again + (CLS_Y + warp * 16)), load_turned(o, again + (CLS_SLAB + 96 + warp % 2 * 16));
    step_of_sums(c, bias, right + CLS_SLAB, right + CLS_DX, y[0], y[1], o[0], o[1], warp);
    UNROLL for (int part = 0; part < 4; ++part) store_four(at + part * 512, c[part]);
    if (warp % 2 && warp / 2 == 3) return;
    if (warp % 2 == 0 && slab) return;  // dx is the same for all slabs
    Word first = lane() % 4 == 0, to = lane() / 4 * 4 + (BIAS_SUMS + (warp % 2 ? warp / 2 * 256 + slab * 64 : 768 + warp / 2 * 64));
    store_real_if(first, to, load_real(to) + bias[0]), store_real_if(first, to + 32, load_real(to + 32) + bias[2]);
}

// What flows back to CLS's normalised vectors, of the block's images, to CLS_D; four warps share it out.
DEVICE void spread_back_cls(const Tiles& tiles, int warp) {
    if (warp >= 4) return;
    Real c[4];
    clear(c);
    Word at = lane() / 4 * HALVES + lane() % 4 * 4 + CLS_DQKV;
    UNROLL for (int k = 0; k < 12; ++k) {
        Word w[4];
        load_turned(w, tiles.right + (k * 16 * ROW + warp * 32));
        multiply(c, w[0], w[1], w[2], w[3], load_word(at + k * 32), load_word(at + (k * 32 + 16)), c[0], c[1], c[2], c[3]);
    }
    UNROLL for (int i = 0; i < 4; ++i)
        store_real((lane() % 4 * 2 + i % 2) * CLS_ROW + (lane() / 4 + i / 2 * 8) * 4 + (CLS_D + warp * 64), c[i]);
}

// Through LayerNorm, and beside it: what flows back to the layer's input.
DEVICE void end(const Real (&dy)[2][8][4], const Arguments& a, int group, int image, int warp, bool mine) {
    Place to = place(a.dtokens, (static_cast<long long>(image) * a.groups + group) * TOKENS * D * 2, lane() / 4 * (D * 2) + lane() % 4 * 4);
    Word y_at = own(Y, warp), dx_at = own(DX, warp);
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int r = 0; r < 2; ++r) {
        Real sum = 0.0f, along = 0.0f;
        UNROLL for (int n = 0; n < 8; ++n) {
            Word y = load_word(y_at + (OF(m, r) + n * 16));
            Real low = dy[m][n][2 * r], high = dy[m][n][2 * r + 1];
            sum += low + high, along = fused(low, low_of(y), along), along = fused(high, high_of(y), along);
        }
        sum += crossed(sum, 1), along += crossed(along, 1);
        sum += crossed(sum, 2), along += crossed(along, 2);
        Real mean = sum * (1.0f / D), slope = along * (-1.0f / D);
        Real factor = load_real(lane() / 4 * 4 + (FACTORS + (warp * T + m * 16 + r * 8) * 4));
        UNROLL for (int n = 0; n < 8; ++n) {
            Word y = load_word(y_at + (OF(m, r) + n * 16)), dx = load_word(dx_at + (OF(m, r) + n * 16));
            Real low = fused(slope, low_of(y), dy[m][n][2 * r] - mean), high = fused(slope, high_of(y), dy[m][n][2 * r + 1] - mean);
            store_word_if(mine, to, (m * 16 + r * 8) * (D * 2) + n * 16, pack(fused(low, factor, low_of(dx)), fused(high, factor, high_of(dx))));
        }
    }
}

// What flows back into an image's CLS vector, two numbers a lane.
DEVICE void gradient_of_cls(Real (&dx)[2], const Arguments& a, int group, int image, bool inner) {
    const long long at = static_cast<long long>(image) * a.groups + group;
    Word two = load_word(place(a.dout, at * D * 2, lane() * 4), 0);
    dx[0] = low_of(two), dx[1] = high_of(two);
    if (inner) load_two(dx, place(a.dcls, at * D * 4, lane() * 8), 0);
}

DEVICE void end_cls(const Arguments& a, int group, int image, int warp, bool inner, bool mine) {
    Real dx[2], dy[2], found[2], factor = load_real(FACTORS + (warp * T + TOKENS) * 4);
    gradient_of_cls(dx, a, group, image, inner);
    load_two(dy, lane() * 8 + (CLS_D + warp * CLS_ROW));
    Word y = load_word(lane() * 4 + (CLS_Y + warp * ROW));
    Real sum = dy[0] + dy[1], along = fused(dy[0], low_of(y), dy[1] * high_of(y));
    UNROLL for (int by = 1; by < 32; by *= 2) sum += crossed(sum, by), along += crossed(along, by);
    UNROLL for (int c = 0; c < 2; ++c)
        found[c] = fused(fused(along * (-1.0f / D), c ? high_of(y) : low_of(y), dy[c] - sum * (1.0f / D)), factor, dx[c]);
    Place to = place(a.dcls, (static_cast<long long>(image) * a.groups + group) * D * 4, lane() * 8);
    UNROLL for (int c = 0; c < 2; ++c) store_real_if(mine, to, c * 4, found[c]);
}

// Eight images of a layer. first: their number.
template <int THRESHOLD>
DEVICE void images_of(const Arguments& a, int group, int layer, int first, int end_of, int warp) {
    const Tiles tiles = tiles_of(WEIGHTS);
    const bool mine = first + warp < end_of, inner = layer + 1 < a.depth;
    const int image = mine ? first + warp : end_of - 1;
    const long long number = static_cast<long long>(group) * a.depth + layer;
    Real dy[2][8][4], dx_cls[2];
    fetch_gradient(a, group, image, warp, !mine || !inner);
    begin(a, number, image, warp);
    gradient_of_cls(dx_cls, a, group, image, inner && mine);  // a warp without an image must not read what is written
    if (!mine) dx_cls[0] = dx_cls[1] = 0.0f;
    store_word(lane() * 4 + (CLS_DX + warp * ROW), pack(dx_cls[0], dx_cls[1]));
    UNROLL for (int m = 0; m < 2; ++m) UNROLL for (int n = 0; n < 8; ++n) clear(dy[m][n]);
    fetched();
    barrier();
    project_cls(tiles, warp);
    barrier();
#pragma unroll 1
    for (int slab = 0; slab < SLABS; ++slab) {
        slab_of<THRESHOLD>(dy, a, image, (a.first_group + group) * 2048u + layer * HEADS + slab * 2, slab, warp, inner);
        barrier();
        add_sums(slab, warp);
        barrier();
    }
    spread_back_cls(tiles, warp);
    end(dy, a, group, image, warp, mine);
    barrier();
    end_cls(a, group, image, warp, inner && mine, mine);
    warp_barrier();  // all lanes have read what the warp writes next
}

// The weights' sums to this block's place, and zeros for the next layer.
DEVICE void flush(const Arguments& a, int split, long long number, int warp, bool write) {
    long long to = (static_cast<long long>(split) * a.groups * a.depth + number) * 4;
    Word g = lane() / 4, two = lane() % 4 * 2;
    Real none[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int slab = 0; slab < SLABS; ++slab) UNROLL for (int part = 0; part < 4; ++part) {
        Word at = lane() * 16 + (SUMS + ((slab * WARPS + warp) * 4 + part) * 512);
        Real c[4];
        load_four(c, at), store_four(at, none);
        if (!write) continue;
        float factor = part == 0 ? SCALE : part == 3 ? a.keep_scale : 1.0f;
        int row = part == 3 ? warp / 2 * 16 : slab * 16, column = part == 3 ? slab * 16 + warp % 2 * 8 : warp * 8;
        Place place_of = place(a.products, (to + part) * D * D * 4 + (row * D + column) * 4, g * (D * 4) + two * 4);
        store_two(place_of, 0, c[0] * factor, c[1] * factor), store_two(place_of, 8 * D * 4, c[2] * factor, c[3] * factor);
    }
    Word thread = lane() + warp * 32;
    Real sum = load_real(thread * 4 + BIAS_SUMS);
    store_real(thread * 4 + BIAS_SUMS, 0.0f);
    if (write) store_real_if(Word(1), place(a.sums, to * D * 4, thread * 4), 0, sum * where(thread < D, Real(SCALE), Real(1.0f)));
}

template <int THRESHOLD>
DEVICE void run(const Arguments& a) {
    const int warp = warp_of_block(), split = block(0), group = block(1), first = split * a.share;
    const int end_of = first + a.share < a.batch ? first + a.share : a.batch;
    Word row = lane() % 8 * ROW + lane() / 8 * 4 + 8 * ROW;  // rows of CLS tiles that no image has
    if (warp == 0) UNROLL for (int i = 0; i < 8; ++i)
        store_word(row + (CLS_Y + i * 16), 0u), store_word(row + (CLS_DX + i * 16), 0u), store_word(row + (CLS_SLAB + i * 16), 0u);
    flush(a, split, 0, warp, false);
    for (int layer = a.depth - 1; layer >= 0; --layer) {
        const long long number = static_cast<long long>(group) * a.depth + layer;
        fetch_layer(a.folded, number, WEIGHTS, BIASES);
        fetched();
        for (int image = first; image < end_of; image += WARPS) images_of<THRESHOLD>(a, group, layer, image, end_of, warp);
        flush(a, split, number, warp, true);
    }
}

}  // namespace backward
