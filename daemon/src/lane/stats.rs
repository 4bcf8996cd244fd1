//! What one lane has done, counted by its thread and read by everyone.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counters of one lane. All only grow.
#[derive(Debug, Default)]
pub struct LaneStats {
    /// Bytes of pages that were acknowledged.
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
    /// The lane has ended,
    pub ended: AtomicBool,
    /// and not in good order.
    pub lost: AtomicBool,
}

impl LaneStats {
    pub(super) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
