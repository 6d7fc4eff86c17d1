#include "backward.h"
#include <thread>
#include <vector>
template <class F> static void grid(int x, int y, F f) {
    for (int g = 0; g < y; ++g) for (int b = 0; b < x; ++b) {
        std::barrier<> meet(WARPS); all_warps = &meet; this_block[0] = b; this_block[1] = g;
        std::vector<std::thread> warps;
        for (int w = 0; w < WARPS; ++w) warps.emplace_back([=] { this_warp = w; f(); });
        for (auto& t : warps) t.join();
    }
}
extern "C" void run_backward(const gradient::Arguments* a, int splits, int dropout) {
    static_assert(gradient::SHARED <= 232448);
    if (dropout) grid(splits, a->groups, [=] { gradient::backward<51>(*a); });
    else grid(splits, a->groups, [=] { gradient::backward<0>(*a); });
}
