//! The largest rate that a shaped port can carry.
//!
//! A port is shaped by HTB, which counts frames with their Ethernet headers (14 bytes; no preamble, no checksum, no gap,
//! which a veth pair does not have either). Of each frame of MTU + 14 bytes, MTU - 52 are payload: 20 bytes are the
//! header of IPv4, 20 that of TCP, and 12 its timestamps. With an MTU of 9000 that is 99.27 % of the rate.

use memlane_lab::Rate;

/// The number of bytes of a frame that HTB counts beyond the MTU.
const ETHERNET: u32 = 14;
/// The number of bytes of a packet that are headers of IPv4 and TCP, with timestamps.
const HEADERS: u32 = 20 + 20 + 12;

/// Returns the largest rate that a port shaped to `rate` can carry as payload of TCP.
pub(crate) fn payload_gbit_per_second(rate: Rate, mtu: u32) -> f64 {
    let share = f64::from(mtu - HEADERS) / f64::from(mtu + ETHERNET);
    rate.bits_per_second() as f64 / 1e9 * share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_take_their_part_of_a_port() {
        let rate = "1gbit".parse().expect("a rate");
        assert!((payload_gbit_per_second(rate, 9000) - 0.992_678).abs() < 1e-6);
        assert!((payload_gbit_per_second(rate, 1500) - 0.956_407).abs() < 1e-6);
    }
}
