// `lanes.h` for a CPU: each value holds the numbers of all 32 lanes of a warp, and warps are threads of the process.

#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define DEVICE inline
#define UNROLL

constexpr int LANES = 32;

template <class T>
struct Each {
    T of[LANES];
    Each() = default;
    Each(T same) { for (T& x : of) x = same; }
    template <class S>
    explicit Each(const Each<S>& other) { for (int i = 0; i < LANES; ++i) of[i] = static_cast<T>(other.of[i]); }
};
using Real = Each<float>;
using Word = Each<uint32_t>;

template <class F>
auto lanewise(F f) {
    Each<decltype(f(0))> found;
    for (int i = 0; i < LANES; ++i) found.of[i] = f(i);
    return found;
}

#define OPERATOR(TYPE, NUMBER, SIGN) \
    inline TYPE operator SIGN(const TYPE& a, const TYPE& b) { return lanewise([&](int i) { return NUMBER(a.of[i] SIGN b.of[i]); }); } \
    inline TYPE& operator SIGN##=(TYPE& a, const TYPE& b) { return a = a SIGN b; }
OPERATOR(Real, float, +) OPERATOR(Real, float, -) OPERATOR(Real, float, *)
OPERATOR(Word, uint32_t, +) OPERATOR(Word, uint32_t, -) OPERATOR(Word, uint32_t, *) OPERATOR(Word, uint32_t, /)
OPERATOR(Word, uint32_t, %) OPERATOR(Word, uint32_t, &) OPERATOR(Word, uint32_t, |) OPERATOR(Word, uint32_t, ^)
OPERATOR(Word, uint32_t, <<) OPERATOR(Word, uint32_t, >>)
#undef OPERATOR
#define COMPARED(SIGN) \
    inline Word operator SIGN(const Word& a, const Word& b) { return lanewise([&](int i) { return uint32_t(a.of[i] SIGN b.of[i]); }); }
COMPARED(<) COMPARED(==)
#undef COMPARED

inline Word lane() { return lanewise([](int i) { return uint32_t(i); }); }
inline Real exp2_of(const Real& x) { return lanewise([&](int i) { return std::exp2(x.of[i]); }); }
inline Real rsqrt_of(const Real& x) { return lanewise([&](int i) { return 1.0f / std::sqrt(x.of[i]); }); }
inline Real inverse(const Real& x) { return lanewise([&](int i) { return 1.0f / x.of[i]; }); }
inline Real larger(const Real& a, const Real& b) { return lanewise([&](int i) { return std::fmax(a.of[i], b.of[i]); }); }
inline Real fused(const Real& a, const Real& b, const Real& c) { return lanewise([&](int i) { return std::fma(a.of[i], b.of[i], c.of[i]); }); }
inline Real crossed(const Real& x, int mask) { return lanewise([&](int i) { return x.of[i ^ mask]; }); }
inline Real taken(const Real& x, const Word& from) { return lanewise([&](int i) { return x.of[from.of[i] % LANES]; }); }
inline Word taken(const Word& x, const Word& from) { return lanewise([&](int i) { return x.of[from.of[i] % LANES]; }); }
inline Word where(const Word& condition, const Word& a, const Word& b) { return lanewise([&](int i) { return condition.of[i] ? a.of[i] : b.of[i]; }); }
inline Real where(const Word& condition, const Real& a, const Real& b) { return lanewise([&](int i) { return condition.of[i] ? a.of[i] : b.of[i]; }); }
inline Word spread(const Word& x, bool upper) {
    Word low = x >> (upper ? 15 : 7), high = x >> (upper ? 31 : 23);
    return (low & 1) * 0xffffu | (high & 1) * 0xffff0000u;
}

inline Word any() { return 0x7fc07fc0u; }  // NaN
inline Word transposed(const Word& x) {
    return lanewise([&](int i) {
        uint32_t both = 0;
        for (int odd = 0; odd < 2; ++odd) {
            int row = i % 4 * 2 + odd, column = i / 4;
            both |= (x.of[row * 4 + column / 2] >> column % 2 * 16 & 0xffff) << odd * 16;
        }
        return both;
    });
}
inline float number(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t rounded(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline Word pack(const Real& low, const Real& high) { return lanewise([&](int i) { return rounded(low.of[i]) | rounded(high.of[i]) << 16; }); }
inline Real low_of(const Word& packed) { return lanewise([&](int i) { return number(packed.of[i] << 16); }); }
inline Real high_of(const Word& packed) { return lanewise([&](int i) { return number(packed.of[i] & 0xffff0000u); }); }

// The PTX manual's figures: rows of a by lane / 4, of b (its columns) too; pairs along the sum by lane % 4.
inline void product(Real (&d)[4], const Real* c, const Word* a, const Word* b, int halves) {
    float left[16][16], right[16][8];
    for (int i = 0; i < LANES; ++i)
        for (int half = 0; half < halves; ++half)
            for (int odd = 0; odd < 2; ++odd) {
                int k = half * 8 + i % 4 * 2 + odd;
                for (int below = 0; below < 2; ++below)
                    left[i / 4 + below * 8][k] = number(a[half * 2 + below].of[i] >> odd * 16 << 16);
                right[k][i / 4] = number(b[half].of[i] >> odd * 16 << 16);
            }
    for (int i = 0; i < LANES; ++i)
        for (int n = 0; n < 4; ++n) {
            float sum = c[n].of[i];
            for (int k = 0; k < halves * 8; ++k) sum += left[i / 4 + n / 2 * 8][k] * right[k][i % 4 * 2 + n % 2];
            d[n].of[i] = sum;
        }
}
inline void multiply(Real (&d)[4], const Word& a0, const Word& a1, const Word& a2, const Word& a3, const Word& b0,
                     const Word& b1, const Real& c0, const Real& c1, const Real& c2, const Real& c3) {
    Word a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    Real c[4] = {c0, c1, c2, c3};
    product(d, c, a, b, 2);
}
inline void multiply(Real (&d)[4], const Word& a0, const Word& a1, const Word& b0, const Real& c0, const Real& c1, const Real& c2, const Real& c3) {
    Word a[2] = {a0, a1}, b[1] = {b0};
    Real c[4] = {c0, c1, c2, c3};
    product(d, c, a, b, 1);
}

// One block at a time: its shared memory, and its warps.
inline char shared_memory[1 << 18];
inline thread_local int this_warp;
inline int this_block[2];
inline std::barrier<>* all_warps;

template <class T>
T at(const void* from) { T x; std::memcpy(&x, from, sizeof x); return x; }

inline void load_tiles(Word (&tile)[4], const Word& address) {
    for (int n = 0; n < 4; ++n)
        tile[n] = lanewise([&](int i) { return at<uint32_t>(shared_memory + address.of[n * 8 + i / 4] + i % 4 * 4); });
}
inline void load_turned(Word (&tile)[4], const Word& address) {
    load_tiles(tile, address);
    for (Word& x : tile) x = transposed(x);
}
inline Word load_word(const Word& address) { return lanewise([&](int i) { return at<uint32_t>(shared_memory + address.of[i]); }); }
inline Real load_real(const Word& address) { return lanewise([&](int i) { return at<float>(shared_memory + address.of[i]); }); }
inline void load_four(Real (&x)[4], const Word& address) {
    for (int n = 0; n < 4; ++n) x[n] = load_real(address + uint32_t(4 * n));
}
inline void store_half(const Word& address, const Real& x) {
    for (int i = 0; i < LANES; ++i) {
        uint16_t bits = rounded(x.of[i]);
        std::memcpy(shared_memory + address.of[i], &bits, 2);
    }
}
inline Real load_half(const Word& address) { return lanewise([&](int i) { return number(uint32_t(at<uint16_t>(shared_memory + address.of[i])) << 16); }); }
inline void load_two(Real (&x)[2], const Word& address) {
    x[0] = load_real(address), x[1] = load_real(address + 4);
}
inline void store_word_if(const Word& condition, const Word& address, const Word& x) {
    for (int i = 0; i < LANES; ++i)
        if (condition.of[i]) std::memcpy(shared_memory + address.of[i], &x.of[i], 4);
}
inline void store_real_if(const Word& condition, const Word& address, const Real& x) {
    for (int i = 0; i < LANES; ++i)
        if (condition.of[i]) std::memcpy(shared_memory + address.of[i], &x.of[i], 4);
}
inline void store_word(const Word& address, const Word& x) { store_word_if(1, address, x); }
inline void store_real(const Word& address, const Real& x) { store_real_if(1, address, x); }
inline void store_four(const Word& address, const Real (&x)[4]) {
    for (int n = 0; n < 4; ++n) store_real(address + uint32_t(4 * n), x[n]);
}

using Place = Each<char*>;
inline Place place(const void* from, long long base, const Word& bytes) {
    return lanewise([&](int i) { return const_cast<char*>(static_cast<const char*>(from)) + base + bytes.of[i]; });
}
inline Real load_bf16(const Place& from, int bytes) { return lanewise([&](int i) { return number(uint32_t(at<uint16_t>(from.of[i] + bytes)) << 16); }); }
inline Real load_real(const Place& from, int bytes) { return lanewise([&](int i) { return at<float>(from.of[i] + bytes); }); }
inline Word load_word(const Place& from, int bytes) { return lanewise([&](int i) { return at<uint32_t>(from.of[i] + bytes); }); }
inline void load_two(Real (&x)[2], const Place& from, int bytes) {
    for (int c = 0; c < 2; ++c) x[c] = lanewise([&](int i) { return at<float>(from.of[i] + bytes + 4 * c); });
}
inline void store_real_if(const Word& condition, const Place& to, int bytes, const Real& x) {
    for (int i = 0; i < LANES; ++i)
        if (condition.of[i]) std::memcpy(to.of[i] + bytes, &x.of[i], 4);
}
inline void store_two(const Place& to, int bytes, const Real& a, const Real& b) {
    store_real_if(1, to, bytes, a), store_real_if(1, to, bytes + 4, b);
}
inline void store_word_if(const Word& condition, const Place& to, int bytes, const Word& x) {
    for (int i = 0; i < LANES; ++i)
        if (condition.of[i]) std::memcpy(to.of[i] + bytes, &x.of[i], 4);
}
inline void store_word(const Place& to, int bytes, const Word& x) { store_word_if(1, to, bytes, x); }
inline void fetch_if(const Word& condition, const Word& address, const Place& from) {
    for (int i = 0; i < LANES; ++i)
        if (condition.of[i]) std::memcpy(shared_memory + address.of[i], from.of[i], 16);
}
inline void fetch(const Word& address, const Place& from, int bytes) {
    for (int i = 0; i < LANES; ++i) std::memcpy(shared_memory + address.of[i], from.of[i] + bytes, 16);
}
inline void fetched() {}

inline int warp_of_block() { return this_warp; }
inline int block(int axis) { return this_block[axis]; }
inline void barrier() { all_warps->arrive_and_wait(); }
inline void warp_barrier() {}

// Every block of a grid, one after another.
template <class F>
void every_block(int x, int y, int warps, F kernel) {
    for (int j = 0; j < y; ++j)
        for (int i = 0; i < x; ++i) {
            std::barrier<> meet(warps);
            all_warps = &meet, this_block[0] = i, this_block[1] = j;
            std::memset(shared_memory, 0xff, sizeof shared_memory);  // NaN in every format
            std::vector<std::thread> block;
            for (int warp = 0; warp < warps; ++warp) block.emplace_back([=] { this_warp = warp, kernel(); });
            for (std::thread& thread : block) thread.join();
        }
}
