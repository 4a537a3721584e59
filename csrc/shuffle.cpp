#include "shuffle.hpp"

#include <utility>

namespace trireme {

namespace {

constexpr int middle = 397;  // distance of the recurrence

inline uint32_t recur(uint32_t high, uint32_t low, uint32_t far) {
    const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return far ^ (y >> 1) ^ ((0u - (y & 1u)) & 0x9908b0dfu);
}

inline uint32_t temper(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

inline uint32_t smallest_mask(uint32_t limit) {
    uint32_t mask = limit;
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    return mask;
}

}  // namespace

void MersenneTwister::twist() {
    for (int k = 0; k < size - middle; ++k) words[k] = recur(words[k], words[k + 1], words[k + middle]);
    for (int k = size - middle; k < size - 1; ++k) words[k] = recur(words[k], words[k + 1], words[k + middle - size]);
    words[size - 1] = recur(words[size - 1], words[0], words[middle - 1]);
    position = 0;
}

template <class Item>
void shuffle(Item* items, int64_t count, MersenneTwister& random) {
    uint32_t drawn[MersenneTwister::size];
    uint32_t partners[MersenneTwister::size];
    int64_t last = count - 1;  // the item that looks for a partner among those up to itself
    while (last > 0) {
        if (random.position == MersenneTwister::size) random.twist();
        for (int k = random.position; k < MersenneTwister::size; ++k) drawn[k] = temper(random.words[k]);
        int num_partners = 0;
        int64_t limit = last;
        while (limit > 0 && random.position < MersenneTwister::size) {
            // numpy's random_interval: as many bits as the limit has, drawn again while the number is above it.
            const uint32_t mask = smallest_mask(static_cast<uint32_t>(limit));
            const int64_t half = mask >> 1;
            while (limit > half && random.position < MersenneTwister::size) {
                const uint32_t partner = drawn[random.position++] & mask;
                partners[num_partners] = partner;
                __builtin_prefetch(items + partner, 1);
                const int is_taken = partner <= limit;
                num_partners += is_taken;
                limit -= is_taken;
            }
        }
        for (int k = 0; k < num_partners; ++k) std::swap(items[last--], items[partners[k]]);
    }
}

template void shuffle<uint32_t>(uint32_t*, int64_t, MersenneTwister&);
template void shuffle<uint64_t>(uint64_t*, int64_t, MersenneTwister&);

}  // namespace trireme
