//! This module has the lanes of one migration: their threads, and what they have done so far.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Add;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use memlane_lane::postcopy::PageServer;
use memlane_lane::socket::hang_up;
use memlane_lane::{
    Bell, LaneError, LaneReceiver, LaneSender, LaneStats, ReceiveState, SendState, Totals, Transport,
};
use memlane_net::port::Traffic;
use memlane_protocol::lane_count::{LaneCount, Load};
use memlane_protocol::wire::Label;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::context::Context;
use crate::observer::{Measurement, Observer};
use crate::progress::Progress;

mod lane;

use lane::Lane;
pub(crate) use lane::LaneEnd;

/// The lanes of one migration at one end. Dropping them ends their connections.
///
/// A lane that begins on a port takes the place of one that was lost there, and goes on counting from where that one
/// had come to.
pub(crate) struct Lanes {
    lanes: Vec<Lane>,
    running: watch::Sender<usize>,
    /// The reason why the last lane ended that has ended.
    last_words: Arc<Mutex<String>>,
    /// Lanes of these numbers are closed for good: no connection may bring them back.
    closed: BTreeSet<u16>,
    /// How many lanes each port is to have.
    counts: BTreeMap<Label, LaneCount>,
    begun: Instant,
    /// The rates were last measured at this moment.
    measured: Instant,
    observer: Rc<dyn Observer>,
    traffic: Rc<Traffic>,
}

/// Returns a bell that lanes ring, and its other end, where it is heard.
pub(crate) fn bell() -> (Arc<Notify>, Bell) {
    let heard = Arc::new(Notify::new());
    let ring = heard.clone();
    (heard, Arc::new(move || ring.notify_one()))
}

impl Lanes {
    /// Makes an empty set of lanes.
    pub(crate) fn new(context: &Context) -> Self {
        Self::telling(context.observer.clone(), context.traffic.clone())
    }

    /// Makes an empty set of lanes. What they carry is reported to `observer` and added to `traffic`.
    fn telling(observer: Rc<dyn Observer>, traffic: Rc<Traffic>) -> Self {
        let (lanes, last_words, closed, counts) = Default::default();
        let (running, begun) = (watch::Sender::new(0), Instant::now());
        Self { lanes, running, last_words, closed, counts, begun, measured: begun, observer, traffic }
    }

    /// Starts a lane that sends from `outbound`.
    pub(crate) fn send(&mut self, end: LaneEnd, outbound: &Arc<SendState>, silence: Duration) {
        let (outbound, number, waker) = (outbound.clone(), end.number, outbound.take_waker());
        self.start(end, false, move |stats, transport| {
            let waker = match waker {
                Ok(waker) => waker,
                Err(source) => return LaneError::Io { doing: "make an eventfd", source },
            };
            match LaneSender::new(outbound, stats, transport, (waker, number), silence) {
                Ok(sender) => sender.run(),
                Err(error) => error,
            }
        });
    }

    /// Starts a lane that receives into `inbound`. Does nothing if its number has been [closed](Self::close_lane).
    pub(crate) fn receive(&mut self, end: LaneEnd, inbound: &Arc<ReceiveState>) {
        if self.closed.contains(&end.number) {
            return;
        }
        let inbound = inbound.clone();
        self.start(end, false, move |stats, transport| match LaneReceiver::new(inbound, stats, transport) {
            Ok(receiver) => receiver.run(),
            Err(error) => error,
        });
    }

    /// Starts a lane that sends, from `outbound`, the pages that a guest at the destination waits for.
    pub(crate) fn answer(&mut self, end: LaneEnd, outbound: &Arc<SendState>, silence: Duration) {
        let outbound = outbound.clone();
        self.start(end, true, move |stats, transport| {
            match PageServer::new(outbound, stats, transport, silence) {
                Ok(answerer) => answerer.run(),
                Err(error) => error,
            }
        });
    }

    fn start(
        &mut self,
        end: LaneEnd,
        answers: bool,
        work: impl FnOnce(Arc<LaneStats>, Transport) -> LaneError + Send + 'static,
    ) {
        let (mut lane, transport) = Lane::new(end, answers);
        let (stats, thread_stats) = (lane.stats.clone(), lane.stats.clone());
        let (running, last_words) = (self.running.clone(), self.last_words.clone());
        let mut ending = Ending { stats, running, last_words, why: "its thread failed".to_owned() };
        let (port, number, remote) = (lane.port.clone(), lane.number, lane.remote);
        let name = format!("lane-{port}-{number}");
        self.running.send_modify(|running| *running += 1);
        let thread = std::thread::Builder::new().name(name).spawn(move || {
            let error = work(thread_stats, transport);
            let lost = !matches!(error, LaneError::HungUp);
            ending.stats.lost.store(lost, Ordering::Release);
            ending.why = error.to_string();
            // Before the log, which may be slow: a paused guest may wait for this.
            drop(ending);
            match lost {
                true => warn!(%port, lane = number, %remote, %error, "lane lost"),
                false => info!(%port, lane = number, %remote, "lane closed"),
            }
        });
        if let Err(error) = thread {
            warn!(port = %lane.port, lane = number, %error, "cannot start a thread for a lane");
        }
        match self
            .lanes
            .iter_mut()
            .find(|old| old.port == lane.port && old.answers == answers && old.is_over())
        {
            Some(old) => {
                lane.succeed(old);
                self.observer.measured(Measurement::LaneReopened { port: &lane.port });
                *old = lane;
            }
            None => self.lanes.push(lane),
        }
    }

    /// Ends all connections at once. The returned future is done when no thread touches guest memory any more.
    pub(crate) fn close(&self) -> impl Future<Output = ()> + use<> {
        self.lanes.iter().for_each(|lane| hang_up(&lane.socket));
        let mut running = self.running.subscribe();
        async move {
            // The last thread drops the last sender, and then there is nothing to wait for.
            let _ = running.wait_for(|running| *running == 0).await;
        }
    }

    /// Ends the connection of lane number `number`, for good. The returned future is done when that lane's thread
    /// touches guest memory no more, which is at once if there is no such lane.
    pub(crate) fn close_lane(&mut self, number: u16) -> impl Future<Output = ()> + use<> {
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

    /// Tells whether every lane has ended.
    pub(crate) fn all_ended(&self) -> bool {
        self.running() == 0
    }

    /// Returns the reason why the last lane ended that has ended, or an empty text if none has.
    pub(crate) fn last_words(&self) -> String {
        self.last_words.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns how many lanes have not ended.
    pub(crate) fn running(&self) -> usize {
        *self.running.borrow()
    }

    /// Tells whether lane number `number` has ended.
    pub(crate) fn has_ended(&self, number: u16) -> bool {
        let mut lanes = self.lanes.iter().filter(|lane| lane.number == number);
        lanes.all(|lane| lane.stats.ended.load(Ordering::Acquire))
    }

    /// Returns how many lanes on `port` have not ended, without those that carry only pages that an access waits for.
    pub(crate) fn running_on(&self, port: &Label) -> usize {
        self.lanes.iter().filter(|lane| lane.port == *port && !lane.answers && !lane.is_over()).count()
    }

    /// Tells whether a port, which began with so many lanes, lacks one: it was lost, or one core is the limit of the encrypted
    /// lanes that there are. The caller asks this again and again, and says whether there is more to send than they have
    /// sent yet.
    pub(crate) fn are_too_few(&mut self, port: &Label, began_with: u16, busy: bool) -> bool {
        let running = self.running_on(port);
        let load = self.load_of(port);
        let count = self.counts.entry(port.clone()).or_insert_with(|| LaneCount::new(began_with));
        match load {
            Some(load) if busy && count.observe(self.begun.elapsed(), load) => {
                info!(%port, lanes = count.wanted(), "one core is the limit of this port: it gets a further lane");
            }
            Some(_) if busy => {}
            _ => count.idle(),
        }
        running < usize::from(count.wanted())
    }

    /// Returns what the encrypted lanes of a port have done that have not ended, or `None` if there are none.
    fn load_of(&self, port: &Label) -> Option<Load> {
        let lanes = self.lanes.iter().filter(|lane| lane.port == *port && !lane.answers && !lane.is_over());
        let loads = lanes.filter(|lane| lane.encrypted).map(|lane| lane.stats.load());
        loads.reduce(Load::add)
    }

    /// Returns the longest round trip of lanes that have not ended, as far as they know, or zero if none knows.
    pub(crate) fn round_trip(&self) -> Duration {
        let running = self.lanes.iter().filter(|lane| !lane.is_over());
        let longest = running.map(|lane| lane.stats.round_trip_us.load(Ordering::Relaxed)).max();
        Duration::from_micros(longest.unwrap_or_default())
    }

    /// Returns the bytes of pages that were acknowledged so far, over all lanes.
    pub(crate) fn acked_bytes(&self) -> u64 {
        self.totals().acked_bytes
    }

    /// Returns the bytes on the wire so far, over all lanes.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.totals().wire_bytes
    }

    /// Returns how many pages have travelled so far, as bytes or as descriptors.
    pub(crate) fn pages(&self) -> u64 {
        let Totals { data_pages, zero_pages, .. } = self.totals();
        data_pages + zero_pages
    }

    /// Returns what all lanes have done so far, together with those that were in their place before.
    pub(crate) fn totals(&self) -> Totals {
        self.lanes.iter().map(Lane::totals).fold(Totals::default(), Totals::add)
    }

    /// Brings rates up to date, and reports what is new. `sending` says which way the bytes go.
    pub(crate) fn measure(&mut self, sending: bool) {
        let elapsed = self.measured.elapsed().as_secs_f64();
        if elapsed >= 0.2 {
            self.measured = Instant::now();
            self.lanes.iter_mut().for_each(|lane| lane.measure(elapsed));
        }
        for lane in &mut self.lanes {
            lane.count(sending, &*self.observer, &self.traffic);
        }
    }

    /// Shows the lanes in the progress, and what was sent over them and, by other lanes, `before` them.
    pub(crate) fn show(&self, progress: &mut Progress, before: Totals) {
        let sent = before + self.totals();
        let ram = &mut progress.ram;
        (ram.bytes_sent, ram.pages_sent, ram.zero_pages) =
            (sent.wire_bytes, sent.data_pages, sent.zero_pages);
        (ram.uncompressed_bytes, ram.compressed_bytes) = (sent.uncompressed_bytes, sent.compressed_bytes);
        progress.lanes = self.lanes.iter().map(Lane::view).collect();
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        self.lanes.iter().for_each(|lane| hang_up(&lane.socket));
    }
}

/// Notes that a lane has ended and why, even if its thread panics or cannot be started.
struct Ending {
    stats: Arc<LaneStats>,
    running: watch::Sender<usize>,
    last_words: Arc<Mutex<String>>,
    why: String,
}

impl Drop for Ending {
    fn drop(&mut self) {
        *self.last_words.lock().unwrap_or_else(PoisonError::into_inner) = std::mem::take(&mut self.why);
        if std::thread::panicking() {
            self.stats.lost.store(true, Ordering::Release);
        }
        self.stats.ended.store(true, Ordering::Release);
        self.running.send_modify(|running| *running -= 1);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::progress::LaneState;

    /// An observer that keeps nothing.
    struct Unwatched;

    impl Observer for Unwatched {
        fn measured(&self, _: Measurement<'_>) {}

        fn announced(&self) -> fn() {
            || ()
        }
    }

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
        (LaneEnd { port, number, local, remote, socket, records: None }, peer)
    }

    /// Works until it is hung up on.
    fn until_hung_up(_: Arc<LaneStats>, transport: Transport) -> LaneError {
        let _ = rustix::io::read(&*transport.socket, &mut [0; 1]);
        LaneError::HungUp
    }

    #[tokio::test]
    async fn closes_one_lane_and_counts_one_that_panics() {
        let mut lanes = Lanes::telling(Rc::new(Unwatched), Rc::default());
        let ((first, _peer), (second, _other_peer), (third, _third_peer)) = (lane(0), lane(1), lane(2));
        lanes.start(first, false, until_hung_up);
        lanes.start(second, false, until_hung_up);
        lanes.start(third, false, |_, _| panic!("on purpose"));
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

    #[tokio::test]
    async fn a_port_gets_a_further_lane_only_if_it_is_encrypted_and_one_core_is_the_limit() {
        let port: Label = "p0".parse().unwrap();
        for (encrypted, share, expected) in [(true, 0.95, true), (true, 0.5, false), (false, 0.95, false)] {
            let mut lanes = Lanes::telling(Rc::new(Unwatched), Rc::default());
            assert!(lanes.are_too_few(&port, 1, true), "there is none");
            let (end, _peer) = lane(0);
            lanes.start(end, false, until_hung_up);
            lanes.lanes[0].encrypted = encrypted;
            assert!(!lanes.are_too_few(&port, 1, true));
            for _ in 0..4 {
                // A second passes.
                lanes.begun -= Duration::from_secs(1);
                let ran = (share * 1e6) as u64;
                lanes.lanes[0].stats.ran_us.fetch_add(ran, Ordering::Relaxed);
                lanes.are_too_few(&port, 1, true);
            }
            assert_eq!(lanes.are_too_few(&port, 1, true), expected, "{encrypted} {share}");
            lanes.close().await;
        }
    }

    #[tokio::test]
    async fn a_lane_goes_on_where_a_lost_one_has_ended() {
        let mut lanes = Lanes::telling(Rc::new(Unwatched), Rc::default());
        let ((first, _peer), (second, _other_peer)) = (lane(0), lane(1));
        let port = first.port.clone();
        lanes.start(first, false, |stats, _| {
            stats.wire_bytes.store(100, Ordering::Relaxed);
            LaneError::Silent(Duration::from_secs(1))
        });
        let lost = lanes.running.subscribe().wait_for(|running| *running == 0).await.is_ok();
        assert!(lanes.last_words().contains("has not answered for 1.0s"), "{}", lanes.last_words());
        let view = lanes.lanes[0].view();
        assert!(lost && lanes.running_on(&port) == 0 && view.state == LaneState::Lost && view.losses == 1);

        lanes.start(second, false, |stats, socket| {
            stats.wire_bytes.store(11, Ordering::Relaxed);
            until_hung_up(stats, socket)
        });
        let counted = || lanes.wire_bytes() == 111;
        while !counted() {
            tokio::task::yield_now().await;
        }
        assert!(lanes.lanes.len() == 1 && lanes.running_on(&port) == 1);
        let view = lanes.lanes[0].view();
        assert_eq!((view.lane, view.state, view.losses, view.bytes), (1, LaneState::Up, 1, 111));
        lanes.close_lane(1).await;
        assert!(lanes.all_ended() && lanes.has_ended(0) && lanes.has_ended(1));
    }
}
