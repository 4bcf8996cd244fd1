//! What one lane has done, counted by its thread and read by everyone.

use std::ops::{Add, Sub};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counters of one lane. All that count only grow.
#[derive(Debug, Default)]
pub struct LaneStats {
    /// Bytes of pages that were acknowledged, as they travel. What is forecast from them holds for pages that
    /// cannot be compressed, too.
    pub acked_bytes: AtomicU64,
    /// Bytes of pages, tables and headers that were sent or received.
    pub wire_bytes: AtomicU64,
    /// Pages whose bytes travelled.
    pub data_pages: AtomicU64,
    /// Pages that travelled as a descriptor: zeros and holes.
    pub zero_pages: AtomicU64,
    /// Payload bytes that the kernel sent without copying them.
    pub zero_copy_bytes: AtomicU64,
    /// Payload bytes that the kernel copied.
    pub copied_bytes: AtomicU64,
    /// Bytes of pages that were compressed,
    pub uncompressed_bytes: AtomicU64,
    /// and what became of them.
    pub compressed_bytes: AtomicU64,
    /// The shortest round trip that its connection has had lately, in microseconds; 0 while unknown.
    pub round_trip_us: AtomicU64,
    /// The lane has ended,
    pub ended: AtomicBool,
    /// and not in good order.
    pub lost: AtomicBool,
}

/// What lanes have done up to some moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// See [`LaneStats`].
    pub acked_bytes: u64,
    /// See [`LaneStats`].
    pub wire_bytes: u64,
    /// See [`LaneStats`].
    pub data_pages: u64,
    /// See [`LaneStats`].
    pub zero_pages: u64,
    /// See [`LaneStats`].
    pub zero_copy_bytes: u64,
    /// See [`LaneStats`].
    pub copied_bytes: u64,
    /// See [`LaneStats`].
    pub uncompressed_bytes: u64,
    /// See [`LaneStats`].
    pub compressed_bytes: u64,
}

impl LaneStats {
    /// What the lane has done so far.
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
