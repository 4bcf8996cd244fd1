//! Counters of a lane. The lane's thread increases them, and any thread may read them.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use memlane_protocol::lane_count::Load;

/// Counters of one lane. Numbers of bytes and pages only grow.
#[derive(Debug, Default)]
pub struct LaneStats {
    /// The bytes of pages that the destination has acknowledged, counted as they are on the wire, so that a forecast made
    /// from them also holds for pages that cannot be compressed.
    pub acked_bytes: AtomicU64,
    /// The bytes of pages, tables and headers that the lane has sent or received.
    pub wire_bytes: AtomicU64,
    /// The number of pages that travelled with their contents.
    pub data_pages: AtomicU64,
    /// The number of pages that travelled as a descriptor without contents: zeros and holes.
    pub zero_pages: AtomicU64,
    /// The bytes of payload that the kernel sent without copying them.
    pub zero_copy_bytes: AtomicU64,
    /// The bytes of payload that the kernel copied to send them.
    pub copied_bytes: AtomicU64,
    /// The bytes of those pages that were compressed, counted before compression.
    pub uncompressed_bytes: AtomicU64,
    /// The bytes that `uncompressed_bytes` became by compression.
    pub compressed_bytes: AtomicU64,
    /// The shortest recent round trip of the lane's connection, in microseconds; 0 while it is unknown.
    pub round_trip_us: AtomicU64,
    /// The time for which the lane's thread ran, in microseconds; it is brought up to date now and then.
    pub ran_us: AtomicU64,
    /// The time for which that thread waited for a processor, in microseconds.
    pub crowded_us: AtomicU64,
    /// The time for which the lane could not send because the receiver did not read, in microseconds
    /// (`tcpi_rwnd_limited` of tcp(7)).
    pub receiver_limited_us: AtomicU64,
    /// The lane has ended.
    pub ended: AtomicBool,
    /// The lane has ended because of an error.
    pub lost: AtomicBool,
}

/// A copy of the counters of one lane, or their sum over several lanes, at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// The bytes of pages that the destination has acknowledged, counted as they are on the wire.
    pub acked_bytes: u64,
    /// The bytes of pages, tables and headers that were sent or received.
    pub wire_bytes: u64,
    /// The number of pages that travelled with their contents.
    pub data_pages: u64,
    /// The number of pages that travelled without contents: zeros and holes.
    pub zero_pages: u64,
    /// The bytes of payload that the kernel sent without copying them.
    pub zero_copy_bytes: u64,
    /// The bytes of payload that the kernel copied to send them.
    pub copied_bytes: u64,
    /// The bytes of compressed pages, counted before compression.
    pub uncompressed_bytes: u64,
    /// The bytes that `uncompressed_bytes` became by compression.
    pub compressed_bytes: u64,
}

impl LaneStats {
    /// Reads the counters.
    pub fn totals(&self) -> Totals {
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Totals {
            acked_bytes: now(&self.acked_bytes),
            wire_bytes: now(&self.wire_bytes),
            data_pages: now(&self.data_pages),
            zero_pages: now(&self.zero_pages),
            zero_copy_bytes: now(&self.zero_copy_bytes),
            copied_bytes: now(&self.copied_bytes),
            uncompressed_bytes: now(&self.uncompressed_bytes),
            compressed_bytes: now(&self.compressed_bytes),
        }
    }

    /// Reads what tells whether one core is the limit of the lane.
    pub fn load(&self) -> Load {
        let time = |counter: &AtomicU64| Duration::from_micros(counter.load(Ordering::Relaxed));
        Load {
            lanes: 1,
            wire_bytes: self.wire_bytes.load(Ordering::Relaxed),
            ran: time(&self.ran_us),
            crowded: time(&self.crowded_us),
            receiver_limited: time(&self.receiver_limited_us),
        }
    }

    /// Adds `count` to a counter.
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

impl Totals {
    fn with(self, other: Self, each: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            acked_bytes: each(self.acked_bytes, other.acked_bytes),
            wire_bytes: each(self.wire_bytes, other.wire_bytes),
            data_pages: each(self.data_pages, other.data_pages),
            zero_pages: each(self.zero_pages, other.zero_pages),
            zero_copy_bytes: each(self.zero_copy_bytes, other.zero_copy_bytes),
            copied_bytes: each(self.copied_bytes, other.copied_bytes),
            uncompressed_bytes: each(self.uncompressed_bytes, other.uncompressed_bytes),
            compressed_bytes: each(self.compressed_bytes, other.compressed_bytes),
        }
    }
}

impl Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.with(other, |here, there| here + there)
    }
}

impl Sub for Totals {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.with(other, |here, there| here - there)
    }
}
