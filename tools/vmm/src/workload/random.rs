//! The generators of random numbers that the guest and its memory are made with.

/// Does a step of xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
pub(super) fn step(mut random: u64) -> u64 {
    random ^= random << 13;
    random ^= random >> 7;
    random ^ random << 17
}

/// Does the inverse of [`step`]: shifts are undone from the last to the first, each by doubling.
pub(super) fn step_back(mut random: u64) -> u64 {
    for shift in [17, 34] {
        random ^= random << shift;
    }
    for shift in [7, 14, 28, 56] {
        random ^= random >> shift;
    }
    for shift in [13, 26, 52] {
        random ^= random << shift;
    }
    random
}

/// Spreads the structure of a value, with the finalizer of SplitMix64.
pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
