/* The hash that the noise of a draw is made of. */
#ifndef HASH_H
#define HASH_H

#include <stdint.h>

#define GOLDEN 0x9E3779B97F4A7C15u
#define MIX_1 0xBF58476D1CE4E5B9u
#define MIX_2 0x94D049BB133111EBu

/* SplitMix64's finaliser (Steele, Lea, Flood 2014) */
static inline uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * MIX_1;
    z = (z ^ (z >> 27)) * MIX_2;
    return z ^ (z >> 31);
}

/* The hash of a token: its upper 53 bits. */
static inline uint64_t bits_of(uint64_t key, uint64_t token) { return mixed(key + token * GOLDEN) >> 11; }

#endif
