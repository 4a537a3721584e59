// numpy's legacy RandomState.shuffle of a one-dimensional array, bit for bit and several times as fast.
//
// In: the array, and the state of a Mersenne Twister as numpy keeps it. Out: the array in its new order, the state after it.
// The Fisher-Yates walk itself cannot be split, but its partners can be drawn a block ahead of the swaps, so that a swap finds its cache
// line on the way. Left out: arrays of more than 2^32 items, for which numpy draws 64 bits at a time, and seeding.
#pragma once

#include <cstdint>

namespace trireme {

// MT19937 (Matsumoto and Nishimura, ACM TOMACS 8(1), 1998). position: how many words of the block were used; 624 means all.
struct MersenneTwister {
    static constexpr int size = 624;
    uint32_t* words;
    int position;

    // The next block of words, in place.
    void twist();
};

// item: uint32_t or uint64_t, whatever the numbers in it stand for. count: at most 2^32.
template <class Item>
void shuffle(Item* items, int64_t count, MersenneTwister& random);

}  // namespace trireme
