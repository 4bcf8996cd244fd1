//! One lane: what it is, what it has done, and how others see it.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memlane_lane::{LaneStats, Totals, Transport};
use memlane_net::port::Traffic;
use memlane_protocol::wire::Label;
use memlane_tls::Records;
use tracing::info;

use crate::observer::{Measurement, Observer};
use crate::progress::{Lane as LaneView, LaneState};

/// One end of a lane's connection.
pub(crate) struct LaneEnd {
    /// This is the port of this host.
    pub port: Label,
    /// This is the number of the lane.
    pub number: u16,
    /// This is the address here.
    pub local: String,
    /// This is the address there.
    pub remote: SocketAddr,
    /// This is the connected socket.
    pub socket: OwnedFd,
    /// This seals and opens what flows there. It is `None` if the lane is not encrypted.
    pub records: Option<Box<Records>>,
}

/// A lane's connection and thread.
pub(super) struct Lane {
    pub(super) port: Label,
    pub(super) number: u16,
    local: String,
    pub(super) remote: SocketAddr,
    pub(super) socket: Arc<OwnedFd>,
    pub(super) stats: Arc<LaneStats>,
    /// If this is true, the lane carries only pages that an access waits for.
    pub(super) answers: bool,
    pub(super) encrypted: bool,
    /// This is what the lanes did that were in this place before.
    past: Totals,
    /// Lanes in this place were lost this many times.
    losses: u32,
    /// This many of the losses, with the loss of the lane itself, have been reported to the observer.
    counted_losses: u32,
    /// This has been reported to the observer.
    counted: Totals,
    /// The lane had carried this many bytes when the rates were last measured.
    measured_bytes: u64,
    rate: f64,
}

impl Lane {
    /// Makes a lane of a connection. Returns it with what its thread needs. If `answers` is true, it carries only pages that
    /// an access waits for.
    pub(super) fn new(end: LaneEnd, answers: bool) -> (Self, Transport) {
        let LaneEnd { port, number, local, remote, socket, records } = end;
        let (encrypted, socket) = (records.is_some(), Arc::new(socket));
        let transport = Transport { socket: socket.clone(), records };
        let (stats, past, counted, measured_bytes) = Default::default();
        let (losses, counted_losses, rate) = (0, 0, 0.0);
        let lane = Self {
            port,
            number,
            local,
            remote,
            socket,
            stats,
            answers,
            encrypted,
            past,
            losses,
            counted_losses,
            counted,
            measured_bytes,
            rate,
        };
        (lane, transport)
    }

    pub(super) fn is_over(&self) -> bool {
        self.stats.ended.load(Ordering::Acquire)
    }

    fn is_lost(&self) -> bool {
        self.is_over() && self.stats.lost.load(Ordering::Acquire)
    }

    /// Takes the place of a lane that has ended.
    pub(super) fn succeed(&mut self, old: &Self) {
        (self.past, self.counted) = (old.totals(), old.counted);
        (self.losses, self.counted_losses) = (old.losses + 1, old.counted_losses);
        self.measured_bytes = old.measured_bytes;
        info!(port = %self.port, lane = self.number, remote = %self.remote, "the port has a lane again");
    }

    /// Returns what this lane has done, together with those that were in its place before.
    pub(super) fn totals(&self) -> Totals {
        self.past + self.stats.totals()
    }

    fn losses(&self) -> u32 {
        self.losses + u32::from(self.is_lost())
    }

    pub(super) fn view(&self) -> LaneView {
        let state = match (self.is_over(), self.is_lost()) {
            (false, _) => LaneState::Up,
            (true, false) => LaneState::Closed,
            (true, true) => LaneState::Lost,
        };
        let totals = self.totals();
        LaneView {
            port: self.port.to_string(),
            lane: self.number,
            local: self.local.clone(),
            remote: self.remote.to_string(),
            bytes: totals.wire_bytes,
            zero_copy_bytes: totals.zero_copy_bytes,
            copied_bytes: totals.copied_bytes,
            bytes_per_second: self.rate,
            state,
            losses: self.losses(),
        }
    }

    /// Takes note of the bytes of the last `seconds`.
    pub(super) fn measure(&mut self, seconds: f64) {
        let bytes = self.totals().wire_bytes;
        let before = std::mem::replace(&mut self.measured_bytes, bytes);
        self.rate = (bytes - before) as f64 / seconds;
    }

    /// Reports what is new.
    pub(super) fn count(&mut self, sending: bool, observer: &dyn Observer, traffic: &Traffic) {
        let now = self.totals();
        let fresh = now - std::mem::replace(&mut self.counted, now);
        let port = &self.port;
        observer.measured(Measurement::Carried { port, sending, fresh });
        if !sending {
            return traffic.add(port, 0, fresh.wire_bytes);
        }
        traffic.add(port, fresh.wire_bytes, 0);
        let losses = self.losses();
        let lanes = losses - std::mem::replace(&mut self.counted_losses, losses);
        if lanes > 0 {
            observer.measured(Measurement::LanesLost { port: &self.port, lanes });
        }
    }
}
