//! What lanes count, by port.

use metrics::{Counter, Gauge, Label, counter, gauge};

use super::part::Part;
use super::{
    BANDWIDTH, BYTES_RECEIVED, BYTES_SENT, COMPRESSED_BYTES, COPIED_BYTES, LANES_LOST, LANES_REOPENED,
    UNCOMPRESSED_BYTES, ZERO_COPY_BYTES,
};

/// Meters of one port. Cloned for each lane; each call is an atomic addition.
#[derive(Clone, Debug)]
pub struct PortMeter {
    sent: Counter,
    received: Counter,
    zero_copy: Counter,
    copied: Counter,
    uncompressed: Counter,
    compressed: Counter,
    bandwidth: Gauge,
    lost: Counter,
    reopened: Counter,
}

impl PortMeter {
    /// The meters of the port of this name.
    pub fn new(port: &str) -> Self {
        let labels = || vec![Label::new("port", port.to_owned())];
        let meter = Self {
            sent: counter!(BYTES_SENT, labels()),
            received: counter!(BYTES_RECEIVED, labels()),
            zero_copy: counter!(ZERO_COPY_BYTES, labels()),
            copied: counter!(COPIED_BYTES, labels()),
            uncompressed: counter!(UNCOMPRESSED_BYTES, labels()),
            compressed: counter!(COMPRESSED_BYTES, labels()),
            bandwidth: gauge!(BANDWIDTH, labels()),
            lost: counter!(LANES_LOST, labels()),
            reopened: counter!(LANES_REOPENED, labels()),
        };
        meter.sent(0);
        meter.received(0);
        meter.zero_copy(0);
        meter.copied(0);
        meter.compressed(0, 0);
        meter.bandwidth.increment(0.0);
        meter.lost(0);
        meter.reopened.increment(0);
        meter
    }

    /// A lane put bytes on the wire.
    pub fn sent(&self, bytes: u64) {
        self.sent.increment(bytes);
    }

    /// A lane took bytes from the wire.
    pub fn received(&self, bytes: u64) {
        self.received.increment(bytes);
    }

    /// The network card read bytes from the guest's memory.
    pub fn zero_copy(&self, bytes: u64) {
        self.zero_copy.increment(bytes);
    }

    /// The kernel copied bytes that were to be sent.
    pub fn copied(&self, bytes: u64) {
        self.copied.increment(bytes);
    }

    /// A lane compressed so many bytes of pages to so many.
    pub fn compressed(&self, from: u64, to: u64) {
        self.uncompressed.increment(from);
        self.compressed.increment(to);
    }

    /// What one lane adds to what the port's lanes deliver together: nothing yet.
    pub fn bandwidth(&self) -> Part {
        Part::of(self.bandwidth.clone())
    }

    /// Lanes were lost that sent over the port.
    pub fn lost(&self, lanes: u64) {
        self.lost.increment(lanes);
    }

    /// The port has a lane again that it had lost.
    pub fn reopened(&self) {
        self.reopened.increment(1);
    }
}
