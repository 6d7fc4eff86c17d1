#include "forward.h"
#include <thread>
#include <vector>
template <int TH, bool S, int TS, int CS>
static void all(const Arguments* a) {
    for (int g = 0; g < a->groups; ++g)
        for (int b = 0; b < (a->batch + WARPS - 1) / WARPS; ++b) {
            std::barrier<> meet(WARPS);
            all_warps = &meet; this_block[0] = b; this_block[1] = g;
            std::vector<std::thread> warps;
            for (int w = 0; w < WARPS; ++w) warps.emplace_back([=] { this_warp = w; forward<TH,S,TS,CS>(*a); });
            for (auto& t : warps) t.join();
        }
}
extern "C" void run_forward(const Arguments* a, int dropout, int strided) {
    if (strided) all<0,true,1,64>(a); else if (dropout) all<51,true,64,1>(a); else all<0,true,64,1>(a);
}
