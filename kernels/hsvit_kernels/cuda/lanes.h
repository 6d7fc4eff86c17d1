// What the lanes of a warp compute, in the words of the kernels: `Real` and `Word` are a number of each lane.
//
// A GPU's compiler sees plain numbers and PTX. Any other compiler takes lanes_host.h instead, where a value holds the
// numbers of all 32 lanes: there the same kernels run on a CPU, to be tested.

#pragma once

#ifdef __CUDACC__

using Real = float;
using Word = unsigned;
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")

// Volatile: read again where it is wanted, rather than kept in a register.
DEVICE Word lane() {
    Word found;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(found));
    return found;
}

DEVICE Real exp2_of(Real x) {
    Real y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE Real rsqrt_of(Real x) {
    Real y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE Real inverse(Real x) {
    Real y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE Real larger(Real a, Real b) { return fmaxf(a, b); }
DEVICE Real fused(Real a, Real b, Real c) { return fmaf(a, b, c); }
DEVICE Real crossed(Real x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE Real taken(Real x, Word from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE Word taken(Word x, Word from) { return __shfl_sync(0xffffffffu, x, from); }
DEVICE Word where(Word condition, Word a, Word b) { return condition ? a : b; }
DEVICE Real where(Word condition, Real a, Real b) { return condition ? a : b; }

// Bits 15 and 31, each over its half; or bits 7 and 23.
DEVICE Word spread(Word x, bool upper) {
    Word y;
    if (upper)
        asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(y) : "r"(x));
    else
        asm("prmt.b32 %0, %1, 0, 0xaa88;" : "=r"(y) : "r"(x));
    return y;
}

// What no result depends on.
DEVICE Word any() {
    Word x;
    asm("" : "=r"(x));
    return x;
}

// An 8 x 8 tile of numbers in 16 bits, of which each lane has two of a row, the other way round.
DEVICE Word transposed(Word x) {
    Word y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Two numbers in bf16, the first one in the lower half.
DEVICE Word pack(Real low, Real high) {
    Word packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE Real low_of(Word packed) { return __uint_as_float(packed << 16); }
DEVICE Real high_of(Word packed) { return __uint_as_float(packed & 0xffff0000u); }

// d [16, 8] = a [16, 16] b [16, 8] + c, in the layouts of mma.m16n8k16.
DEVICE void multiply(Real (&d)[4], Word a0, Word a1, Word a2, Word a3, Word b0, Word b1, Real c0, Real c1, Real c2, Real c3) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// d [16, 8] = a [16, 8] b [8, 8] + c.
DEVICE void multiply(Real (&d)[4], Word a0, Word a1, Word b0, Real c0, Real c1, Real c2, Real c3) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}

// Addresses in shared memory are bytes from its start.
extern __shared__ __align__(128) char shared_memory[];

DEVICE Word shared_start() { return static_cast<Word>(__cvta_generic_to_shared(shared_memory)); }

// Four tiles of 8 x 8 numbers in 16 bits; lane n gives the address of row n % 8 of tile n / 8.
DEVICE void load_tiles(Word (&tile)[4], Word address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(shared_start() + address)
                 : "memory");
}

// The same, each tile the other way round.
DEVICE void load_turned(Word (&tile)[4], Word address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(shared_start() + address)
                 : "memory");
}

DEVICE Word load_word(Word address) { return *reinterpret_cast<const Word*>(shared_memory + address); }
DEVICE Real load_real(Word address) { return *reinterpret_cast<const Real*>(shared_memory + address); }
DEVICE void load_two(Real (&x)[2], Word address) {
    const float2 two = *reinterpret_cast<const float2*>(shared_memory + address);
    x[0] = two.x, x[1] = two.y;
}
DEVICE void load_four(Real (&x)[4], Word address) {
    const float4 four = *reinterpret_cast<const float4*>(shared_memory + address);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
DEVICE void store_four(Word address, const Real (&x)[4]) {
    *reinterpret_cast<float4*>(shared_memory + address) = make_float4(x[0], x[1], x[2], x[3]);
}
// A number in bf16.
DEVICE void store_half(Word address, Real x) {
    *reinterpret_cast<unsigned short*>(shared_memory + address) = static_cast<unsigned short>(pack(x, x));
}
DEVICE Real load_half(Word address) {
    return __uint_as_float(static_cast<Word>(*reinterpret_cast<const unsigned short*>(shared_memory + address)) << 16);
}
DEVICE void store_word(Word address, Word x) { *reinterpret_cast<Word*>(shared_memory + address) = x; }
DEVICE void store_real(Word address, Real x) { *reinterpret_cast<Real*>(shared_memory + address) = x; }
DEVICE void store_word_if(Word condition, Word address, Word x) { if (condition) store_word(address, x); }
DEVICE void store_real_if(Word condition, Word address, Real x) { if (condition) store_real(address, x); }

// Memory of the device, by an address of each lane and a distance in bytes that a compiler can put into the instruction.
using Place = char*;

DEVICE Place place(const void* from, long long base, Word bytes) {
    return const_cast<char*>(static_cast<const char*>(from)) + base + bytes;
}
DEVICE Real load_bf16(Place from, int bytes) {
    return __uint_as_float(static_cast<Word>(*reinterpret_cast<const unsigned short*>(from + bytes)) << 16);
}
DEVICE Real load_real(Place from, int bytes) { return *reinterpret_cast<const float*>(from + bytes); }
DEVICE Word load_word(Place from, int bytes) { return *reinterpret_cast<const Word*>(from + bytes); }
DEVICE void load_two(Real (&x)[2], Place from, int bytes) {
    const float2 two = *reinterpret_cast<const float2*>(from + bytes);
    x[0] = two.x, x[1] = two.y;
}
DEVICE void store_two(Place to, int bytes, Real a, Real b) { *reinterpret_cast<float2*>(to + bytes) = make_float2(a, b); }
DEVICE void store_word(Place to, int bytes, Word x) { *reinterpret_cast<Word*>(to + bytes) = x; }
DEVICE void store_real_if(Word condition, Place to, int bytes, Real x) {
    if (condition) *reinterpret_cast<float*>(to + bytes) = x;
}
DEVICE void store_word_if(Word condition, Place to, int bytes, Word x) {
    if (condition) *reinterpret_cast<Word*>(to + bytes) = x;
}

// Sixteen bytes of the device's memory to shared memory, while the warp goes on.
DEVICE void fetch(Word address, Place from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(shared_start() + address), "l"(from + bytes) : "memory");
}
DEVICE void fetch_if(Word condition, Word address, Place from) {
    if (condition) fetch(address, from, 0);
}
DEVICE void fetched() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The same in all lanes, and the compiler shall know it.
DEVICE int warp_of_block() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0); }
DEVICE int block(int axis) { return axis ? blockIdx.y : blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

#else
#include "lanes_host.h"
#endif
