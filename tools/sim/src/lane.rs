//! Lanes at the source: the real window, liveness and compression decide for each of them. The rest is a model of
//! `LaneSender` of `daemon/lane` and of `daemon/migrate/src/lane_reconnect.rs`.

use std::collections::VecDeque;
use std::time::Duration;

use memlane_protocol::compression::{Compression, Load};
use memlane_protocol::liveness::{Condition, Liveness, TcpInfo};
use memlane_protocol::window::{Flow, Window};
use memlane_protocol::wire::frame::{Run, contents_bytes, encode_compressed_head, encode_head};

use crate::clock::Clock;
use crate::dice::Dice;
use crate::event::{Event, HostId, Wake};
use crate::memory::Memory;
use crate::network::{Network, Payload};
use crate::outbound::Outbound;
use crate::plant::Plant;

/// A connection is looked at this often while something is in flight.
const CHECK: Duration = Duration::from_millis(50);
const HEARTBEAT: Duration = Duration::from_millis(250);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

/// What lanes work with besides what they share.
pub(crate) struct Bench<'a> {
    pub clock: &'a mut Clock,
    pub dice: &'a mut Dice,
    pub network: &'a mut Network,
    pub memory: &'a Memory,
    pub host: HostId,
    pub epoch: u32,
    pub plant: Plant,
    pub silence: Duration,
    /// Pages become this small by compression, in percent; 100 if lanes may not compress.
    pub compressed_percent: u64,
    /// So much of what a lane is handed may wait in the kernel.
    pub socket_buffer: Duration,
}

/// The lanes that send from one [`Outbound`].
#[derive(Debug)]
pub(crate) struct Sender {
    pub outbound: Outbound,
    pub lanes: Vec<Lane>,
    /// What lanes that have ended had acknowledged.
    pub acked_before: u64,
    pub lanes_lost: u64,
    /// What the last harvest found.
    pub harvested: u64,
    pub next_number: u16,
    /// For each path: when a lane is opened again there, and the pause before that.
    pub again: Vec<Again>,
    /// This much is in flight on one lane, with its limit, at worst.
    pub overdrawn: Option<(u64, u64)>,
}

/// The tries to open a lane again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Again {
    pub path: usize,
    pause: Duration,
    due: Option<Duration>,
    pub under_way: bool,
}

#[derive(Debug)]
pub(crate) struct Lane {
    pub connection: usize,
    pub number: u16,
    pub path: usize,
    window: Window,
    liveness: Liveness,
    compression: Option<Compression>,
    doubtful: bool,
    cursor: u64,
    sequence: u64,
    acknowledged: u64,
    slots: VecDeque<Slot>,
    window_bytes: u64,
    acked_bytes: u64,
    contents_bytes: u64,
    /// When the newest frame has left, while it is not handed over.
    leaves: Option<Duration>,
    full: bool,
    last_ack: Duration,
    round_trip: Duration,
}

#[derive(Debug)]
struct Slot {
    sequence: u64,
    runs: Vec<Run>,
    payload_bytes: u64,
    compressed: bool,
}

impl Sender {
    pub(crate) fn new(outbound: Outbound, paths: impl Iterator<Item = usize>) -> Self {
        let again = paths.map(|path| Again { path, pause: FIRST_PAUSE, due: None, under_way: false });
        Self {
            outbound,
            lanes: Vec::new(),
            acked_before: 0,
            lanes_lost: 0,
            harvested: 0,
            next_number: 0,
            again: again.collect(),
            overdrawn: None,
        }
    }

    pub(crate) fn acked_bytes(&self) -> u64 {
        self.acked_before + self.lanes.iter().map(|lane| lane.acked_bytes).sum::<u64>()
    }

    pub(crate) fn round_trip(&self) -> Duration {
        self.lanes.iter().map(|lane| lane.round_trip).max().unwrap_or_default()
    }

    /// Adds a lane over a connection that was opened.
    pub(crate) fn begin(&mut self, connection: usize, number: u16, path: usize, bench: &mut Bench<'_>) {
        let round_trip = 2 * bench.network.paths[path].latency;
        let cursor = bench.dice.below(bench.memory.pages());
        let now = bench.clock.now();
        self.lanes.push(Lane {
            connection,
            number,
            path,
            window: Window::new(round_trip),
            liveness: Liveness::default(),
            compression: (bench.compressed_percent < 100).then(Compression::default),
            doubtful: false,
            cursor,
            sequence: 0,
            acknowledged: 0,
            slots: VecDeque::new(),
            window_bytes: 0,
            acked_bytes: 0,
            contents_bytes: 0,
            leaves: None,
            full: false,
            last_ack: now,
            round_trip,
        });
        bench.wake(CHECK, Wake::CheckLane { connection });
        self.fill(bench);
    }

    /// Tells the lanes that there are pages to claim, and that more will come.
    pub(crate) fn publish(&mut self, to_come: u64, bench: &mut Bench<'_>) {
        if self.outbound.is_quiesced() {
            return;
        }
        let rate = self.lanes.iter().map(|lane| lane.window.bytes_per_second()).sum();
        self.outbound.publish(to_come, self.lanes.len() as u64, rate);
        self.fill(bench);
    }

    /// Has all lanes send what they may.
    pub(crate) fn fill(&mut self, bench: &mut Bench<'_>) {
        for index in 0..self.lanes.len() {
            self.fill_lane(index, bench);
        }
    }

    fn fill_lane(&mut self, index: usize, bench: &mut Bench<'_>) {
        let Self { outbound, lanes, overdrawn, .. } = self;
        let lane = &mut lanes[index];
        lane.full |= lane.leaves.is_some();
        while lane.leaves.is_none() {
            lane.full |= lane.window_bytes >= lane.window.bytes();
            let share = outbound.lane_share();
            let full = lane.window_bytes >= lane.window.bytes_held(share)
                || lane.slots.len() >= lane.window.frames();
            if full && bench.plant != Plant::WindowIgnored {
                break;
            }
            let frame_bytes = lane.window.frame_bytes(share);
            if !lane.send_next(outbound, frame_bytes, bench) {
                break;
            }
            let most = lane.window.bytes() + frame_bytes;
            if lane.window_bytes > most || lane.slots.len() > lane.window.frames() {
                *overdrawn = Some((lane.window_bytes, most));
            }
        }
    }

    /// The kernel has room for the newest frame: its pages are read now.
    pub(crate) fn hand_over(&mut self, connection: usize, bench: &mut Bench<'_>) {
        let Some(index) = self.index(connection) else { return };
        self.lanes[index].hand_over(&mut self.outbound, bench);
        self.fill_lane(index, bench);
    }

    /// Takes an acknowledgement.
    pub(crate) fn acknowledged(&mut self, connection: usize, sequence: u64, bench: &mut Bench<'_>) {
        let Some(index) = self.index(connection) else { return };
        let Self { outbound, lanes, .. } = self;
        let lane = &mut lanes[index];
        lane.acknowledged = lane.acknowledged.max(sequence);
        lane.last_ack = bench.clock.now();
        while lane.slots.front().is_some_and(|slot| slot.sequence <= lane.acknowledged) {
            let slot = lane.slots.pop_front().expect("the front was there");
            outbound.acknowledge(&slot.runs);
            lane.window_bytes -= slot.payload_bytes;
            lane.acked_bytes += slot.payload_bytes;
            lane.contents_bytes += contents_bytes(&slot.runs);
        }
        let flow = Flow {
            acked_bytes: lane.acked_bytes,
            round_trip: lane.round_trip,
            full: std::mem::take(&mut lane.full),
        };
        lane.window.observe(bench.clock.now(), &flow);
        if let Some(compression) = &mut lane.compression
            && compression.is_due(bench.clock.now())
        {
            let (wire_bytes, contents_bytes) = (lane.acked_bytes, lane.contents_bytes);
            let (ran, crowded) = (bench.clock.now() / 8, Duration::ZERO);
            compression.observe(bench.clock.now(), Load { wire_bytes, contents_bytes, ran, crowded });
        }
        self.fill_lane(index, bench);
    }

    /// Looks at a lane's connection. Returns whether it is to be given up.
    pub(crate) fn check(&mut self, connection: usize, bench: &mut Bench<'_>) -> bool {
        let Some(index) = self.index(connection) else { return false };
        let now = bench.clock.now();
        let (since_heard, unanswered) = bench.network.unanswered(connection, bench.host, now);
        let others_are_well =
            self.lanes.iter().enumerate().any(|(other, lane)| other != index && !lane.doubtful);
        let lane = &mut self.lanes[index];
        if lane.slots.is_empty() {
            lane.last_ack = now;
        }
        let round_trip = lane.round_trip;
        let info = TcpInfo { since_heard, unanswered, round_trip, variation: round_trip / 4 };
        let condition = lane.liveness.observe(now, &info);
        lane.doubtful = condition != Condition::Well;
        let silent = matches!(condition, Condition::Silent(_)) && others_are_well;
        let wait = if lane.slots.is_empty() { HEARTBEAT } else { CHECK };
        bench.wake(wait, Wake::CheckLane { connection });
        silent || now - lane.last_ack > bench.silence
    }

    /// Notes that a lane has ended. Returns its number, if it is one of these.
    pub(crate) fn ended(&mut self, connection: usize) -> Option<u16> {
        let index = self.index(connection)?;
        let lane = self.lanes.remove(index);
        self.acked_before += lane.acked_bytes;
        self.lanes_lost += 1;
        self.outbound.orphan(lane.number, lane.slots.into_iter().map(|slot| slot.runs));
        Some(lane.number)
    }

    pub(crate) fn index(&self, connection: usize) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.connection == connection)
    }

    /// Returns the paths on which a lane is to be opened now. There are to be so many on each.
    pub(crate) fn missing_lanes(&mut self, lanes: usize, now: Duration) -> Vec<usize> {
        let mut missing = Vec::new();
        for again in self.again.iter_mut().filter(|again| !again.under_way) {
            let running = self.lanes.iter().filter(|lane| lane.path == again.path).count();
            if running >= lanes {
                again.due = None;
            } else if *again.due.get_or_insert(now + again.pause) <= now {
                (again.under_way, again.due) = (true, None);
                again.pause = (2 * again.pause).min(LONGEST_PAUSE);
                missing.push(again.path);
            }
        }
        missing
    }

    /// Notes that the try to open a lane on this path is over.
    pub(crate) fn tried(&mut self, path: usize) {
        self.again.iter_mut().filter(|again| again.path == path).for_each(|again| again.under_way = false);
    }
}

impl Lane {
    /// Claims a frame, which is handed to the kernel as soon as that has room. Returns whether there was something to
    /// claim.
    fn send_next(&mut self, outbound: &mut Outbound, frame_bytes: u64, bench: &mut Bench<'_>) -> bool {
        let runs = outbound.claim(&mut self.cursor, frame_bytes, bench.memory);
        if runs.is_empty() {
            if self.slots.is_empty() {
                self.full = false;
                self.window.rest();
            }
            if let Some(compression) = &mut self.compression {
                compression.idle();
            }
            return false;
        }
        self.sequence += 1;
        let contents = contents_bytes(&runs);
        let (payload_bytes, compressed) = self.compress(contents, bench);
        let (starts, leaves) =
            bench.network.reserve(self.connection, bench.host, payload_bytes + 100, bench.clock.now());
        self.leaves = Some(leaves);
        self.window_bytes += payload_bytes;
        self.slots.push_back(Slot { sequence: self.sequence, runs, payload_bytes, compressed });
        let wait = starts.saturating_sub(bench.socket_buffer).saturating_sub(bench.clock.now());
        bench.wake(wait, Wake::HandOver { connection: self.connection });
        true
    }

    fn compress(&mut self, contents: u64, bench: &Bench<'_>) -> (u64, bool) {
        /// Compression does so many bytes in a microsecond.
        const SPEED: u64 = 500;
        let Some(compression) = self.compression.as_mut().filter(|_| contents > 0) else {
            return (contents, false);
        };
        let small = contents * bench.compressed_percent / 100;
        let worth = compression.wants_sample(contents)
            && compression.judge_sample(contents, small)
            && compression.judge_frame(contents, small, Duration::from_micros(contents / SPEED));
        if worth && small > 0 { (small, true) } else { (contents, false) }
    }

    fn hand_over(&mut self, outbound: &mut Outbound, bench: &mut Bench<'_>) {
        let Some(leaves) = self.leaves.take() else { return };
        let Some(slot) = self.slots.back() else { return };
        let mut head = Vec::new();
        if slot.compressed {
            encode_compressed_head(&mut head, slot.sequence, &slot.runs, None, slot.payload_bytes);
        } else {
            encode_head(&mut head, slot.sequence, &slot.runs, None);
        }
        let pages = slot.runs.iter().flat_map(|run| run.pages.clone());
        let versions = pages.map(|page| bench.memory.version(page)).collect();
        if bench.plant == Plant::InFlightClearedAtSend {
            slot.runs.iter().for_each(|run| _ = outbound.in_flight.remove_range(run.pages.clone()));
        }
        let frame = Payload::Frame { head, versions };
        bench.network.send_reserved(
            self.connection,
            bench.host,
            frame,
            leaves,
            (&mut *bench.clock, &mut *bench.dice),
        );
    }
}

impl Bench<'_> {
    fn wake(&mut self, wait: Duration, wake: Wake) {
        let (host, epoch) = (self.host, self.epoch);
        self.clock.after(wait, Event::Daemon { host, epoch, wake });
    }
}
