//! The lanes of one migration: their threads, and what they have done so far.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memlane_protocol::wire::Label;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::api::types::{Lane as LaneView, LaneState, Migration};
use crate::lane::{Answerer, Inbound, LaneError, LaneStats, Outbound, Receiver, Sender};
use crate::metrics::{self, PageKind, PortMeter};
use crate::port::{Traffic, hang_up};

/// Lanes of one migration at one end. Dropping them ends their connections.
pub struct Lanes {
    lanes: Vec<Lane>,
    running: watch::Sender<usize>,
    /// Numbers of lanes that no connection may bring back.
    closed: BTreeSet<u16>,
    seen: Seen,
    traffic: Rc<Traffic>,
}

/// A lane's connection and thread.
struct Lane {
    port: Label,
    number: u16,
    local: String,
    remote: SocketAddr,
    socket: Arc<OwnedFd>,
    stats: Arc<LaneStats>,
    /// What has gone into the metrics already.
    counted: Counted,
    meter: PortMeter,
    rate: f64,
}

#[derive(Clone, Copy, Default)]
struct Counted {
    wire_bytes: u64,
    zero_copy_bytes: u64,
    copied_bytes: u64,
    data_pages: u64,
    zero_pages: u64,
}

/// When the rates were looked at last.
struct Seen {
    at: Instant,
    wire_bytes: Vec<u64>,
}

/// One end of a lane's connection.
pub struct LaneEnd {
    /// The port of this host.
    pub port: Label,
    /// Number of the lane.
    pub number: u16,
    /// The address here.
    pub local: String,
    /// The address there.
    pub remote: SocketAddr,
    /// The connection.
    pub socket: OwnedFd,
}

impl Lanes {
    /// No lanes yet; what they carry is added to `traffic`.
    pub fn new(traffic: Rc<Traffic>) -> Self {
        let seen = Seen { at: Instant::now(), wire_bytes: Vec::new() };
        let (lanes, running, closed) = (Vec::new(), watch::Sender::new(0), BTreeSet::new());
        Self { lanes, running, closed, seen, traffic }
    }

    /// Starts a lane that sends from `outbound`.
    pub fn send(&mut self, end: LaneEnd, outbound: &Arc<Outbound>, silence: Duration) {
        let (outbound, lane) = (outbound.clone(), (self.lanes.len(), end.number));
        self.start(end, move |stats, socket| match Sender::new(outbound, stats, socket, lane, silence) {
            Ok(sender) => sender.run(),
            Err(error) => error,
        });
    }

    /// Starts a lane that receives into `inbound`; not if its number has been
    /// [closed](Self::close_lane).
    pub fn receive(&mut self, end: LaneEnd, inbound: &Arc<Inbound>) {
        if self.closed.contains(&end.number) {
            return;
        }
        let inbound = inbound.clone();
        self.start(end, move |stats, socket| match Receiver::new(inbound, stats, socket) {
            Ok(receiver) => receiver.run(),
            Err(error) => error,
        });
    }

    /// Starts a lane that answers what a guest at the destination waits for, from `outbound`.
    pub fn answer(&mut self, end: LaneEnd, outbound: &Arc<Outbound>, silence: Duration) {
        let outbound = outbound.clone();
        self.start(end, move |stats, socket| match Answerer::new(outbound, stats, socket, silence) {
            Ok(answerer) => answerer.run(),
            Err(error) => error,
        });
    }

    fn start(
        &mut self,
        end: LaneEnd,
        work: impl FnOnce(Arc<LaneStats>, Arc<OwnedFd>) -> LaneError + Send + 'static,
    ) {
        let LaneEnd { port, number, local, remote, socket } = end;
        let (socket, stats) = (Arc::new(socket), Arc::new(LaneStats::default()));
        let (thread_socket, thread_stats) = (socket.clone(), stats.clone());
        let ending = Ending { stats: stats.clone(), running: self.running.clone() };
        let name = format!("lane-{port}-{number}");
        let port_name = port.clone();
        self.running.send_modify(|running| *running += 1);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let error = work(thread_stats, thread_socket);
            let lost = !matches!(error, LaneError::HungUp);
            ending.stats.lost.store(lost, Ordering::Release);
            // Before the log, which may be slow: a guest that stands still may wait for this.
            drop(ending);
            match lost {
                true => warn!(port = %port_name, lane = number, %remote, %error, "lane lost"),
                false => info!(port = %port_name, lane = number, %remote, "lane closed"),
            }
        });
        if let Err(error) = thread {
            warn!(%port, lane = number, %error, "cannot start a thread for a lane");
        }
        let (counted, rate) = (Counted::default(), 0.0);
        self.seen.wire_bytes.push(0);
        let meter = PortMeter::new(port.as_str());
        self.lanes.push(Lane { port, number, local, remote, socket, stats, counted, meter, rate });
    }

    /// Ends all connections at once; what it returns is done when no thread touches guest
    /// memory any more.
    pub fn close(&self) -> impl Future<Output = ()> + use<> {
        self.lanes.iter().for_each(|lane| hang_up(&lane.socket));
        let mut running = self.running.subscribe();
        async move {
            // The last thread drops the last sender, and then there is nothing to wait for.
            let _ = running.wait_for(|running| *running == 0).await;
        }
    }

    /// Ends the connection of lane number `number`, for good; what it returns is done when that
    /// lane's thread touches guest memory no more. At once if there is no such lane.
    pub fn close_lane(&mut self, number: u16) -> impl Future<Output = ()> + use<> {
        self.closed.insert(number);
        let lanes = self.lanes.iter().filter(|lane| lane.number == number);
        let ending: Vec<Arc<LaneStats>> = lanes
            .map(|lane| {
                hang_up(&lane.socket);
                lane.stats.clone()
            })
            .collect();
        let mut running = self.running.subscribe();
        async move {
            let ended = |_: &usize| ending.iter().all(|stats| stats.ended.load(Ordering::Acquire));
            // As in `close`.
            let _ = running.wait_for(ended).await;
        }
    }

    /// Whether every lane has ended.
    pub fn all_ended(&self) -> bool {
        self.running() == 0
    }

    /// Lanes that have not ended.
    pub fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Whether lane number `number` has ended.
    pub fn has_ended(&self, number: u16) -> bool {
        let mut lanes = self.lanes.iter().filter(|lane| lane.number == number);
        lanes.all(|lane| lane.stats.ended.load(Ordering::Acquire))
    }

    /// Bytes of pages acknowledged so far, over all lanes.
    pub fn acked_bytes(&self) -> u64 {
        self.sum(|stats| &stats.acked_bytes)
    }

    /// Bytes on the wire so far, over all lanes.
    pub fn wire_bytes(&self) -> u64 {
        self.sum(|stats| &stats.wire_bytes)
    }

    /// Pages that have travelled so far, as bytes or as descriptors.
    pub fn pages(&self) -> u64 {
        self.data_pages() + self.zero_pages()
    }

    /// Pages that have travelled so far with their contents.
    pub fn data_pages(&self) -> u64 {
        self.sum(|stats| &stats.data_pages)
    }

    /// Pages that have travelled so far as descriptors.
    pub fn zero_pages(&self) -> u64 {
        self.sum(|stats| &stats.zero_pages)
    }

    fn sum(&self, counter: impl Fn(&LaneStats) -> &AtomicU64) -> u64 {
        self.lanes.iter().map(|lane| counter(&lane.stats).load(Ordering::Relaxed)).sum()
    }

    /// Brings rates and metrics up to date; `sending` tells which way the bytes go.
    pub fn measure(&mut self, sending: bool) {
        let elapsed = self.seen.at.elapsed().as_secs_f64();
        let fresh_rates = elapsed >= 0.2;
        for (lane, seen) in self.lanes.iter_mut().zip(&mut self.seen.wire_bytes) {
            lane.count(sending, &self.traffic);
            if fresh_rates {
                let bytes = lane.stats.wire_bytes.load(Ordering::Relaxed);
                lane.rate = (bytes - *seen) as f64 / elapsed;
                *seen = bytes;
            }
        }
        if fresh_rates {
            self.seen.at = Instant::now();
        }
    }

    /// Shows the lanes.
    pub fn show(&self, progress: &mut Migration) {
        progress.bytes_sent = self.wire_bytes();
        progress.pages_sent = self.data_pages();
        progress.zero_pages = self.zero_pages();
        progress.lanes = self.lanes.iter().map(Lane::view).collect();
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.lanes.iter().for_each(|lane| hang_up(&lane.socket));
    }
}

/// Says that a lane has ended, even if its thread panics or cannot be started.
struct Ending {
    stats: Arc<LaneStats>,
    running: watch::Sender<usize>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.stats.lost.store(true, Ordering::Release);
        }
        self.stats.ended.store(true, Ordering::Release);
        self.running.send_modify(|running| *running -= 1);
    }
}

impl Lane {
    fn view(&self) -> LaneView {
        let stats = &self.stats;
        let state = match (stats.ended.load(Ordering::Acquire), stats.lost.load(Ordering::Acquire)) {
            (false, _) => LaneState::Up,
            (true, false) => LaneState::Closed,
            (true, true) => LaneState::Lost,
        };
        LaneView {
            port: self.port.to_string(),
            lane: self.number,
            local: self.local.clone(),
            remote: self.remote.to_string(),
            bytes: stats.wire_bytes.load(Ordering::Relaxed),
            zero_copy_bytes: stats.zero_copy_bytes.load(Ordering::Relaxed),
            copied_bytes: stats.copied_bytes.load(Ordering::Relaxed),
            bytes_per_second: self.rate,
            state,
        }
    }

    /// Adds what is new to the metrics.
    fn count(&mut self, sending: bool, traffic: &Traffic) {
        let (stats, counted) = (&self.stats, &mut self.counted);
        let fresh = |counter: &AtomicU64, counted: &mut u64| {
            let now = counter.load(Ordering::Relaxed);
            now - std::mem::replace(counted, now)
        };
        let bytes = fresh(&stats.wire_bytes, &mut counted.wire_bytes);
        if !sending {
            self.meter.received(bytes);
            traffic.add(&self.port, 0, bytes);
            return;
        }
        self.meter.sent(bytes);
        traffic.add(&self.port, bytes, 0);
        self.meter.zero_copy(fresh(&stats.zero_copy_bytes, &mut counted.zero_copy_bytes));
        self.meter.copied(fresh(&stats.copied_bytes, &mut counted.copied_bytes));
        self.meter.bandwidth(self.rate);
        metrics::pages_sent(PageKind::Data, fresh(&stats.data_pages, &mut counted.data_pages));
        metrics::pages_sent(PageKind::Zero, fresh(&stats.zero_pages, &mut counted.zero_pages));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(number: u16) -> (LaneEnd, OwnedFd) {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (socket, peer) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            flags,
            None,
        )
        .unwrap();
        let port = "p0".parse().unwrap();
        let (local, remote) = ("here".to_owned(), "[::1]:1".parse().unwrap());
        (LaneEnd { port, number, local, remote, socket }, peer)
    }

    /// Works until it is hung up on.
    fn until_hung_up(_: Arc<LaneStats>, socket: Arc<OwnedFd>) -> LaneError {
        let _ = rustix::io::read(&*socket, &mut [0; 1]);
        LaneError::HungUp
    }

    #[tokio::test]
    async fn closes_one_lane_and_counts_one_that_panics() {
        let mut lanes = Lanes::new(Rc::default());
        let ((first, _peer), (second, _other_peer), (third, _third_peer)) = (lane(0), lane(1), lane(2));
        lanes.start(first, until_hung_up);
        lanes.start(second, until_hung_up);
        lanes.start(third, |_, _| panic!("on purpose"));
        lanes.close_lane(2).await;
        lanes.close_lane(0).await;
        lanes.close_lane(7).await;
        let state = |lanes: &Lanes, index: usize| lanes.lanes[index].view().state;
        assert_eq!(state(&lanes, 0), LaneState::Closed);
        assert_eq!(state(&lanes, 1), LaneState::Up);
        assert_eq!(state(&lanes, 2), LaneState::Lost);
        assert!(!lanes.all_ended());
        lanes.close().await;
        assert!(lanes.all_ended());
    }
}
